"""The studies of bench/studies.py: which keys their candidates change."""

import pytest

from bench import studies
from hrm.study.comparison import check_comparable
from hrm.study.runs import Campaign, settings


@pytest.mark.parametrize(
    ("study", "length"),
    [("architectures", set()), ("ingredients", set()), ("record", {"epochs", "eval_interval"})],
)
def test_candidates_share_data_and_steps(study, length, tmp_path):
    campaign = Campaign(tmp_path, studies.arguments(study), [0])
    check_comparable(campaign, studies.LENGTH_KEYS)
    values = [settings(candidate.config) for candidate in campaign.candidates]
    assert {key for key in studies.LENGTH_KEYS if len({each[key] for each in values}) > 1} == length


def test_each_ingredient_is_taken_away_alone(tmp_path):
    campaign = Campaign(tmp_path, studies.arguments("ingredients"), [0])
    recipe, *others = campaign.candidates
    whole = settings(recipe.config)
    changes = {
        other.name: {key for key, value in settings(other.config).items() if value != whole[key]}
        for other in others
    }
    assert changes == {
        "adam-atan2": {"optimizer"},
        "plain-swiglu": {"arch.swiglu"},
        "no-smoothing": {"loss.label_smoothing"},
        "no-symmetries": {"augment"},
        "attention": {"arch.mlp_t", "arch.pos_encodings"},
        "no-register": {"arch.register_tokens"},
        "no-head-bias": {"arch.head_bias"},
        "no-clipping": {"grad_clip"},
        "q-weight-0.5": {"loss.q_halt_weight"},
    }

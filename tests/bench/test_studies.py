"""The studies of bench/studies.py: which keys their candidates change."""

import numpy as np
import pytest

from bench import studies
from hrm.common.errors import UserError
from hrm.study.comparison import check_comparable
from hrm.study.history import History
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


def test_times_come_from_the_measurement_and_not_from_the_runs(monkeypatch, tmp_path):
    study = studies.Study(tmp_path, studies.arguments("record"), [0])
    logged = {
        "train/seconds_per_step": (np.array([5, 10]), np.array([7.0, 9.0])),
        "loss": (np.array([1]),) * 2,
    }
    run = History("sic seed 0", tmp_path, None, 10, logged)
    monkeypatch.setattr(Campaign, "histories", lambda _: {"trm": {}, "sic": {0: run}})
    (tmp_path / "paces.json").write_text('{"trm": 0.25, "sic": 0.5}')
    found = study.histories()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "paces.json").write_text('{"trm": 0.25}')
    with pytest.raises(UserError, match=r"paces.json: expected the seconds of a step by candidate; rename"):
        studies.Study(tmp_path / "other", studies.arguments("record"), [0]).histories()
    assert found["trm"] == {} and found["sic"][0].seconds_per_step == 0.5
    assert found["sic"][0].metrics.keys() == logged.keys() and run.seconds_per_step == 8


def test_steps_are_timed_for_every_candidate(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "ROUNDS", 1)
    monkeypatch.setenv("HRM_CACHE", str(tmp_path))
    words = ["preset=quick", "device=cpu", "mode=eager", "sudoku.num_train=70", "sudoku.num_test=1"]
    one = {"arch.hidden_size=8", "arch.num_heads=1", "global_batch_size=2"}
    candidates = {"one": [*words, *one], "two": [*words, *one, "arch.H_cycles=20"]}
    found = studies.paces(Campaign(tmp_path, candidates, [0]).candidates)
    assert found.keys() == {"one", "two"} and 0 < found["one"] < found["two"]

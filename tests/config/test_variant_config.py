"""The configuration of the variants: architectures, their files, stages, and what does not go together."""

from operator import attrgetter

import pytest

from hrm.config import load as config_module
from hrm.config.load import load_config, parse_args, to_yaml
from hrm.config.messages import ConfigError
from hrm.config.schedule import stage_arch, stage_ends


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch, tmp_path):
    """An empty working folder on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_module, "resolve_device", lambda name: "cpu" if name == "auto" else name)


def error(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    text = str(caught.value)
    assert text and text.isprintable()
    return text


def changes(name, *words):
    """What an architecture changes in v1, by dotted name, both at full size."""
    v1, other = (parse_args(["--arch", a, "data_path=x", "run_name=x", *words]) for a in ("v1", name))
    values = ((key, attrgetter(key)(v1), attrgetter(key)(other)) for key in config_module.KEYS)
    return {key: theirs for key, ours, theirs in values if ours != theirs}


@pytest.mark.slow
def test_named_architectures():
    assert changes("gated") == {"arch.use_gating": True}
    assert changes("balanced") == changes("hrm_v1_balanced") == {"arch.halt_max_steps": 8}
    assert changes("feudal") == {"arch.subgoal_head.enabled": True, "loss.feudal_loss_weight": 0.1}
    trm = changes("trm")
    assert trm == {
        "arch.share_levels": True,
        "arch.L_layers": 2,
        "arch.H_cycles": 3,
        "arch.L_cycles": 6,
        "arch.gradient": "last_cycle",
        "arch.q_continue": False,
        "arch.puzzle_emb_len": 16,
        "ema": True,
    }
    del trm["arch.puzzle_emb_len"]
    assert changes("sic") == trm | {
        "arch.mlp_t": True,
        "arch.swiglu": "normed",
        "arch.pos_encodings": "none",
        "arch.H_cycles": 6,
        "arch.L_cycles": 9,
        "arch.puzzle_emb_ndim": 0,
        "arch.register_tokens": 1,
        "arch.head_bias": True,
    }
    assert changes("urm") == {
        "arch.single_state": True,
        "arch.swiglu": "conv",
        "arch.L_cycles": 6,
        "arch.gradient": "last_cycle",
        "arch.q_continue": False,
        "ema": True,
    }


def test_small_architectures_beside_the_quick_preset():
    """There 8 thinking steps are v1's, and 16 puzzle tokens would be as many as cells."""
    quick = {name: parse_args(["--arch", name]).arch for name in ("v1", "balanced", "trm")}
    assert (quick["v1"].halt_max_steps, quick["balanced"].halt_max_steps) == (8, 4)
    assert quick["trm"].puzzle_emb_len == 0 and quick["trm"].share_levels and quick["trm"].L_cycles == 6


def test_a_file_inherits_the_values_of_its_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [feudal]\nhidden_size: 128\nsubgoal_head:\n  manager_period: 2\n  goal_dim: 32\n"
    )
    config = parse_args(["--arch", "mine.yaml", "data_path=x"])
    head = config.arch.subgoal_head
    assert (head.enabled, head.manager_period, head.goal_dim) == (True, 2, 32)
    assert config.loss.feudal_loss_weight == 0.1 and config.arch.hidden_size == 128
    assert config.run_name == "mine"


def test_the_goal_is_as_wide_as_the_states():
    config = parse_args(["--arch", "feudal", "arch.hidden_size=128"])
    assert config.arch.subgoal_head.goal_dim == 128


STAGES = (
    "stages=[{halt_max_steps: 4, epochs: 20}, {halt_max_steps: 8, epochs: 40, L_cycles: 3}, {epochs: 40}]"
)


def test_stages():
    config = parse_args(["data_path=x", STAGES])
    assert config.epochs == 100 and stage_ends(config) == [20, 60, 100]
    # The default of 10,000 gives way to the longest interval that every stage ends with.
    assert config.eval_interval == 20
    assert config.notes[1] == "eval_interval lowered from 10000 to 20, to fit the stages"
    steps = [stage_arch(config, epoch).halt_max_steps for epoch in (0, 19, 20, 59, 60, 99, 100)]
    assert steps == [4, 4, 8, 8, 16, 16, 16]
    assert [stage_arch(config, epoch).L_cycles for epoch in (0, 20, 60)] == [2, 3, 2]
    assert parse_args(["data_path=x", STAGES, "eval_interval=10"]).eval_interval == 10
    assert stage_arch(parse_args(["data_path=x"]), 5) == parse_args(["data_path=x"]).arch


def test_stages_come_back_from_a_file(tmp_path):
    config = parse_args([STAGES, "eval_interval=10"])
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    again = load_config("saved.yaml")
    assert again == config and again.stages[1].L_cycles == 3 and again.stages[2].halt_max_steps is None
    shorter = parse_args(["--config", "saved.yaml", "stages=[{epochs: 8}, {epochs: 4}]"])
    assert (shorter.epochs, shorter.eval_interval) == (12, 8)
    whole = parse_args(["--config", "saved.yaml", "stages=null"])
    assert whole.stages is None and whole.epochs == 100


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages=[]"], "stages: give a list of {epochs: VALUE, halt_max_steps: VALUE"),
        (["stages=3"], "stages: give a list of {epochs: VALUE"),
        (["stages=[4, 8]"], "expected `key: value` lines"),
        (["stages=[{halt_max_steps: 4}]"], "stages[0] has no epochs: give a whole number from 1"),
        (["stages=[{epochs: 4}, {epochs: 0}]"], "stages[1]: epochs=0 is not allowed: give a whole number"),
        (
            ["stages=[{epochs: 4, halt_max_step: 3}]"],
            "unknown key halt_max_step: did you mean halt_max_steps?",
        ),
        (["stages=[{epochs: 4"], "not valid YAML: expected ',' or '}'"),
        (["stages=[{epochs: [4]}]"], "epochs: expected a single plain value"),
        ([STAGES, "epochs=50"], "epochs=50 is not the sum of the stages' epochs: leave epochs out"),
        ([STAGES, "eval_interval=30"], "one ends after 20 epochs, which eval_interval=30 does not divide"),
        (
            ["loss.feudal_loss_weight=0.1"],
            "loss.feudal_loss_weight=0.1 needs a subgoal head: give --arch feudal or "
            "arch.subgoal_head.enabled=true, or set it to 0",
        ),
        (
            ["arch=feudal", "arch.subgoal_head.enabled=false"],
            "loss.feudal_loss_weight=0.1 needs a subgoal head",
        ),
        (
            ["arch=feudal", "arch.subgoal_head.goal_dim=65"],
            "arch.subgoal_head.goal_dim=65 is more than arch.hidden_size=64",
        ),
        (["arch.subgoal_head=3"], "arch.subgoal_head is a group of keys"),
        (
            ["arch.gate_init_strategy=balanced", "arch.gate_init_bias=-3"],
            "arch.gate_init_strategy=balanced sets the biases that arch.gate_init_bias=-3 would: leave one",
        ),
        (
            ["muon_steps=5", "optimizer=adamw"],
            "muon_steps=5 is for optimizer=muon, not for optimizer=adamw: leave one out",
        ),
        (
            ["arch.gradient_updates=5"],
            "arch.gradient_updates=5 is for arch.gradient=last_n, not for arch.gradient=one_step: leave one",
        ),
        (["arch=v1", "loss.gate_entropy_weight=1"], "are for a gated model: give --arch gated"),
        (
            ["arch.puzzle_emb_ndim=200", "arch.puzzle_emb_len=3"],
            "arch.puzzle_emb_ndim=200 fills 4 tokens of arch.hidden_size=64, more than arch.puzzle_emb_len=3",
        ),
    ],
)
def test_invalid_variants(words, expected):
    assert expected in error(*words)

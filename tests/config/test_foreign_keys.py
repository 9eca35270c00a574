"""Spellings of the official code, of TRM and of their forks: what they set, their notes and refusals."""

import os
import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from hrm.common.errors import UserError
from hrm.config import foreign, official
from hrm.config.load import KEYS, parse_args
from hrm.config.messages import ConfigError
from hrm.evaluate import parse_args as parse_evaluate


def parsed(*words):
    return parse_args(["device=cpu", "preset=quick", *words])


@pytest.mark.parametrize(
    ("word", "key", "value", "note"),
    [
        ("+run_name=a b", "run_name", "a b", "+run_name is read as run_name"),
        ("++lr=1e-3", "lr", 1e-3, "++lr is read as lr"),
        ("enable_wandb=false", "tracker", "none", "enable_wandb=false is read as tracker=none"),
        ("use_wandb=True", "tracker", "wandb", "use_wandb=True is read as tracker=wandb"),
        ("DISABLE_COMPILE=1", "mode", "eager", "DISABLE_COMPILE=1 is read as mode=eager"),
        ("compile=false", "mode", "eager", "compile=false is read as mode=eager"),
        (
            "arch.no_ACT_continue=False",
            "arch.q_continue",
            True,
            "arch.no_ACT_continue=False is read as arch.q_continue=true",
        ),
        (
            "+arch.no_ACT_continue=True",
            "arch.q_continue",
            False,
            "+arch.no_ACT_continue=True is read as arch.q_continue=false",
        ),
        (
            "arch.loss.loss_type=softmax_cross_entropy",
            "loss.loss_type",
            "softmax_cross_entropy",
            "arch.loss.loss_type is read as loss.loss_type",
        ),
        ("arch.forward_dtype=float32", "dtype", "float32", "arch.forward_dtype is read as dtype"),
        ("load_checkpoint=runs/a", "checkpoint_path", "runs/a", "load_checkpoint is read as checkpoint_path"),
        ("data_paths=[data/x]", "data_path", "data/x", "data_paths=[data/x] is read as data_path=data/x"),
        ("data_paths=['a b']", "data_path", "a b", "data_paths=['a b'] is read as data_path=a b"),
        ("evaluators=[]", "tracker", "none", "evaluators=[] is ignored: it has no effect here"),
        (
            "min_eval_interval=0",
            "tracker",
            "none",
            "min_eval_interval=0 is ignored: it has no effect here",
        ),
        ("freeze_weights=False", "lr", 1e-3, "freeze_weights=False is ignored: it has no effect here"),
    ],
)
def test_foreign_arguments_with_an_equivalent(word, key, value, note):
    config = parsed(word)
    assert attrgetter(key)(config) == value
    assert note in config.notes


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data_paths=[a,b]", "data_paths=[a,b]: a run trains on one data set, write data_path=DIR"),
        ("data_paths=[]", "data_path has no value: give a path"),
        (
            "evaluators=[{name: arc@ARC}]",
            "evaluators is not a key here: leave it out; python -m hrm.evaluate",
        ),
        ("data_paths_test=[a]", "data_paths_test is not a key here: leave it out; python -m hrm.evaluate"),
        ("min_eval_interval=3", "min_eval_interval is not a key here: leave it out; the first evaluation"),
        ("freeze_weights=True", "freeze_weights is not a key here: write optimizer=adam_atan2 lr=0 puzzle"),
        (
            "arch.no_ACT_continue=maybe",
            "write arch.q_continue=false for true, arch.q_continue=true for false",
        ),
        ("arch.forward_dtype=float16", "arch.forward_dtype is read as dtype; dtype=float16 is not allowed"),
        ("arch.name=a@B", "arch.name is not a key here: choose the architecture by --arch NAME"),
        ("+nothing=1", "unknown key nothing: --help lists every key"),
        (
            "arch=trm_singlez",
            "unknown architecture trm_singlez: that model of TRM's code does not exist here",
        ),
    ],
)
def test_foreign_arguments_without_an_equivalent_give_a_remedy(word, message):
    with pytest.raises(ConfigError) as caught:
        parsed(word)
    assert message in str(caught.value)


def test_a_key_in_two_spellings_is_a_duplicate():
    with pytest.raises(ConfigError, match=r"^tracker is given twice, as none and wandb: leave one out$"):
        parsed("enable_wandb=false", "tracker=wandb")


def test_trms_name_of_the_original_model():
    assert parsed("arch=hrm").arch == parsed("arch=v1").arch


def test_evaluation_names_its_own_keys():
    with pytest.raises(UserError, match=r"unknown key load_checkpoint: did you mean checkpoint\?"):
        parse_evaluate(["checkpoint=x", "load_checkpoint=y"])
    with pytest.raises(UserError, match=r"save_outputs is not a key here: .*save_predictions=FILE\.npz"):
        parse_evaluate(["checkpoint=x", "save_outputs=[logits]"])


# --- their configuration files

ALL_CONFIG = """\
arch:
  H_cycles: 3
  H_layers: 0
  L_cycles: 4
  L_layers: 2
  expansion: 4
  forward_dtype: float32
  halt_exploration_prob: 0.2
  halt_max_steps: 9
  hidden_size: 64
  loss: {loss_type: softmax_cross_entropy, name: losses@ACTLossHead}
  mlp_t: false
  name: recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1
  no_ACT_continue: true
  num_heads: 4
  puzzle_emb_len: 2
  puzzle_emb_ndim: 64
checkpoint_path: checkpoints/there
data_paths: [data/a]
ema: true
epochs: 50
eval_interval: 10
evaluators: [{name: arc@ARC}]
freeze_weights: false
global_batch_size: 24
load_checkpoint: null
lr: 3.0e-05
project_name: null
run_name: bold-owl
weight_decay: 1.0
"""


def test_an_official_configuration_starts_a_run(tmp_path):
    path = tmp_path / "all_config.yaml"
    path.write_text(ALL_CONFIG)
    config = parse_args([str(path)])
    arch = {"share_levels": True, "gradient": "last_cycle", "q_continue": False, "H_cycles": 3, "L_cycles": 4}
    arch |= {"L_layers": 2, "halt_max_steps": 9, "hidden_size": 64, "puzzle_emb_len": 2, "expansion": 4.0}
    arch |= {"use_gating": False}
    assert {name: getattr(config.arch, name) for name in arch} == arch
    assert (config.dtype, config.loss.loss_type) == ("float32", "softmax_cross_entropy")
    assert (config.data_path, config.run_name, config.lr, config.ema) == ("data/a", "bold-owl", 3e-5, True)
    # There it is the folder of the run's checkpoints, here the weights to start from.
    assert config.checkpoint_path is None and config.project_name == "a"
    assert [note for note in config.notes if "left out" in note] == [
        f"{path} line 23: evaluators is left out; python -m hrm.evaluate checkpoint=RUN lets ARC's "
        "augmentations vote"
    ]
    assert parse_args([f"--config={path}", "lr=1", "data_path=b"]).data_path == "b"
    path.write_text(ALL_CONFIG.replace("[data/a]", "[data/a, data/b]"))
    with pytest.raises(ConfigError, match=r"names 2 data sets, and a run trains on one: write data_path=DIR"):
        parse_args([str(path)])
    assert parse_args([str(path), "data_path=data/b"]).data_path == "data/b"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "freeze_weights: false",
            "freeze_weights: true",
            r"line 24: freeze_weights=true does not exist here; w",
        ),
        ("  mlp_t: false", "  mlp_q: false", r"line 12: arch.mlp_q is unknown .*; is it mlp_t\?"),
        (
            "recursive_reasoning.trm@",
            "recursive_reasoning.trm_singlez@",
            "that model of TRM's code does not ex",
        ),
        ("trm@TinyRecursiveReasoningModel_ACTV1", "urm@URM2", "arch.name ends in URM2, expected one of Hier"),
        ("lr: 3.0e-05", "use_muon: true", "use_muon=true does not exist here; write optimizer=muon"),
        ("  mlp_t: false", "  H_init_std: 0.5", "arch.H_init_std=0.5 does not exist here; initial states"),
    ],
)
def test_unsupported_values_of_an_official_configuration(old, new, message, tmp_path):
    assert old in ALL_CONFIG
    (tmp_path / "a.yaml").write_text(ALL_CONFIG.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        parse_args([str(tmp_path / "a.yaml")])


def test_hydras_defaults_and_files_of_architectures(tmp_path):
    (tmp_path / "arch").mkdir()
    arch = tmp_path / "arch" / "mine.yaml"
    arch.write_text("name: trm@TRMModel\nloss: {name: a@B}\nL_layers: 3\npuzzle_emb_ndim: ${.hidden_size}\n")
    config = parsed(f"--arch={arch}", "data_path=x")
    assert config.arch.share_levels and config.arch.L_layers == 3 and config.run_name == "mine"
    for place, entry in ((tmp_path, "arch"), (tmp_path / "train", "/arch")):
        place.mkdir(exist_ok=True)
        (place / "cfg.yaml").write_text(
            f"defaults:\n  - {entry}: mine\n  - _self_\narch: {{L_cycles: 4}}\nlr: 1\n"
        )
        config = parse_args([str(place / "cfg.yaml"), "data_path=x"])
        assert config.arch.share_levels and (config.arch.L_layers, config.arch.L_cycles) == (3, 4)
    arch.write_text("name: eqr@EqRModel\nshort_name: EqR\nlambda_: 0.9\nnoise_scale: 0.5\nboard_height: 9\n")
    config = parsed(f"--arch={arch}", "data_path=x").arch
    assert (config.damping, config.noise, config.init) == (0.9, 0.5, "random")
    assert (config.puzzle_emb_ndim, config.q_continue, config.share_levels) == (0, False, True)
    arch.write_text(
        "name: urm.urm@URM\nloops: 8\nnum_layers: 3\nH_cycles: 4\nL_cycles: 3\nloop_deltas: [0, 8]\n"
    )
    config, urm = parsed(f"--arch={arch}", "data_path=x").arch, parsed("--arch=urm", "data_path=x").arch
    sizes = {"L_layers": 3, "H_cycles": 4, "L_cycles": 3, "halt_max_steps": 8}
    assert config == replace(urm, **sizes)
    (tmp_path / "hrm.yaml").write_text("defaults:\n  - arch: hrm_v1\ndata_path: d\n")
    assert parse_args([str(tmp_path / "hrm.yaml")]).arch == parse_args(["--arch=v1", "data_path=d"]).arch


CHECKOUTS = [
    os.environ[name] for name in ("HRM_REPO", "TRM_REPO", "URM_REPO", "EQR_REPO") if name in os.environ
]


@pytest.mark.skipif(not CHECKOUTS, reason="HRM_REPO, TRM_REPO, URM_REPO and EQR_REPO name no checkout")
def test_the_table_has_every_key_of_their_files():
    missing = []
    for repo in CHECKOUTS:
        for path in [*Path(repo).glob("config/**/*.yaml"), *Path(repo).glob("config/schema.py")]:
            text = path.read_text()
            keys = re.findall(r"^    (\w+): .* = ", text, re.M) if path.suffix == ".py" else None
            for name in keys or leaves(yaml.safe_load(text), "arch." if path.parent.name == "arch" else ""):
                # A schema's fields and some files leave the group out.
                own = [name, *(f"{group}.{name}" for group in ("dataset", "arch"))]
                if not any(key in KEYS or foreign.is_known(key) for key in own):
                    missing.append(f"{path.relative_to(repo)}: {name}")
    assert missing == []


def leaves(values, prefix):
    for name, value in (values or {}).items():
        if prefix + name in ("defaults", "secrets"):
            continue
        if isinstance(value, dict) and prefix + name != "param_iter":
            yield from leaves(value, f"{prefix}{name}.")
        elif prefix.removeprefix("arch.") + name not in official.TRAINERS:
            yield prefix + name

"""The configuration: defaults, precedence, files, errors, help."""

import dataclasses
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hrm.common.errors import UserError
from hrm.config import load as config_module
from hrm.config.load import (
    KEYS,
    ArchConfig,
    Config,
    ConfigError,
    help_text,
    load_config,
    parse_args,
    resolve_device,
    to_yaml,
    validate,
)
from hrm.config.presets import ARCHITECTURE_ALIASES, ARCHITECTURES, FULL_SUDOKU, QUICK
from hrm.config.schedule import later_archs


@pytest.fixture(autouse=True)
def on_cpu(tmp_path, monkeypatch):
    """An empty working folder on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_module, "resolve_device", lambda name: "cpu" if name == "auto" else name)


def value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def error(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    text = str(caught.value)
    assert text and text.isprintable()
    return text


# The table of defaults, written out: the dataclasses are not their own judge.
DEFAULTS = """
arch.hidden_size=512 arch.num_heads=8 arch.expansion=4.0 arch.H_layers=4 arch.L_layers=4 arch.H_cycles=2
arch.L_cycles=2 arch.halt_max_steps=16 arch.halt_exploration_prob=0.1 arch.q_continue=True
arch.gradient=one_step arch.gradient_updates=2 arch.share_levels=False arch.single_state=False
arch.swiglu=plain arch.head_bias=False arch.register_tokens=0 arch.mlp_t=False arch.init=fixed
arch.noise=0.0 arch.damping=1.0 arch.chains=1 arch.pos_encodings=rope arch.rope_theta=10000.0
arch.rms_norm_eps=1e-05 arch.puzzle_emb_ndim=512 arch.puzzle_emb_len=0 arch.use_gating=False
arch.gating_type=standard arch.gate_hidden_ratio=0.25 arch.gate_init_bias=-2.2 arch.gate_init_strategy=None
arch.subgoal_head.enabled=False arch.subgoal_head.manager_period=4 arch.subgoal_head.goal_dim=512
arch.subgoal_head.goal_scale=1.0 arch.subgoal_head.gating=True arch.subgoal_head.temperature=1.0
loss.loss_type=stablemax_cross_entropy loss.label_smoothing=0.0 loss.step_decay=1.0 loss.q_halt_weight=0.5
loss.feudal_loss_weight=0.0 loss.gate_saturation_weight=0.0 loss.gate_entropy_weight=0.0
loss.gate_stability_weight=0.0 loss.gate_loss_warmup_steps=1000 loss.gate_loss_ramp_steps=1000
attention.backend=auto sudoku.size=9 sudoku.num_train=1000 sudoku.num_test=1000 sudoku.num_aug=1000
sudoku.clues=0 sudoku.min_difficulty=0 sudoku.seed=0 preset=full data_path=data/maze global_batch_size=768
epochs=100000 eval_interval=10000 eval_samples=None valid_fraction=0.0 augment=False max_steps=None
max_seconds=None optimizer=adam_atan2 lr=0.0001 lr_warmup_steps=2000 lr_min_ratio=1.0 weight_decay=0.1
beta1=0.9 beta2=0.95 muon_lr=0.02 muon_momentum=0.6 muon_steps=3 muon_weight_decay=0.005 grad_clip=None
max_skipped_steps=10 spike_threshold=10.0 spike_rewinds=0 ema=False ema_rate=0.999 ema_start=0 stages=None
puzzle_emb_lr=0.01 puzzle_emb_weight_decay=0.1 seed=0 device=auto dtype=auto mode=auto deterministic=False
rank_timeout=1800.0 gradient_accumulation=1 project_name=maze run_name=v1 output_dir=checkpoints
checkpoint_path=None reset_puzzle_emb=False resume=auto resume_force=False checkpoint_every_eval=True
checkpoint_interval=None checkpoint_seconds=600.0 keep_checkpoints=3 best_metric=exact_accuracy
keep_best=True early_stop_patience=None early_stop_min_delta=0.0 tracker=none log_interval=50 profile=none
profile_steps=5 profile_after=20
"""


def test_defaults_of_v1_on_a_data_set():
    config = parse_args(["--arch", "v1", "data_path=data/maze"])
    assert sorted(f"{name}={value(config, name)}" for name in KEYS) == sorted(DEFAULTS.split())
    assert config.notes == ["preset full (as data_path is given): the published defaults"]


def test_plain_dataclasses_are_usable_by_themselves():
    assert ArchConfig(hidden_size=64).puzzle_emb_ndim == 64
    assert ArchConfig(hidden_size=64, puzzle_emb_ndim=0).puzzle_emb_ndim == 0
    config = Config(arch=ArchConfig(use_gating=True))
    assert (config.project_name, config.run_name) == ("sudoku-9x9", "gated")
    validate(config)
    with pytest.raises(ValidationError, match=r"hidden_size\n.*valid integer"):
        config.arch.hidden_size = 512.0
    with pytest.raises(ValidationError, match=r"lr\n.*less than or equal to 10"):
        dataclasses.replace(config, lr=11)
    config.arch.hidden_size = 100
    with pytest.raises(ConfigError, match=r"^arch.hidden_size=100 is not a multiple of arch.num_heads=8"):
        validate(config)


def test_quick_is_chosen_on_a_cpu_and_full_on_cuda(monkeypatch):
    config = parse_args([])
    assert config.preset == "quick" and config.project_name == "sudoku-4x4" and config.run_name == "gated"
    assert config.arch.use_gating and config.arch.puzzle_emb_ndim == config.arch.hidden_size == 64
    assert len(config.notes) == 1 and config.notes[0].startswith("preset quick (on cpu, without CUDA)")
    for name, expected in QUICK.items():
        assert value(config, name) == (config.lr if expected == "${lr}" else expected), name
    monkeypatch.setattr(config_module, "resolve_device", lambda name: "cuda")
    config = parse_args([])
    assert config.preset == "full" and config.project_name == "sudoku-9x9"
    assert config.notes[0].startswith("preset full (on cuda)")


def test_recipes_set_their_architecture_and_arguments_override_them():
    config = parse_args(["preset=record", "muon_lr=0.01"])
    assert (config.preset, config.run_name, config.optimizer, config.muon_lr) == (
        "record",
        "record",
        "muon",
        0.01,
    )
    assert config.arch.swiglu == "normed" and config.ema and config.ema_rate == 0.9
    # 8,000 steps of 384 with 1,000 groups, evaluated every 1,000.
    assert config.epochs * 1000 == 8000 * config.global_batch_size and config.eval_interval == 384
    config = parse_args(["preset=cgar", "epochs=10", "eval_interval=1"])
    assert config.stages is not None and config.arch.share_levels and config.loss.step_decay == 0.7
    assert [(s.epochs, s.H_cycles, s.L_cycles) for s in config.stages] == [(3, 1, 2), (3, 2, 4), (4, 3, 6)]
    assert [arch.H_cycles for arch in later_archs(config, 0)] == [2, 3]
    assert [arch.H_cycles for arch in later_archs(config, 5)] == [3] and not later_archs(config, 6)


def test_full_preset_is_the_sudoku_recipe_without_a_data_path():
    config = parse_args(["preset=full"])
    recipe = ("sudoku.size", "sudoku.num_train", "sudoku.num_aug", "global_batch_size", "lr", "puzzle_emb_lr")
    assert [value(config, name) for name in recipe] == [9, 1000, 1000, 384, 7e-5, 7e-5]
    assert (config.weight_decay, config.puzzle_emb_weight_decay) == (1.0, 1.0)
    assert (config.epochs, config.eval_interval, config.arch.hidden_size) == (20_000, 2000, 512)
    # puzzle_emb_lr follows lr until it is given.
    assert parse_args(["preset=full", "lr=1e-3"]).puzzle_emb_lr == 1e-3
    assert parse_args(["preset=full", "lr=1e-3", "puzzle_emb_lr=0"]).puzzle_emb_lr == 0


def test_quick_applies_to_a_data_set_only_on_request():
    assert parse_args(["data_path=x", "device=cpu"]).preset == "full"
    config = parse_args(["data_path=x", "preset=quick"])
    assert (config.arch.hidden_size, config.project_name) == (64, "x")


@pytest.mark.parametrize("how", [["--arch", "{}"], ["--arch={}"], ["arch={}"]])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *ARCHITECTURE_ALIASES])
def test_architectures_and_their_aliases(name, how):
    config = parse_args(["data_path=x", *(word.format(name) for word in how)])
    plain = "v1" if name == "hrm" else name.removeprefix("hrm_").removeprefix("v1_")
    assert config.run_name == plain
    assert config.arch.use_gating == (plain == "gated")
    assert config.arch.halt_max_steps == (8 if plain == "balanced" else 16)
    assert config.arch.hidden_size == 512


def test_each_layer_beats_those_below_it(tmp_path):
    assert parse_args(["--arch", "gated"]).arch.hidden_size == QUICK["arch.hidden_size"]
    assert parse_args(["--arch", "balanced", "arch.halt_max_steps=3"]).arch.halt_max_steps == 3
    assert not parse_args(["--arch", "gated", "arch.use_gating=false"]).arch.use_gating
    (tmp_path / "mine.yaml").write_text("defaults: [gated, balanced]\nhidden_size: 96\nhalt_max_steps: 5\n")
    config = parse_args(["--arch", "mine.yaml"])
    assert config.arch.hidden_size == 96 == config.arch.puzzle_emb_ndim
    assert config.arch.halt_max_steps == 5 and config.arch.use_gating
    assert config.arch.H_layers == QUICK["arch.H_layers"]
    (tmp_path / "part.yaml").write_text("arch: {hidden_size: 32}\nlr: 0.5\n")
    config = parse_args(["--config", "part.yaml", "lr=0.25"])
    assert (config.arch.hidden_size, config.lr) == (32, 0.25)
    assert (config.arch.H_layers, config.puzzle_emb_lr) == (QUICK["arch.H_layers"], 0.25)


def test_architecture_file(tmp_path):
    (tmp_path / "my arch.yml").write_text(
        "# comment\ndefaults:\n  - hrm_v1_gated\n  - _self_\n\nhidden_size: 256\ngate_init_bias: -1.5\n"
        "rms_norm_eps: 1e-6\nq_continue: no\n"
    )
    config = parse_args(["arch=my arch.yml", "data_path=x"])
    assert config.run_name == "my arch"
    expected = ArchConfig(
        hidden_size=256, use_gating=True, gate_init_bias=-1.5, rms_norm_eps=1e-6, q_continue=False
    )
    assert config.arch == expected
    (tmp_path / "empty.yaml").write_text("")
    assert parse_args(["--arch", "empty.yaml", "data_path=x"]).arch == ArchConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", "a.yaml line 1: unknown key arch.hiden_size: did you mean arch.hidden_size?"),
        ("\nhidden_size: big", "a.yaml line 2: arch.hidden_size=big is not allowed: give a whole number"),
        (
            "num_heads: 0",
            "a.yaml line 1: arch.num_heads=0 is not allowed: give a whole number from 1 to 4096",
        ),
        ("num_heads:", "a.yaml line 1: arch.num_heads has no value: give a whole number"),
        ("num_heads: [1]", "a.yaml line 1: arch.num_heads: expected a single plain value"),
        (
            "num_heads: !!python/name:os.system",
            "a.yaml line 1: arch.num_heads: expected a single plain value",
        ),
        ("num_heads: !mine 4", "a.yaml line 1: arch.num_heads: expected a single plain value"),
        ("num_heads: 4\nnum_heads: 4", "a.yaml line 2: num_heads is given twice: leave one out"),
        ("puzzle_emb_ndim: ${.hidden_size}", "a value cannot hold ${...} or be ???; give a whole number"),
        ("defaults: gated", "a.yaml line 1: defaults: expected a list of architectures, as in [gated]"),
        (
            "defaults: [gatd]",
            "a.yaml line 1: unknown architecture gatd: did you mean gated? The names are v1",
        ),
        ("defaults: [a.yaml]", "a.yaml line 1: unknown architecture a.yaml: The names are v1, gated"),
        ("lr: 3", "a.yaml line 1: lr is not a field of an architecture: give the file by --config"),
        ("arch: {}", "a.yaml line 1: arch is not a field of an architecture: give the file by --config"),
        ("name: x@y", "a.yaml line 1: arch.name ends in y, expected one of HierarchicalReasoningModel_ACTV1"),
        ("- 1", "a.yaml line 1: expected `key: value` lines"),
        ("? [a]\n: 3", "a.yaml line 1: expected a plain key"),
        ("x: 1\na: [", "a.yaml line 2: not valid YAML: "),
        ("[" * 5000, "a.yaml: not valid YAML: nested too deeply"),
        ("a: &a {b: *a}", "a.yaml line 1: unknown key arch.a"),
    ],
)
def test_bad_architecture_files(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert message in error("--arch", "a.yaml")


def test_files_that_cannot_be_read(tmp_path):
    assert error("--arch", "no.yaml") == "cannot read no.yaml: No such file or directory"
    assert error("--config", str(tmp_path)) == f"{tmp_path}: a folder, pipe or device; expected a file"
    assert error("--config", "/dev/zero") == "/dev/zero: a folder, pipe or device; expected a file"
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    assert error("--arch", "b.yaml") == "b.yaml: not text in UTF-8, expected a configuration in YAML"
    (tmp_path / "c.yaml").write_bytes(b" " * (1 << 16) + b"\n")
    assert error("--config", "c.yaml") == "c.yaml: more than 64 KiB, expected a configuration in YAML"
    assert error("--config", "a\0b") == r"cannot read a\x00b: no file has such a name"


@pytest.mark.parametrize("text", ['a: "\\UFFFFFFFF"', "%YAML 1." + "9" * 5000 + "\n---\na: 1"])
def test_numbers_that_are_too_large_for_yaml(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert error("--config", "a.yaml").startswith("a.yaml: not valid YAML: nested too deeply")


def test_an_architecture_in_hydras_folder_is_suggested(tmp_path):
    (tmp_path / "config/arch").mkdir(parents=True)
    (tmp_path / "config/arch/mine.yaml").write_text("")
    assert "unknown architecture mine: did you mean config/arch/mine.yaml? The names are" in error(
        "arch=mine"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("lrr=3", "unknown key lrr: did you mean lr?"),
        ("hidden_size=3", "unknown key hidden_size: did you mean arch.hidden_size?"),
        ("arch.hiden_size=3", "unknown key arch.hiden_size: did you mean arch.hidden_size?"),
        ("qqqq=3", "unknown key qqqq: --help lists every key"),
        ("=3", "unknown key (empty): --help lists every key"),
        ("loss=3", "loss is a group of keys: set one of them, as in loss.loss_type=VALUE"),
        ("lr", "lr: write key=value, with no space around the =; see --help"),
        ("lr=", "lr has no value: give a number from 0 to 10"),
        ("max_steps=", "max_steps has no value: give a whole number from 1 to 1000000000, or null"),
        ("lr=abc", "lr=abc is not allowed: give a number from 0 to 10"),
        ("lr=nan", "lr=nan is not allowed: give a number from 0 to 10"),
        ("lr=-inf", "lr=-inf is not allowed: give a number from 0 to 10"),
        ("lr=1e999", "lr=1e999 is not allowed"),
        ("lr=-1", "lr=-1 is not allowed"),
        ("lr=null", "lr=null is not allowed: give a number from 0 to 10"),
        ("beta1=1", "beta1=1 is not allowed: give a number >= 0 and < 1"),
        ("beta2=-0.1", "beta2=-0.1 is not allowed: give a number >= 0 and < 1"),
        ("lr_min_ratio=1.1", "lr_min_ratio=1.1 is not allowed: give a number from 0 to 1"),
        ("arch.expansion=0", "arch.expansion=0 is not allowed: give a number > 0 and <= 64"),
        ("epochs=1.5", "epochs=1.5 is not allowed: give a whole number from 1 to 1000000000"),
        ("epochs=0", "epochs=0 is not allowed"),
        ("max_steps=0", "max_steps=0 is not allowed: give a whole number from 1 to 1000000000, or null"),
        ("epochs=" + "9" * 5000, "epochs=" + "9" * 197 + "... is not allowed"),
        ("global_batch_size=true", "global_batch_size=true is not allowed"),
        ("seed=-1", "seed=-1 is not allowed: give a whole number from 0 to 4294967295"),
        ("arch.use_gating=maybe", "arch.use_gating=maybe is not allowed: give true or false"),
        ("dtype=float16", "dtype=float16 is not allowed: give auto, float32 or bfloat16"),
        ("sudoku.size=5", "sudoku.size=5 is not allowed: give 4, 6, 9 or 16"),
        ("device=gpu", "device=gpu is not allowed: give auto, cpu, cuda, cuda:N or mps"),
        ("lr=${oc.env:HOME}", "lr=${oc.env:HOME}: a value cannot hold ${...} or be ???; give a number"),
        ("run_name=???", "run_name=???: a value cannot hold ${...} or be ???; give a folder name"),
        ("run_name=a/b", "run_name=a/b is not allowed: give a folder name"),
        ("run_name=a\\b", "run_name=a\\b is not allowed: give a folder name"),
        ("run_name=..", "run_name=.. is not allowed: give a folder name of at most 80 characters"),
        ("run_name=a\nb", "run_name=a\\nb is not allowed: give a folder name"),
        ("project_name=null", "project_name=null is not allowed: give a folder name"),
        ("output_dir=a\0b", "output_dir=a\\x00b is not allowed: give a path"),
        ("lr=1 lr=2", "lr is given twice, as 1 and 2: leave one out"),
        ("--arch gated arch=v1", "--arch is given twice: leave one out"),
        ("--print-config --print-config", "--print-config is given twice: leave one out"),
        ("--print-config=1", "--print-config takes no value: write --print-config"),
        ("--arch", "--arch needs a value: write --arch NAME"),
        ("--config --print-config", "--config needs a value: write --config FILE.yaml"),
        ("arch=", "arch has no value: write arch=NAME or arch=FILE.yaml"),
        ("arch=gatedd", "unknown architecture gatedd: did you mean gated? The names are v1, gated, balanced"),
        ("--epochs=3", "unknown flag --epochs: keys are written without dashes, epochs=VALUE"),
        ("--num-aug 3", "unknown flag --num-aug: keys are written without dashes, sudoku.num_aug=VALUE"),
        ("--config-name=x", "unknown flag --config-name: write --config FILE.yaml, or --arch NAME"),
        ("-x", "unknown flag -x: the flags are --arch, --config, --print-config, --help"),
        (
            "enable_wandb=maybe",
            "enable_wandb is not a key here: write tracker=wandb for true, tracker=none for false",
        ),
        (
            "arch.loss.loss_type=x",
            "arch.loss.loss_type is read as loss.loss_type; loss.loss_type=x is not allowed: give stablemax",
        ),
        ("--disable-compile", "unknown flag --disable-compile: write mode=eager for true, mode=auto for"),
        (
            "arch.hidden_size=100 arch.num_heads=3",
            "arch.hidden_size=100 is not a multiple of arch.num_heads=3: change one",
        ),
        (
            "arch.hidden_size=12 arch.num_heads=4 arch.pos_encodings=rope",
            "arch.hidden_size=12 over arch.num_heads=4 gives heads of odd width",
        ),
        (
            "arch.gate_hidden_ratio=0.001",
            "arch.gate_hidden_ratio=0.001 of arch.hidden_size=64 leaves the gate network no units",
        ),
        ("eval_interval=9 epochs=5", "eval_interval=9 is more than epochs=5: lower it, or set it to null"),
        ("resume=x checkpoint_path=y", "resume=PATH continues a run, checkpoint_path=PATH starts a new one"),
        (
            "resume=hub:a/b",
            "resume=hub:a/b: a run resumes only from a local folder; checkpoint_path=hub:NAME",
        ),
        ("data_path=x sudoku.size=4", "sudoku.size is for the built-in data, which data_path replaces"),
    ],
)
def test_errors(argv, message):
    assert error(*argv.split(" ")).startswith(message)


def test_the_error_is_one_that_the_command_reports():
    assert issubclass(ConfigError, UserError)


@pytest.mark.parametrize(
    ("word", "name", "expected"),
    [
        ("run_name=0.10 = 007", "run_name", "0.10 = 007"),
        ("run_name=true", "run_name", "true"),
        ("project_name=Großes ß", "project_name", "Großes ß"),
        ("lr=1e-4", "lr", 1e-4),
        ("lr=0", "lr", 0.0),
        ("max_steps=null", "max_steps", None),
        ("eval_interval=null", "eval_interval", None),
        ("arch.use_gating=No", "arch.use_gating", False),
        ("arch.hidden_size=512", "arch.puzzle_emb_ndim", 512),
        ("arch.puzzle_emb_ndim=0", "arch.puzzle_emb_ndim", 0),
        ("arch.pos_encodings=learned", "arch.pos_encodings", "learned"),
        ("device=cuda:1", "device", "cuda:1"),
        ("resume=runs/a", "resume", "runs/a"),
        ("data_path=data/arc full/", "project_name", "arc full"),
        ("data_path=/", "project_name", "run"),
        ("sudoku.size=6", "project_name", "sudoku-6x6"),
    ],
)
def test_values(word, name, expected):
    got = value(parse_args([word]), name)
    assert got == expected and type(got) is type(expected)


def test_a_long_command_line():
    line = (
        "arch=hrm_v1_gated data_path=path/to/data global_batch_size=256 epochs=50000 eval_interval=5000 "
        "lr=1e-4 lr_warmup_steps=1000 arch.gate_init_bias=-2.5 arch.halt_max_steps=3 project_name=HRM-Gating "
        "run_name=gated-baseline checkpoint_every_eval=true checkpoint_path=checkpoints/a/b"
    )
    config = parse_args(line.split())
    arch = ArchConfig(use_gating=True, gate_init_bias=-2.5, halt_max_steps=3)
    assert config == Config(
        arch=arch,
        preset="full",
        data_path="path/to/data",
        global_batch_size=256,
        epochs=50_000,
        eval_interval=5000,
        lr_warmup_steps=1000,
        project_name="HRM-Gating",
        run_name="gated-baseline",
        checkpoint_path="checkpoints/a/b",
    )


def test_odd_heads_are_fine_without_rope():
    argv = ["arch.hidden_size=12", "arch.num_heads=4", "arch.pos_encodings=learned"]
    assert parse_args(argv).arch.hidden_size == 12


def test_the_presets_interval_gives_way_to_few_epochs():
    config = parse_args(["data_path=x", "epochs=20"])
    assert config.eval_interval == 20
    assert config.notes[1] == "eval_interval lowered from 10000 to 20, to fit epochs=20"
    config = parse_args(["data_path=x", "epochs=20", "eval_interval=null"])
    assert config.eval_interval is None and len(config.notes) == 1


@pytest.mark.parametrize(
    ("ends", "asked", "fitting"), [((12, 18), 5, 3), ((12, 18), 100, 6), ((999_999_937,), 999_999_936, 1)]
)
def test_the_interval_is_the_longest_that_every_stage_ends_with(tmp_path, ends, asked, fitting):
    lengths = [end - begin for begin, end in pairwise((0, *ends))]
    stages = ", ".join(f"{{epochs: {length}}}" for length in [*lengths, 1])
    (tmp_path / "a.yaml").write_text(f"data_path: x\neval_interval: {asked}\nstages: [{stages}]\n")
    assert parse_args(["--config", str(tmp_path / "a.yaml")]).eval_interval == fitting


def test_more_stages_than_are_read_in_a_moment():
    stages = f"[{'{epochs: 1}, ' * 1001}]"
    assert error("data_path=x", f"stages={stages}") == "stages: 1001 entries, give at most 1000"


RUNS = [
    [],
    ["preset=full", "lr=3e-5", "run_name=null-ish: 'x' # \"y\" é"],
    ["--arch", "v1", "data_path=a b/c", "epochs=5", "max_steps=null", "run_name=null "],
    ["--arch", "balanced", "arch.puzzle_emb_ndim=0", "device=cpu", "eval_interval=null", "output_dir=1e3"],
]


@pytest.mark.parametrize("argv", RUNS)
def test_a_printed_configuration_gives_itself_again(tmp_path, capsys, argv):
    config = parse_args(argv)
    with pytest.raises(SystemExit) as done:
        parse_args([*argv, "--print-config"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert printed == "".join(f"# {note}\n" for note in config.notes) + to_yaml(config)
    (tmp_path / "saved.yaml").write_text(printed, encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == config
    again = parse_args(["--config", "saved.yaml", "seed=7"])
    assert again == dataclasses.replace(config, seed=7) and again.notes == ["configuration from saved.yaml"]


def test_a_saved_interval_gives_way_to_few_epochs_too(tmp_path):
    (tmp_path / "saved.yaml").write_text(to_yaml(parse_args(["preset=full"])))
    config = parse_args(["--config", "saved.yaml", "epochs=5"])
    assert (config.epochs, config.eval_interval) == (5, 5)


def test_a_saved_configuration_is_not_half_replaced(tmp_path):
    (tmp_path / "saved.yaml").write_text(to_yaml(parse_args([])))
    assert "saved.yaml already describes the architecture" in error("--config", "saved.yaml", "--arch", "v1")
    assert "already holds the values of preset=quick" in error("--config", "saved.yaml", "preset=full")
    (tmp_path / "part.yaml").write_text("lr: 1\nlr: 2\n")
    assert error("--config", "part.yaml") == "part.yaml line 2: lr is given twice: leave one out"
    (tmp_path / "part.yaml").write_text("loss: {loss_type: mse}\n")
    assert error("--config", "part.yaml").startswith("part.yaml line 1: loss.loss_type=mse is not allowed")
    (tmp_path / "part.yaml").write_text("arch: {num_heads: 4}\narch.num_heads: 2\n")
    assert error("--config", "part.yaml") == "part.yaml line 2: arch.num_heads is given twice: leave one out"


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit) as done:
        parse_args(["nonsense", "-h"])
    assert done.value.code == 0
    page = capsys.readouterr().out
    assert page == help_text() + "\n"
    lines = page.splitlines()
    assert max(map(len, lines)) <= 110
    flat = " ".join(page.split())
    for name, key in KEYS.items():
        shown = [line for line in lines if line.startswith(f"  {name}=")]
        assert len(shown) == 1, name
        assert f"{key.info.description} [{key.allowed}]" in flat, name
    for name in [*ARCHITECTURES, *ARCHITECTURE_ALIASES, "auto", "full", "quick"]:
        assert name in flat
    for name, setting in {**FULL_SUDOKU, "sudoku.size": 9}.items():
        assert f"{name}={'lr' if setting == '${lr}' else setting}" in flat
    for line in (
        "  arch.halt_exploration_prob=0.1 ",
        "  seed=0 ",
        "  lr_min_ratio=1.0 ",
        "  max_steps=null ",
    ):
        assert any(shown.startswith(line) for shown in lines), line


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom hrm.config.load import parse_args\n"
        "try: parse_args(['--help'])\nexcept SystemExit: pass"
    )
    code += "\nassert 'torch' not in sys.modules"
    root = str(config_module.__file__).rsplit("/hrm/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python train.py"), done.stderr


def test_resolve_device(monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("cpu") == "cpu" and resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match=r"^device=cuda: PyTorch finds no CUDA GPU .*: use device=cpu, or"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match=r"^device=mps: PyTorch finds no Apple GPU .*: use device=cpu, or"):
        resolve_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ConfigError, match=r"^device=cuda:2: the last CUDA GPU on this machine is cuda:1:"):
        resolve_device("cuda:2")


names = st.sampled_from([*KEYS, *ARCHITECTURES, "arch", "loss", "--arch", "--config", "--print-config"])
scalars = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "true", "auto", "gated", "${lr}", "???", "f.yaml", "a/../b", "", " ", "9" * 5000]
    ),
)
words = st.one_of(st.text(max_size=12), names, st.builds("{}={}".format, names, scalars))
lines = st.one_of(st.text(max_size=20), st.builds("{}: {}".format, names | st.just("hidden_size"), scalars))


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(argv=st.lists(words, max_size=5), content=st.lists(lines, max_size=4).map("\n".join))
def test_nothing_a_user_types_is_a_traceback(tmp_path, argv, content):
    (tmp_path / "f.yaml").write_text(content, encoding="utf-8", errors="replace")
    for arguments in (argv, ["--arch", "f.yaml", *argv[:1]], ["--config", "f.yaml", *argv[:1]]):
        try:
            config = parse_args(arguments)
        except ConfigError as fault:
            assert str(fault).isprintable() and len(str(fault)) < 600
        except SystemExit as done:
            assert done.code == 0
        else:
            (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
            assert load_config(tmp_path / "again.yaml") == config

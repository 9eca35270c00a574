"""Spellings of the official code, of TRM and of their forks: what they set, their notes and refusals."""

from operator import attrgetter

import pytest

from hrm.common.errors import UserError
from hrm.config.load import parse_args
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
        ("evaluators=[]", "tracker", "none", "evaluators=[] is left out: it changes nothing here"),
        (
            "min_eval_interval=0",
            "tracker",
            "none",
            "min_eval_interval=0 is left out: it changes nothing here",
        ),
        ("freeze_weights=False", "lr", 1e-3, "freeze_weights=False is left out: it changes nothing here"),
    ],
)
def test_words_whose_meaning_is_plain(word, key, value, note):
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
        ("freeze_weights=True", "freeze_weights is not a key here: write lr=0 puzzle_emb_lr=VALUE, which"),
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
def test_words_without_a_counterpart_name_a_remedy(word, message):
    with pytest.raises(ConfigError) as caught:
        parsed(word)
    assert message in str(caught.value)


def test_a_key_in_both_spellings_is_given_twice():
    with pytest.raises(ConfigError, match=r"^tracker is given twice, as none and wandb: leave one out$"):
        parsed("enable_wandb=false", "tracker=wandb")


def test_trms_name_of_the_original_model():
    assert parsed("arch=hrm").arch == parsed("arch=v1").arch


def test_evaluation_names_its_own_keys():
    with pytest.raises(UserError, match=r"unknown key load_checkpoint: did you mean checkpoint\?"):
        parse_evaluate(["checkpoint=x", "load_checkpoint=y"])
    with pytest.raises(UserError, match=r"save_outputs is not a key here: .*save_predictions=FILE\.npz"):
        parse_evaluate(["checkpoint=x", "save_outputs=[logits]"])

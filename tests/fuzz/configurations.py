"""Targets that read configurations: the command line, and YAML files of runs and architectures."""

import json
from functools import cache
from random import Random
from typing import Any

from tests.fuzz.judge import Target, given, put, text
from tests.fuzz.mutations import text_changed

WORDS = (
    b"preset=quick\0device=cpu\0lr=1e-3\0ema=true",
    b"--arch\0feudal\0device=cpu\0data_path=data/x\0epochs=40\0eval_interval=null",
    b"--arch=gated\0device=cpu\0stages=[{halt_max_steps: 4, epochs: 20}, {epochs: 40}]\0seed=1",
    b"lr=1",
    b"device=cpu\0--print-config\0arch.hidden_size=16\0run_name=a b\0project_name=p",
)


FOREIGN = ("arch.name", "+lr", "enable_wandb", "data_paths", "evaluators", "arch.loss.loss_type")


def read_words(data: bytes) -> None:
    from hrm.config.load import parse_args

    parse_args([text(word) for word in data.split(b"\0")])


def words_changed(random: Random, data: bytes) -> bytes:
    from hrm.config.load import KEYS

    words = data.split(b"\0")
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice([*KEYS, *FOREIGN, "--arch", "--config", "arch"])
        word = f"{name}={_config_value(random, KEYS.get(name))}".encode("utf-8", "surrogatepass")
        words.insert(random.randrange(len(words) + 1), word)
    return b"\0".join(words)


def _config_value(random: Random, key: Any) -> str:
    if key is None or random.random() < 0.4:
        return text_changed(random)
    if key.choices:
        return random.choice(list(key.choices))
    bounds = map(str, key.limits.values())
    return random.choice([*bounds, "null", "1", "true", "8", "0.5", "[{epochs: 3}, {epochs: 999999937}]"])


@cache
def yaml_seeds() -> tuple[bytes, ...]:
    from hrm.config.load import parse_args, to_yaml

    saved = [to_yaml(parse_args([text(word) for word in words.split(b"\0")[:3]])) for words in WORDS[:3]]
    short = (
        b"lr: 0.001\ndevice: cpu\narch: {hidden_size: 32, subgoal_head: {enabled: true}}\narch.H_layers: 1\n"
    )
    # One that names no device: PyTorch is asked for it.
    return (*(one.encode() for one in saved), short, b"lr: 0.001\n")


def read_config(data: bytes) -> None:
    """What is taken must be what is saved again."""
    from hrm.config.load import load_config, to_yaml

    config = load_config(put("run.yaml", data))
    saved = put("saved.yaml", to_yaml(config).encode())
    if load_config(saved) != config:
        raise AssertionError("a saved configuration is read as another one")


def yaml_changed(random: Random, data: bytes) -> bytes:
    """Lines with other values, other indentation, in another order."""
    lines = data.decode().splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        number = random.randrange(len(lines))
        name, colon, _ = lines[number].partition(":")
        change = random.randrange(6)
        if change == 0:
            lines.insert(random.randrange(len(lines)), lines.pop(number))
        elif change == 1:
            lines[number] = "  " + lines[number]
        elif change == 2:
            quoted = json.dumps(text_changed(random))
            lines[number] = f"{name}: {quoted}"
        else:
            lines[number] = f"{name}{colon} {text_changed(random)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def read_architecture(data: bytes) -> None:
    from hrm.config.load import parse_args

    parse_args([f"--arch={put('mine.yaml', data)}", "device=cpu"])


ARCHITECTURES = (
    b"defaults: [feudal, _self_]\nhidden_size: 64\nsubgoal_head:\n  manager_period: 2\n",
    b"use_gating: true\ngating_type: attention\nsubgoal_head.enabled: false\n",
)
YAML_WORDS = (
    *(b"&a ", b"*a", b"<<: *a", b"!!python/name:os.system", b"!<%ff>", b"%YAML 9.9\n---\n", b"\n---\n"),
    *(b"|\n ", b'"\\UFFFFFFFF"', b'"\\x', b"\xff", b"[" * 2000, b"[", b"{", b": ", b"- ", b"? ", b"#", b"\t"),
)


TARGETS = (
    Target("words", read_words, given(*WORDS), words_changed, (b"\0", b"=", b"--", b"${", *YAML_WORDS), (0,)),
    Target("config", read_config, yaml_seeds, yaml_changed, YAML_WORDS),
    Target("architecture", read_architecture, given(*ARCHITECTURES), yaml_changed, YAML_WORDS),
)

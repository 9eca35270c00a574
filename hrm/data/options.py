"""The options that several builders have."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm.common.errors import UserError

# Options by name; {items} are puzzles, mazes or tasks.
_SHARED: dict[str, dict[str, Any]] = {
    "--output-dir": {
        "type": Path,
        "required": True,
        "help": "folder of the data set; one that a builder wrote there is replaced",
    },
    "--num-train": {"type": int, "help": "training {items} to generate (default 1000)"},
    "--num-test": {"type": int, "help": "test {items} to generate (default 1000)"},
    "--subsample-size": {"type": int, "help": "keep this many training {items}, chosen at random"},
    "--test-size": {
        "type": float,
        "help": "part of a single file that is held out for the test (default 0.1)",
    },
    "--skip-bad": {
        "action": "store_true",
        "help": "leave out the faulty {items} of the sources, and list them; else all of them are one error",
    },
    "--seed": {"type": int, "default": 0, "help": "same seed, same bytes (default 0)"},
    "--workers": {
        "type": int,
        "help": "threads or processes, which change no byte (default: one a core)",
    },
}


def add_shared(parser: argparse.ArgumentParser, items: str, *names: str) -> None:
    """Adds shared options by name. items: what the builder's sources hold, in the plural."""
    for name in names:
        settings = _SHARED[name]
        parser.add_argument(name, **{**settings, "help": settings["help"].format(items=items)})


def refuse_idle(
    args: argparse.Namespace, has_effect: Mapping[str, bool], why: str, error: type[UserError]
) -> None:
    """Raises `error` for an option that is given and has no effect.

    has_effect: by the name of the option in args. why: the option that takes its effect, with its value.
    """
    for name, effect in has_effect.items():
        value = getattr(args, name)
        if value is not None and value is not False and not effect:
            raise error(f"--{name.replace('_', '-')} has no meaning for {why}; leave it out")

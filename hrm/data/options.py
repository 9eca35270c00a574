"""Options shared by several builders."""

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
        "help": "folder of the data set; an earlier data set of a builder is replaced",
    },
    "--num-train": {"type": int, "help": "training {items} to generate (default 1000)"},
    "--num-test": {"type": int, "help": "test {items} to generate (default 1000)"},
    "--subsample-size": {"type": int, "help": "keep this many training {items}, chosen at random"},
    "--test-size": {
        "type": float,
        "help": "share of a single file that is held out for the test (default 0.1)",
    },
    "--skip-bad": {
        "action": "store_true",
        "help": "skip invalid {items} of the sources, and list them; else they are an error",
    },
    "--seed": {"type": int, "default": 0, "help": "same seed, same bytes (default 0)"},
    "--workers": {
        "type": int,
        "help": "number of threads or processes; does not affect the result (default: one per core)",
    },
}


def add_shared(parser: argparse.ArgumentParser, items: str, *names: str) -> None:
    """Adds shared options by name. items: plural noun for the contents of the builder's sources."""
    for name in names:
        settings = _SHARED[name]
        parser.add_argument(name, **{**settings, "help": settings["help"].format(items=items)})


def refuse_idle(
    args: argparse.Namespace, has_effect: Mapping[str, bool], why: str, error: type[UserError]
) -> None:
    """Raises `error` for a given option without effect.

    has_effect: by the option's name in args. why: the option that disables it, with its value.
    """
    for name, effect in has_effect.items():
        value = getattr(args, name)
        if value is not None and value is not False and not effect:
            raise error(f"--{name.replace('_', '-')} has no meaning for {why}; leave it out")

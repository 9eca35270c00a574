"""Trains over a grid of values: `python -m hrm.sweep lr=1e-4,3e-4,1e-3 [key=value ...] [--arch gated]`.

Every argument with several values is an axis of the grid; the other arguments apply to all runs. The points
are compared as `hrm.compare` compares architectures.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from hrm.common.errors import UserError, run_command
from hrm.common.text import one_line
from hrm.config.presets import folder_name
from hrm.study.options import INTERRUPTED, add_options, parse

MOST_POINTS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns its exit status: that of `run_command`, or 1 if a run failed."""
    return run_command(lambda: sweep(_parse(argv)), INTERRUPTED)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hrm.sweep", description="Train over a grid of values, and report the differences."
    )
    parser.add_argument(
        "words", nargs="+", metavar="key=value", help="values with commas are swept, others apply to all runs"
    )
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="an architecture's name or YAML file, a run's folder or saved configuration (default: gated)",
    )
    add_options(parser, "the first of each key's values")
    return parse(parser, argv)


def sweep(args: argparse.Namespace) -> int:
    """Trains all runs and writes the report. Returns 1 if a run failed, else 0."""
    # Import late: PyTorch takes seconds.
    from hrm.study.comparison import candidate_words, conduct, refuse_own, seeds
    from hrm.study.runs import Campaign

    refuse_own(args.words)
    axes, fixed = split_axes(args.words)
    base = candidate_words(args.arch) if args.arch else []
    points = grid(axes)
    campaign = Campaign(
        args.output or Path("checkpoints") / folder_name(f"sweep-{'-'.join(map(_leaf, axes))}"),
        {name: [*base, *point, *fixed] for name, point in points.items()},
        seeds(args.seeds),
    )
    if args.baseline:
        args.baseline = _name(args.baseline.replace(",", " ").split())
    return int(bool(conduct(campaign, args, f"Sweep of {', '.join(axes)}", swept=list(axes))))


def split_axes(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The swept keys with their values, and the other arguments. Raises UserError if there is nothing to
    sweep.

    Commas within brackets belong to one value, such as a list.
    """
    axes: dict[str, list[str]] = {}
    fixed = []
    for word in words:
        key, _, text = word.partition("=")
        values = _split(text)
        if len(values) == 1:
            fixed.append(word)
        elif key in axes or len(set(values)) < len(values):
            raise UserError(f"{one_line(word)}: {one_line(key)} or a value is given twice: leave one out")
        else:
            axes[key] = values
    if not axes:
        raise UserError("no key has several values: give one as in lr=1e-4,1e-3")
    return axes, fixed


def grid(axes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The arguments of every grid point by its name; the last key varies fastest.

    Raises UserError for too many points, or for two points with the same name.
    """
    points: dict[str, list[str]] = {}
    for index, values in enumerate(product(*axes.values())):
        words = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        name = _name(words)
        if index == MOST_POINTS or name in points:
            why = f"has more than {MOST_POINTS} points" if index == MOST_POINTS else f"has two points {name}"
            raise UserError(f"the grid of {', '.join(axes)} {why}: sweep fewer values or keys")
        points[name] = words
    return points


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _name(words: Sequence[str]) -> str:
    """A point's name, a valid folder name: its keys without their groups, and its values."""
    return folder_name(
        ",".join(f"{_leaf(key)}={value}" for key, _, value in (w.partition("=") for w in words))
    )


if __name__ == "__main__":
    sys.exit(main())

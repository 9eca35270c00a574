"""Compares architectures: `python -m hrm.compare v1 gated feudal [key=value ...] --seeds 3`.

Each candidate is trained with the same seeds on the same data, in the same order. `hrm.sweep` compares the
points of a grid of values.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm.common.errors import UserError, run_command
from hrm.config.presets import folder_name
from hrm.study.options import INTERRUPTED, add_options, parse

_WORDS_HELP = (
    "an architecture's name or YAML file, a run's folder or saved configuration; "
    "key=value arguments apply to every run"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns its exit status: that of `run_command`, or 1 if a run failed."""
    return run_command(lambda: compare(_parse(argv)), INTERRUPTED)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hrm.compare",
        description="Train architectures with the same seeds and data, and report how they differ.",
    )
    parser.add_argument("words", nargs="*", metavar="CANDIDATE|key=value", help=_WORDS_HELP)
    parser.add_argument(
        "--arch", nargs="+", default=[], metavar="NAME", help="candidates, as in --arch v1 gated"
    )
    add_options(parser, "the first candidate")
    return parse(parser, argv)


def compare(args: argparse.Namespace) -> int:
    """Trains all runs and writes the report. Returns 1 if a run failed, else 0."""
    # Import late: PyTorch takes seconds.
    from hrm.study.comparison import conduct, named, refuse_own, seeds
    from hrm.study.runs import Campaign

    given = [*args.arch, *args.words]
    keys = [word for word in given if "=" in word]
    refuse_own(keys)
    candidates = named([word for word in given if "=" not in word])
    if len(candidates) < 2:
        raise UserError("give two candidates or more, as in `python -m hrm.compare v1 gated`")
    default = Path("checkpoints") / folder_name(f"compare-{'-'.join(candidates)}")
    campaign = Campaign(
        args.output or default,
        {name: [*words, *keys] for name, words in candidates.items()},
        seeds(args.seeds),
    )
    return int(bool(conduct(campaign, args, f"Comparison of {', '.join(candidates)}")))


if __name__ == "__main__":
    sys.exit(main())

"""Options shared by the comparison commands."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from hrm.common.threads import THREADS_HELP

INTERRUPTED = "the same command continues from here; with --report-only it reports on the finished runs"


def add_options(parser: argparse.ArgumentParser, first: str) -> None:
    """Adds the options of a campaign. first: describes the default baseline."""
    parser.epilog, parser.formatter_class = THREADS_HELP, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--seeds",
        default="3",
        metavar="N|A,B,...",
        help="the number of seeds, or a list of them (default: 3)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder of runs and results (default: in checkpoints)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of parallel runs (default: one per GPU, or one on a CPU)",
    )
    parser.add_argument("--baseline", metavar="NAME", help=f"baseline of the differences (default: {first})")
    parser.add_argument("--report-only", action="store_true", help="report on finished runs and train none")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; `command` is its text, to be typed again."""
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(given)
    args.command = shlex.join([*parser.prog.split(), *given])
    return args

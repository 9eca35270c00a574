"""Builds and inspects data sets: `python -m hrm.data sudoku|maze|arc|inspect ...`."""

import argparse
import sys
from collections.abc import Sequence

from hrm.common.errors import interrupted_by_sigterm, run_command
from hrm.data.arc import build as arc
from hrm.data.inspect import command as inspect
from hrm.data.maze import build as maze
from hrm.data.sudoku import build as sudoku

# Each command is a module whose add_arguments(parser) sets `run`, the function to call.
COMMANDS = {
    "sudoku": (sudoku, "build a Sudoku data set, generated or from files"),
    "maze": (maze, "build a data set of mazes and their shortest paths, generated or from files"),
    "arc": (arc, "build an ARC data set from task files"),
    "inspect": (inspect, "check a data set, and show its contents"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; see `run_command`."""
    with interrupted_by_sigterm():
        return run_command(lambda: command(argv), "no unfinished data set is left")


def command(argv: Sequence[str] | None) -> int | None:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m hrm.data", description="Build and inspect puzzle data sets."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())

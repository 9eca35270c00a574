"""Builders of data sets: `python -m hrm.data sudoku --output-dir DIR ...`."""

import argparse
import sys
from collections.abc import Sequence

from hrm.data import sudoku
from hrm.errors import UserError

# Each command is a module with add_arguments(parser), which sets `run` as the function to call.
COMMANDS = {"sudoku": (sudoku, "build a Sudoku data set, generated or from files")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m hrm.data", description="Build puzzle data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

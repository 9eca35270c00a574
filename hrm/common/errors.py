"""The mistakes a user of the commands can make, and how every command answers them."""

import signal
import sys
from collections.abc import Callable

from hrm.common.text import printable


class UserError(Exception):
    """A mistake in what the user gave: a key, a value, a file.

    Its text is one line that names the thing, says what was expected, and gives the remedy.
    """


def run_command(command: Callable[[], int | None], interrupted: str) -> int:
    """Runs a command; returns its exit status: its own, 2 for a mistake told in one line, 130 interrupted.

    interrupted: what to say after Ctrl-C. A file that the system refuses (no permission, a damaged disk) is
    the user's to mend as well; any other error is ours and keeps its traceback.
    """
    try:
        return command() or 0
    except UserError as error:
        return _mistake(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _mistake(f"{error.filename}: {error.strerror}; check the path and its permissions")
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT


def _mistake(text: str) -> int:
    print(f"error: {printable(text)}", file=sys.stderr)
    return 2

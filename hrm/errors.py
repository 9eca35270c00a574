"""The mistakes a user of the commands can make, and how every command answers them."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave: a key, a value, a file.

    Its text is one line that names the thing, says what was expected, and gives the remedy.
    """


def run_command(command: Callable[[], None], interrupted: str) -> int:
    """Runs a command; returns its exit status: 0 done, 2 a mistake told in one line, 130 interrupted.

    interrupted: what to say after Ctrl-C. A file that the system refuses (no permission, a damaged disk) is
    the user's to mend as well; any other error is ours and keeps its traceback.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}; check the path and its permissions", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0

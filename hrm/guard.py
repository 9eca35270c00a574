"""Ends a process that gives no sign of life: started beside a rank, it runs by itself, on Python alone.

A stopped process cannot end itself, torchrun waits for it, and its peers may all be on other nodes. Run as
`guard.py PERIOD MISSED` by the process it guards; a byte on standard input is a sign, its end ends the guard.
"""

import os
import select
import signal
import sys


def guard(signs: int, parent: int, period: float, missed: int) -> None:
    """Kills the parent process when `missed` periods in a row bring no byte on the descriptor `signs`.

    period: seconds. Ends when the descriptor is closed or the parent gone.
    """
    silent = 0
    # By turns and not by the clock, so that the process and its guard may be suspended together.
    while silent < missed:
        if select.select([signs], [], [], period)[0]:
            if not os.read(signs, 4096):
                return
            silent = 0
        else:
            silent += 1
        # A process that was forked from the parent may keep the descriptor open.
        if os.getppid() != parent:
            return
    os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    guard(sys.stdin.fileno(), os.getppid(), float(sys.argv[1]), int(sys.argv[2]))

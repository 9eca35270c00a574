"""What torchrun tells a process of its place among the ranks, and which rank speaks for them all."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from hrm.common.errors import UserError

# Seconds that a process whose command has failed may take to end, on a busy machine.
ENDING = 5.0


@dataclass(frozen=True)
class Place:
    """A process among those that train one run: `rank` of `size`, number `local_rank` of its node.

    node: a name that the ranks of one torchrun share. A process started alone is rank 0 of 1.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: str = "0"


def place() -> Place:
    """This process's place, from the environment. Raises UserError for one that no launcher would give."""
    if "WORLD_SIZE" not in os.environ:
        return Place()
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Place()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE={size} without {name}: {_REMEDY}")
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if rank >= size:
        raise UserError(f"RANK={rank} of WORLD_SIZE={size}: ranks count from 0; {_REMEDY}")
    return Place(rank, size, local_rank, os.environ.get("GROUP_RANK", f"of rank {rank}"))


_REMEDY = "start the ranks with torchrun, or unset WORLD_SIZE for a single one"


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        given = f"{name}={text}" if name in os.environ else f"WORLD_SIZE without {name}"
        raise UserError(f"{given}: expected a whole number from {least} on; {_REMEDY}")
    return int(text)


def one_voice(command: Callable[[], int | None]) -> int | None:
    """Runs a command that every rank runs, so that an error which they all meet is told once for each node.

    torchrun ends a node's ranks as soon as one of them has ended. The node's first rank raises its error at
    once; the others wait for their end, and those that are still there after it had an error of their own:
    they raise it with their rank's number.
    """
    here = place()
    try:
        return command()
    except KeyboardInterrupt:
        # Ctrl-C reaches every rank.
        if here.rank > 0:
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if here.local_rank > 0:
            time.sleep(ENDING + here.local_rank / 4)
        if here.rank > 0 and isinstance(error, UserError):
            raise UserError(f"rank {here.rank}: {error}") from None
        raise

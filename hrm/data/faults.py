"""Invalid items of a source: reported in one error, or skipped and listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hrm.common.errors import UserError

# Maximum number of faults in an error or in a list of skipped items.
MOST = 10


class Faults:
    """Collects the faults of a source. skip: skip invalid items instead of rejecting the source.

    error: the type that `check` raises. Memory does not grow with the number of faults.
    """

    def __init__(self, *, skip: bool, error: type[UserError]) -> None:
        self.skip, self._error = skip, error
        self.first: list[str] = []
        self.count = 0

    def add(self, where: Any, what: str) -> None:
        """Records an invalid item: its place and its fault."""
        self._record(f"{where}: {what}")

    @contextmanager
    def item(self) -> Iterator[None]:
        """Records an error that ends the block, which reads one item."""
        try:
            yield
        except self._error as fault:
            self._record(str(fault))

    def _record(self, fault: str) -> None:
        self.count += 1
        if len(self.first) < MOST:
            self.first.append(fault)

    def check(self, remedy: str = "--skip-bad leaves them out") -> None:
        """Raises an error with the first faults and their number, unless invalid items are skipped."""
        if self.skip or not self.count:
            return
        if self.count == 1:
            raise self._error(f"{self.first[0]}; {remedy.replace('them', 'it')}")
        raise self._error(f"{self.listed()}; {self.count:,} bad in all, {remedy}")

    def listed(self) -> str:
        """The first faults in one line, and how many more there are."""
        more = [f"and {self.count - MOST:,} more"] if self.count > MOST else []
        return "; ".join([*self.first, *more])

    def notes(self) -> list[str]:
        """Lines about the skipped items: number, places and faults."""
        if not self.count:
            return []
        more = [f"  and {self.count - MOST:,} more"] if self.count > MOST else []
        return [f"left out {self.count:,} bad:", *(f"  {what}" for what in self.first), *more]

"""Configuration messages: mistakes, the most similar key, the layout of the help page."""

import difflib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hrm.common.errors import UserError

# Maximum length of a message that lists several mistakes.
_LONGEST = 500


class ConfigError(UserError):
    """A configuration that cannot be used: a key, a value, a flag or a file. Its text is one line."""


class Faults(list[str]):
    """Collects mistakes, to report all of them in one message."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collects the ConfigError of the block."""
        try:
            yield
        except ConfigError as error:
            self.append(str(error))

    def raise_any(self) -> None:
        """Raises one ConfigError for all mistakes, if there are any."""
        if not self:
            return
        kept = [text for n, text in enumerate(self) if n == 0 or sum(map(len, self[: n + 1])) < _LONGEST]
        more = [f"{len(self) - len(kept)} more"] if len(kept) < len(self) else []
        raise ConfigError("; ".join([*kept, *more]))


def typed(value: Any) -> str:
    """A value as a user types it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def alternatives(texts: Sequence[str]) -> str:
    """Joins texts as "a, b or c"."""
    return " or ".join(", ".join(texts).rsplit(", ", 1))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted name whose last part is most similar to that of `name`, if one is close.

    A name in the same group wins a tie.
    """
    group, _, leaf = name[:100].rpartition(".")

    def likeness(other: str) -> float:
        other_group, _, other_leaf = other.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, other_leaf).ratio() + 0.1 * (group == other_group)

    best = max(known, key=likeness)
    return best if likeness(best) >= 0.7 else None


def help_entry(left: str, text: str, column: int, width: int) -> Iterator[str]:
    """Lines of the help page: `left`, then the text in `width` columns from `column` on."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
    yield f"{left:<{column}} {lines[0]}" if len(left) < column else f"{left}\n{'':{column}} {lines[0]}"
    yield from (f"{'':{column}} {line}" for line in lines[1:])

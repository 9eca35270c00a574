"""Makes untrusted text safe and short for one line; formats sizes with units."""

import re
from typing import Any

# A version's folder in the cache of huggingface_hub.
_CACHED = re.compile(r"[^\s'\"]*(?:model|dataset)s--([\w.-]+?)--([\w.-]+)/snapshots/\w+")


def printable(text: str) -> str:
    """The text with every invisible character, such as ESC, escaped: safe for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(value: str | BaseException, limit: int = 200) -> str:
    """A text or an error's message as printable text of at most `limit` characters; the error's type if it is
    empty."""
    if isinstance(value, BaseException):
        value = " ".join(str(value).split()) or type(value).__name__
    # Cut before escaping: the text may be a whole file.
    text = printable(value[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def literal(value: Any, limit: int = 60) -> str:
    """The repr of a value from a file, in one line of at most `limit` characters."""
    try:
        return one_line(repr(value), limit)
    # Python refuses to write an integer of thousands of digits.
    except ValueError:
        return type(value).__name__


def error_text(error: BaseException, limit: int = 120) -> str:
    """An error as "Type: message" in one line."""
    return f"{type(error).__name__}: {one_line(error, limit)}"


def counted(number: int, what: str) -> str:
    """A number with its noun, such as "1 field" and "2 fields". what: the singular."""
    return f"{number} {what}{'s' * (number != 1)}"


def size_text(count: float) -> str:
    """A number of bytes in the largest unit that fits: 2048 is 2 KiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.4g} {units[0]}"


def with_sources(text: str) -> str:
    """A text in which `hub:OWNER/NAME` replaces the cache folder of a repository."""
    return _CACHED.sub(r"hub:\1/\2", text)

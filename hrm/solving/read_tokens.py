"""Reads sequences of tokens as numbers from the command line, a file or standard input."""

import os
import re
import sys
from collections.abc import Iterator

from hrm.common.errors import UserError
from hrm.common.files import read_text
from hrm.common.text import counted
from hrm.data.format import Metadata
from hrm.data.puzzle_kinds import Kind, declared
from hrm.solving.read_puzzles import MAX_TEXT_BYTES, Puzzle, Puzzles, shortened

EXPECTED = "whole numbers separated by commas or spaces, one sequence per line"
_NUMBERS = re.compile(r"\s*\d+(?:[\s,]+\d+)+[\s,]*")


def may_be_tokens(source: str) -> bool:
    """Whether an argument is several numbers separated by commas or spaces."""
    return _NUMBERS.fullmatch(source) is not None


def read_tokens(source: str, kind: Kind, metadata: Metadata) -> Puzzles:
    """The sequences in an argument: numbers, a file, or `-` for standard input; one sequence per line.

    A shorter sequence is padded with pad_id. Raises UserError with the line, the position and the expected
    value.
    """
    where, text = "the sequence", source
    if source == "-":
        where = "standard input"
        raw = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        if len(raw) > MAX_TEXT_BYTES:
            raise UserError(f"{where}: more than {MAX_TEXT_BYTES >> 20} MiB, expected {EXPECTED}")
        text = raw.decode("utf-8-sig", "replace")
    elif os.path.isfile(source):
        where, text = source, read_text(source, MAX_TEXT_BYTES, EXPECTED)
    elif not re.fullmatch(r"[\d\s,+-]*", source):
        raise UserError(f"{source[:100]!r}: no such file, nor numbers; expected a file, or {EXPECTED}")
    return Puzzles(kind, list(_sequences(text, where, kind, metadata)))


def _sequences(text: str, where: str, kind: Kind, metadata: Metadata) -> Iterator[Puzzle]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{where}: empty; expected {EXPECTED}")
    for number, line in lines:
        place = where if len(lines) == 1 else f"{where}, line {number}"
        words = line.replace(",", " ").split()
        if len(words) > metadata.seq_len:
            raise UserError(f"{place}: {counted(len(words), 'number')}, expected at most {metadata.seq_len}")
        padding = [str(metadata.pad_id)] * (metadata.seq_len - len(words))
        for cell, word in enumerate(words, 1):
            if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) < kind.vocab_size):
                raise UserError(
                    f"{place}: number {cell} is {word[:20]!r}, expected 0 to {kind.vocab_size - 1}"
                )
        question = declared(kind, "tokens").parse(" ".join([*words, *padding]))
        if wrong := kind.impossible(question):
            raise UserError(f"{place}: {shortened(wrong)}; correct it, because no single answer is right")
        yield Puzzle(question, None, place)

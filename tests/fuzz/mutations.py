"""Inputs that are nearly right: valid ones with a few things changed, as bytes and as what the format holds.

Every function takes its choices from a `random.Random`, a seeded one or hypothesis's own, so that one number
is one input, and a failing one is found again.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

# Text and numbers that have broken readers before.
STRINGS = (
    *("", " ", "0", "-1", "1e999", "nan", "null", "~", "true", "???", "${lr}", "$", "a\nb", "\x1b[31m", "\0"),
    *("\ud800", "\u2028", "\u202e", "é" * 300, "x" * 5000, "../x", "/etc/passwd", "a/b", "C:\\x", "*a", "&a"),
    *("!!python/object/apply:os.system", "<<", "=", "%YAML 1.1", "١٢", "1_0", "0x10", "9" * 5000, "'", '"'),
)
NUMBERS = (
    *(0, 1, 2, 3, 4, 16, 255, 256, -1, -2, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 10**400, -(10**400), 0.5, 1e-320, 1e308, float("inf"), float("nan"), 999_999_937, 999_999_936),
)
# Of boards and tables, and what looks like them: digits that are none to `int`, ends of lines, marks.
CHARACTERS = '0123456789.#SGo _|+-,"\r\t\0²٣é\u2028\ufeff\x1b'
# What no JSON library writes: it goes into the text as it is.
RAW = (
    *("[" * 3000, "[" * 90 + "]" * 90, "[" * 900 + "]" * 900, '{"a":' * 940 + "1" + "}" * 940, "9" * 5000),
    *("1e400", "-0", "Infinity", "\0", "01"),
)
DTYPES = (
    *("<i8", "<i4", "|i1", "|u1", "<u8", ">i4", "|O", "<f8", "|b1", "<M8[s]", "|S3", "<U9", "<i8,<i8", "x"),
)
# Steps of a pickle that do more than hold numbers.
PICKLE = (b"cos\nsystem\n", b"ctorch\nload\n", b"c__builtin__\neval\n", b"(", b"t", b"R", b"\x81", b"b", b"Q")
LONGEST = 1 << 16


def bytes_changed(random: Random, data: bytes, words: Sequence[bytes]) -> bytes:
    """Data with one change: a bit, a cut, a piece left out, repeated, moved, made random or a word put in."""
    first = random.randrange(len(data) + 1)
    last = min(len(data), first + random.choice((0, 1, 2, 4, 8, 32, 1024)))
    before, piece, after = data[:first], data[first:last], data[last:]
    change = random.choice(("bit", "cut", "less", "more", "move", "noise", "word", "word"))
    if change == "bit" and piece:
        return before + bytes([piece[0] ^ 1 << random.randrange(8)]) + piece[1:] + after
    if change == "cut":
        return before
    if change == "more":
        return before + piece * random.choice((2, 3, 100)) + after
    if change == "move":
        place = random.randrange(len(data) + 1)
        return data[:place] + piece + data[place:]
    if change == "noise":
        return before + bytes(random.randrange(256) for _ in range(len(piece) % 9)) + after
    if change == "word" and words:
        return before + random.choice(words) + random.choice((piece, b"")) + after
    return before + after


def text_changed(random: Random) -> str:
    """A string or a number as text, odd or plain."""
    choice = random.random()
    if choice < 0.4:
        return random.choice(STRINGS)
    if choice < 0.8:
        return str(_number(random))
    return "".join(chr(random.choice((random.randrange(128), random.randrange(0x3000)))) for _ in range(4))


def json_changed(random: Random, data: bytes) -> bytes:
    """A JSON text with one to three of its values, keys or entries changed."""
    value = json.loads(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _change(random, value)
    text = json.dumps(value)
    for number, raw in enumerate(RAW):
        text = text.replace(f'"raw{number}"', raw)
    return text.encode()


def lines_changed(random: Random, data: bytes) -> bytes:
    """A text with a line left out, emptied, there twice or moved, or with a character or a field changed."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(random.choice((1, 1, 2, 3))):
        number = random.randrange(len(lines) + 1)
        line = lines.pop(number) if number < len(lines) else ""
        change = random.choice(("less", "empty", "more", "move", "field", "field", "character", "character"))
        if change == "character" and line:
            place = random.randrange(len(line))
            line = line[:place] + random.choice(CHARACTERS) + line[place + random.choice((0, 1)) :]
        if change == "field":
            fields = line.split(",")
            fields[random.randrange(len(fields))] = text_changed(random)
            line = ",".join(fields)
        if change not in ("less", "move"):
            lines.insert(number, "" if change == "empty" else line)
        if change in ("more", "move"):
            lines.insert(random.randrange(len(lines) + 1), line)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def npy_changed(random: Random, data: bytes) -> bytes:
    """A .npy file with another header: version, type, order or shape; or with other numbers."""
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode(), data[10 + length :]
    shape = header[header.index("(") : header.index(")") + 1]
    if random.random() < 0.5:
        sizes = [random.choice((_number(random), random.randrange(9))) for _ in range(random.randrange(4))]
        header = header.replace(shape, "(" + "".join(f"{size}, " for size in sizes) + ")")
    if random.random() < 0.3:
        header = header.replace(header.split("'")[3], random.choice(DTYPES))
    if random.random() < 0.1:
        header = header.replace("False", random.choice(("True", "None", "0", "[]" * 99, "open('x')")))
    version = random.choice((b"\x01\0", b"\x01\0", b"\x01\0", b"\x02\0", b"\x03\0", b"\x09\0"))
    size = len(header) if random.random() < 0.9 else random.choice((0, 1, 65535))
    lengths = size.to_bytes(2 if version[0] == 1 else 4, "little")
    for _ in range(random.choice((0, 1, 2))):
        body = bytes_changed(random, body, (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"))
    return data[:6] + version + lengths + header.encode() + body


def zip_changed(random: Random, data: bytes) -> bytes:
    """A torch file with one member changed, and now and then one left out, or all compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    chosen = pickled if random.random() < 0.7 else random.choice(list(members))
    for _ in range(random.choice((1, 1, 2, 4))):
        members[chosen] = bytes_changed(random, members[chosen], PICKLE)
    if random.random() < 0.1:
        del members[random.choice(list(members))]
    kind = zipfile.ZIP_DEFLATED if random.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            # Of no date: the same choices make the same bytes.
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def safetensors_changed(random: Random, data: bytes) -> bytes:
    """A .safetensors file with another header; its length is right but for some."""
    length = int.from_bytes(data[:8], "little")
    header, body = json_changed(random, data[8 : 8 + length]), data[8 + length :]
    size = len(header) if random.random() < 0.9 else random.choice((0, 1, 2**32, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + header + body


def _number(random: Random) -> Any:
    return random.choice(NUMBERS) if random.random() < 0.7 else random.randrange(-(10**6), 10**6)


def _value(random: Random) -> Any:
    kind = random.randrange(6)
    if kind < 2:
        return _number(random)
    if kind < 4:
        return random.choice(STRINGS)
    if kind == 4:
        return f"raw{random.randrange(len(RAW))}"
    return random.choice((None, True, False, [], {}, [[]], [None], {"": 0}))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within a JSON value, with each of its keys."""
    if isinstance(value, list | dict):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change(random: Random, value: Any) -> Any:
    """The value with one change somewhere in it, which may be made in place."""
    places = list(_places(value))
    if not places or random.random() < 0.05:
        return _value(random)
    holder, key = random.choice(places)
    old = holder[key]
    change = random.choice(("less", "more", "copy", "empty", "near", "other", "other"))
    if change == "less":
        del holder[key]
    elif change == "more" and isinstance(holder, list):
        holder += [old] * random.choice((1, 2, 60))
    elif change == "more":
        holder[random.choice(STRINGS)] = old
    elif change == "copy":
        holder[key] = json.loads(json.dumps(random.choice(places)[0]))
    elif change == "empty" and old is not None:
        holder[key] = type(old)()
    elif change == "near" and type(old) in (int, float) and abs(old) < 2**63:
        holder[key] = random.choice((old + 1, old - 1, -old, float(old), str(old), [old], bool(old)))
    else:
        holder[key] = _value(random)
    return value

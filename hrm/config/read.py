"""Reads configurations from command lines and YAML files; scalars stay text.

YAML is composed into nodes but never constructed: tags create no objects, values cannot refer to other
values, and mistakes are reported with their line.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from hrm.common.files import read_text
from hrm.common.text import one_line
from hrm.config import foreign
from hrm.config.keys import Key, find_key, keys_of
from hrm.config.messages import ConfigError, Faults, nearest

# Maximum bytes of a file (a saved one has 4 KiB) and entries of a list, so that reading takes a second or
# two.
MOST_BYTES, MOST_ITEMS = 1 << 16, 1000
_FLAGS = {"--arch": "NAME", "--config": "FILE.yaml", "--print-config": "", "--help": ""}


@dataclass
class Arguments:
    """A parsed command line: the flags, the values of the keys, and a note for each foreign spelling."""

    flags: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def split_arguments(
    argv: Sequence[str], keys: Mapping[str, Key], known: Sequence[str] = tuple(_FLAGS)
) -> Arguments:
    """Parses a command line of known flags and `key=value` arguments, in any order.

    `arch=NAME` is --arch NAME. With --help the other arguments are ignored. Raises ConfigError that reports
    every mistake.
    """
    if "--help" in argv or "-h" in argv:
        return Arguments({"--help": ""})
    found, reader, words = Arguments(), Reader(keys), deque(argv)
    while words:
        word = words.popleft()
        with reader.faults.collect():
            name, equals, text = word.partition("=")
            if name == "arch" and equals and "--arch" in known:
                if not text.strip():
                    raise ConfigError("arch has no value: write arch=NAME or arch=FILE.yaml")
                name = "--arch"
            if not equals and word.endswith((".yaml", ".yml")) and "--config" in known:
                name, equals, text = "--config", "=", word
            if name in known:
                text = text if equals or not _FLAGS[name] else words.popleft() if words else ""
                if equals and not _FLAGS[name]:
                    raise ConfigError(f"{name} takes no value: write {name}")
                if _FLAGS[name] and (not text.strip() or text in _FLAGS):
                    raise ConfigError(f"{name} needs a value: write {name} {_FLAGS[name]}")
                if name in found.flags:
                    raise ConfigError(f"{name} is given twice: leave one out")
                found.flags[name] = text
            elif word.startswith("-"):
                # The next word is most likely the flag's value, not a second mistake.
                if not equals and words and "=" not in words[0] and not words[0].startswith("-"):
                    words.popleft()
                raise ConfigError(f"unknown flag {one_line(name)}: {_instead_of(name, keys, known)}")
            elif not equals:
                shown = one_line(word) or "(empty)"
                if word and "checkpoint" in keys:
                    raise ConfigError(f"{shown}: write key=value, such as checkpoint={shown}; see --help")
                raise ConfigError(f"{shown}: write key=value, with no space around the =; see --help")
            else:
                own, text, note = foreign.translate(name, text, keys)
                found.notes.extend([note] if note else [])
                if own is not None:
                    reader.add(own, text, f"{note}; " if note else "")
    found.values = reader.result()
    return found


def _instead_of(flag: str, keys: Mapping[str, Key], known: Sequence[str]) -> str:
    name = flag.lstrip("-").replace("-", "_")
    near = name if name in keys else nearest(name, keys)
    if remedy := foreign.remedy(name, keys):
        return remedy
    return f"keys are written without dashes, {near}=VALUE" if near else f"the flags are {', '.join(known)}"


class Reader:
    """Reads the values of keys one by one, and collects the mistakes."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self.keys, self.faults = keys, Faults()
        self._given: dict[str, str | yaml.Node] = {}
        self._values: dict[str, Any] = {}

    def add(self, name: str, given: str | yaml.Node, where: str) -> None:
        """Reads one key's value from a text or a YAML node. where: start of the message for a mistake."""
        with self.faults.collect():
            k = find_key(name, self.keys, where)
            other = self._given.setdefault(name, given)
            if other is not given:
                both = [one_line(text) for text in (other, given) if isinstance(text, str)]
                values = f", as {' and '.join(both)}" if both else ""
                raise ConfigError(f"{where}{name} is given twice{values}: leave one out")
            self._values[name] = (
                _entries(k, given, where) if k.items else k.parse(scalar(given, name, where), where)
            )

    def add_mapping(self, node: yaml.Node | None, path: str, prefix: str = "") -> None:
        """Reads the keys of a YAML mapping below `prefix`, nested or dotted."""
        with self.faults.collect():
            for name, child, where in mapping_items(node, path):
                if any(k.startswith(f"{prefix}{name}.") for k in self.keys):
                    self.add_mapping(child, path, f"{prefix}{name}.")
                else:
                    self.add(prefix + name, child, where)

    def result(self) -> dict[str, Any]:
        """The values by dotted name. Raises ConfigError that reports every mistake."""
        self.faults.raise_any()
        return self._values


def read_file(node: yaml.Node | None, path: str, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The values in a YAML file, by dotted name. Raises ConfigError that reports every mistake."""
    reader = Reader(keys)
    reader.add_mapping(node, path)
    return reader.result()


def _entries(k: Key, given: str | yaml.Node, where: str) -> Any:
    """The value of a key that holds a list of mappings."""
    if isinstance(given, str) and given.strip():
        given = compose(given, f"{where}{k.name}={one_line(given)}") or ""
    if isinstance(given, str) or (isinstance(given, yaml.ScalarNode) and given.value in ("null", "~")):
        return k.parse(scalar(given, k.name, where), where)
    if not isinstance(given, yaml.SequenceNode) or not given.value:
        raise ConfigError(f"{where}{k.name}: give {k.allowed}")
    if len(given.value) > MOST_ITEMS:
        raise ConfigError(f"{where}{k.name}: {len(given.value)} entries, give at most {MOST_ITEMS}")
    keys, entries = keys_of(k.items), []
    for index, child in enumerate(given.value):
        place = f"{where}{k.name}[{index}]"
        reader = Reader(keys)
        for name, value, _ in mapping_items(child, place):
            reader.add(name, value, f"{place}: ")
        values = reader.result()
        for name, field_key in keys.items():
            if field_key.info.is_required() and name not in values:
                raise ConfigError(f"{place} has no {name}: give {field_key.allowed}")
        entries.append(k.items(**values))
    return entries


def read_yaml(path: str) -> yaml.Node | None:
    """The node tree of a YAML file; None if it is empty. Raises ConfigError."""
    try:
        text = read_text(path, MOST_BYTES, "a configuration in YAML", ConfigError)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise ConfigError(f"cannot read {one_line(path)}: {reason}") from None
    return compose(text, one_line(path))


def compose(text: str, where: str) -> yaml.Node | None:
    """The node tree of a YAML text. where: the name of the text in messages."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = one_line(error.problem or error.context or "cut short")
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    # The scanner raises the last two for too large numbers in an escape or a version.
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        problem = "nested too deeply, or characters YAML does not allow"
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None


def mapping_items(node: yaml.Node | None, path: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """Each entry of a YAML mapping: key, value, "FILE line N: ". Raises ConfigError for other nodes."""
    if not isinstance(node, yaml.MappingNode | None):
        raise ConfigError(f"{one_line(path)} line {node.start_mark.line + 1}: expected `key: value` lines")
    seen = set()
    for name, value in node.value if node else []:
        where = f"{one_line(path)} line {name.start_mark.line + 1}: "
        if not isinstance(name, yaml.ScalarNode):
            raise ConfigError(f"{where}expected a plain key")
        if name.value in seen:
            raise ConfigError(f"{where}{one_line(name.value)} is given twice: leave one out")
        seen.add(name.value)
        yield name.value, value, where


def scalar(node: str | yaml.Node, name: str, where: str) -> str:
    """The text of a YAML scalar. Raises ConfigError for lists, mappings and tags of objects."""
    if isinstance(node, str):
        return node
    plain = isinstance(node, yaml.ScalarNode) and node.tag.startswith("tag:yaml.org,2002:")
    if not plain or "/" in node.tag:
        raise ConfigError(f"{where}{one_line(name)}: expected a single plain value")
    return str(node.value)

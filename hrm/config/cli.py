"""The grammar of the command line and of configuration files, the checks of one key, and the help page.

A key is a field of a configuration dataclass made by `key(...)`: its default, help, range and form are
written there once, and read here to parse values, to word errors and to print the help.
"""

import difflib
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from hrm.common.errors import UserError
from hrm.common.files import read_text
from hrm.common.text import one_line

# Bytes of a configuration, a saved one has 4 KiB, and entries of a list in it: read within a second or two.
MOST_BYTES, MOST_ITEMS = 1 << 16, 1000
_BOOLS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_FLAGS = {"--arch": True, "--config": True, "--print-config": False, "--help": False}  # True: takes a value


_TRACKER = "write tracker=wandb, or leave it out to log to files only"
_ARCH_NAME = "choose the architecture by --arch NAME"
_EAGER = "write mode=eager to run without torch.compile"

# Keys and flags of the official code and its forks that have another place here, with that place.
MOVED: dict[str, str] = {
    "enable_wandb": _TRACKER,
    "use_wandb": _TRACKER,
    "arch.name": _ARCH_NAME,
    "arch.loss": "write loss.loss_type=NAME",
    "arch.loss.loss_type": "write loss.loss_type=NAME",
    "arch.loss.name": "choose the loss by loss.loss_type=NAME",
    "loss.name": "choose the loss by loss.loss_type=NAME",
    "DISABLE_COMPILE": _EAGER,
    "disable_compile": _EAGER,
    "compile": _EAGER,
    "learning_rate": "write lr=VALUE",
    "warmup_steps": "write lr_warmup_steps=VALUE",
    "subsample_size": "write sudoku.num_train=VALUE",
    "eval_save_outputs": "python -m hrm.evaluate saves predictions, by save_predictions=FILE.npz",
    "cuda": "write device=cuda",
    "cpu": "write device=cpu",
    "config_name": "write --config FILE.yaml, or --arch NAME",
}


class ConfigError(UserError):
    """A configuration that cannot be used: a key, a value, a flag or a file. Its text is one line."""


def key(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pattern: str | None = None,
    form: str | None = None,
    shown: str | None = None,
    items: type | None = None,
) -> Any:
    """A dataclass field that is a key of the configuration.

    `ge, gt, le, lt` bound a number. `pattern` is what a string must match in full, `form` says so in words.
    `shown` replaces the default in the help where it depends on other keys. `items` is the dataclass of keys
    that a list holds.
    """
    meta = {"help": help, "bounds": {">=": ge, ">": gt, "<=": le, "<": lt}, "shown": shown, "items": items}
    return field(default=default, metadata={**meta, "pattern": pattern, "form": form})


@dataclass(frozen=True)
class Key:
    """One key of the configuration, as its field declares it. `name` is dotted, as on the command line."""

    name: str
    kind: type
    nullable: bool
    choices: tuple
    default: Any
    meta: Mapping[str, Any]

    @property
    def allowed(self) -> str:
        """The values it takes, in words."""
        if self.kind is list:
            text = "a list of {" + ", ".join(f"{name}: VALUE" for name in keys_of(self.meta["items"])) + "}"
        elif self.choices:
            text = " or ".join(", ".join(map(str, self.choices)).rsplit(", ", 1))
        elif self.kind is bool:
            text = "true or false"
        elif self.kind is str:
            text = self.meta["form"]
        else:
            bounds = dict(self._bounds())
            limits = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
            if bounds.keys() == {">=", "<="}:
                limits = f"from {bounds['>=']} to {bounds['<=']}"
            text = f"{'a whole' if self.kind is int else 'a'} number {limits}"
        return text + (", or null" if self.nullable else "")

    def _bounds(self) -> Iterator[tuple[str, float]]:
        return ((sign, bound) for sign, bound in self.meta["bounds"].items() if bound is not None)

    def parse(self, text: str, where: str = "") -> Any:
        """The value that `text` writes. Raises ConfigError, with `where` in front, if it is not allowed."""
        if not text.strip():
            raise ConfigError(f"{where}{self.name} has no value: give {self.allowed}")
        # OmegaConf would read these as a reference to another value, or as a value still to come.
        if "${" in text or text == "???":
            raise ConfigError(
                f"{where}{self.name}={one_line(text)}: a value cannot hold ${{...}} or be ???; "
                f"give {self.allowed}, or leave it out"
            )
        if text in ("null", "~"):
            value = None
        elif self.kind is list:
            return self.parse_list(compose(text, f"{where}{self.name}={one_line(text)}"), where)
        elif self.choices:
            value = {str(choice): choice for choice in self.choices}.get(text, text)
        elif self.kind is bool:
            value = _BOOLS.get(text.lower(), text)
        else:
            try:
                value = self.kind(text)
            except ValueError:
                value = text
        if not self.accepts(value):
            raise ConfigError(f"{where}{self.name}={one_line(text)} is not allowed: give {self.allowed}")
        return value

    def parse_list(self, node: yaml.Node | None, where: str) -> Any:
        """The value that a YAML sequence of mappings writes."""
        if isinstance(node, yaml.ScalarNode) and node.value in ("null", "~"):
            return self.parse(node.value, where)
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise ConfigError(f"{where}{self.name}: give {self.allowed}")
        if len(node.value) > MOST_ITEMS:
            raise ConfigError(f"{where}{self.name}: {len(node.value)} entries, give at most {MOST_ITEMS}")
        kind: Any = self.meta["items"]
        keys = keys_of(kind)
        items = []
        for index, child in enumerate(node.value):
            name = f"{where}{self.name}[{index}]"
            values = {}
            for field_name, value, _ in mapping_items(child, name):
                found = find_key(field_name, keys, f"{name}: ")
                values[field_name] = found.parse(scalar(value, field_name, f"{name}: "), f"{name}: ")
            missing = [key for key, k in keys.items() if not k.nullable and key not in values]
            if missing:
                raise ConfigError(f"{name} has no {missing[0]}: give {keys[missing[0]].allowed}")
            items.append(kind(**values))
        return items

    def accepts(self, value: Any) -> bool:
        """Whether `value` has the type, and lies in the range, that the field declares."""
        if value is None:
            return self.nullable
        if self.kind is list:
            keys = keys_of(self.meta["items"])
            return bool(value) and all(k.accepts(getattr(v, n, None)) for v in value for n, k in keys.items())
        if self.choices:
            return any(type(value) is type(choice) and value == choice for choice in self.choices)
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and re.fullmatch(self.meta["pattern"], value) is not None
        if isinstance(value, bool) or not isinstance(value, (int, float) if self.kind is float else int):
            return False
        compare = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__, "<": float.__lt__}
        try:
            number = float(value)
        except OverflowError:
            return False
        return math.isfinite(number) and all(compare[sign](number, float(b)) for sign, b in self._bounds())


def keys_of(group: type, prefix: str = "") -> dict[str, Key]:
    """Every key of a configuration dataclass and of the groups within it, by dotted name, in order."""
    keys: dict[str, Key] = {}
    hints = get_type_hints(group)
    choices: tuple
    for f in fields(group):
        kind, nullable, choices = hints[f.name], False, ()
        if is_dataclass(kind):
            keys |= keys_of(kind, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        if "bounds" not in f.metadata:
            continue
        if get_origin(kind) in (Union, UnionType):
            nullable = True
            kind = next(arg for arg in get_args(kind) if arg is not NoneType)
        if get_origin(kind) is list:
            kind = list
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            kind = type(choices[0])
        name = prefix + f.name
        default = None if f.default is MISSING else f.default
        keys[name] = Key(name, kind, nullable, choices, default, f.metadata)
    return keys


def show_value(value: Any) -> str:
    """A value as it would be typed."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted name most like `name` in its last word, if any is; its own group comes first."""
    group, _, leaf = name[:100].rpartition(".")

    def likeness(other: str) -> float:
        its_group, _, its_leaf = other.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, its_leaf).ratio() + 0.1 * (group == its_group)

    best = max(known, key=likeness)
    return best if likeness(best) >= 0.7 else None


def find_key(name: str, keys: Mapping[str, Key], where: str = "") -> Key:
    """The key called `name`. Raises ConfigError that names the nearest one, or where the key is now."""
    if name in keys:
        return keys[name]
    if name in MOVED:
        raise ConfigError(f"{where}{name} is not a key here: {MOVED[name]}")
    members = [k for k in keys if k.startswith(f"{name}.")]
    if members:
        raise ConfigError(f"{where}{name} is a group of keys: set one of them, as in {members[0]}=VALUE")
    near = nearest(name, keys)
    hint = f"did you mean {near}?" if near else "--help lists every key"
    raise ConfigError(f"{where}unknown key {one_line(name) or '(empty)'}: {hint}")


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart: the values of the flags, and the text given for each key."""

    arch: str | None
    config: str | None
    print_config: bool
    help: bool
    overrides: dict[str, str]


def split_arguments(
    argv: Sequence[str], keys: Mapping[str, Key], flags_known: Sequence[str] = tuple(_FLAGS)
) -> Arguments:
    """Take a command line apart: flags, of those known, and `key=value` words in any order.

    `arch=NAME` stands for --arch NAME, and --help makes the rest of the line idle.
    Raises ConfigError for an unknown or repeated flag or key, a flag without a value, a word without `=`.
    """
    flags: dict[str, str] = {}
    overrides: dict[str, str] = {}
    if "--help" in argv or "-h" in argv:
        return Arguments(None, None, False, True, {})
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in flags_known:
            if not _FLAGS[name] and equals:
                raise ConfigError(f"{name} takes no value: write {name}")
            if _FLAGS[name] and not equals:
                value = next(words, "")
            if _FLAGS[name] and (not value.strip() or value in _FLAGS):
                raise ConfigError(
                    f"{name} needs a value: write {name} {'FILE.yaml' if name == '--config' else 'NAME'}"
                )
        elif word.startswith("-"):
            _refuse_flag(name, keys, flags_known)
        elif not equals:
            raise ConfigError(
                f"{one_line(word) or '(empty)'}: write key=value, with no space around the =; see --help"
            )
        elif name == "arch" and "--arch" in flags_known:
            name = "--arch"
            if not value.strip():
                raise ConfigError("arch has no value: write arch=NAME or arch=FILE.yaml")
        elif find_key(name, keys).name in overrides:
            raise ConfigError(
                f"{name} is given twice, as {one_line(overrides[name])} and {one_line(value)}: leave one out"
            )
        else:
            overrides[name] = value
            continue
        if name in flags:
            raise ConfigError(f"{name} is given twice: leave one out")
        flags[name] = value
    return Arguments(flags.get("--arch"), flags.get("--config"), "--print-config" in flags, False, overrides)


def _refuse_flag(name: str, keys: Mapping[str, Key], flags: Sequence[str]) -> None:
    bare = name.lstrip("-").replace("-", "_")
    if bare in MOVED:
        hint = MOVED[bare]
    elif bare in keys or nearest(bare, keys):
        hint = f"keys are written without dashes, {bare if bare in keys else nearest(bare, keys)}=VALUE"
    else:
        hint = "the flags are " + ", ".join(flags)
    raise ConfigError(f"unknown flag {one_line(name)}: {hint}")


def read_yaml(path: str) -> yaml.Node | None:
    """The node tree of a YAML file; None if it is empty. Nothing in it is constructed: scalars stay text."""
    try:
        text = read_text(path, MOST_BYTES, "a configuration in YAML", ConfigError)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise ConfigError(f"cannot read {one_line(path)}: {reason}") from None
    return compose(text, one_line(path))


def compose(text: str, where: str) -> yaml.Node | None:
    """The node tree of a YAML text from `where`."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where}{line}: not valid YAML: {one_line(error.problem or error.context or 'cut short')}"
        ) from None
    # An escape or a version of too large a number is another error than those of YAML.
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        raise ConfigError(
            f"{where}: not valid YAML: nested too deeply, or characters YAML does not allow"
        ) from None


def mapping_items(node: yaml.Node | None, path: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """Each entry of a YAML mapping: key, value node, "FILE line N: ". Raises ConfigError for other nodes."""
    if node is None:
        return
    seen = set()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{one_line(path)} line {node.start_mark.line + 1}: expected `key: value` lines")
    for name, value in node.value:
        where = f"{one_line(path)} line {name.start_mark.line + 1}: "
        if not isinstance(name, yaml.ScalarNode):
            raise ConfigError(f"{where}expected a plain key")
        if name.value in seen:
            raise ConfigError(f"{where}{one_line(name.value)} is given twice: leave one out")
        seen.add(name.value)
        yield name.value, value, where


def scalar(node: yaml.Node, name: str, where: str) -> str:
    """The text of a YAML scalar. Raises ConfigError for lists, mappings and tags that ask for objects."""
    if (
        not isinstance(node, yaml.ScalarNode)
        or not node.tag.startswith("tag:yaml.org,2002:")
        or "/" in node.tag
    ):
        raise ConfigError(f"{where}{one_line(name)}: expected a single plain value")
    return node.value


def read_keys(node: yaml.Node | None, path: str, keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """The values that a YAML mapping gives to the keys under `prefix`, nested or dotted."""
    values: dict[str, Any] = {}
    for name, child, where in mapping_items(node, path):
        dotted = prefix + name
        if any(k.startswith(f"{dotted}.") for k in keys) and dotted not in MOVED:
            found = read_keys(child, path, keys, f"{dotted}.")
        elif dotted in keys and keys[dotted].kind is list:
            found = {dotted: keys[dotted].parse_list(child, where)}
        else:
            found = {dotted: find_key(dotted, keys, where).parse(scalar(child, dotted, where), where)}
        if values.keys() & found.keys():
            raise ConfigError(f"{where}{one_line(dotted)} is given twice: leave one out")
        values |= found
    return values


def help_lines(keys: Mapping[str, Key], headings: Mapping[str, str]) -> Iterator[str]:
    """The help's list of keys, by group: the default, the meaning, the allowed values."""
    for group, heading in headings.items():
        yield f"\n{heading}"
        for k in (k for k in keys.values() if k.name.rpartition(".")[0] == group):
            left = f"  {k.name}={k.meta['shown'] or show_value(k.default)}"
            text = f"{k.meta['help']} [{k.allowed}]"
            lines = textwrap.wrap(text, 66, break_on_hyphens=False)
            yield f"{left:<42} {lines[0]}" if len(left) < 42 else f"{left}\n{'':42} {lines[0]}"
            yield from (f"{'':42} {line}" for line in lines[1:])

"""Configuration keys: fields of pydantic dataclasses, with a description and a parser of their values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.fields import FieldInfo

from hrm.common.text import one_line
from hrm.config import foreign
from hrm.config.messages import ConfigError, alternatives, help_entry, nearest, typed

# Strict: 512.0 and true are not whole numbers. Patterns use lookaheads, which need Python's engine.
RULES = ConfigDict(strict=True, validate_assignment=True, allow_inf_nan=False, regex_engine="python-re")
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def key(default: Any, help: str, *, form: str | None = None, shown: str | None = None, **limits: Any) -> Any:
    """Declares a field of a pydantic dataclass as a configuration key.

    limits: pydantic's ge, gt, le, lt, pattern. form: describes the pattern. shown: replaces the default in
    the help if the default depends on other keys.
    """
    return Field(default, description=help, json_schema_extra={"form": form, "shown": shown}, **limits)


@dataclass(frozen=True)
class Key:
    """A configuration key.

    name: dotted, as on the command line. kind: the type without null. choices: for a key with a few values,
    the values by their text. items: the dataclass of a list's entries. default, allowed: descriptions.
    """

    name: str
    info: FieldInfo
    kind: Any
    nullable: bool
    choices: Mapping[str, Any]
    items: Any
    limits: Mapping[str, float]
    default: str
    allowed: str

    def parse(self, text: str, where: str = "") -> Any:
        """Parses the text of a value. Raises ConfigError, whose message starts with `where`."""
        if not text.strip():
            raise ConfigError(f"{where}{self.name} has no value: give {self.allowed}")
        shown = f"{where}{self.name}={one_line(text)}"
        # OmegaConf treats these as a reference to another value and as a missing value.
        if "${" in text or text == "???":
            raise ConfigError(
                f"{shown}: a value cannot hold ${{...}} or be ???; give {self.allowed}, or leave it out"
            )
        try:
            if text in ("null", "~"):
                return {True: None}[self.nullable]
            return self.choices[text] if self.choices else self._adapter.validate_strings(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{shown} is not allowed: give {self.allowed}") from None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        declared: Any = Annotated[self.info.annotation, self.info]
        return TypeAdapter(declared, config=RULES)


def _key(name: str, info: FieldInfo) -> Key:
    declared, extra = info.annotation, dict[str, Any](info.json_schema_extra)  # type: ignore[arg-type]
    nullable = NoneType in get_args(declared)
    kind = next(arg for arg in get_args(declared) if arg is not NoneType) if nullable else declared
    choices = {str(value): value for value in get_args(kind)} if get_origin(kind) is Literal else {}
    items = get_args(kind)[0] if get_origin(kind) is list else None
    limits = {s: getattr(limit, n) for limit in info.metadata for n, s in _SIGNS.items() if hasattr(limit, n)}
    default = extra["shown"] or typed(None if info.is_required() else info.default)
    if items:
        allowed = "a list of {" + ", ".join(f"{name}: VALUE" for name in keys_of(items)) + "}"
    elif choices or kind in (bool, str):
        allowed = extra["form"] or alternatives([*choices] or ["true", "false"])
    else:
        both = limits.keys() == {">=", "<="}
        bounds = (
            "from {>=} to {<=}".format(**limits)
            if both
            else " and ".join(f"{s} {b}" for s, b in limits.items())
        )
        allowed = f"{'a whole' if kind is int else 'a'} number {bounds}"
    allowed += ", or null" if nullable else ""
    return Key(name, info, kind, nullable, choices, items, limits, default, allowed)


def keys_of(group: Any, prefix: str = "") -> dict[str, Key]:
    """All keys of a configuration dataclass and its groups, by dotted name, in the order of declaration."""
    keys: dict[str, Key] = {}
    for name, info in group.__pydantic_fields__.items():
        if is_dataclass(info.annotation):
            keys |= keys_of(info.annotation, f"{prefix}{name}.")
        elif info.description is not None:
            keys[prefix + name] = _key(prefix + name, info)
    return keys


def find_key(name: str, keys: Mapping[str, Key], where: str = "") -> Key:
    """The key of that name. Raises ConfigError with the equivalent or most similar key."""
    if name in keys:
        return keys[name]
    if remedy := foreign.remedy(name, keys):
        raise ConfigError(f"{where}{name} is not a key here: {remedy}")
    if members := [k for k in keys if k.startswith(f"{name}.")]:
        raise ConfigError(f"{where}{name} is a group of keys: set one of them, as in {members[0]}=VALUE")
    near = nearest(name, keys)
    hint = f"did you mean {near}?" if near else "--help lists every key"
    raise ConfigError(f"{where}unknown key {one_line(name) or '(empty)'}: {hint}")


def help_keys(keys: Mapping[str, Key], groups: Mapping[str, Any]) -> Iterator[str]:
    """The help page's list of keys: default, meaning, values. groups: dataclasses by prefix."""
    for group, declared in groups.items():
        yield f"\n{declared.__doc__}"
        for name, k in keys.items():
            if name.rpartition(".")[0] == group:
                yield from help_entry(f"  {name}={k.default}", f"{k.info.description} [{k.allowed}]", 42, 66)

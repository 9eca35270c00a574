"""Reads configuration files of the official HRM code, TRM, URM and EqR.

Such a file is `all_config.yaml`, which their runs save, one of `config/arch/`, or a `config/cfg_*.yaml`.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from hrm.common.text import one_line
from hrm.config import foreign
from hrm.config.keys import Key
from hrm.config.messages import ConfigError, nearest
from hrm.config.read import Reader, mapping_items, scalar

# Trainer keys that may be in an architecture file, as in URM's.
TRAINERS = ("eval_interval", "checkpoint_every_eval", "checkpoint_path", "ema", "ema_rate", "profile")
# Do not read other nested mappings: an alias may lead a mapping back to itself.
_NULL = ("null", "~", "")
_GROUPS = ("arch", "arch.loss", "arch.subgoal_head", "dataset", "wandb")
# A value that refers to another key, which is the default here.
_FOLLOWS = {"arch.puzzle_emb_ndim": "${.hidden_size}"}


@dataclass
class Official:
    """The contents of a file: values by key, notes on differing spellings, the base architecture.

    data_paths: every data set in it.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    base: str | None = None
    data_paths: list[str] = field(default_factory=list)


def is_official(node: yaml.Node | None) -> bool:
    """Whether a YAML file is an official one: it names a model class, or an architecture in Hydra's
    defaults."""
    if not isinstance(node, yaml.MappingNode):
        return False
    top = {name.value: value for name, value in node.value if isinstance(name, yaml.ScalarNode)}
    arch = top.get("arch")
    names_class = isinstance(arch, yaml.MappingNode) and any(name.value == "name" for name, _ in arch.value)
    return names_class or _base(top.get("defaults")) is not None


def official_arch(node: yaml.Node | None) -> yaml.Node | None:
    """An official architecture file, which names a class, as the group `arch`; None for any other file."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == "name" and isinstance(value, yaml.ScalarNode) and "@" in value.value:
            key = yaml.ScalarNode("tag:yaml.org,2002:str", "arch", node.start_mark)
            return yaml.MappingNode(node.tag, [(key, node)], node.start_mark)
    return None


def read_official(
    node: yaml.Node | None, path: str, keys: Mapping[str, Key], taken: Container[str] | None = None
) -> Official:
    """The contents of a file.

    taken: the keys to read besides arch; None for all. Raises ConfigError that reports every mistake: an
    unknown model key, or a value that affects training and does not exist here.
    """
    found, reader = Official(), Reader(keys)
    for name, child, where in _leaves(node, path):
        with reader.faults.collect():
            if name == "defaults":
                found.base = _base(child)
            elif name == "arch.name":
                found.values |= _class_values(scalar(child, name, where), where, keys)
            elif name in ("data_path", "data_paths", "dataset.data_path"):
                nodes = child.value if isinstance(child, yaml.SequenceNode) else [child]
                paths = [scalar(item, name, where) for item in nodes]
                found.data_paths += [text for text in paths if text not in _NULL]
            elif name.startswith("arch.") or taken is None or name in taken:
                _add(found, reader, name, child, where)
            elif name not in keys and not foreign.is_known(name):
                found.notes.append(f"{where}{one_line(name)} is unknown and has no effect here")
    found.values |= reader.result()
    if found.values.get("arch.share_levels"):
        # Official files of single-stack models set H_layers: 0.
        found.values.pop("arch.H_layers", None)
    return found


def _add(found: Official, reader: Reader, name: str, child: yaml.Node, where: str) -> None:
    """Reads one key's value, in the spelling used here."""
    text = _text(child)
    if text == _FOLLOWS.get(name) or (name == "arch.H_layers" and text == "0"):
        return
    if name == "arch.loss.name" or (name in reader.keys and text in _NULL and not reader.keys[name].nullable):
        return
    # In official files this is the folder that a run saves in.
    if name == "checkpoint_path":
        return
    own, given, _ = foreign.translate(name, text, reader.keys)
    if own is None:
        return
    if own in reader.keys:
        reader.add(own, child if given == text and not reader.keys[own].items else given, where)
    elif name.removeprefix("arch.") in TRAINERS:
        return
    elif name in foreign.HARMLESS:
        why = str(foreign.remedy(name, reader.keys)).removeprefix("leave it out; ")
        found.notes.append(f"{where}{name} is left out; {why}")
    elif name.startswith("arch.") or foreign.is_known(name):
        hint = foreign.remedy(name, reader.keys)
        near = None if hint else nearest(name, reader.keys)
        hint = hint or (f"is it {near.removeprefix('arch.')}?" if near else "leave it out if it may")
        what = (
            f"={one_line(text)} does not exist here"
            if foreign.is_known(name)
            else " is unknown and would change the model"
        )
        raise ConfigError(f"{where}{one_line(name)}{what}; {hint}")
    else:
        found.notes.append(f"{where}{one_line(name)} is unknown and has no effect here")


def _class_values(text: str, where: str, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The options of a model class."""
    module, _, name = text.rpartition("@")
    if module.rpartition(".")[2] in foreign.ARCHITECTURES:
        raise ConfigError(f"{where}arch.name={one_line(text)}: that model of TRM's code does not exist here")
    known = [each for each, values in foreign.CLASSES.items() if values.keys() <= keys.keys()]
    if name not in known:
        raise ConfigError(
            f"{where}arch.name ends in {one_line(name)}, expected one of {', '.join(known)}: a model of "
            "another class does not exist here"
        )
    return foreign.CLASSES[name]


def _base(node: yaml.Node | None) -> str | None:
    """The architecture in Hydra's `defaults: [arch: NAME, _self_]`."""
    for child in node.value if isinstance(node, yaml.SequenceNode) else ():
        if isinstance(child, yaml.MappingNode):
            for name, value in child.value:
                if str(name.value).strip("/") == "arch" and isinstance(value, yaml.ScalarNode):
                    return str(value.value)
    return None


def _leaves(node: yaml.Node | None, path: str, prefix: str = "") -> Iterator[tuple[str, yaml.Node, str]]:
    """Each value below a YAML mapping by dotted name, with its place."""
    for name, child, where in mapping_items(node, path):
        if prefix + name == "hydra":
            continue
        if prefix + name in _GROUPS:
            yield from _leaves(child, path, f"{prefix}{name}.")
        else:
            yield prefix + name, child, where


def _text(node: yaml.Node, inner: bool = False) -> str:
    """A value in the form of the command line; inner lists become [...], as they may be nested deeply."""
    if isinstance(node, yaml.SequenceNode):
        return "[...]" if inner else f"[{', '.join(_text(child, inner=True) for child in node.value)}]"
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "{...}"

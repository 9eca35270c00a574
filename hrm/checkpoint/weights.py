"""Initial weights from another run, the official code or its gated fork."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hrm.checkpoint.foreign import Contents, read_file, weights_file
from hrm.checkpoint.hub import fetch_checkpoint
from hrm.checkpoint.identifiers import Identifiers, follow_names, identifiers_of_checkpoint
from hrm.checkpoint.read import MANIFEST, STEP_NAME, WEIGHTS, choose
from hrm.checkpoint.safe_io import CheckpointError
from hrm.common.hub import is_remote
from hrm.common.text import with_sources
from hrm.distributed import World

PUZZLE_TABLE = "puzzle_emb.weights"
# Initial states, which a model with random initial states does not use.
STATES = ("H_init", "L_init")
CHAINS = "L_chains"
# Parts that variants add to v1, with a substring of their tensors' names; a checkpoint may lack a whole part.
ADDED = {"gate networks": ".gating_network.", "subgoal head": "subgoal_head.", "further chains": CHAINS}


def load_weights(
    path: str | Path,
    expected: Mapping[str, torch.Size],
    reset_puzzle_emb: bool = False,
    names: Identifiers | None = None,
    world: World | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights that fit a model's names and shapes, and a line for each omitted part.

    path: a `step_<N>` folder, a run's folder, a weights file of another trainer or the folder that holds it
    (see `hrm.checkpoint.foreign`), or `hub:OWNER/NAME`. expected: the shape of every parameter and persistent
    buffer. If the checkpoint has no gate networks or no subgoal head, the result lacks them and the model
    keeps its own values; with reset_puzzle_emb this also applies to a puzzle table of another length. names:
    of the model's puzzle table, to which the checkpoint's rows are matched; None keeps the row numbers.
    world: the ranks that call this together. Tensors are on the CPU in the file's dtype.
    Raises HubError as `fetch_checkpoint` does; CheckpointError for a damaged file or another architecture,
    with the first differences, and for a puzzle table of other puzzles.
    """
    path, weights, notes, *_ = read_weights(path, world)
    shapes = dict(expected)
    table, shape = weights.get(PUZZLE_TABLE), shapes.get(PUZZLE_TABLE)
    if table is not None and shape is not None and table.shape[1:] == shape[1:]:
        if reset_puzzle_emb:
            notes.append(
                f"{path}: its puzzle embeddings ({len(table)} rows) are left out; the table starts fresh"
            )
            del shapes[PUZZLE_TABLE], weights[PUZZLE_TABLE]
        elif names is not None:
            its_names = identifiers_of_checkpoint(path, len(table))
            remedy = "use the data it was trained on, or reset_puzzle_emb=true for a fresh table"
            weights[PUZZLE_TABLE], told = follow_names(table, its_names, names, shape[0], path, remedy)
            notes += told
    if not weights.keys() & set(STATES) and shapes.keys() >= set(STATES):
        notes.append(
            f"{path}: it has no {' and no '.join(STATES)}; they keep their initial values. This suits only "
            "a model trained with arch.init=random"
        )
        shapes = {name: shape for name, shape in shapes.items() if name not in STATES}
    if CHAINS in weights and CHAINS not in shapes:
        del weights[CHAINS]
        notes.append(f"{path}: trained with arch.chains; only the initial state of the first chain is used")
    for what, mark in ADDED.items():
        added = [name for name in shapes if mark in name]
        if added and not any(mark in name for name in weights):
            notes.append(f"{path}: it has no {what}; its {len(added)} tensors keep their initial values")
            shapes = {name: shape for name, shape in shapes.items() if name not in added}

    reshaped = [name for name in shapes if name in weights and weights[name].shape != shapes[name]]
    differing = [
        f"{name} is {tuple(weights[name].shape)} there, {tuple(shapes[name])} here" for name in reshaped
    ]
    differing += [f"{name} is missing there" for name in shapes if name not in weights]
    differing += [f"{name} is unknown here" for name in weights if name not in shapes]
    if not differing:
        return weights, list(map(with_sources, notes))
    if len(differing) == 1 and reshaped == [PUZZLE_TABLE]:
        there, here = weights[PUZZLE_TABLE].shape, shapes[PUZZLE_TABLE]
        if there[1:] == here[1:]:
            raise CheckpointError(
                f"{path} has a puzzle table of {there[0]} rows, but {here[0]} are needed here; use the data "
                "it was trained on, or reset_puzzle_emb=true for a fresh table"
            )
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise CheckpointError(
        f"{path} is a checkpoint of another architecture: {'; '.join(differing[:3])}{more}; "
        "give the arch and arch.* options it was trained with"
    )


def read_weights(path: str | Path, world: World | None = None) -> Contents:
    """The weights file at a path, and its contents.

    path, world: see `load_weights`. Raises CheckpointError or HubError.
    """
    notes: list[str] = []
    path = fetch_checkpoint(str(path), world) if is_remote(path) else Path(path)
    if path.is_dir():
        names = [(entry, STEP_NAME.fullmatch(entry.name)) for entry in (path, *path.iterdir())]
        is_own = (path / MANIFEST).exists() or any(match and entry.is_dir() for entry, match in names)
        file = None if is_own else weights_file(path)
        if file is None:
            path, _, notes = choose(path)
            file = path / WEIGHTS
        path = file
    elif not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint's file or folder")
    return read_file(path)._replace(notes=notes)

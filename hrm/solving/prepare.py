"""Loads the trained model for a user's puzzle, and selects the puzzle's embedding."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hrm.checkpoint.identifiers import hashes_of
from hrm.checkpoint.load_model import Trained, find_trained, load_trained
from hrm.checkpoint.weights import PUZZLE_TABLE
from hrm.common.errors import UserError
from hrm.common.hub import is_remote
from hrm.common.text import one_line
from hrm.config.load import resolve_device
from hrm.data.arc.augment import Pair, canvas
from hrm.data.arc.files import Task
from hrm.data.format import IGNORE_LABEL, Metadata, read_names
from hrm.data.puzzle_kinds import Kind, kind_of
from hrm.evaluation.paths import check_rule, differences
from hrm.evaluation.selection import Rule
from hrm.solving.adapt import learn_embedding
from hrm.solving.trace import Paths

# Called with a line for the user.
Note = Callable[[str], None]


def load_for(
    kind: Kind | None, puzzle: str, checkpoint: str, *, device: str, ema: bool | None, note: Note
) -> Trained:
    """The model of a checkpoint for puzzles of this kind and size. puzzle: the user's text.

    kind: None for numbers, which any kind accepts. Without its training data the model's sizes come from the
    puzzle. Raises UserError for a checkpoint of another kind or size, and the errors of `load_trained`.
    """
    if not is_remote(checkpoint) and not Path(checkpoint).exists():
        raise UserError(f"{checkpoint}: no such folder or file; expected a run or a checkpoint of one")
    place = resolve_device(device)
    found, metadata = find_trained(checkpoint), None
    data = found.config.data_path
    if kind is not None and found.metadata is None and data is not None and not Path(data).is_dir():
        rows = len(found.weights[PUZZLE_TABLE]) if PUZZLE_TABLE in found.weights else 1
        metadata = Metadata(0, 0, 0, kind.vocab_size, kind.rows * kind.cols, rows, 1, 1.0, ["all"])
        note(f"{data} is missing; the model is assumed to be trained on {_description(kind)}")
    # On a CPU the products of one puzzle are too small to gain from bfloat16.
    dtype = "float32" if place == "cpu" and found.config.dtype == "auto" else "auto"
    trained = load_trained(found, device=place, dtype=dtype, metadata=metadata, ema=ema)
    for line in trained.notes:
        note(line)
    if kind is not None:
        check_fits(kind, puzzle, checkpoint, trained)
    return trained


def check_fits(kind: Kind, puzzle: str, checkpoint: str, trained: Trained) -> None:
    """Raises UserError unless the model was trained on puzzles of this kind and size; ARC puzzles may have
    any canvas."""
    its = kind_of(trained.metadata)
    is_of_size = (its.rows, its.cols) == (kind.rows, kind.cols) or kind.name == "arc"
    if its.name != kind.name or not is_of_size:
        remedy = "give a checkpoint of the puzzle's kind and size"
        if its.name == "tokens":
            remedy = f"give it {its.rows * its.cols} numbers by --tokens"
        raise UserError(
            f"{puzzle[:100]!r} is {_description(kind)}, but {checkpoint} was trained on "
            f"{_description(its)}; {remedy}"
        )


def _description(kind: Kind) -> str:
    if kind.name == "tokens":
        return f"a sequence of {kind.rows * kind.cols} tokens"
    names = {"sudoku": "Sudoku", "maze": "a maze", "arc": "ARC"}
    return f"{names[kind.name]} of {kind.rows} x {kind.cols} cells"


def identifier_for(task: Task | None, asked: str | None, trained: Trained, note: Note) -> int | None:
    """The row of the puzzle table for a puzzle, None for the blank one.

    asked: the user's name or number; by default an ARC task's own name is looked up. Raises
    UserError for a name that the training data does not have.
    """
    if trained.model.puzzle_emb is None:
        if asked is not None:
            raise UserError(f"--identifier: {trained.path} has no puzzle embeddings; leave it out")
        return None
    name = asked or (task.name if task is not None else None)
    if name is None:
        return None
    path, row, known = trained.names.source, trained.names.row_of(name), trained.names.hashes is not None
    if row is not None:
        return row
    if asked is None:
        why = "was not trained on" if known else f"cannot be looked up without {path}"
        note(
            f"{name} {why}: it gets the blank identifier, whose embedding is not specific to the task; "
            "--adapt-steps 100 learns one from its demonstrations"
        )
        return None
    if not (name.isascii() and name.isdigit() and len(name) < 19):
        what = f"is unknown to {trained.path}" if known else f"cannot be looked up without {path}"
        raise UserError(
            f"--identifier {one_line(name, 100)} {what}; give the number of a row, or leave it out"
        )
    return int(name)


def adapted_embedding(
    steps: int, demonstrations: Sequence[Pair], trained: Trained, note: Note
) -> tuple[Tensor, list[float]]:
    """Learns an embedding (puzzle_emb_ndim) from demonstrations in `steps` updates; returns it with the
    losses.

    demonstrations: pairs with both grids. Raises UserError as `learn_embedding` does.
    """
    config, ignored = trained.config, trained.metadata.ignore_label_id
    side = kind_of(trained.metadata).rows
    inputs, labels = (
        np.stack([canvas(pair.grids[n], side=side) for pair in demonstrations]).astype(int) for n in (0, 1)
    )
    labels[labels == ignored] = IGNORE_LABEL
    losses: list[float] = []

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        if step % max(1, steps // 10) == 0 or step == steps:
            note(f"adapting to {len(inputs)} demonstrations: step {step} of {steps}, loss {loss:.4f}")

    row = learn_embedding(
        trained.model,
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        steps=steps,
        lr=config.puzzle_emb_lr,
        loss=config.loss,
        weight_decay=config.puzzle_emb_weight_decay,
        seed=config.seed,
        report=record,
    )
    return row, losses


def paths_for(
    count: int,
    by: Sequence[str],
    select: Rule,
    seed: int,
    noise: float | None,
    kind: Kind,
    embedding: Tensor | int | None,
    trained: Trained,
) -> Paths:
    """The user's paths; for the arguments see `hrm.solve`.

    Raises UserError for a rule or a symmetry that the puzzle does not have.
    """
    check_rule(select, kind)
    if count == 1:
        return Paths()
    names: list[str] = []
    if "symmetry" in by and kind.name == "arc" and trained.model.puzzle_emb is not None:
        folder = Path(trained.config.data_path or ".")
        names = read_names(folder) if (folder / "identifiers.json").is_file() else []
        known = trained.names.hashes
        if names and known is not None and not torch.equal(hashes_of(names), known):
            raise UserError(
                f"--by symmetry: {folder} was rebuilt after {trained.path} was trained on it, so its "
                "names do not fit the model's puzzle embeddings; write --by init or --by noise"
            )
        if not isinstance(embedding, int) or embedding >= len(names):
            raise UserError(
                "--by symmetry: the model has puzzle embeddings for the augmentations of its training tasks "
                "only; write --by init or --by noise for this task"
            )
    views, randomness = differences(by, kind, trained.model, seed=seed, noise=noise, names=names)
    return Paths(count, views, randomness, seed)

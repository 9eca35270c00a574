"""Notes on valid data sets from other software: deviations from the usual contents and their consequences."""

from collections.abc import Iterator

import numpy as np

from hrm.data.dataset import PuzzleDataset
from hrm.data.format import IGNORE_LABEL, PuzzleSet, ignored_labels
from hrm.data.puzzle_kinds import kind_for, kind_of

# Maximum number of examples per set whose labels are inspected, evenly spaced.
LOOKED_AT = 1000


def deviations(dataset: PuzzleDataset) -> Iterator[str]:
    """A line for each deviation of a split; data sets of the builders have none.

    Reads at most LOOKED_AT examples per set.
    """
    yield from dataset.notes
    metadata = dataset.metadata
    if metadata.kind is None:
        sizes = kind_for(metadata.vocab_size, metadata.seq_len, metadata.columns).name
        if kind_of(metadata, dataset.sets).name != sizes:
            yield (
                f"{dataset.folder}: its sizes fit {sizes}, but most examples break the rules of "
                f'{sizes}; it is read as plain tokens; "kind": "{sizes}" in dataset.json declares it'
            )
    for name, part in dataset.sets.items():
        dataset.check_unchanged(name)
        where = f"{dataset.folder}, set {name}"
        # Evaluation reads every example, whatever its group.
        groups = () if dataset.folder.name == "test" else _groups(part)
        for what in (*groups, *_labels(dataset, part)):
            yield f"{where}: {what}"


def _groups(part: PuzzleSet) -> Iterator[str]:
    """Reports that an epoch uses few examples, because different puzzles share a group or a puzzle."""
    examples, puzzles, groups = len(part.inputs), len(part.puzzle_identifiers), len(part.group_indices) - 1
    # Puzzles with different names are a task and its augmentations.
    if groups == 1 and puzzles > 1 and len(np.unique(part.puzzle_identifiers)) == 1:
        yield (
            f"all {puzzles:,} puzzles are in one group, so an epoch uses 1 puzzle; a group is one original "
            f"puzzle and its augmentations: for different puzzles, group_indices is 0, 1, ..., {puzzles}"
        )
    elif puzzles == 1 and examples > 1:
        yield (
            f"all {examples:,} examples are one puzzle, so an epoch uses one batch of them at most; for "
            f"different puzzles, puzzle_indices and group_indices are 0, 1, ..., {examples}"
        )


def _labels(dataset: PuzzleDataset, part: PuzzleSet) -> Iterator[str]:
    rows = np.unique(np.linspace(0, len(part.inputs) - 1, LOOKED_AT).astype(np.int64))
    inputs, labels = part.inputs[rows], part.labels[rows]
    ignore = dataset.metadata.ignore_label_id
    ignored = np.isin(labels, ignored_labels(ignore))
    if ignore != IGNORE_LABEL and (labels == IGNORE_LABEL).any():
        also = "" if ignore is None else f", nor do labels {ignore}"
        yield (
            f"labels {IGNORE_LABEL} carry no loss{also}: ignore_label_id is "
            f"{'null' if ignore is None else ignore}; set it to {IGNORE_LABEL} in dataset.json if "
            f"{IGNORE_LABEL} is the only ignored label"
        )
    if ignored.all():
        yield "no label is known: none of the inspected examples carries loss"
    elif not ignored.any() and np.array_equal(labels, inputs):
        yield (
            f"the labels equal the inputs in all {len(rows):,} inspected examples, so copying solves them; "
            "labels are the answers"
        )

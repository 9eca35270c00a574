"""Targets that read data sets: one file of a small one is another."""

import argparse
import io
import json
from functools import cache
from random import Random

import numpy as np

from hrm.common.errors import UserError
from tests.fuzz.judge import Target, files_of, given, put
from tests.fuzz.mutations import json_changed, npy_changed
from tests.fuzz.puzzles import SUDOKUS

METADATA = {
    "pad_id": 0,
    "ignore_label_id": 0,
    "blank_identifier_id": 0,
    "vocab_size": 6,
    "seq_len": 16,
    "num_puzzle_identifiers": 1,
    "total_groups": 2,
    "mean_puzzle_examples": 1.0,
    "sets": ["all"],
}


def dataset_files() -> dict[str, bytes]:
    """A data set of two puzzles and two splits, as the official code writes it."""
    questions, answers = (
        np.array([[int(cell) + 1 for cell in row.replace(".", "0")] for row in rows], np.uint8)
        for rows in zip(*SUDOKUS, strict=True)
    )
    arrays: dict[str, np.ndarray] = {
        "inputs": questions,
        "labels": answers,
        "puzzle_identifiers": np.zeros(2, np.int32),
        "puzzle_indices": np.arange(3, dtype=np.int32),
        "group_indices": np.arange(3, dtype=np.int32),
        "difficulty": np.array([1, 7], np.int32),
    }
    files = {"identifiers.json": b'["<blank>"]'}
    for split in ("train", "test"):
        files[f"{split}/dataset.json"] = json.dumps(METADATA).encode()
        for name, array in arrays.items():
            np.save(file := io.BytesIO(), array)
            files[f"{split}/all__{name}.npy"] = file.getvalue()
    return files


ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices", "difficulty")


def _dataset(name: str, data: bytes) -> None:
    """Looks at a data set and opens it, where one file of its training split is another."""
    from hrm.data.dataset import PuzzleDataset, test_batches, train_batches
    from hrm.data.inspect.command import run

    files = files_of("dataset", dataset_files)
    root = put(f"dataset/{name}", data).parents[name.count("/")]
    try:
        args = {"path": root, "samples": 2, "seed": 0, "deep": False}
        args |= dict.fromkeys(("split", "kind", "png"))
        refused = None
        try:
            run(argparse.Namespace(**args))
        except SystemExit as error:
            if error.code != 1:
                raise
        except UserError as error:
            refused = error
        dataset = PuzzleDataset(root, "train")
        list(train_batches(dataset, seed=0, epochs=2, epochs_per_iter=1, global_batch_size=2))
        list(test_batches(dataset, global_batch_size=3))
        if refused:
            raise refused
    finally:
        put(f"dataset/{name}", files[name])


def read_dataset_json(data: bytes) -> None:
    _dataset("train/dataset.json", data)


def read_identifiers(data: bytes) -> None:
    _dataset("identifiers.json", data)


def read_array(data: bytes) -> None:
    """The first byte chooses the array."""
    _dataset(f"train/all__{ARRAYS[data[0] % len(ARRAYS) if data else 0]}.npy", data[1:])


@cache
def array_seeds() -> tuple[bytes, ...]:
    files = dataset_files()
    return tuple(bytes([n]) + files[f"train/all__{name}.npy"] for n, name in enumerate(ARRAYS))


def array_changed(random: Random, data: bytes) -> bytes:
    return data[:1] + npy_changed(random, data[1:])


TARGETS = (
    Target("dataset", read_dataset_json, given(json.dumps(METADATA).encode()), json_changed),
    Target("identifiers", read_identifiers, given(b'["<blank>"]'), json_changed),
    Target("array", read_array, array_seeds, array_changed),
)

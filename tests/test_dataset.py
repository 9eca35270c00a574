"""The data set's layout: written and read back, damage named, and drawn from in the order promised."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data import dataset, layout
from hrm.data.dataset import PuzzleDataset, fingerprint, steps_in, train_batches
from hrm.data.layout import ARRAYS, DatasetError, PuzzleSet
from hrm.data.writer import Shape, new_dataset
from hrm.errors import UserError

CELLS = 5
VOCAB = 9


def a_set(groups: list[list[int]], seed: int = 0) -> PuzzleSet:
    """A set from the number of examples of every puzzle of every group; each input row tells its example."""
    sizes = [size for group in groups for size in group]
    examples = sum(sizes)
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, VOCAB, (examples, CELLS), dtype=np.uint8)
    # The number of the example in base 8, so that a batch can be traced back to the rows it came from.
    for place in range(3):
        inputs[:, place] = np.arange(examples) // 8**place % 8
    return PuzzleSet(
        inputs=inputs,
        labels=rng.integers(0, VOCAB, (examples, CELLS), dtype=np.uint8),
        puzzle_identifiers=np.arange(1, len(sizes) + 1, dtype=np.int32),
        puzzle_indices=np.cumsum([0, *sizes]).astype(np.int32),
        group_indices=np.cumsum([0, *map(len, groups)]).astype(np.int32),
    )


def written(
    folder: Path, *sets: list[list[int]], split: str = "train", identifiers: int = 200, **shape: Any
) -> PuzzleDataset:
    """A data set of one split, whose sets are called set0, set1, ..."""
    with new_dataset(folder) as data:
        part = data.split(split, Shape(**{"seq_len": CELLS, "vocab_size": VOCAB} | shape))
        for number, groups in enumerate(sets):
            part.add(f"set{number}", a_set(groups, number))
        data.close([str(number) for number in range(identifiers)])
    return PuzzleDataset(folder, split)


def examples_of(batch: dataset.Batch) -> list[int]:
    return [int(row[0] + 8 * row[1] + 64 * row[2]) for row in batch.inputs]


MIXED = [[1, 1], [3], [2, 4, 1], [7], [1], [2, 2], [5, 1], [1, 1, 1]]


# --- on disk


def test_unknown_keys_and_a_missing_ignore_label_are_fine(tmp_path: Path) -> None:
    data = written(tmp_path, MIXED)
    path = tmp_path / "train/dataset.json"
    values = json.loads(path.read_text()) | {"made_by": "somebody"}
    del values["ignore_label_id"]
    path.write_text(json.dumps(values))
    again = PuzzleDataset(tmp_path, "train")
    assert again.metadata == replace(data.metadata, ignore_label_id=None)
    batch = next(dataset.test_batches(again, global_batch_size=4))[1]
    np.testing.assert_array_equal(batch.labels, data.sets["set0"].labels[:4])


def test_missing_folder_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"data/train: no such folder.*hrm\.data sudoku --output-dir \S*data"
    ):
        PuzzleDataset(tmp_path / "data", "train")


def cut(path: Path, share: float) -> None:
    size = path.stat().st_size
    os.truncate(path, int(size * share))


def altered(array: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        path = folder / f"set0__{array}.npy"
        np.save(path, change(np.load(path)), allow_pickle=True)

    return alter


def with_value(index: Any, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.int32)
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "set0__labels.npy").unlink(), r"set0__labels\.npy: no such file"),
        (lambda f: cut(f / "set0__inputs.npy", 0.9), r"set0__inputs\.npy: not a readable \.npy array"),
        (lambda f: cut(f / "set0__inputs.npy", 0.1), r"set0__inputs\.npy: not a readable \.npy array"),
        (lambda f: cut(f / "set0__labels.npy", 0), r"set0__labels\.npy: not a readable \.npy array"),
        (lambda f: cut(f / "set0__group_indices.npy", 0.9), r"set0__group_indices\.npy: not a readable"),
        (lambda f: cut(f / "set0__puzzle_indices.npy", 0.3), r"set0__puzzle_indices\.npy: not a readable"),
        (
            lambda f: (f / "set0__inputs.npy").write_text("rows"),
            r"set0__inputs\.npy: not a readable \.npy array",
        ),
        (
            lambda f: np.savez((f / "set0__inputs.npy").open("wb"), a=np.zeros(3)),
            r"set0__inputs\.npy: an archive",
        ),
        (altered("puzzle_identifiers", lambda a: a.astype(object)), r"identifiers\.npy: not a readable"),
        (altered("inputs", lambda a: a.astype(object)), r"inputs\.npy: not a readable"),
        (altered("inputs", lambda a: a.astype(np.float32)), r"inputs\.npy: numbers of type float32"),
        (altered("labels", lambda a: a > 0), r"labels\.npy: numbers of type bool"),
        (altered("inputs", lambda a: a[:, :, None]), r"inputs\.npy: shape \(33, 5, 1\)"),
        (altered("inputs", lambda a: a[:0]), r"inputs\.npy: shape \(0, 5\)"),
        (altered("group_indices", lambda a: a[None]), r"group_indices\.npy: shape \(1, 9\)"),
        (altered("labels", lambda a: a[:, :4]), r"labels\.npy: rows of 4 cells.*seq_len 5"),
        (altered("labels", lambda a: a[:-1]), r"labels\.npy: 32 rows, but the inputs have 33"),
        (altered("inputs", with_value((7, 2), VOCAB)), r"inputs\.npy: row 7 holds 9, .*< 9 \(vocab_size 9\)"),
        (altered("inputs", with_value((8, 0), -1)), r"inputs\.npy: row 8 holds -1, "),
        (altered("labels", with_value((32, 4), 77)), r"labels\.npy: row 32 holds 77, "),
        (
            altered("puzzle_identifiers", with_value(2, 200)),
            r"identifiers\.npy: row 2 holds 200, .*identifiers 200",
        ),
        (altered("puzzle_identifiers", with_value(3, -4)), r"identifiers\.npy: row 3 holds -4, "),
        (altered("puzzle_identifiers", lambda a: a[1:]), r"puzzle_indices\.npy: length 16, .*the 14 puzzle"),
        (altered("puzzle_indices", with_value(0, 1)), r"puzzle_indices\.npy: starts with 1 "),
        (altered("puzzle_indices", with_value(4, 1)), r"puzzle_indices\.npy: row 4 holds 1 after 5"),
        (altered("puzzle_indices", with_value(-1, 35)), r"puzzle_indices\.npy: ends with 35, expected 33"),
        (altered("group_indices", with_value(-1, 99)), r"group_indices\.npy: ends with 99, expected 15"),
        (altered("group_indices", with_value(2, 2)), r"group_indices\.npy: row 2 holds 2 after 2"),
        (altered("group_indices", lambda a: np.delete(a, 2)), r"total_groups is 8, .*hold 7 groups"),
    ],
)
def test_damaged_arrays_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    written(tmp_path, MIXED)
    damage(tmp_path / "train")
    with pytest.raises(DatasetError, match=message) as caught:
        PuzzleDataset(tmp_path, "train")
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [(0, 0), (17, 3), (32, 4)])
def test_a_bad_label_is_found_in_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[int, int]
) -> None:
    written(tmp_path, MIXED)
    path = tmp_path / "train/set0__labels.npy"
    labels = np.load(path)
    labels[where] = 200
    np.save(path, labels)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4 * CELLS)
    with pytest.raises(DatasetError, match=f"row {where[0]} holds 200"):
        PuzzleDataset(tmp_path, "train")


def test_an_ignored_label_may_lie_outside_the_vocabulary(tmp_path: Path) -> None:
    written(tmp_path, MIXED, ignore_label_id=-7)
    path = tmp_path / "train/set0__labels.npy"
    labels = np.load(path).astype(np.int16)
    labels[3, 1] = -7
    np.save(path, labels)
    batch = next(dataset.test_batches(PuzzleDataset(tmp_path, "train"), global_batch_size=8))[1]
    assert [tuple(where) for where in np.argwhere(batch.labels == -100)] == [(3, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 6}, r"inputs\.npy: rows of 5 cells, dataset\.json says seq_len 6"),
        ({"vocab_size": 8}, r"inputs\.npy: row \d+ holds 8, .*vocab_size 8"),
        ({"num_puzzle_identifiers": 15}, r"puzzle_identifiers\.npy: row 14 holds 15"),
        ({"total_groups": 7}, r"dataset\.json: total_groups is 7, but the arrays hold 8"),
        ({"mean_puzzle_examples": 2.5}, r"dataset\.json: mean_puzzle_examples is 2\.5, .* give 2\.2;"),
        ({"mean_puzzle_examples": float("nan")}, r"mean_puzzle_examples is nan"),
        ({"mean_puzzle_examples": "2"}, r"mean_puzzle_examples is '2'"),
        ({"vocab_size": "9"}, r"vocab_size is '9', expected a whole number"),
        ({"vocab_size": True}, r"vocab_size is True"),
        ({"seq_len": 0}, r"seq_len is 0"),
        ({"pad_id": 9}, r"pad_id is 9, expected less than vocab_size 9"),
        ({"blank_identifier_id": 200}, r"blank_identifier_id is 200, .*num_puzzle_identifiers 200"),
        ({"ignore_label_id": "0"}, r"ignore_label_id is '0'"),
        ({"sets": []}, r"sets is \[\]"),
        ({"sets": "set0"}, r"sets is 'set0'"),
        ({"sets": ["set0", "set0"]}, r"'set0' is there twice"),
        ({"sets": ["../set0"]}, r"set name '\.\./set0', expected a plain name"),
        ({"sets": ["a/b"]}, r"set name 'a/b'"),
        ({"sets": ["a\\b"]}, r"set name"),
        ({"sets": ["other"]}, r"other__inputs\.npy: no such file"),
    ],
)
def test_contradicting_metadata_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    written(tmp_path, MIXED)
    path = tmp_path / "train/dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DatasetError, match=message):
        PuzzleDataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"pad_id": 0}', "no blank_identifier_id, vocab_size, seq_len"),
    ],
)
def test_a_bad_description_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    written(tmp_path, MIXED)
    path = tmp_path / "train/dataset.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DatasetError, match=rf"dataset\.json: {message}"):
        PuzzleDataset(tmp_path, "train")


def test_the_fingerprint_sees_every_byte_and_not_the_place(tmp_path: Path) -> None:
    first, second = (fingerprint(written(tmp_path / name, MIXED)) for name in "ab")
    assert first == second and len(first) == 64
    seen = {first}
    for array in ARRAYS:
        path = tmp_path / f"b/train/set0__{array}.npy"
        before = path.read_bytes()
        data = PuzzleDataset(tmp_path / "b", "train")
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        seen.add(fingerprint(data))
        path.write_bytes(before)
    # A byte that moves from the end of one file to the beginning of the next.
    one, next_one = (tmp_path / f"b/train/set0__{array}.npy" for array in ARRAYS[:2])
    before, after = one.read_bytes(), next_one.read_bytes()
    one.write_bytes(before[:-1])
    next_one.write_bytes(before[-1:] + after)
    seen.add(fingerprint(data))
    one.write_bytes(before)
    next_one.write_bytes(after)
    (tmp_path / "b/train/dataset.json").write_text((tmp_path / "a/train/dataset.json").read_text() + " ")
    seen.add(fingerprint(PuzzleDataset(tmp_path / "b", "train")))
    assert len(seen) == len(ARRAYS) + 3


# --- training batches


def test_single_examples_come_in_the_official_order(tmp_path: Path) -> None:
    data = written(tmp_path, [[1, 1, 1], [1], [1, 1], [1, 1, 1, 1], [1]] * 9)
    part = data.sets["set0"]
    batches = train_batches(data, seed=11, epochs=8, epochs_per_iter=3, global_batch_size=16)
    seen = [(batch.position, examples_of(batch)) for batch in batches]
    expected = []
    for iteration, epochs in enumerate([3, 3, 2]):
        # Iteration by iteration and group by group, with one scalar draw each.
        rng = np.random.Generator(np.random.Philox(seed=11 + iteration + 1))
        order = np.concatenate([rng.permutation(45) for _ in range(epochs)])
        drawn = [int(rng.integers(part.group_indices[g], part.group_indices[g + 1])) for g in order]
        full = len(drawn) // 16
        for index in range(full):
            position = (iteration, index + 1) if index + 1 < full else (iteration + 1, 0)
            expected.append((position, drawn[16 * index : 16 * (index + 1)]))
    assert seen == expected


def test_puzzles_of_several_examples_are_packed_in_the_official_order(tmp_path: Path) -> None:
    data = written(tmp_path, MIXED)
    part = data.sets["set0"]
    batches = list(train_batches(data, seed=4, epochs=6, epochs_per_iter=6, global_batch_size=7))
    rng = np.random.Generator(np.random.Philox(seed=5))
    order = np.concatenate([rng.permutation(8) for _ in range(6)])
    drawn = [int(rng.integers(part.group_indices[g], part.group_indices[g + 1])) for g in order]
    expected: list[list[int]] = [[]]
    for puzzle in drawn:
        if len(expected[-1]) == 7:
            expected.append([])
        size = int(part.puzzle_indices[puzzle + 1] - part.puzzle_indices[puzzle])
        expected[-1] += [puzzle + 1] * min(size, 7 - len(expected[-1]))
    if len(expected[-1]) < 7:
        expected.pop()
    assert [batch.puzzle_identifiers.tolist() for batch in batches] == expected
    chosen: dict[int, set[int]] = {}
    for batch in batches:
        examples = np.array(examples_of(batch))
        for start in np.unique(np.nonzero(np.diff(batch.puzzle_identifiers, prepend=-1))[0]):
            puzzle = batch.puzzle_identifiers[start] - 1
            run = examples[start:][batch.puzzle_identifiers[start:] == puzzle + 1]
            low, high = part.puzzle_indices[puzzle], part.puzzle_indices[puzzle + 1]
            assert ((run >= low) & (run < high)).all()
            chosen.setdefault(int(puzzle), set()).update(run.tolist())
        np.testing.assert_array_equal(batch.inputs, part.inputs[examples])
        labels = part.labels[examples].astype(int)
        np.testing.assert_array_equal(batch.labels, np.where(labels == 0, -100, labels))
        assert {batch.inputs.dtype, batch.labels.dtype, batch.puzzle_identifiers.dtype} == {
            np.dtype(np.int32)
        }
    # Group 3 is one puzzle of 7 examples: over six epochs all of them turn up.
    assert chosen[6] == set(range(12, 19))


def test_examples_of_a_puzzle_are_drawn_without_replacement_and_anew(tmp_path: Path) -> None:
    data = written(tmp_path, [[40]])
    batches = [
        examples_of(b) for b in train_batches(data, seed=0, epochs=6, epochs_per_iter=2, global_batch_size=9)
    ]
    assert len(batches) == 6
    assert all(len(set(batch)) == 9 for batch in batches)
    assert len({tuple(batch) for batch in batches}) == 6
    again = [
        examples_of(b) for b in train_batches(data, seed=0, epochs=6, epochs_per_iter=2, global_batch_size=9)
    ]
    other = [
        examples_of(b) for b in train_batches(data, seed=1, epochs=6, epochs_per_iter=2, global_batch_size=9)
    ]
    assert again == batches != other


def test_every_set_counts_as_an_iteration_of_the_official_reader(tmp_path: Path) -> None:
    data = written(tmp_path, [[1]] * 10, [[1]] * 12)
    batches = train_batches(data, seed=3, epochs=4, epochs_per_iter=2, global_batch_size=6)
    rows = [examples_of(batch) for batch in batches]
    expected = []
    for number in range(4):
        rng = np.random.Generator(np.random.Philox(seed=3 + number + 1))
        groups = 10 if number % 2 == 0 else 12
        order = np.concatenate([rng.permutation(groups) for _ in range(2)])
        expected += [order[6 * i : 6 * i + 6].tolist() for i in range(2 * groups // 6)]
    assert rows == expected


@pytest.mark.parametrize("groups", [[[1]] * 21, MIXED])
def test_ranks_share_one_global_order(tmp_path: Path, groups: list[list[int]]) -> None:
    data = written(tmp_path, groups)

    def run(rank: int, world_size: int) -> Iterator[dataset.TrainBatch]:
        return train_batches(
            data, seed=2, epochs=5, epochs_per_iter=2, global_batch_size=6, rank=rank, world_size=world_size
        )

    whole = list(run(0, 1))
    assert len(whole) > 3
    for world_size in (2, 3, 6):
        ranks = [list(run(rank, world_size)) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            parts = [rank[step] for rank in ranks]
            assert {part.position for part in parts} == {batch.position}
            for name in ("inputs", "labels", "puzzle_identifiers"):
                joined = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(batch, name))
        assert {len(rank) for rank in ranks} == {len(whole)}


class Watched(np.ndarray):
    """An array that counts the rows taken from it."""

    taken = 0

    def __getitem__(self, key: Any) -> Any:
        Watched.taken += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("sets", [([[1]] * 21,), (MIXED,), ([[1]] * 9, MIXED)])
def test_a_run_goes_on_from_any_position(tmp_path: Path, sets: tuple[list[list[int]], ...]) -> None:
    data = written(tmp_path, *sets)
    options: dict[str, Any] = {"seed": 7, "epochs": 7, "epochs_per_iter": 3, "global_batch_size": 6}
    whole = list(train_batches(data, **options))
    assert whole[-1].position == (3, 0)
    for step, batch in enumerate(whole):
        rest = list(train_batches(data, **options, start=batch.position))
        assert [b.position for b in rest] == [b.position for b in whole[step + 1 :]]
        for ours, theirs in zip(rest, whole[step + 1 :], strict=True):
            np.testing.assert_array_equal(ours.inputs, theirs.inputs)
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            np.testing.assert_array_equal(ours.puzzle_identifiers, theirs.puzzle_identifiers)
    for name, part in data.sets.items():
        data.sets[name] = replace(part, inputs=part.inputs.view(Watched))
    Watched.taken = 0
    next(train_batches(data, **options, start=whole[-2].position))
    assert Watched.taken == 1


def test_requests_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    data = written(tmp_path, MIXED)
    options: dict[str, Any] = {"seed": 0, "epochs": 4, "epochs_per_iter": 2, "global_batch_size": 6}
    with pytest.raises(DatasetError, match="global_batch_size=6 cannot be shared by 4 processes"):
        train_batches(data, **options, world_size=4)
    with pytest.raises(DatasetError, match="global_batch_size=6 cannot be shared by 4 processes"):
        dataset.test_batches(data, global_batch_size=6, world_size=4)
    with pytest.raises(DatasetError, match="rank=2 is not one of the 2 processes"):
        train_batches(data, **options, rank=2, world_size=2)
    # The largest puzzles of the groups have 24 examples, so two epochs never have more than 48.
    with pytest.raises(DatasetError, match=r"of 2 epochs gives 48 examples, .*global_batch_size=49; lower"):
        train_batches(data, **options | {"global_batch_size": 49})
    with pytest.raises(DatasetError, match=r"of 2 epochs gives [34]\d examples, .*global_batch_size=48"):
        list(train_batches(data, **options | {"global_batch_size": 48}))
    with pytest.raises(DatasetError, match="cannot go on at batch 99 of an iteration of"):
        list(train_batches(data, **options, start=(1, 99)))


def test_steps_are_the_official_estimate(tmp_path: Path) -> None:
    assert steps_in(written(tmp_path, MIXED), epochs=100, global_batch_size=7) == int(100 * 8 * 2.2 / 7)


# --- test batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_test_example_comes_once_in_order(tmp_path: Path, world_size: int) -> None:
    data = written(tmp_path, MIXED, [[2], [1, 1]], split="test", pad_id=8, blank_identifier_id=199)
    ranks = [
        list(dataset.test_batches(data, global_batch_size=12, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [(name, valid) for name, _, valid in ranks[0]] == [
        ("set0", 12),
        ("set0", 12),
        ("set0", 9),
        ("set1", 4),
    ]
    taken = {"set0": 0, "set1": 0}
    for parts in zip(*ranks, strict=True):
        name, _, valid = parts[0]
        part, first = data.sets[name], taken[name]
        taken[name] += valid
        inputs, labels, identifiers = (
            np.concatenate([getattr(batch, array) for _, batch, _ in parts])
            for array in ("inputs", "labels", "puzzle_identifiers")
        )
        assert len(inputs) == len(labels) == len(identifiers) == 12
        np.testing.assert_array_equal(inputs[:valid], part.inputs[first : first + valid])
        truth = part.labels[first : first + valid].astype(int)
        np.testing.assert_array_equal(labels[:valid], np.where(truth == 0, -100, truth))
        owners = np.repeat(part.puzzle_identifiers, np.diff(part.puzzle_indices))
        np.testing.assert_array_equal(identifiers[:valid], owners[first : first + valid])
        assert (
            (inputs[valid:] == 8).all()
            and (labels[valid:] == -100).all()
            and (identifiers[valid:] == 199).all()
        )
    assert taken == {"set0": 33, "set1": 4}

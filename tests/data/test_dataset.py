"""The data set's layout: written and read back, damage named, and drawn from in the order promised."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.errors import UserError
from hrm.data import dataset
from hrm.data import format as layout
from hrm.data.checksums import read_contents
from hrm.data.dataset import PuzzleDataset, batch_members, fingerprint, steps_in, train_batches
from hrm.data.format import ARRAYS, DatasetError
from tests.support.puzzle_sets import CELLS, MIXED, VOCAB, written


def examples_of(batch: dataset.Batch) -> list[int]:
    return [int(row[0] + 8 * row[1] + 64 * row[2]) for row in batch.inputs]


# --- on disk


def test_unknown_keys_and_a_missing_ignore_label_are_fine(tmp_path: Path) -> None:
    data = written(tmp_path, MIXED)
    path = tmp_path / "train/dataset.json"
    values = json.loads(path.read_text()) | {"made_by": "somebody"}
    del values["ignore_label_id"]
    path.write_text(json.dumps(values))
    (tmp_path / "train/checksums.json").unlink()
    again = PuzzleDataset(tmp_path, "train")
    assert again.metadata == replace(data.metadata, ignore_label_id=None)
    batch = next(dataset.test_batches(again, global_batch_size=4))[1]
    np.testing.assert_array_equal(batch.labels, data.sets["set0"].labels[:4])


def test_missing_folder_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"data/train: no such folder.*hrm\.data sudoku --output-dir \S*data"
    ):
        PuzzleDataset(tmp_path / "data", "train")


def cut(array: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / f"set0__{array}.npy"
        os.truncate(path, int(path.stat().st_size * share))

    return damage


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


def more_puzzles_than_examples(folder: Path) -> None:
    np.save(folder / "set0__puzzle_identifiers.npy", np.zeros(34, np.uint8))
    np.save(folder / "set0__puzzle_indices.npy", np.arange(35))


def with_large(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.uint64)
    array[3] = 2**64 - 1
    return array


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "set0__labels.npy").unlink(), r"set0__labels\.npy: no such file"),
        (cut("inputs", 0.9), r"set0__inputs\.npy: 263 bytes, expected 293 for .*33, 5"),
        (cut("inputs", 0.1), r"set0__inputs\.npy: not a readable \.npy array"),
        (cut("labels", 0), r"set0__labels\.npy: not a readable \.npy array"),
        (cut("group_indices", 0.9), r"set0__group_indices\.npy: 147 bytes, expected 164"),
        (
            lambda f: (f / "set0__labels.npy").open("ab").write(b"0"),
            r"set0__labels\.npy: 294 bytes, expected 293",
        ),
        (cut("puzzle_indices", 0.3), r"set0__puzzle_indices\.npy: not a readable"),
        (
            lambda f: (f / "set0__inputs.npy").write_text("rows"),
            r"set0__inputs\.npy: not a readable \.npy array",
        ),
        (
            lambda f: np.savez((f / "set0__inputs.npy").open("wb"), a=np.zeros(3)),
            r"set0__inputs\.npy: not a readable \.npy array \(the magic string",
        ),
        (
            altered("puzzle_identifiers", lambda a: a.astype(object)),
            r"identifiers\.npy: numbers of type object",
        ),
        (
            altered("inputs", lambda a: a.astype(object)),
            r"inputs\.npy: numbers of type object, expected integers",
        ),
        (altered("inputs", lambda a: a.astype(np.float32)), r"inputs\.npy: numbers of type float32"),
        (altered("labels", lambda a: a > 0), r"labels\.npy: numbers of type bool"),
        (altered("labels", lambda a: a.astype("i4, i4")), r"labels\.npy: numbers of type \[\("),
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
        (
            altered("puzzle_indices", lambda a: with_large(a)),
            r"puzzle_indices\.npy: row 3 holds 18446744073709551615",
        ),
        (
            altered("group_indices", lambda a: np.arange(40)),
            r"group_indices\.npy: length 40, expected at most 16",
        ),
        (more_puzzles_than_examples, r"puzzle_identifiers\.npy: length 34, expected at most 33"),
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
    (tmp_path / "train/checksums.json").unlink()
    batch = next(dataset.test_batches(PuzzleDataset(tmp_path, "train"), global_batch_size=8))[1]
    assert [tuple(where) for where in np.argwhere(batch.labels == -100)] == [(3, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 6}, r"inputs\.npy: rows of 5 cells, dataset\.json says seq_len 6"),
        ({"vocab_size": 8}, r"inputs\.npy: row \d+ holds 8, .*vocab_size 8"),
        ({"num_puzzle_identifiers": 15}, r"puzzle_identifiers\.npy: row 14 holds 15"),
        ({"kind": "chess"}, r"kind is 'chess', expected one of sudoku, maze, arc, tokens"),
        ({"columns": 2}, r"columns is 2, expected a divisor of seq_len 5"),
        ({"mean_puzzle_examples": float("nan")}, r"dataset\.json: not readable as JSON \(NaN"),
        ({"mean_puzzle_examples": 10**400}, r"mean_puzzle_examples is 1000+\.\.\., expected"),
        ({"mean_puzzle_examples": "2"}, r"mean_puzzle_examples is '2'"),
        ({"vocab_size": "9"}, r"vocab_size is '9', expected a whole number from 1 to 1048576"),
        ({"vocab_size": True}, r"vocab_size is True"),
        ({"vocab_size": 2**20 + 1}, r"vocab_size is 1048577, expected a whole number from 1 to 1048576"),
        ({"seq_len": 0}, r"seq_len is 0"),
        ({"seq_len": 2**16 + 1}, r"seq_len is 65537, expected a whole number from 1 to 65536"),
        ({"num_puzzle_identifiers": 2**27 + 1}, r"num_puzzle_identifiers is 134217729, expected"),
        ({"total_groups": 10**1000}, r"total_groups is 1000+\.\.\., expected"),
        ({"pad_id": 9}, r"pad_id is 9, expected less than vocab_size 9"),
        ({"blank_identifier_id": 200}, r"blank_identifier_id is 200, .*num_puzzle_identifiers 200"),
        ({"ignore_label_id": "0"}, r"ignore_label_id is '0'"),
        ({"ignore_label_id": -(2**31) - 1}, r"ignore_label_id is -2147483649, .* 32 bits"),
        ({"sets": []}, r"sets is \[\], expected a list of different plain names"),
        ({"sets": "set0"}, r"sets is 'set0'"),
        ({"sets": [0]}, r"sets is \[0\]"),
        ({"sets": ["set0", "set0"]}, r"sets is \['set0', 'set0'\]"),
        ({"sets": [str(number) for number in range(1001)]}, r"sets is \['0', .* at most 1000"),
        *(
            ({"sets": [name]}, r"sets is \['.*, expected a list of different plain names")
            for name in ("../set0", "a/b", "a\\b", "", "..", "C:set0", "set0\0", "a\n", "\ud800", "ä" * 101)
        ),
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
        ("[1]", "holds list, expected a JSON object"),
        ('{"pad_id": 0}', "blank_identifier_id is missing, expected a whole number"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"pad_id": ' + "1" * 5000 + "}", "not readable as JSON"),
        (" " * (1 << 20) + "{}", "more than 1 MiB"),
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
    # As it was before there were checksums: checkpoints hold it.
    assert first == second == "ec76513f4660612b9ccfcf92a3ac9cb3549366007c34513799bddeff64162436"
    (tmp_path / "b/train/checksums.json").unlink()
    names = ["dataset.json", *(f"set0__{array}.npy" for array in ARRAYS)]

    def now() -> str:
        return read_contents([tmp_path / "b/train" / name for name in names]).fingerprint

    assert fingerprint(PuzzleDataset(tmp_path / "b", "train")) == now() == first
    seen = {first}
    for name in names:
        path = tmp_path / "b/train" / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        seen.add(now())
        path.write_bytes(before)
    # A byte that moves from the end of one file to the beginning of the next.
    one, next_one = (tmp_path / "b/train" / name for name in names[1:3])
    before, after = one.read_bytes(), next_one.read_bytes()
    one.write_bytes(before[:-1])
    next_one.write_bytes(before[-1:] + after)
    seen.add(now())
    assert len(seen) == len(names) + 2


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


def test_examples_of_a_puzzle_are_drawn_without_replacement_in_each_epoch(tmp_path: Path) -> None:
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
def test_training_continues_from_any_position(tmp_path: Path, sets: tuple[list[list[int]], ...]) -> None:
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
    with pytest.raises(
        DatasetError,
        match=r"the 2 epochs between evaluations have 48 examples, .*global_batch_size=49; lower",
    ):
        train_batches(data, **options | {"global_batch_size": 49})
    with pytest.raises(
        DatasetError, match=r"the 2 epochs between evaluations have [34]\d examples, .*global_batch_size=48"
    ):
        list(train_batches(data, **options | {"global_batch_size": 48}))
    with pytest.raises(DatasetError, match="cannot continue at batch 99 of an iteration of"):
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


# --- what was in a batch


@pytest.mark.parametrize("sets", [([[1]] * 21,), (MIXED,), ([[1]] * 9, MIXED)])
def test_the_members_of_a_batch_are_drawn_again(tmp_path: Path, sets: tuple[list[list[int]], ...]) -> None:
    data = written(tmp_path, *sets)
    options: dict[str, Any] = {"seed": 7, "epochs": 7, "epochs_per_iter": 3, "global_batch_size": 6}
    batches, position = list(train_batches(data, **options)), (0, 0)
    for batch in batches:
        # The place of a batch is where the one before it said that it is.
        assert batch.index == position
        position = batch.position
        found = batch_members(data, **options, position=batch.index)
        part = data.sets[found.set_name]
        np.testing.assert_array_equal(part.inputs[found.examples], batch.inputs)
        np.testing.assert_array_equal(found.puzzle_identifiers, batch.puzzle_identifiers)
        owners = np.searchsorted(part.puzzle_indices, found.examples, side="right") - 1
        np.testing.assert_array_equal(part.puzzle_identifiers[owners], found.puzzle_identifiers)
    # Of the whole batch, whatever a rank's rows are.
    half = list(train_batches(data, **options, rank=1, world_size=2))[-1]
    last = batch_members(data, **options, position=half.index)
    np.testing.assert_array_equal(data.sets[last.set_name].inputs[last.examples[3:]], half.inputs)
    with pytest.raises(DatasetError, match=r"the run of 7 epochs has no batch at \(3, 0\)"):
        batch_members(data, **options, position=(3, 0))
    with pytest.raises(DatasetError, match=r"has no batch at|cannot continue at batch 99"):
        batch_members(data, **options, position=(1, 99))
    count = sum(batch.index[0] == 1 for batch in batches)
    with pytest.raises(DatasetError, match=rf"has no batch at \(1, {count}\)"):
        batch_members(data, **options, position=(1, count))


def test_a_declared_kind_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    plain, declared = written(tmp_path / "a", MIXED), written(tmp_path / "b", MIXED, kind="tokens")
    assert fingerprint(plain) == fingerprint(declared)
    # Runs of versions in between hold the fingerprint with the kind.
    other = written(tmp_path / "c", MIXED, kind="maze")
    of_kind = [read_contents(each._files, with_kind=True).fingerprint for each in (plain, declared, other)]
    assert of_kind[0] == fingerprint(plain) and len(set(of_kind)) == 3
    assert [declared.has_fingerprint(value) for value in of_kind] == [True, True, False]

"""A fixed random part of a split: which examples it holds, and how they are walked."""

import numpy as np
import pytest

from hrm.data.dataset import PuzzleDataset, subset, test_batches
from hrm.data.format import IGNORE_LABEL, DatasetError, PuzzleSet
from hrm.data.writer import Shape, new_dataset

# pytest takes the name for a test's.
test_batches.__test__ = False  # type: ignore[attr-defined]

SIZES = {"large": 30, "small": 7, "one": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PuzzleDataset:
    """Sets of 30, 7 and 1 examples of three cells that hold the example's number; puzzles of two examples."""
    folder = tmp_path_factory.mktemp("data") / "sets"
    with new_dataset(folder) as writer:
        split = writer.split("test", Shape(seq_len=3, vocab_size=40))
        for name, size in SIZES.items():
            rows = np.repeat(np.arange(1, size + 1, dtype=np.uint8)[:, None], 3, axis=1)
            ends = np.unique([*range(0, size, 2), size]).astype(np.int32)
            part = PuzzleSet(
                inputs=rows,
                labels=rows,
                puzzle_identifiers=np.arange(1, len(ends), dtype=np.int32),
                puzzle_indices=ends,
                group_indices=np.arange(len(ends), dtype=np.int32),
            )
            split.add(name, part)
        writer.close([f"puzzle {i}" for i in range(20)])
    return PuzzleDataset(folder, "test")


@pytest.mark.parametrize("samples", [1, 2, 5, 12, 19, 37, 38, 1000])
def test_shares_are_in_proportion(dataset, samples):
    taken = subset(dataset, samples, 0)
    assert list(taken) == list(SIZES)
    assert sum(map(len, taken.values())) == min(samples, 38)
    for name, size in SIZES.items():
        share = size * min(samples, 38) / 38
        assert abs(len(taken[name]) - share) < 1
        assert len(np.unique(taken[name])) == len(taken[name])
        assert (np.diff(taken[name]) > 0).all() and np.isin(taken[name], np.arange(size)).all()


@pytest.mark.parametrize(("samples", "shares"), [(5, [4, 1, 0]), (12, [10, 2, 0]), (36, [28, 7, 1])])
def test_remainders_are_distributed_by_size(dataset, samples, shares):
    # Counts of 5: 3.95, 0.92 and 0.13; of 12: 9.47, 2.21 and 0.32; of 36: 28.42, 6.63 and 0.95.
    assert [len(examples) for examples in subset(dataset, samples, 0).values()] == shares


def test_the_seed_chooses(dataset):
    first, again, other = (subset(dataset, 12, seed)["large"].tolist() for seed in (3, 3, 4))
    assert first == again != other
    # Over many seeds every example has its turn.
    turns = np.bincount(np.concatenate([subset(dataset, 12, seed)["large"] for seed in range(300)]))
    assert turns.min() > 0.5 * turns.mean() and turns.max() < 1.5 * turns.mean()


def test_a_null_value_is_refused(dataset):
    with pytest.raises(DatasetError, match="expected at least 1"):
        subset(dataset, 0, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_part_is_walked_once_in_order(dataset: PuzzleDataset, ranks: int) -> None:
    taken = subset(dataset, 12, 1)
    seen: dict[str, list[int]] = {name: [] for name in SIZES}
    walks = [
        list(test_batches(dataset, global_batch_size=4, rank=rank, world_size=ranks, examples=taken))
        for rank in range(ranks)
    ]
    for parts in zip(*walks, strict=True):
        name, _, count = parts[0]
        rows = np.concatenate([batch.inputs for _, batch, _ in parts])
        labels = np.concatenate([batch.labels for _, batch, _ in parts])
        identifiers = np.concatenate([batch.puzzle_identifiers for _, batch, _ in parts])
        assert len(rows) == 4
        seen[name] += rows[:count, 0].tolist()
        assert (labels[count:] == IGNORE_LABEL).all() and (labels[:count] == rows[:count]).all()
        # Example n, counted from 1, belongs to puzzle (n - 1) // 2, whose identifier is one more.
        assert identifiers[:count].tolist() == ((rows[:count, 0] - 1) // 2 + 1).tolist()
    assert seen == {name: (examples + 1).tolist() for name, examples in taken.items()}

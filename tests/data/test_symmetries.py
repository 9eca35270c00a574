"""Fresh symmetries: right puzzles, no answer of another split, the same on any number of ranks."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm.data.arc.augment import TURNS, canvas, grid_of, inverse
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.data.arc.fresh import boxes, placed
from hrm.data.dataset import PuzzleDataset, train_batches
from hrm.data.format import DatasetError, PuzzleSet, read_names
from hrm.data.maze.build import Request, generate, write_mazes
from hrm.data.maze.search import symmetric
from hrm.data.order import draw
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import builtin_sudoku
from hrm.data.symmetries import FreshSymmetries, Held
from hrm.data.writer import Shape, new_dataset
from tests.support.arc_tasks import random_task, write_tasks

OPTIONS = {"seed": 3, "epochs": 6, "epochs_per_iter": 3, "global_batch_size": 12}


def fresh(data: PuzzleDataset, *held: Held) -> FreshSymmetries:
    return FreshSymmetries(data, kind_of(data.metadata, data.sets), 3, held)


@pytest.fixture(scope="module")
def sudoku(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return builtin_sudoku(4, 40, 30, 0, 0)


def test_sudoku_draws_are_valid_and_avoid_test_answers(sudoku):
    train, test = (PuzzleDataset(sudoku, split) for split in ("train", "test"))
    kind = kind_of(train.metadata)
    plain = list(train_batches(train, **OPTIONS))
    drawn = list(train_batches(train, **OPTIONS, augment=fresh(train, Held(test))))
    unbound = list(train_batches(train, **OPTIONS, augment=fresh(train)))
    answers = {row.tobytes() for row in test.sets["all"].labels.astype(np.int32)}
    changed, seen = 0, set()
    for before, after in zip(plain, drawn, strict=True):
        assert after.inputs.shape == before.inputs.shape and after.inputs.dtype == np.int32
        for question, answer, old in zip(after.inputs, after.labels, before.inputs, strict=True):
            assert not kind.problems(question, answer)
            assert (question == 1).sum() == (old == 1).sum()
            assert answer.tobytes() not in answers
            seen.add(question.tobytes())
            changed += not np.array_equal(question, old)
    # 4x4 grids have 288 solutions, so that draws without regard to the test meet it.
    assert any(row.tobytes() in answers for batch in unbound for row in batch.labels)
    count = 12 * len(drawn)
    assert changed > 0.9 * count and len(seen) > 0.9 * count


def test_cells_without_loss_and_padding_move_with_the_grid(sudoku):
    train = PuzzleDataset(sudoku, "train")
    augment = fresh(train)
    batch = next(train_batches(train, **OPTIONS))
    # Labels that are the answer's at blanks alone, as third parties write them.
    batch.labels[batch.inputs > 1] = -100
    batch.inputs[:, 0], batch.labels[:, 0] = 0, -100
    made = augment(batch, next(draw(train.folder, train.sets, start=(0, 0), **OPTIONS)), slice(12))
    assert ((made.labels == -100) == (made.inputs != 1)).all()
    assert ((made.inputs == 0).sum(axis=1) == 1).all() and (made.inputs[:, 0] > 0).any()


def test_mazes_take_each_of_the_eight_symmetries(tmp_path):
    request, taken = Request(7, 7, seed=1), set[bytes]()
    splits = {split: list(generate(request, split, 12, taken)) for split in ("test", "train")}
    write_mazes(tmp_path / "maze", splits, 0, 0)
    train = PuzzleDataset(tmp_path / "maze", "train")
    kind = kind_of(train.metadata)
    options = OPTIONS | {"epochs": 24, "epochs_per_iter": 24}
    found = set()
    for before, after in zip(
        train_batches(train, **options),
        train_batches(train, **options, augment=fresh(train)),
        strict=True,
    ):
        for old, question, answer in zip(before.inputs, after.inputs, after.labels, strict=True):
            assert not kind.problems(question, answer)
            turned = [symmetric(old.reshape(7, 7), n).ravel() for n in range(8)]
            found.add(next(n for n, each in enumerate(turned) if np.array_equal(each, question)))
    assert found == set(range(8))


def test_a_canvas_is_placed_as_the_builder_places_it():
    rng = np.random.default_rng(0)
    for number, turn in enumerate(TURNS):
        grid = rng.integers(0, 10, (5, 8)).astype(np.uint8)
        colours = np.concatenate([[0], 1 + rng.permutation(9)]).astype(np.uint8)
        expected = colours[turn(grid)]
        for row, col in ((0, 0), (3, 4), (30 - expected.shape[0], 30 - expected.shape[1])):
            before = canvas(grid, 7, 2).reshape(1, 30, 30).astype(np.int32)
            place = np.array([[row, col]])
            labels = np.where(before == 0, -100, before)
            arguments = (boxes(before), np.array([number]), colours[None], place)
            after, labels_after = placed(before, *arguments), placed(labels, *arguments)
            tokens = canvas(expected, row, col).reshape(1, 30, 30).astype(np.int32)
            assert np.array_equal(after, tokens)
            assert np.array_equal(labels_after, np.where(tokens == 0, -100, tokens))


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arc")
    source = write_tasks(folder / "tasks", {f"t{n}": random_task(n, largest=12) for n in range(6)})
    write_arc(folder / "data", list(read_source(str(source))), 4, 0)
    return folder / "data"


def test_an_arc_draw_equals_the_puzzle_of_its_identifier(arc):
    data, names = PuzzleDataset(arc, "train"), read_names(arc)
    part = data.sets["all"]
    options = OPTIONS | {"epochs": 30, "epochs_per_iter": 30}
    before, after = (train_batches(data, **options, augment=each) for each in (None, fresh(data)))
    plain = {name for name in names if "_t" not in name}
    moved, corner, count, changed = 0, 0, 0, 0
    for old, new in zip(before, after, strict=True):
        for row in range(12):
            name, own = names[new.puzzle_identifiers[row]], names[old.puzzle_identifiers[row]]
            # Only a plain puzzle becomes another one, of its own task.
            assert name == own or (own in plain and name.startswith(f"{own}_t"))
            changed += name != own
            pair = []
            for tokens, original in ((new.inputs[row], old.inputs[row]), (new.labels[row], old.labels[row])):
                tokens, original = np.maximum(tokens, 0), np.maximum(original, 0)
                top, left, rows, cols = boxes(tokens.reshape(1, 30, 30).astype(np.int32))[0]
                grid = tokens.reshape(30, 30)[top : top + rows, left : left + cols] - 2
                assert np.array_equal(canvas(grid, top, left), tokens)
                y, x, height, width = boxes(original.reshape(1, 30, 30).astype(np.int32))[0]
                was = original.reshape(30, 30)[y : y + height, x : x + width] - 2
                back = (inverse(name)(grid), inverse(own)(was))
                assert np.array_equal(*back)
                pair.append((top, left))
            assert pair[0] == pair[1]
            corner += pair[0] == (0, 0)
            moved += pair[0] != (0, 0)
            count += 1
    assert changed > 0 and moved > corner > 0
    # One of four pairs stays in the corner, and few more land there.
    assert 0.2 < corner / count < 0.35
    assert len(part.inputs) == 6 * 4 * 5 and grid_of(part.inputs[0]) is not None


def test_names_that_do_not_fit_the_puzzles_are_refused(arc, tmp_path):
    shutil.copytree(arc, tmp_path / "arc")
    (tmp_path / "arc" / "identifiers.json").write_text('["<blank>", "t0"]')
    with pytest.raises(DatasetError, match=r"identifiers\.json: 2 names, expected 31"):
        fresh(PuzzleDataset(tmp_path / "arc", "train"))


@pytest.mark.parametrize("kind", ["sudoku", "arc"])
def test_ranks_and_a_restart_draw_the_same_bits(kind, request):
    data = PuzzleDataset(request.getfixturevalue(kind), "train")
    test = Held(PuzzleDataset(request.getfixturevalue(kind), "test")) if kind == "sudoku" else None
    augment = fresh(data, *([test] if test else []))
    whole = list(train_batches(data, **OPTIONS, augment=augment))
    ranks = [
        list(train_batches(data, **OPTIONS, augment=augment, rank=rank, world_size=3)) for rank in range(3)
    ]
    again = list(train_batches(data, **OPTIONS, augment=fresh(data, *([test] if test else [])), start=(1, 0)))
    for name in ("inputs", "labels", "puzzle_identifiers"):
        for number, batch in enumerate(whole):
            shared = np.concatenate([getattr(part[number], name) for part in ranks])
            assert np.array_equal(getattr(batch, name), shared)
        for batch, restarted in zip(whole[-len(again) :], again, strict=True):
            assert np.array_equal(getattr(batch, name), getattr(restarted, name))
    # Two draws of one epoch's batch are not alike.
    pairs = itertools.combinations(whole, 2)
    assert not any(np.array_equal(one.inputs, other.inputs) for one, other in pairs)


def test_a_kind_without_symmetries_is_refused(tmp_path):
    with new_dataset(tmp_path / "data") as data:
        rows = np.ones((4, 5), np.uint8)
        numbers = np.arange(5, dtype=np.int32)
        part = PuzzleSet(rows, rows, np.zeros(4, np.int32), numbers, numbers)
        data.split("train", Shape(seq_len=5, vocab_size=7)).add("all", part)
        data.close(["<blank>"])
    with pytest.raises(
        DatasetError, match=r"augment=true supports .* set it to false for data of kind tokens"
    ):
        fresh(PuzzleDataset(tmp_path / "data", "train"))

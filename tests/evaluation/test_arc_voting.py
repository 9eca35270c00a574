"""Voting: counts and ranks computed by hand, what no vote can be, tests read from a data set, submissions."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.arc.augment import TURNS, Pair, canvas
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import DatasetError, read_names
from hrm.evaluation.arc_voting import Votes, read_tests, submission
from tests.support.arc_tasks import key, random_task, write_kaggle, write_tasks


def grid(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


ASKED, OTHER = grid([1, 2], [0, 3]), grid([5])
RIGHT, WRONG, WORSE = grid([1, 2, 3]), grid([3], [2]), grid([9, 9], [9, 9])
TURNED = "a_t1_0321456789"


def turned(one: np.ndarray) -> np.ndarray:
    """As the puzzle TURNED has it: colours 1 and 3 exchanged, rotated once against the clock."""
    return np.rot90(np.array([0, 3, 2, 1, 4, 5, 6, 7, 8, 9])[one])


def one_test(ranking: str = "votes") -> Votes:
    return Votes({"a": [Pair(ASKED, RIGHT)]}, ranking)


def vote(votes: Votes, answer: np.ndarray | None, q_halt: float, asked: np.ndarray = ASKED) -> None:
    votes.add("a", canvas(asked), np.zeros(900, int) if answer is None else canvas(answer), q_halt)


def told(votes: Votes, test: int = 0) -> list[tuple[Any, int, float]]:
    return [(answer.grid.tolist(), answer.votes, answer.q_halt) for answer in votes.ranked("a", test)]


def test_votes_are_mapped_back_and_counted() -> None:
    votes = one_test()
    vote(votes, RIGHT, 0.5)
    votes.add(TURNED, canvas(turned(ASKED)), canvas(turned(RIGHT)), 0.25)
    votes.add(TURNED, canvas(turned(ASKED)), canvas(RIGHT), 0.75)
    # RIGHT as the turned puzzle's answer means, back: rotated with the clock, 1 and 3 exchanged.
    assert told(votes) == [([[1, 2, 3]], 2, 0.375), ([[3], [2], [1]], 1, 0.75)]
    assert votes.ranked("a", 0)[0].grid.dtype == np.uint8


def test_rank_is_by_votes_then_by_mean_q_halt() -> None:
    votes, weighted = one_test(), one_test("q_halt")
    for each in (votes, weighted):
        # RIGHT: 2 votes, mean 0.25. WRONG: 2 votes, mean 0.5. WORSE: 1 vote of 0.9375, more than the sum of
        # RIGHT's, 0.5, and less than that of WRONG's, 1.
        for answer, q_halt in ((RIGHT, 0.375), (WORSE, 0.9375), (WRONG, 0.25), (RIGHT, 0.125), (WRONG, 0.75)):
            vote(each, answer, q_halt)
    assert [answer for answer, *_ in told(votes)] == [WRONG.tolist(), RIGHT.tolist(), WORSE.tolist()]
    assert [answer for answer, *_ in told(weighted)] == [WRONG.tolist(), WORSE.tolist(), RIGHT.tolist()]
    assert votes.pass_at([1, 2, 3]) == {1: 0.0, 2: 1.0, 3: 1.0}
    assert weighted.pass_at([1, 2, 3]) == {1: 0.0, 2: 0.0, 3: 1.0}


def test_ties_do_not_depend_on_the_order_of_votes() -> None:
    answers = [RIGHT, WRONG, WORSE, grid([0, 2, 3])]
    orders = [answers, answers[::-1], answers[2:] + answers[:2]]
    seen = []
    for order in orders:
        votes = one_test()
        for answer in order:
            vote(votes, answer, 0.5)
        seen.append(told(votes))
    assert seen[0] == seen[1] == seen[2]
    # By shape, then by cells.
    assert [answer for answer, *_ in seen[0]] == [[[0, 2, 3]], [[1, 2, 3]], [[3], [2]], [[9, 9], [9, 9]]]


def test_grids_of_the_same_cells_and_other_shapes_differ() -> None:
    votes = one_test()
    vote(votes, grid([1, 2, 3]), 0.5)
    vote(votes, grid([1], [2], [3]), 0.5)
    assert len(told(votes)) == 2


def test_pass_at_counts_parts_of_tasks_and_whole_ones() -> None:
    # a: one of its two tests solved at 1, both at 2. b: solved. c: nothing voted. d: no answer is known.
    tests = {
        "a": [Pair(ASKED, RIGHT), Pair(OTHER, WRONG)],
        "b": [Pair(OTHER, RIGHT)],
        "c": [Pair(OTHER, RIGHT)],
        "d": [Pair(OTHER, None)],
    }
    votes = Votes(tests)
    vote(votes, RIGHT, 0.5)
    vote(votes, RIGHT, 0.75, asked=OTHER)
    vote(votes, WRONG, 0.5, asked=OTHER)
    votes.add("b", canvas(OTHER), canvas(RIGHT), 0.0)
    votes.add("d", canvas(OTHER), canvas(RIGHT), 1.0)
    assert votes.pass_at([1, 2, 1000]) == {1: 1.5 / 3, 2: 2 / 3, 1000: 2 / 3}
    assert votes.pass_at([1, 2], whole_tasks=True) == {1: 1 / 3, 2: 2 / 3}
    assert Votes({"d": tests["d"]}).pass_at([1, 2]) == {}
    # A test whose answer is not known leaves the others of its task to count.
    mixed = Votes({"a": [Pair(OTHER, None), Pair(ASKED, RIGHT)]})
    vote(mixed, RIGHT, 0.5)
    assert mixed.pass_at([1]) == mixed.pass_at([1], whole_tasks=True) == {1: 1.0}


def test_a_submission_has_two_attempts_at_every_test_in_order() -> None:
    tests = {"b": [Pair(OTHER, None)], "a": [Pair(OTHER, WRONG), Pair(ASKED, RIGHT), Pair(WORSE, None)]}
    votes = Votes(tests)
    for answer, q_halt in ((WRONG, 0.5), (None, 0.75), (RIGHT, 0.25), (WORSE, 0.125), (None, 0.75)):
        vote(votes, answer, q_halt)
    vote(votes, WORSE, 0.5, asked=OTHER)
    vote(votes, None, 0.5, asked=WORSE)
    assert told(votes, 1)[0] == ([], 2, 0.75)
    made = submission(votes)
    assert json.loads(json.dumps(made)) == {
        "b": [{"attempt_1": [[0]], "attempt_2": [[0]]}],
        "a": [
            {"attempt_1": WORSE.tolist(), "attempt_2": WORSE.tolist()},
            {"attempt_1": WRONG.tolist(), "attempt_2": RIGHT.tolist()},
            {"attempt_1": [[0]], "attempt_2": [[0]]},
        ],
    }
    assert list(made) == ["b", "a"]


def test_tests_of_the_same_input_share_their_votes() -> None:
    votes = Votes({"a": [Pair(ASKED, RIGHT), Pair(ASKED, WRONG)]})
    vote(votes, RIGHT, 0.5)
    vote(votes, WRONG, 0.25)
    assert told(votes, 0) == told(votes, 1) and len(told(votes)) == 2
    assert votes.pass_at([1, 2]) == {1: 0.5, 2: 1.0}


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("x", canvas(ASKED), "puzzle 'x': its input is not a test of task 'x'"),
        ("a", canvas(OTHER), "puzzle 'a': its input is not a test of task 'a'"),
        ("a", np.zeros(900, int), "puzzle 'a': its input is not a test of task 'a'"),
        (
            TURNED,
            canvas(ASKED),
            "not a test of task 'a'; take the identifiers and the examples of one data set",
        ),
        ("a_t1_0121456789", canvas(ASKED), "0121456789 holds a colour twice"),
    ],
)
def test_votes_for_no_test_are_refused(name: str, inputs: np.ndarray, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        one_test().add(name, inputs, canvas(RIGHT), 0.5)


@pytest.mark.parametrize("q_halt", [float("nan"), -0.01, 1.01, float("inf")])
def test_a_vote_needs_a_probability(q_halt: float) -> None:
    with pytest.raises(ValueError, match="expected a probability"):
        vote(one_test(), RIGHT, q_halt)


def test_memory_grows_only_with_different_grids() -> None:
    votes, board = one_test(), canvas(np.full((30, 30), 7, np.uint8))
    vote(votes, np.full((30, 30), 7, np.uint8), 0.5)
    grown = []
    tracemalloc.start()
    # Twice, as another thread of the process may allocate meanwhile.
    for _ in range(2):
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(250):
            votes.add("a", canvas(ASKED), board, 0.5)
        grown.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    assert min(grown) < 5_000
    assert told(votes)[0][1] == 501


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voting")
    write_tasks(folder / "training", {"t": random_task(9, 2, 1)})
    write_tasks(folder / "evaluation", {f"e_{n}": random_task(n, 2, 1 + n % 3) for n in range(5)})
    return folder


def test_right_answers_to_a_whole_data_set_solve_it(source: Path, tmp_path: Path) -> None:
    write_arc(tmp_path / "out", list(read_source(str(source))), num_aug=8, seed=0)
    dataset, names = PuzzleDataset(tmp_path / "out", "test"), read_names(tmp_path / "out")
    tests = read_tests(dataset, names)
    known = json.loads((tmp_path / "out" / "test_puzzles.json").read_text())
    assert list(tests) == list(known)
    assert {task: [key(pair.grids) for pair in pairs] for task, pairs in tests.items()} == {
        task: [key(pair) for pair in value["test"]] for task, value in known.items()
    }
    votes = Votes(tests)
    part = dataset.sets["all"]
    for puzzle, identifier in enumerate(part.puzzle_identifiers):
        for example in range(part.puzzle_indices[puzzle], part.puzzle_indices[puzzle + 1]):
            votes.add(names[identifier], part.inputs[example], part.labels[example], 0.5)
    assert votes.pass_at([1]) == votes.pass_at([1], whole_tasks=True) == {1: 1.0}
    for task, value in known.items():
        for number, pair in enumerate(value["test"]):
            (answer,) = votes.ranked(task, number)
            assert (answer.grid.tolist(), answer.votes, answer.q_halt) == (pair["output"], 9, 0.5)
            assert submission(votes)[task][number]["attempt_1"] == pair["output"]


def test_answers_that_are_not_known_stay_unknown(tmp_path: Path) -> None:
    prefix = write_kaggle(tmp_path, "x_test", {"a": random_task(1, 2, 2)}, solutions=False)
    write_arc(tmp_path / "out", list(read_source(prefix)), num_aug=2, seed=0)
    tests = read_tests(PuzzleDataset(tmp_path / "out", "test"), read_names(tmp_path / "out"))
    assert [pair.output for pair in tests["a"]] == [None, None]
    assert Votes(tests).pass_at([1]) == {}


def test_damaged_names_are_reported(source: Path, tmp_path: Path) -> None:
    write_arc(tmp_path / "out", list(read_source(str(source))), num_aug=0, seed=0)
    dataset, path = PuzzleDataset(tmp_path / "out", "test"), tmp_path / "out" / "identifiers.json"
    with pytest.raises(DatasetError, match=r"identifiers\.json: 2 names, expected 7 as .*dataset\.json says"):
        read_tests(dataset, ["<blank>", "t"])
    for text, message in (
        ("{", "not readable as JSON"),
        ("[" * 10**5, "not readable as JSON"),
        ('{"1": "a"}', "no list of names"),
        ('["a", 1]', "no list of names"),
        (None, "no such file"),
    ):
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(DatasetError, match=message) as caught:
            read_names(tmp_path / "out")
        assert "\n" not in str(caught.value)
        path.touch()


def test_boards_that_show_no_grid_are_no_arc_tests(source: Path, tmp_path: Path) -> None:
    write_arc(tmp_path / "out", list(read_source(str(source))), num_aug=0, seed=0)
    path = tmp_path / "out" / "test" / "all__inputs.npy"
    inputs = np.load(path)
    inputs[1] = 0
    np.save(path, inputs)
    (tmp_path / "out" / "test" / "checksums.json").unlink()
    with pytest.raises(DatasetError, match="example 1 of 'e_1' shows no grid"):
        read_tests(PuzzleDataset(tmp_path / "out", "test"), read_names(tmp_path / "out"))


def test_every_turn_is_undone() -> None:
    for number, turn in enumerate(TURNS):
        votes = one_test()
        votes.add(f"a_t{number}_0123456789", canvas(turn(ASKED)), canvas(turn(RIGHT)), 0.5)
        assert told(votes) == [(RIGHT.tolist(), 1, 0.5)]

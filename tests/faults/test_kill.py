"""kill -9 at steps, in saves and while the trainer starts: the run that is resumed is the one left alone."""

from tests.faults.soak import INTERVAL, KINDS, soak


def test_a_run_that_is_killed_again_and_again_is_the_one_left_alone(tiny_sudoku, tmp_path):
    """The soak, short: it compares the runs, and at each kill what was saved and resumed."""
    found = soak(tiny_sudoku, tmp_path, kills=4, seed=1)
    assert found["identical"] and [kill["kind"] for kill in found["each"]] == list(KINDS)
    assert found["each"][1]["in_a_save"] and found["kills_in_a_save"] >= 1
    assert 0 < found["most_steps_done_again"] <= 2 * INTERVAL
    assert found["steps"] > max(kill["step"] for kill in found["each"])


def test_a_run_with_random_starts_and_noise_is_killed(tiny_sudoku, tmp_path):
    random = ("arch.init=random", "arch.noise=0.05", "arch.damping=0.9")
    assert soak(tiny_sudoku, tmp_path, 2, 1, *random)["identical"]

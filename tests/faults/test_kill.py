"""kill -9 at steps, in saves and while the trainer starts: the run that is resumed is the one left alone."""

from tests.faults import soak


def test_a_run_that_is_killed_again_and_again_is_the_one_left_alone(tiny_sudoku, tmp_path, monkeypatch):
    """The soak, short, with all that is random: it compares the runs, and what each kill left and resumed."""
    monkeypatch.setattr(soak, "STRETCH", 8)
    random = ("arch.init=random", "arch.noise=0.05", "arch.damping=0.9")
    found = soak.soak(tiny_sudoku, tmp_path, 3, 1, *random)
    assert found["identical"] and [kill["kind"] for kill in found["each"]] == list(soak.KINDS[:3])
    assert found["each"][1]["in_a_save"] and found["kills_in_a_save"] >= 1
    assert 0 < found["most_steps_done_again"] <= 2 * soak.INTERVAL
    assert found["steps"] > max(kill["step"] for kill in found["each"])

"""kill -9 at every step of a save: the newest, the one before and the best are never lost."""

import json
from pathlib import Path

import pytest

from tests.support.forked import start
from tests.support.killed_saves import RULES


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_killed_at_every_step_of_a_save(tmp_path: Path, rule: str) -> None:
    with open(tmp_path / "said", "w") as said:
        assert start(["-m", "tests.support.killed_saves", str(tmp_path), rule], stdout=said).wait() == 0
    outcomes = json.loads((tmp_path / "said").read_text())
    # Killed before the new one counted, killed after, and in the end not killed.
    for step, score in RULES[rule][1]:
        case = f"{step} {score}"
        assert outcomes[f"{case} old"] >= 8 and outcomes[f"{case} new"] >= 3, outcomes
        assert outcomes[f"{case} survived"] == 1, outcomes

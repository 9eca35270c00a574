"""kill -9 at every step of a save: the newest, the one before and the best are never lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killed_saves import RULES
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_killed_at_every_step_of_a_save(tmp_path: Path, rule: str) -> None:
    command = [sys.executable, "-m", "tests.support.killed_saves", str(tmp_path), rule]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    # Killed before the new one counted, killed after, and in the end not killed.
    for step, score in RULES[rule][1]:
        case = f"{step} {score}"
        assert outcomes[f"{case} old"] >= 8 and outcomes[f"{case} new"] >= 3, outcomes
        assert outcomes[f"{case} survived"] == 1, outcomes

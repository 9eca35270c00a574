"""Saves that are killed at every file operation, each in a separate process.

usage: killed_saves.py FOLDER last|best

Prints the number of survived saves, and of kills after which the new or the old checkpoint was the newest, by
step and score.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from hrm.checkpoint.read import Checkpoint, CheckpointError, best_checkpoint, load_checkpoint
from hrm.checkpoint.save import save_checkpoint

# By rule: the checkpoints to keep, and the killed saves as step and score. The saves of `best` are a worse
# one, a better one, the last one again, the best one again.
RULES: dict[str, tuple[dict[str, Any], tuple[tuple[int, float], ...]]] = {
    "last": ({"keep": 2}, ((3, 0.6), (2, 0.5))),
    "best": ({"keep": 1, "keep_best": True}, ((3, 0.6), (3, 0.9), (2, 0.9), (1, 0.9))),
}
Content = tuple[int, float, list[float], list[float], list[str]]


def save(run: Path, step: int, value: float, score: float, **options: Any) -> None:
    weights, extra = {"w": torch.full((4,), value)}, {"ema.safetensors": {"w": torch.full((4,), -value)}}
    save_checkpoint(
        run, step, weights=weights, training={"v": value}, run={}, extra=extra, score=score, **options
    )


def save_and_die(at: int, *arguments: Any, **options: Any) -> None:
    """Saves; kills itself at the `at`-th file operation (open, rename, create or remove)."""
    events = 0

    def count(event: str, _: Any) -> None:
        nonlocal events
        events += event == "open" or event.startswith("os.")
        if events == at:
            os.kill(os.getpid(), 9)

    sys.addaudithook(count)
    save(*arguments, **options)
    os._exit(0)


def content(read: Checkpoint) -> Content:
    ema = read.extra["ema.safetensors"]["w"].tolist()
    return read.step, read.training["v"], read.weights["w"].tolist(), ema, read.notes


def of(step: int, value: float) -> Content:
    return step, value, [value] * 4, [-value] * 4, []


def is_whole(folder: Path) -> bool:
    try:
        return load_checkpoint(folder).step > 0
    except CheckpointError:
        return False


def main(folder: Path, rule: str) -> None:
    options, cases = RULES[rule]
    template = folder / "template"
    save(template, 1, 1.0, 0.8, **options)
    save(template, 2, 2.0, 0.5, **options)
    outcomes: dict[str, int] = {}
    for step, score in cases:
        for at in range(1, 200):
            run = Path(shutil.copytree(template, folder / f"{step}_{at}"))
            child = os.fork()
            if child == 0:
                save_and_die(at, run, step, 9.0, score, **options)
            status = os.waitpid(child, 0)[1]
            newest = content(load_checkpoint(run))
            assert newest in (of(2, 2.0), of(step, 9.0)), (step, score, at, newest)
            saved = newest == of(step, 9.0)
            best = best_checkpoint(run)
            assert best is not None, (step, score, at)
            expected = of(step, 9.0) if saved and score == 0.9 else of(1, 1.0)
            if rule == "best":
                assert content(load_checkpoint(best)) == expected, (step, score, at, best)
            else:
                assert sum(map(is_whole, run.glob("step_*"))) >= 2, (step, at)
            save(run, 4, 4.0, 0.1, **options)
            kept = expected[0] if rule == "best" else newest[0]
            assert sorted(path.name for path in run.iterdir()) == [f"step_{kept}", "step_4"], (
                step,
                score,
                at,
            )
            assert content(load_checkpoint(run)) == of(4, 4.0), (step, score, at)
            key = f"{step} {score} " + ("survived" if status == 0 else "new" if saved else "old")
            outcomes[key] = outcomes.get(key, 0) + 1
            shutil.rmtree(run)
            if status == 0:
                break
            assert os.WTERMSIG(status) == 9
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

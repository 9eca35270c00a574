"""The trainer, held at a known place until a file appears: tests then need not race against it.

usage: held_program.py PLACE FILE WORD...
PLACE: a step, held before its line in the log, or `evaluation`, held after the first batch of each.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import train
from hrm.engine.engine import Engine

place, file = sys.argv[1], Path(sys.argv[2])
train_step, evaluate = Engine.train_step, Engine.evaluate


def hold() -> None:
    file.with_suffix(".held").touch()
    while not file.exists():
        time.sleep(0.005)


def held_step(engine: Engine, batch: Any) -> None:
    train_step(engine, batch)
    if place == str(engine.step):
        hold()


def held_evaluation(engine: Engine, batches: Iterable[Any]) -> Any:
    def held() -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if place == "evaluation" and number == 1:
                hold()
            yield batch

    return evaluate(engine, held())


setattr(Engine, "train_step", held_step)  # noqa: B010
setattr(Engine, "evaluate", held_evaluation)  # noqa: B010
sys.exit(train.main(sys.argv[3:]))

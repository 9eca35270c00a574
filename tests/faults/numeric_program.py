"""The trainer with a fault in its numbers, for tests/faults/test_numerics.py.

usage: numeric_program.py KIND:FIRST:LAST[:RANK] WORD...
At the steps FIRST to LAST, of one rank or of all. KIND: `gradient` (NaN in that of lm_head.weight, by a
hook), `loss` (infinite), `carry` (NaN in one sequence's state) or `weights` (noise, once: not again after a
rewind).
"""

import math
import os
import sys
from typing import Any

import torch
from torch import Tensor

import train
from hrm.data.dataset import Batch
from hrm.engine import step_program
from hrm.engine.engine import Engine

kind, first, last, *ranks = sys.argv[1].split(":")
is_here = not ranks or ranks[0] == os.environ.get("RANK", "0")
train_step, act_loss = Engine.train_step, step_program.act_loss
# The step under way; the engines that have a hook, or have had their noise.
step = 0
hooked: list[Engine] = []
noisy: list[Engine] = []


def strikes(what: str) -> bool:
    return kind == what and is_here and int(first) <= step <= int(last)


def poison(gradient: Tensor) -> Tensor:
    poisoned = gradient.clone()
    if strikes("gradient"):
        poisoned.view(-1)[7] = math.nan
    return poisoned


def faulty_loss(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss, sums = act_loss(*args)
    return (loss * math.inf if strikes("loss") else loss), sums


def faulty_step(engine: Engine, batch: Batch) -> None:
    global step
    step = engine.step + 1
    if not hooked:
        engine.model.get_parameter("lm_head.weight").register_hook(poison)
        hooked.append(engine)
    if strikes("carry"):
        engine.carry.z_H[3] = math.nan
        engine.carry.halted[3] = False
    if strikes("weights") and not noisy:
        noise = torch.randn(engine.parameters.data.shape, generator=torch.Generator().manual_seed(0))
        engine.parameters.data.add_(noise)
        engine.parameters.refresh_copy()
        noisy.append(engine)
    train_step(engine, batch)


setattr(Engine, "train_step", faulty_step)  # noqa: B010
setattr(step_program, "act_loss", faulty_loss)  # noqa: B010
sys.exit(train.main(sys.argv[2:]))

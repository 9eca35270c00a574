"""What torchrun starts in tests/test_ranks.py: the trainer with a fault in one rank, or a few collectives.

usage: rank_program.py train|sums FAULT ONCE SILENCE WORD...   rank_program.py collectives OUT_FOLDER
FAULT: `none` or `RANK:STEP:KIND`, KIND one of KILL, STOP (signals), mistake, bug; it strikes if the file ONCE
is not there yet. SILENCE: seconds. A word of train.py that starts with `RANK:` is for that rank alone. `sums`
takes a sum over the ranks for a step.
"""

import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hrm import distributed
from hrm.errors import UserError, run_command
from hrm.ranks import one_voice

RANK = int(os.environ["RANK"])


def strike(fault: str, once: Path, step: int) -> None:
    """Commits the fault if it is this rank's at this step."""
    rank, at, kind = ("", "", "") if fault == "none" else fault.split(":")
    if (str(RANK), str(step)) != (rank, at) or once.exists():
        return
    once.touch()
    if kind == "mistake":
        raise UserError("the disk is full")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))


def train_with_fault(fault: str, once: Path, silence: float, words: Sequence[str]) -> int:
    import train
    from hrm.engine import Engine

    distributed.joined = functools.partial(distributed.joined, silence=silence)
    train_step = Engine.train_step

    def faulty(engine, batch):
        strike(fault, once, engine.step)
        train_step(engine, batch)

    setattr(Engine, "train_step", faulty)  # noqa: B010
    mine = [word.removeprefix(f"{RANK}:") for word in words]
    return train.main([word for word in mine if not word[0].isdigit()])


def sums_with_fault(fault: str, once: Path, silence: float) -> None:
    with distributed.joined("cpu", 8, silence) as (world, _):
        for step in range(50):
            strike(fault, once, step)
            world.all_reduce(torch.ones(4))


def collectives(out: Path) -> None:
    with distributed.joined("cpu", 6) as (world, device):
        rank = world.rank
        results = {"device": device, "rows": world.rows(6), "world": (world.rank, world.size)}
        results["reduced"] = world.all_reduce(torch.tensor([1.0, rank]))
        results["gathered"] = world.all_gather(torch.tensor([[rank, 7]]))
        results["bools"] = world.all_gather(torch.tensor([rank == 1, True]))
        for name, tensor in {
            "float64": torch.full((2, 3), float(rank + 1), dtype=torch.float64).t(),
            "bfloat16": torch.full((4, 4), rank + 1, dtype=torch.bfloat16)[:, 1],
            "bool": torch.tensor([rank == 0, rank == 1]),
            "parameter": torch.nn.Parameter(torch.tensor([float(rank + 1)])),
        }.items():
            assert world.broadcast(tensor) is tensor
            results[name] = tensor.detach()
        world.check_equal({"weights": "a1", "torch": "2.9"})
        for name, what in {
            "differ": {"weights": "b2" if rank == 2 else "a1", "torch": "2.9"},
            "all": {"weights": f"w{rank}", "code": "c3"} if rank else {"weights": "w0"},
        }.items():
            try:
                world.check_equal(what)
            except UserError as error:
                results[name] = str(error)
        torch.save(results, out / f"{rank}.pt")
        world.barrier()
    raise UserError("every rank meets this")


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "train":
        sys.exit(train_with_fault(rest[0], Path(rest[1]), float(rest[2]), rest[3:]))
    command = functools.partial(collectives, Path(rest[0]))
    if name == "sums":
        command = functools.partial(sums_with_fault, rest[0], Path(rest[1]), float(rest[2]))
    sys.exit(run_command(lambda: one_voice(command), ""))

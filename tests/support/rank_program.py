"""The program of torchrun in tests of ranks: the trainer with a fault in one rank, or a few collectives.

usage: rank_program.py train|sums FAULT ONCE WORD...   rank_program.py collectives OUT_FOLDER
FAULT: `none` or `RANK:STEP:KIND,...`, KIND is a signal (KILL, STOP, TERM), mistake, bug, sleep, or agent for
a SIGTERM to torchrun; each occurs once, recorded by files with the prefix ONCE. An argument of train.py with
the prefix `RANK:` is only for that rank. `sums` sums over the ranks in each step, after a barrier if the
first WORD is `barrier`; ranks wait 4 s for each other. `train` writes the batches of each rank to the folder
BATCHES, if set. SOURCES=RANK:FOLDER makes that rank use the project's sources from the folder.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RANK = int(os.environ["RANK"])
if os.environ.get("SOURCES", "").startswith(f"{RANK}:"):
    sys.path.insert(0, os.environ["SOURCES"].partition(":")[2])

import torch  # noqa: E402

from hrm import distributed  # noqa: E402
from hrm.common.errors import UserError, run_command  # noqa: E402


def strike(fault: str, once: Path, step: int) -> None:
    """Causes this rank's fault at this step, if there is one."""
    mine = [one for one in fault.split(",") if one.startswith(f"{RANK}:{step}:")]
    struck = once.with_name(f"{once.name}-{step}")
    if not mine or struck.exists():
        return
    struck.touch()
    kind = mine[0].split(":")[2]
    if kind == "mistake":
        raise UserError("the disk is full")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    if kind == "sleep":
        time.sleep(300)
    if kind == "agent":
        os.kill(os.getppid(), signal.SIGTERM)
        # Wait for the signal: every rank gets it once, and then handles it by default.
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            time.sleep(0.05)
        return
    os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))


def train_with_fault(fault: str, once: Path, words: Sequence[str]) -> int:
    import train
    from hrm.engine.engine import Engine

    train_step, batches = Engine.train_step, []

    def faulty(engine, batch):
        strike(fault, once, engine.step)
        batches.append((batch.inputs, batch.labels, batch.puzzle_identifiers))
        train_step(engine, batch)

    setattr(Engine, "train_step", faulty)  # noqa: B010
    mine = [word.removeprefix(f"{RANK}:") for word in words]
    status = train.main([word for word in mine if not word[0].isdigit()])
    if folder := os.environ.get("BATCHES"):
        torch.save([[torch.tensor(part) for part in batch] for batch in batches], f"{folder}/{RANK}.pt")
    return status


def sums_with_fault(fault: str, once: Path, words: Sequence[str]) -> None:
    with distributed.joined("cpu", 8, rank_timeout=4) as (world, _):
        for step in range(50):
            strike(fault, once, step)
            if "barrier" in words:
                world.barrier()
            world.all_reduce(torch.ones(4))
            world.highest(0)


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
            "many": {f"key{i}": f"{'x' * 5000}{rank > 0}" for i in range(9)},
        }.items():
            try:
                world.check_equal(what)
            except UserError as error:
                results[name] = str(error)
        # Rank 1 gets a stop request at its third step, and rank 2 a more urgent one at its fifth.
        codes = [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 0), (0, 0, 3), (2, 0, 0), (0, 0, 0)]
        results["highest"] = [world.highest(code[rank]) for code in codes]
        results["highest now"] = [world.highest_now(code[rank]) for code in codes]
        torch.save(results, out / f"{rank}.pt")
        # One last code is in flight when the ranks end.
        world.highest(1)
    with distributed.joined("cpu", 6) as (world, _):
        world.barrier()
    raise UserError("every rank meets this")


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "train":
        sys.exit(train_with_fault(rest[0], Path(rest[1]), rest[2:]))
    command = functools.partial(collectives, Path(rest[0]))
    if name == "sums":
        command = functools.partial(sums_with_fault, rest[0], Path(rest[1]), rest[2:])
    sys.exit(run_command(command, ""))

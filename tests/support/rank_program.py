"""What torchrun starts in the tests of ranks: the trainer with a fault in one rank, or a few collectives.

usage: rank_program.py train|sums FAULT ONCE WORD...   rank_program.py collectives OUT_FOLDER
FAULT: `none` or `RANK:STEP:KIND,...`, KIND a signal (KILL, STOP, TERM), mistake, bug, sleep, or agent for a
SIGTERM to torchrun; each strikes once, as files that begin with ONCE remember. A word of train.py that starts
with `RANK:` is for that rank alone. `sums` sums over the ranks in each step, the first WORD `barrier` has it
pass a barrier before, and a rank waits 4 s for another. If BATCHES names a folder, `train` writes there the
batches of each rank. SOURCES=RANK:FOLDER gives that rank the project's sources from there.
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
    """Commits the fault that is this rank's at this step, if there is one."""
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
        # Until it has come back: every rank is sent it once, and then does as the system does.
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
        # Rank 1 sees a reason to stop at its third step, rank 2 a graver one at its fifth.
        codes = [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 0), (0, 0, 3), (2, 0, 0), (0, 0, 0)]
        results["highest"] = [world.highest(code[rank]) for code in codes]
        results["highest now"] = [world.highest_now(code[rank]) for code in codes]
        torch.save(results, out / f"{rank}.pt")
        # One last code is on its way when the ranks part.
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

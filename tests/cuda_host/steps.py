"""Training steps on the stand-in library, and what the log says of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.implementations import metadata, random_batches
from hrm.config.load import parse_args
from hrm.config.presets import ARCHITECTURES
from hrm.config.schema import Config
from hrm.data.dataset import Batch
from hrm.engine.cuda_graph import WARM_UP
from hrm.engine.dry_run import Observer, Rehearsal
from hrm.engine.engine import Engine
from hrm.engine.profiling import opened_by
from kernels.backend import Launch
from tests.cuda_host.stand_in import Record, StandIn, read_log

# Models that compile in seconds. The published ones come from the same code.
SMALL = {
    "preset": "full",
    "device": "cuda",
    "global_batch_size": "32",
    "arch.hidden_size": "128",
    "arch.num_heads": "2",
    "arch.H_cycles": "1",
    "arch.H_layers": "1",
    "arch.L_layers": "1",
    "arch.L_cycles": "1",
    "arch.halt_max_steps": "3",
}
# Named ranges of a step; what is in none of them prepares or ends it.
PARTS = ("forward", "backward", "optimiser")


def configuration(text: str) -> Config:
    """A small model's configuration. text: an architecture, then key=value words, which beat SMALL's."""
    arch, *words = text.split()
    values = {key: value for key, value in SMALL.items() if key not in ARCHITECTURES[arch]}
    values |= dict(word.split("=", 1) for word in words)
    return parse_args(["--arch", arch, *(f"{key}={value}" for key, value in values.items())])


def engine_of(config: Config, cells: int = 81) -> tuple[Engine, Iterator[Batch]]:
    """An engine on the stand-in device, and batches for it without end."""
    data = metadata(cells, 11 if cells == 81 else 12)
    return Engine(config, data, total_steps=1000, device="cuda"), random_batches(config, data)


def logged(stand_in: StandIn, path: Path, call: Callable[[], object]) -> list[Record]:
    """What a call does, with the step's named ranges as parts."""
    with stand_in.log(path), opened_by(stand_in.part):
        call()
    return read_log(path)


@dataclass(frozen=True)
class Steps:
    """The log of the step that is captured, and of a later one that is replayed."""

    captured: list[Record]
    replayed: list[Record]

    @property
    def nodes(self) -> list[Record]:
        return [record for record in self.captured if record.graph]

    def custom_launches(self) -> Counter[tuple[str, str]]:
        """The number of launches of each of this project's kernels in the graph, by part and name."""
        kernels = [node for node in self.nodes if node.kind == "kernel" and node.origin == "custom"]
        return Counter((part_of(node.parts), node.name) for node in kernels)


def part_of(ranges: tuple[str, ...] | list[str]) -> str:
    return next((name for name in ranges if name in PARTS), "")


def train(stand_in: StandIn, folder: Path, engine: Engine, batches: Iterator[Batch]) -> Steps:
    """Warms a captured step up, captures it, and replays it until its inputs' two buffers are in turn."""

    def step() -> None:
        engine.train_step(next(batches))

    for _ in range(WARM_UP):
        step()
    captured = logged(stand_in, folder / "captured", step)
    for _ in range(3):
        step()
    return Steps(captured, logged(stand_in, folder / "replayed", step))


def waits(records: list[Record], graphs: int = 1) -> list[Record]:
    """What makes the host wait, allocates, or copies pageable memory in a step that is replayed.

    A batch's pinned buffer is written when the copy of two steps before has ended: that is no wait. graphs:
    graph launches in a step.
    """

    def is_wait(record: Record) -> bool:
        if record.name == "cudaEventSynchronize":
            return record.facts["launches_since"] < 2 * graphs
        if record.kind == "memcpy":
            return "pageable" in (record.facts["from"], record.facts["to"])
        return record.kind in ("sync", "malloc", "free", "module")

    return [record for record in records if is_wait(record)]


def rehearsed_launches(config: Config, cells: int = 81) -> Counter[tuple[str, str]]:
    """The launches of this project's kernels that the dry run predicts for a step, by part and name."""

    class Launches(Observer):
        def __init__(self) -> None:
            super().__init__()
            self.found: Counter[tuple[str, str]] = Counter()

        def launched(self, launch: Launch) -> None:
            self.found[part_of(self.regions), launch.kernel.__name__] += 1

    launches = Launches()
    rehearsal = Rehearsal(config, metadata(cells, 11 if cells == 81 else 12), torch.device("cuda"), launches)
    # The first step also makes what later ones find.
    rehearsal.step()
    launches.found.clear()
    rehearsal.step()
    return launches.found

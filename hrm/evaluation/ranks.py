"""Distributes whole batches among ranks, and gathers their answers in order.

A batch has the same shape and rows as in a single process, and sums are added in the order of batches. So the
results are identical for any number of ranks.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from hrm.data.dataset import Batch
from hrm.distributed import World
from hrm.engine.inference import Answers, EarlyExit, Inference


def answers_in_order(
    full: Inference, batches: Iterable[tuple[Batch, int]], world: World
) -> Iterator[tuple[Answers, np.ndarray]]:
    """The answers to all batches, on every rank, with each batch's metric sums as float64.

    batches: equal on every rank, each with its number of valid rows.
    """
    source, first = iter(batches), 0
    while turn := list(islice(source, world.size)):
        # In the last round, a rank without a batch repeats one, because the others wait for it.
        full.run(turn[min(world.rank, len(turn) - 1)][0])
        outputs = (full.predictions, full.q_halt, full.sums)
        gathered = [world.all_gather(output).cpu().numpy().copy() for output in outputs]
        for rank, (batch, count) in enumerate(turn):
            predictions, q_halt, sums = (
                values[rank * (len(values) // world.size) :][: len(values) // world.size]
                for values in gathered
            )
            steps = np.full(count, full.model.arch.halt_max_steps, np.int32)
            places = np.arange(first, first + count)
            labels = batch.labels[:count]
            yield Answers(places, labels, predictions[:count], q_halt[:count], steps), sums.astype(np.float64)
            first += count


def own_early_answers(
    early: EarlyExit, batches: Iterable[tuple[Batch, int]], batch_size: int, world: World
) -> Iterator[Answers]:
    """The answers with early halting to this rank's batches, with places among the sequences of all ranks."""
    for answers in early.answers(islice(batches, world.rank, None, world.size)):
        turn, row = np.divmod(answers.places, batch_size)
        yield answers._replace(places=(turn * world.size + world.rank) * batch_size + row)

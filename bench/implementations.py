"""Whole training steps of one model by different code, from the same weights, on the same data.

Each maker returns `step() -> loss of that step` (summed over the batch, before the update), and goes on from
one call to the next as a training run does: halting, replacement, both optimisers.
"""

import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hrm.act import draw_min_halt_steps
from hrm.config import Config
from hrm.data.dataset import Batch
from hrm.data.layout import Metadata
from hrm.engine import Engine
from tests import official, straight_line

Step = Callable[[], float]
TOTAL_STEPS = 10_000


def metadata(cells: int, vocab_size: int) -> Metadata:
    """A Sudoku-like data set's description."""
    return Metadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=cells,
        num_puzzle_identifiers=1,
        total_groups=1000,
        mean_puzzle_examples=1.0,
        sets=["all"],
    )


def random_batches(config: Config, data: Metadata) -> Iterator[Batch]:
    """Random sequences, the same for every implementation; eight batches over and over."""
    rng = np.random.default_rng(0)
    shape = (config.global_batch_size, data.seq_len)

    def cells() -> np.ndarray:
        return rng.integers(1, data.vocab_size, shape, dtype=np.int32)

    identifiers = np.zeros(shape[0], dtype=np.int32)
    return cycle([Batch(cells(), cells(), identifiers) for _ in range(8)])


@contextmanager
def ours(config: Config, data: Metadata) -> Iterator[Step]:
    """This project's engine, in the configuration's mode."""
    engine, batches = Engine(config, data, total_steps=TOTAL_STEPS), random_batches(config, data)

    def step() -> float:
        engine.train_step(next(batches))
        return engine.pop_metrics()["loss"] * config.global_batch_size

    yield step


@contextmanager
def plain(config: Config, data: Metadata) -> Iterator[Step]:
    """The model written plainly in eager PyTorch, an optimiser call for each parameter."""
    start = Engine(config, data, total_steps=TOTAL_STEPS).weights()
    weights = {name: tensor.clone() for name, tensor in start.items()}
    weights.setdefault("puzzle_emb.weights", torch.zeros(1, 0))
    recipe = SimpleNamespace(**asdict(config), total_steps=TOTAL_STEPS, loss_type=config.loss.loss_type)
    batches, count = random_batches(config, data), 0
    state: dict[str, Any] = {}
    carry: Any = None

    def step() -> float:
        nonlocal carry, count
        count += 1
        batch = {name: torch.from_numpy(array) for name, array in vars(next(batches)).items()}
        least = draw_min_halt_steps(config.arch, config.seed, count, config.global_batch_size)
        if carry is None:
            carry = straight_line.initial_carry(weights, config.arch, batch)
        result = straight_line.train_step(
            weights, config.arch, recipe, state, carry, batch, torch.from_numpy(least)
        )
        carry = result["carry"]
        return result["loss"].item()

    yield step


@contextmanager
def official_step(config: Config, data: Metadata, *, compiled: bool) -> Iterator[Step]:
    """The official model and loss (v1 alone), and its per-parameter update.

    Its optimiser package runs on CUDA only, so the plain update stands in for it; its attention is PyTorch's
    where flash-attn is missing.
    """
    weights = Engine(config, data, total_steps=TOTAL_STEPS).weights()
    with official.official_code() as code:
        head: Any = official.official_model(
            code,
            config.arch,
            weights,
            batch_size=config.global_batch_size,
            seq_len=data.seq_len,
            dtype=torch.float32,
            loss_type=config.loss.loss_type,
            halt_exploration_prob=config.arch.halt_exploration_prob,
        )
        model: Any = torch.compile(head, dynamic=False) if compiled else head
        batches, count = random_batches(config, data), 0
        state: dict[str, Any] = {}
        carry: Any = None

        def step() -> float:
            nonlocal carry, count
            count += 1
            batch = {name: torch.from_numpy(array) for name, array in vars(next(batches)).items()}
            if carry is None:
                carry = head.initial_carry(batch)
            carry, loss, _, _, _ = model(return_keys=[], carry=carry, batch=batch)
            (loss / config.global_batch_size).backward()
            rates = [
                straight_line.learning_rate(
                    count, base, config.lr_warmup_steps, TOTAL_STEPS, config.lr_min_ratio
                )
                for base in (config.lr, config.puzzle_emb_lr)
            ]
            with torch.no_grad():
                for name, p in head.named_parameters():
                    m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
                    straight_line.adam_atan2(
                        p, p.grad, m, v, count, rates[0], config.beta1, config.beta2, config.weight_decay
                    )
                table = head.model.puzzle_emb
                code.sparse_embedding._sparse_emb_signsgd_dist(
                    table.local_weights.grad,
                    table.local_ids,
                    table.weights,
                    lr=rates[1],
                    weight_decay=config.puzzle_emb_weight_decay,
                    world_size=1,
                )
                for tensor in (*head.parameters(), table.local_weights):
                    tensor.grad = None
            return loss.item()

        yield step


def peak_memory(step: Step) -> int:
    """Bytes that a step allocates at its peak, on top of what lives between steps, on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    live = np.cumsum([size for _, size in sorted(changes)])
    return int(live.max())


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

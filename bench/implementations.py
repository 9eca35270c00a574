"""Implementations of the same model: this project's, plain PyTorch, and the official one.

Each class starts from the same weights and data and provides three operations: training steps as in a run
(halting, replacement, both optimisers), the evaluation of a batch, and its solution. With the arguments
CERTAIN every sequence may halt from its first step, and the full learning rate applies from the first update,
so that the losses of a few steps show whether implementations agree.
"""

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import kernels
from hrm.config.load import Config
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.engine.engine import Engine
from hrm.engine.kernel_choice import take_measured
from hrm.model.hrm import HRM
from tests.support import official, straight_line

TOTAL_STEPS = 10_000
# Arguments that remove randomness and schedules from training steps.
CERTAIN = ["arch.halt_exploration_prob=0", "lr_warmup_steps=0", "lr_min_ratio=1"]
Answers = tuple[np.ndarray, np.ndarray]


class Implementation(Protocol):
    """The interface of all implementations. B: global_batch_size; S: cells; all methods except `train` use
    the first batch."""

    def train(self) -> None:
        """Runs a training step on the next batch."""

    def loss(self) -> float:
        """The mean loss over the batch of the last training step, before its update. Read it only once."""

    def evaluate(self) -> dict[str, float]:
        """lm_loss and q_halt_loss after halt_max_steps steps, means over the batch."""

    def solve(self) -> Answers:
        """Predictions (B, S) and q_halt (B,) after halt_max_steps steps, on the host."""


# ------------------------------------------------------------------------------------------ data and weights


def metadata(cells: int, vocab_size: int, puzzles: int = 1) -> Metadata:
    """A Sudoku-like data set's description."""
    return Metadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=cells,
        num_puzzle_identifiers=puzzles,
        total_groups=1000,
        mean_puzzle_examples=1.0,
        sets=["all"],
    )


def random_batches(config: Config, data: Metadata) -> Iterator[Batch]:
    """Random sequences, the same for every implementation; eight batches repeat."""
    rng = np.random.default_rng(0)
    shape = (config.global_batch_size, data.seq_len)

    def cells() -> np.ndarray:
        return rng.integers(1, data.vocab_size, shape, dtype=np.int32)

    def identifiers() -> np.ndarray:
        return rng.integers(0, data.num_puzzle_identifiers, shape[0], dtype=np.int32)

    return cycle([Batch(cells(), cells(), identifiers()) for _ in range(8)])


def starting_weights(config: Config, data: Metadata) -> dict[str, Tensor]:
    """Initial weights on the CPU, changed so that results show whether implementations agree.

    Constant tensors become random: the Q head, which decides on halting, and the puzzle table. The blocks'
    output weights are divided by four, because 16 steps of untrained blocks would amplify rounding beyond use
    in bfloat16.
    """
    model = HRM.from_config(config, data, torch.float32)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    generator, scale = torch.Generator().manual_seed(config.seed + 1), config.arch.hidden_size**-0.5
    weights["q_head.weight"].normal_(std=scale, generator=generator)
    # Large enough that only some puzzles halt.
    weights["puzzle_emb.weights"].normal_(std=4 * scale, generator=generator)
    weights["q_head.bias"].zero_()
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name].mul_(0.25)
    return weights


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in vars(batch).items()}


# ---------------------------------------------------------------------------------------------- this project


class Ours:
    """This project's engine, in the configuration's mode."""

    def __init__(self, config: Config, data: Metadata, device: torch.device) -> None:
        self.engine = Engine(config, data, total_steps=TOTAL_STEPS, device=device)
        self.engine.load_weights(starting_weights(config, data))
        self.batches, self.first = random_batches(config, data), next(random_batches(config, data))

    def train(self) -> None:
        self.engine.train_step(next(self.batches))

    def loss(self) -> float:
        return self.engine.pop().metrics["loss"]

    def evaluate(self) -> dict[str, float]:
        size = len(self.first.inputs)
        means = self.engine.evaluate([("all", self.first, size)])["all"]
        return {name: means[name] for name in ("lm_loss", "q_halt_loss")}

    def solve(self) -> Answers:
        inference = self.engine.inference(len(self.first.inputs))
        return inference.solve(self.first.inputs, self.first.puzzle_identifiers)


# ------------------------------------------------------------------------------------------- written plainly


class Plain:
    """The straight-line model in eager PyTorch and float32, with one optimiser call per parameter.

    part: number of sequences computed at a time, by default all. Smaller parts take less memory and give the
    same results up to rounding.
    """

    def __init__(self, config: Config, data: Metadata, device: torch.device, part: int | None = None) -> None:
        self.config, self.device, size = config, device, config.global_batch_size
        self.weights = {name: tensor.to(device) for name, tensor in starting_weights(config, data).items()}
        self.dense = [
            n for n in self.weights if n not in (*straight_line.BUFFERS, straight_line.PUZZLE_TABLE)
        ]
        self.moments = {n: [torch.zeros_like(self.weights[n]) for _ in range(2)] for n in self.dense}
        part = part or size
        self.parts = [slice(first, first + part) for first in range(0, size, part)]
        self.carries: list[Any] = [None] * len(self.parts)
        self.batches, self.first = random_batches(config, data), next(random_batches(config, data))
        self.step = 0
        self.last_loss = torch.zeros(())

    def split(self, batch: Batch) -> list[dict[str, Tensor]]:
        tensors = on_device(batch, self.device)
        return [{name: tensor[rows] for name, tensor in tensors.items()} for rows in self.parts]

    def train(self) -> None:
        config, arch, size = self.config, self.config.arch, self.config.global_batch_size
        self.step += 1
        results = []
        for index, batch in enumerate(self.split(next(self.batches))):
            carry = self.carries[index] or straight_line.initial_carry(self.weights, arch, batch)
            least = torch.zeros_like(batch["puzzle_identifiers"])
            result = straight_line.act_training_step(
                self.weights, arch, carry, batch, least, config.loss.loss_type, size
            )
            self.carries[index] = result["carry"]
            results.append(result)
        self.last_loss = sum(result["loss"] for result in results) / size
        for name in self.dense:
            gradient = sum(result["gradients"][name] for result in results)
            m, v = self.moments[name]
            recipe = (config.lr, config.beta1, config.beta2, config.weight_decay)
            straight_line.adam_atan2(self.weights[name], gradient, m, v, self.step, *recipe)
        if arch.puzzle_emb_ndim:
            ids, gradients = (
                torch.cat(each) for each in zip(*(r["puzzle_rows"] for r in results), strict=True)
            )
            seen, place = ids.unique(return_inverse=True)
            summed = gradients.new_zeros(len(seen), arch.puzzle_emb_ndim).index_add_(0, place, gradients)
            table, lr = self.weights[straight_line.PUZZLE_TABLE], config.puzzle_emb_lr
            straight_line.sign_sgd(table, seen, summed, lr, config.puzzle_emb_weight_decay)

    def loss(self) -> float:
        return self.last_loss.item()

    def run(self) -> list[dict[str, Any]]:
        loss = self.config.loss.loss_type
        parts = self.split(self.first)
        return [straight_line.evaluation(self.weights, self.config.arch, part, loss) for part in parts]

    def evaluate(self) -> dict[str, float]:
        metrics, size = [result["metrics"] for result in self.run()], self.config.global_batch_size
        return {n: sum(part[n].item() for part in metrics) / size for n in ("lm_loss", "q_halt_loss")}

    def solve(self) -> Answers:
        outputs = [result["outputs"] for result in self.run()]
        predictions = torch.cat([part["logits"].argmax(-1) for part in outputs])
        return predictions.cpu().numpy(), torch.cat([part["q_halt"] for part in outputs]).cpu().numpy()


# ---------------------------------------------------------------------------------------------- the official


class Official:
    """The official model and loss (only v1) in the loops of its pretrain.py, in `dtype`.

    Its update is the package adam-atan2 if installed, on CUDA only; otherwise this project's fused update,
    called per parameter.
    """

    def __init__(
        self,
        code: Any,
        config: Config,
        data: Metadata,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compiled: bool,
    ) -> None:
        self.code, self.config, self.device = code, config, device
        weights = {name: tensor.to(device) for name, tensor in starting_weights(config, data).items()}
        self.head: Any = official.official_model(
            code,
            config.arch,
            weights,
            batch_size=config.global_batch_size,
            seq_len=data.seq_len,
            dtype=dtype,
            loss_type=config.loss.loss_type,
            halt_exploration_prob=config.arch.halt_exploration_prob,
        )
        self.model: Any = torch.compile(self.head, dynamic=False) if compiled else self.head
        self.batches, self.first = random_batches(config, data), next(random_batches(config, data))
        self.carry: Any = None
        self.metrics: dict[str, float] = {}
        self.update = self.packaged_update() if adam_atan2_package(device) else self.fused_update()

    def fresh_carry(self, batch: dict[str, Tensor]) -> Any:
        with self.device:
            return self.head.initial_carry(batch)

    def fetched(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Copies metrics to the host, as its loops do after every step."""
        values = torch.stack([metrics[name] for name in sorted(metrics)]).tolist()
        return dict(zip(sorted(metrics), values, strict=True))

    def train(self) -> None:
        batch = on_device(next(self.batches), self.device)
        if self.carry is None:
            self.carry = self.fresh_carry(batch)
        self.carry, loss, metrics, _, _ = self.model(return_keys=[], carry=self.carry, batch=batch)
        (loss / self.config.global_batch_size).backward()
        self.update()
        table = self.head.model.puzzle_emb
        self.code.sparse_embedding._sparse_emb_signsgd_dist(
            table.local_weights.grad,
            table.local_ids,
            table.weights,
            lr=self.config.puzzle_emb_lr,
            weight_decay=self.config.puzzle_emb_weight_decay,
            world_size=1,
        )
        for tensor in (*self.head.parameters(), table.local_weights):
            tensor.grad = None
        self.metrics = self.fetched(metrics)

    def packaged_update(self) -> Callable[[], None]:
        config = self.config
        optimizer = importlib.import_module("adam_atan2").AdamATan2(
            self.head.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        return optimizer.step

    def fused_update(self) -> Callable[[], None]:
        config = self.config
        lr = torch.tensor(config.lr, device=self.device)
        count = torch.zeros((), dtype=torch.int32, device=self.device)
        moments = [[torch.zeros_like(p) for _ in range(2)] for p in self.head.parameters()]
        recipe: Any = {"beta1": config.beta1, "beta2": config.beta2, "weight_decay": config.weight_decay}

        @torch.no_grad()
        def update() -> None:
            count.add_(1)
            for p, (m, v) in zip(self.head.parameters(), moments, strict=True):
                kernels.adam_atan2(p, p.grad, m, v, lr=lr, step=count, **recipe)

        return update

    def loss(self) -> float:
        m = self.metrics
        total = m["lm_loss"] + 0.5 * (m["q_halt_loss"] + m["q_continue_loss"])
        return total / self.config.global_batch_size

    def run(self, return_keys: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.head.training:
            self.head.eval()
        with torch.inference_mode():
            batch = on_device(self.first, self.device)
            carry, finished = self.fresh_carry(batch), False
            while not finished:
                carry, _, metrics, outputs, finished = self.model(
                    return_keys=return_keys, carry=carry, batch=batch
                )
            return metrics, outputs

    def evaluate(self) -> dict[str, float]:
        metrics, size = self.fetched(self.run([])[0]), self.config.global_batch_size
        return {name: metrics[name] / size for name in ("lm_loss", "q_halt_loss")}

    def solve(self) -> Answers:
        outputs = self.run(["logits", "q_halt_logits"])[1]
        return outputs["logits"].argmax(-1).cpu().numpy(), outputs["q_halt_logits"].cpu().numpy()


def adam_atan2_package(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("adam_atan2") is not None


# -------------------------------------------------------------------------------------------- the row's code


@contextmanager
def built(
    implementation: str, config: Config, data: Metadata, device: torch.device, dtype: torch.dtype
) -> Iterator[Implementation]:
    """An implementation by name: ours, reference (this project's without its kernels), plain or official.

    config.mode: its mode; dtype: of the forward.
    """
    torch.manual_seed(0)
    if implementation in ("ours", "reference"):
        before = kernels.get_backend()
        kernels.set_backend("auto" if implementation == "ours" else "reference")
        take_measured(device)
        try:
            yield Ours(config, data, device)
        finally:
            kernels.set_backend(before)
    elif implementation == "plain":
        yield Plain(config, data, device)
    else:
        with official.official_code() as code:
            yield Official(code, config, data, device, dtype, compiled=config.mode == "compile")


# --------------------------------------------------------------------------------------------- what it took


def traced(step: Callable[[], object], device: torch.device, **options: Any) -> list[dict[str, Any]]:
    """The events of a call in a trace of PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, **options) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def peak_memory(step: Callable[[], object]) -> int:
    """Peak bytes that a step allocates on the CPU, in addition to memory that persists between steps."""
    events = traced(step, torch.device("cpu"), profile_memory=True)
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    live = np.cumsum([size for _, size in sorted(changes)])
    return int(live.max(initial=0))

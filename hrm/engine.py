"""The training step and the evaluation of a run, and all the state that a run resumes from.

A step is a fixed-shape program: fresh sequences in, one ACT step forward and back, one update. Everything it
draws at random is a function of (seed, step), everything it sums for the log stays on the device, so the
state is the tensors named here and a step number, and no value of a step is read back by the host.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm.act import Carry, Outputs, Sequences, act_step, draw_min_halt_steps, initial_carry, replace_halted
from hrm.config import Config
from hrm.data.dataset import Batch
from hrm.data.layout import Metadata
from hrm.distributed import World
from hrm.errors import UserError
from hrm.losses import act_loss
from hrm.model import HRM
from hrm.optim import AdamATan2, FlatParameters, learning_rate
from hrm.profiling import region
from kernels import get_backend, sign_sgd
from kernels.backend import BackendError

# Compiling pays on a CPU from about this many steps on; below it the compiler takes longer than it saves.
COMPILE_FROM_STEPS = 2000
# The sums that are means over sequences which halted; every other one is a mean over all sequences.
PER_HALTED = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The forward dtype that `dtype=name` stands for: auto is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_mode(name: str, device: torch.device, total_steps: int) -> tuple[str, str]:
    """The mode that `mode=name` stands for, and in words why auto had to settle for less.

    auto compiles on CUDA, and on a CPU if the run is long enough. A function of machine and configuration
    alone, so that a resumed run takes the same path.
    """
    long_enough = device.type == "cuda" or (device.type == "cpu" and total_steps >= COMPILE_FROM_STEPS)
    if name == "eager" or (name == "auto" and not long_enough):
        return "eager", ""
    fault = compiler_fault(device)
    if fault is None:
        return "compile", ""
    if name == "compile":
        raise UserError(
            f"mode=compile: {fault}; use mode=eager, or install a C++ compiler and Python's headers"
        )
    return "eager", f" (slower: {fault})"


def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work here, found by trying it on one operation; None when it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    # A missing compiler, header or library shows in as many ways as there are of each.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return f"torch.compile fails here ({reason.splitlines()[0][:120]})"
    return None


class Engine:
    """A model in training on one device: `train_step`, `evaluate`, and its state."""

    def __init__(
        self,
        config: Config,
        metadata: Metadata,
        *,
        total_steps: int,
        device: torch.device | str = "cpu",
        world: World | None = None,
    ) -> None:
        """total_steps: the schedule's length. Every rank builds the same model from config.seed."""
        self.config, self.metadata, self.total_steps = config, metadata, total_steps
        self.device, self.world = torch.device(device), world or World()
        self.mode, self.mode_note = resolve_mode(config.mode, self.device, total_steps)
        self.model = HRM(
            config.arch,
            vocab_size=metadata.vocab_size,
            seq_len=metadata.seq_len,
            num_puzzle_identifiers=metadata.num_puzzle_identifiers,
            dtype=resolve_dtype(config.dtype, self.device),
            seed=config.seed,
            attention_backend=config.attention.backend,
        ).to(self.device)
        self._check_kernels()
        self.parameters = FlatParameters(self.model)
        self.optimizer = AdamATan2(
            self.parameters, beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay
        )
        self.step = 0
        self.carry = self._fresh_carry()
        self._lr = torch.zeros((), device=self.device)
        self._puzzle_emb_lr = torch.zeros((), device=self.device)
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._steps_summed = 0
        self._train_forward, self._eval_forward = self._training_forward, self._evaluation_forward
        if self.mode == "compile":
            self._train_forward = torch.compile(self._training_forward, fullgraph=True, dynamic=False)
            self._eval_forward = torch.compile(self._evaluation_forward, fullgraph=True, dynamic=False)

    def _check_kernels(self) -> None:
        """Steps one sequence where implementations were asked for by name: what cannot run is refused now."""
        try:
            named = get_backend() == "triton" or self.config.attention.backend != "auto"
        except ValueError as error:
            raise UserError(str(error)) from None
        if not named:
            return
        carry, rows = initial_carry(self.model, 1, self.metadata.seq_len, self.device), None
        if self.model.puzzle_emb is not None:
            rows = self.model.puzzle_emb(carry.puzzle_identifiers)
        try:
            self._loss(*act_step(self.model, carry, rows, torch.zeros_like(carry.steps)))
        except BackendError as error:
            raise UserError(str(error)) from None

    # ------------------------------------------------------------------------------------------ training

    def _training_forward(
        self, carry: Carry, fresh: Sequences, puzzle_rows: Tensor | None, min_halt_steps: Tensor
    ) -> tuple[Carry, Tensor, dict[str, Tensor]]:
        carry = replace_halted(self.model, carry, fresh)
        carry, outputs = act_step(self.model, carry, puzzle_rows, min_halt_steps)
        loss, sums = self._loss(carry, outputs)
        return carry, loss / self.config.global_batch_size, sums

    def _loss(self, carry: Carry, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        with region("head and loss"):
            return act_loss(self.config.loss.loss_type, self.model.lm_head.weight, carry, outputs)

    def train_step(self, batch: Batch) -> None:
        """One ACT step and one update. batch: this rank's rows of the global batch, taken where needed.

        Raises UserError when the batch does not fit into the device's memory.
        """
        with self._enough_memory(), region("step"):
            self._train_step(batch)

    def _train_step(self, batch: Batch) -> None:
        config, model = self.config, self.model
        self.step += 1
        self._lr.fill_(self.learning_rate(config.lr))
        with region("data"):
            min_halt_steps = draw_min_halt_steps(
                config.arch, config.seed, self.step, config.global_batch_size
            )
            local = torch.from_numpy(min_halt_steps[self.world.rows(config.global_batch_size)])
            fresh, local = self._to_device(batch), local.to(self.device)

        with region("forward"):
            puzzle_rows = None
            if model.puzzle_emb is not None:
                # A leaf outside the forward: its gradient is that of these rows, the table's is never made.
                identifiers = torch.where(
                    self.carry.halted, fresh.puzzle_identifiers, self.carry.puzzle_identifiers
                )
                puzzle_rows = model.puzzle_emb(identifiers).requires_grad_()
            self.carry, loss, sums = self._train_forward(self.carry, fresh, puzzle_rows, local)
        with region("backward"):
            self.parameters.grad.zero_()
            loss.backward()
        with region("all-reduce"):
            self.world.all_reduce(self.parameters.grad)
        with region("optimiser"):
            statistics = self.optimizer.step(self._lr)
            if model.puzzle_emb is not None and puzzle_rows is not None:
                assert puzzle_rows.grad is not None
                self._puzzle_emb_lr.fill_(self.learning_rate(config.puzzle_emb_lr))
                sign_sgd(
                    model.puzzle_emb.weights,
                    self.world.all_gather(self.carry.puzzle_identifiers),
                    self.world.all_gather(puzzle_rows.grad),
                    self._puzzle_emb_lr,
                    config.puzzle_emb_weight_decay,
                )
        self._add(sums, loss, statistics.norm)

    def learning_rate(self, base_lr: float) -> float:
        """The schedule's value at the current step for one of the two base learning rates."""
        config = self.config
        return learning_rate(
            self.step,
            base_lr=base_lr,
            warmup_steps=config.lr_warmup_steps,
            total_steps=self.total_steps,
            min_ratio=config.lr_min_ratio,
        )

    def _add(self, sums: dict[str, Tensor], loss: Tensor, grad_norm: Tensor) -> None:
        # The gradient is whole on every rank, so its norm must not be summed over them.
        norm = grad_norm / self.world.size
        values = [*sums.values(), loss.detach() * self.config.global_batch_size, norm]
        vector = torch.stack([value.to(torch.float32) for value in values])
        self._names = [*sums, "loss", "grad_norm"]
        self._sums = vector if self._sums is None else self._sums.add_(vector)
        self._steps_summed += 1

    def pop_metrics(self) -> dict[str, float]:
        """Means since the last call, over all ranks: of halted sequences, of all sequences, of steps.

        The only place where training waits for the device. Metrics of halted sequences are left out while
        none has halted. Raises UserError when the loss is no longer finite.
        """
        assert self._sums is not None, "no step since the last call"
        values = self.world.all_reduce(self._sums).tolist()
        sums, steps = dict(zip(self._names, values, strict=True)), self._steps_summed
        self._sums, self._steps_summed = None, 0
        if not math.isfinite(sums["loss"]):
            raise UserError(
                f"the loss is not finite at step {self.step}: lower lr={self.config.lr:g} or raise "
                f"lr_warmup_steps={self.config.lr_warmup_steps}, and resume from the last checkpoint"
            )
        grad_norm = sums.pop("grad_norm") / steps
        metrics = _means(sums, steps * self.config.global_batch_size)
        return {**metrics, "grad_norm": grad_norm, "lr": self.learning_rate(self.config.lr)}

    # ---------------------------------------------------------------------------------------- evaluation

    def _evaluation_forward(
        self, carry: Carry, puzzle_rows: Tensor | None
    ) -> tuple[Carry, dict[str, Tensor]]:
        carry, outputs = act_step(self.model, carry, puzzle_rows, None)
        return carry, self._loss(carry, outputs)[1]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[str, Batch, int]]) -> dict[str, dict[str, float]]:
        """Runs every sequence for halt_max_steps steps; returns each set's means over its sequences.

        batches: (set name, this rank's padded rows, ...) as `test_batches` yields them. Training's carry is
        untouched.
        """
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        for set_name, batch, _ in batches:
            carry = replace_halted(self.model, self._fresh_carry(), self._to_device(batch))
            puzzle_rows = None
            if self.model.puzzle_emb is not None:
                puzzle_rows = self.model.puzzle_emb(carry.puzzle_identifiers)
            for _ in range(self.config.arch.halt_max_steps):
                carry, sums = self._eval_forward(carry, puzzle_rows)
            names = list(sums)
            # On the host and in float64: the sums of a large set outgrow float32's integers.
            vector = torch.stack([value.to(torch.float32) for value in sums.values()]).cpu().double()
            totals[set_name] = totals[set_name] + vector if set_name in totals else vector
        results = {}
        for set_name, total in totals.items():
            reduced = self.world.all_reduce(total if self.world.size == 1 else total.to(self.device))
            set_sums = dict(zip(names, reduced.tolist(), strict=True))
            results[set_name] = _means(set_sums, set_sums["count"])
        return results

    # --------------------------------------------------------------------------------------------- state

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, under the official checkpoints' names."""
        return self.model.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over the given weights; names that are missing keep their values."""
        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    def training_state(self) -> dict[str, Any]:
        """Everything besides the weights that the next step depends on; the carry in global-batch order."""
        carry = {name: self.world.all_gather(tensor) for name, tensor in self.carry._asdict().items()}
        return {"step": self.step, "carry": carry, "optimizer": self.optimizer.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continues from a `training_state` of the same configuration."""
        rows = self.world.rows(self.config.global_batch_size)
        self.step = state["step"]
        self.carry = Carry(**{name: tensor[rows].to(self.device) for name, tensor in state["carry"].items()})
        self.optimizer.load_state_dict(state["optimizer"])

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise UserError(
                f"global_batch_size={self.config.global_batch_size} does not fit into the memory of "
                f"{self.device}: lower it, arch.hidden_size or the layers"
            ) from None

    def _fresh_carry(self) -> Carry:
        local = self.config.global_batch_size // self.world.size
        return initial_carry(self.model, local, self.metadata.seq_len, self.device)

    def _to_device(self, batch: Batch) -> Sequences:
        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        return Sequences(tensor(batch.inputs), tensor(batch.labels), tensor(batch.puzzle_identifiers))


def _means(sums: dict[str, float], sequences: float) -> dict[str, float]:
    """Means from sums: of PER_HALTED over the halted, without them if none has; of the rest over all."""
    halted = sums["count"]
    means = {name: sums[name] / halted for name in PER_HALTED if halted}
    rest = [name for name in sums if name not in PER_HALTED and name != "count"]
    return {"count": halted, **means, **{name: sums[name] / max(sequences, 1) for name in rest}}

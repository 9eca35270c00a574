"""The training step and the evaluation of a run, and all the state that a run resumes from.

A step is a fixed-shape program: fresh sequences in, one ACT step forward and back, one update. Everything it
draws at random is a function of (seed, step), everything it sums for the log stays on the device, so the
state is the tensors named here and a step number, and no value of a step is read back by the host.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.common.errors import UserError
from hrm.common.regions import region
from hrm.config.load import Config
from hrm.config.schema import ArchConfig
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.distributed import World, digest
from hrm.engine.cuda_graph import Program
from hrm.engine.inference import Inference
from hrm.engine.metrics import gate_metrics, means
from hrm.engine.modes import (
    COMPILE,
    EAGER,
    Mode,
    compiled,
    compiler_fault,
    faster_mode,
    resolve_dtype,
    resolve_mode,
)
from hrm.engine.optim import AdamATan2, FlatParameters, MovingAverage, learning_rate
from hrm.engine.profiling import Stopwatch
from hrm.engine.step_inputs import Feed
from hrm.engine.tally import Tally
from hrm.model.act import Carry, Sequences, act_step, draw_min_halt_steps, initial_carry, replace_halted
from hrm.model.gating import gate_loss_scale, gate_statistics
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from kernels import get_backend, sign_sgd
from kernels.backend import BackendError

# Sequences of the carry whose gates are looked at for the log.
GATES_SEEN = 16


class Interval(NamedTuple):
    """The steps between two lines of the log.

    metrics: by their names in the log. losses, norms: the mean loss and the gradient's norm of each of the
    last steps, the oldest first; one of them is not finite where a step was skipped. skipped_in_a_row: steps
    up to the last one.
    """

    metrics: dict[str, float]
    losses: list[float]
    norms: list[float]
    skipped_in_a_row: int


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
        self._mode = resolve_mode(config.mode, self.device)
        if self._mode is None and config.deterministic:
            # What is measured may come out otherwise the next time.
            self._mode = EAGER._replace(note="deterministic=true measures none")
        self.model = HRM.from_config(config, metadata, resolve_dtype(config.dtype, self.device))
        self.model = self.model.to(self.device)
        self._check_kernels()
        self.step = 0
        self._rows = config.global_batch_size // self.world.size
        self._part_rows, left = divmod(self._rows, config.gradient_accumulation)
        if left:
            raise UserError(
                f"gradient_accumulation={config.gradient_accumulation} does not divide the {self._rows} "
                f"sequences of each device: change it or global_batch_size={config.global_batch_size}"
            )
        with self._enough_memory():
            self._allocate()
        self.tally = Tally(self.device, config.log_interval)
        # Of a step's part that waits for no other rank.
        self.own_time = Stopwatch(self.device)
        self._whole = compiled(self._forward)
        self._programs: list[Callable[[], None]] = []
        self._inferences: dict[int, Inference] = {}

    def _allocate(self) -> None:
        """What a step reads and writes: buffers that stay, so that a graph can be replayed on them."""
        config, model = self.config, self.model
        self.parameters = FlatParameters(model, model.dtype, model.wide)
        self.optimizer = AdamATan2(
            self.parameters, beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay
        )
        self._feed = Feed(self._rows, self.metadata.seq_len, self.device, self.parameters.data.dtype)
        self.average = MovingAverage(self.parameters, config.ema_rate) if config.ema else None
        self.carry = initial_carry(
            model,
            self._rows,
            self.metadata.seq_len,
            self.device,
            keeps_gates=config.loss.gate_stability_weight > 0,
        )
        self._row_grads: Tensor | None = None
        if model.puzzle_emb is not None:
            self._row_grads = model.puzzle_emb.weights.new_zeros(self._rows, config.arch.puzzle_emb_ndim)
        # Of every rank's rows, for the update.
        self._identifiers, self._all_row_grads = self.carry.puzzle_identifiers, self._row_grads
        if self.world.size > 1:
            self._identifiers = self.world.all_gather(self._identifiers)
            if self._row_grads is not None:
                self._all_row_grads = self.world.all_gather(self._row_grads)

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
            after, outputs = act_step(self.model, carry, rows, torch.zeros_like(carry.steps))
            act_loss(self.config.loss, self.model.lm_head.weight, after, outputs)
        except BackendError as error:
            raise UserError(str(error)) from None

    # -------------------------------------------------------------------------------------------- the mode

    @property
    def mode(self) -> Mode:
        """How steps are run; on a CPU, mode=auto finds it out when it is first asked for."""
        if self._mode is None:
            self._mode = self._measured_mode()
        return self._mode

    def _measured_mode(self) -> Mode:
        """The faster mode for the steps ahead, as the main rank measures it on steps that change nothing."""
        mode = EAGER
        if self.world.is_main:
            steps = self.total_steps - self.step
            mode = faster_mode(self._forward, self._whole, self._dry_step, steps, self.device)
        compiles = self.world.broadcast(torch.tensor([mode.compiled], dtype=torch.int32)).item()
        return mode if self.world.is_main else (COMPILE if compiles else EAGER)

    def _dry_step(self, forward: Callable[..., Any]) -> None:
        """A step's forward and backward on what the buffers hold, which stays as it is."""
        inputs = self._inputs(slice(self._part_rows))
        self._differentiate(forward(*inputs)[1], inputs[2])

    # ------------------------------------------------------------------------------------------ training

    def _forward(
        self,
        carry: Carry,
        fresh: Sequences,
        puzzle_rows: Tensor | None,
        min_halt_steps: Tensor,
        gate_loss_scale: Tensor,
    ) -> tuple[Carry, Tensor, dict[str, Tensor]]:
        config = self.config
        carry = replace_halted(self.model, carry, fresh)
        previous_gates, sees_gates = carry.gates, config.loss.uses_gates
        carry, outputs = act_step(self.model, carry, puzzle_rows, min_halt_steps, sees_gates=sees_gates)
        with region("head and loss"):
            head = self.model.lm_head.weight
            loss, sums = act_loss(config.loss, head, carry, outputs, previous_gates, gate_loss_scale)
        return carry, loss / config.global_batch_size, sums

    def train_step(self, batch: Batch) -> None:
        """One ACT step and one update. batch: this rank's rows of the global batch, taken where needed.

        Raises UserError when the batch does not fit into the device's memory.
        """
        config = self.config
        with self._enough_memory(), region("step"):
            self._programs = self._programs or self._step_programs()
            self.step += 1
            with region("data"):
                min_halt_steps = draw_min_halt_steps(
                    config.arch, config.seed, self.step, config.global_batch_size
                )
                self._feed.push(
                    batch,
                    min_halt_steps[self.world.rows(config.global_batch_size)],
                    self.learning_rate(config.lr),
                    self.learning_rate(config.puzzle_emb_lr),
                    gate_loss_scale(
                        self.step, config.loss.gate_loss_warmup_steps, config.loss.gate_loss_ramp_steps
                    ),
                )
            with self.own_time:
                self._programs[0]()
            for program in self._programs[1:]:
                program()

    def _step_programs(self) -> list[Callable[[], None]]:
        """A step's parts in their order: one graph, or two around what the ranks exchange."""
        forward = self._whole if self.mode.compiled else self._forward
        program = partial(Program, device=self.device, captured=self.mode.captured)

        def whole() -> None:
            self._compute(forward)
            self._update()

        if self.world.size == 1:
            return [program(whole)]
        return [program(partial(self._compute, forward)), self._exchange, program(self._update)]

    def _compute(self, forward: Callable[..., Any]) -> None:
        """Gradients of the fed sequences, the carry after them, their metric sums."""
        self.tally.begin()
        for first in range(0, self._rows, self._part_rows):
            part = slice(first, first + self._part_rows)
            with region("forward"):
                carry, fresh, puzzle_rows, *rest = self._inputs(part)
                after, loss, sums = forward(carry, fresh, puzzle_rows, *rest)
            with region("backward"):
                grads, row_grads = self._differentiate(loss, puzzle_rows)
                self.parameters.collect(grads, adds=first > 0)
            # Only now: until here the backward may go back to what the forward read.
            for old, new in zip(carry, after, strict=True):
                old.copy_(new)
            if row_grads is not None and self._row_grads is not None:
                self._row_grads[part] = row_grads
            self.tally.add({**sums, "loss": loss.detach() * self.config.global_batch_size})
            # Or they would live through the next part.
            del after, loss, sums, puzzle_rows, grads, row_grads
        # A loss that is not finite is one for every rank, by the gradient that they exchange.
        self.parameters.grad[:1].add_(self.tally.loss * 0)

    def _differentiate(
        self, loss: Tensor, puzzle_rows: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """The loss's gradients by the parameters' leaves, and by the puzzle rows where there are some."""
        rows = () if puzzle_rows is None else (puzzle_rows,)
        grads = torch.autograd.grad(loss, (*self.parameters.leaves, *rows), allow_unused=True)
        return (grads[:-1], grads[-1]) if rows else (grads, None)

    def _inputs(self, part: slice) -> tuple[Carry, Sequences, Tensor | None, Tensor, Tensor]:
        """What `_forward` takes for a part of the rows."""
        carry = Carry(*(tensor[part] for tensor in self.carry))
        fresh = Sequences(*(tensor[part] for tensor in self._feed.fresh))
        puzzle_rows = None
        if self.model.puzzle_emb is not None:
            # A leaf outside the forward: its gradient is these rows', the table's is never made.
            identifiers = torch.where(carry.halted, fresh.puzzle_identifiers, carry.puzzle_identifiers)
            puzzle_rows = self.model.puzzle_emb(identifiers).requires_grad_()
        return carry, fresh, puzzle_rows, self._feed.min_halt_steps[part], self._feed.gate_loss_scale

    def _exchange(self) -> None:
        """What the ranks tell each other: the sum of their gradients, and the puzzle rows of all."""
        with region("all-reduce"):
            self.world.all_reduce(self.parameters.grad)
            if self._row_grads is not None and self._all_row_grads is not None:
                self._identifiers.copy_(self.world.all_gather(self.carry.puzzle_identifiers))
                self._all_row_grads.copy_(self.world.all_gather(self._row_grads))

    def _update(self) -> None:
        with region("optimiser"):
            norm = torch.linalg.vector_norm(self.parameters.grad)
            if self._all_row_grads is not None:
                norm = norm + 0 * self._all_row_grads.sum()
            skip = ~torch.isfinite(norm)
            if self.config.grad_clip is not None:
                scale = self.config.grad_clip / norm.clamp(min=self.config.grad_clip)
                # Or one value that is not finite would be in all, and nobody could tell where it was.
                self.parameters.grad.mul_(torch.where(skip, 1, scale))
            self.optimizer.step(self._feed.lr, skip)
            if self.average is not None:
                self.average.update(skip)
            if self.model.puzzle_emb is not None and self._all_row_grads is not None:
                sign_sgd(
                    self.model.puzzle_emb.weights,
                    self._identifiers,
                    self._all_row_grads,
                    self._feed.puzzle_emb_lr,
                    self.config.puzzle_emb_weight_decay,
                    skip,
                )
            # What was not finite may lie in the states: such a step's sequences are given up for fresh ones.
            self.carry.halted.logical_or_(skip)
            self.carry.gates.copy_(torch.where(skip, 0, self.carry.gates))
            self.tally.end(norm, skip)

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

    def pop(self) -> Interval:
        """The steps since the last call, over all ranks; the only place where training waits for the device.

        Metrics are means of halted sequences, of all sequences, of steps; those that were skipped are in none
        of them. Metrics of halted sequences are left out while none has halted.
        """
        steps, skipped, in_a_row, sums, losses, norms = self.tally.read(self.world)
        kept, batch_size = steps - skipped, self.config.global_batch_size
        grad_norm = sums.pop("grad_norm")
        metrics: dict[str, float] = {"skipped": skipped} if skipped else {}
        if kept:
            metrics |= means(sums, kept * batch_size)
            metrics |= {"grad_norm": grad_norm / kept, "lr": self.learning_rate(self.config.lr)}
        if kept and not in_a_row:
            metrics |= {**self._puzzle_metrics(), **self.gate_metrics()}
        return Interval(metrics, [loss / batch_size for loss in losses], norms, in_a_row)

    def diagnosis(self) -> str:
        """What is not finite in the last step, whose gradients are still there, and the largest weight."""
        found = [] if bool(torch.isfinite(self.tally.loss)) else ["the loss"]
        gradients = self.parameters.views(self.parameters.grad)
        names = [name for name, grad in gradients.items() if not bool(torch.isfinite(grad).all())]
        if self._all_row_grads is not None and not bool(torch.isfinite(self._all_row_grads).all()):
            names.append("puzzle_emb.weights")
        if names:
            more = f" and of {len(names) - 3} more tensors" if len(names) > 3 else ""
            found.append(f"the gradient of {', '.join(names[:3])}{more}")
        weights = {name: value.abs().max().item() for name, value in self.weights().items()}
        largest = max(weights, key=lambda name: weights[name])
        return (
            f"{' and '.join(found) or 'the norm of the gradient'} is not finite; "
            f"the largest weight is {weights[largest]:.3g}, of {largest}"
        )

    def _puzzle_metrics(self) -> dict[str, float]:
        """Of the rows that the last step used: their mean norm, and the norm of all their gradients."""
        table = self.model.puzzle_emb
        if table is None or self._row_grads is None:
            return {}
        norms = table(self.carry.puzzle_identifiers).norm(dim=1).sum()
        both = self.world.all_reduce(torch.stack([norms, self._row_grads.square().sum()])).tolist()
        return {
            "puzzle_emb_norm": both[0] / self.config.global_batch_size,
            "puzzle_emb_grad_norm": math.sqrt(both[1]),
        }

    @torch.no_grad()
    def gate_metrics(self) -> dict[str, float]:
        """Statistics of the gates, from one more step of a few sequences that leaves everything as it is.

        Nothing without gates. A step itself computes none; a line of the log costs GATES_SEEN sequences'
        share of one.
        """
        if not self.config.arch.use_gating:
            return {}
        carry, fresh, puzzle_rows, *_ = self._inputs(slice(min(GATES_SEEN, self._rows)))
        carry = replace_halted(self.model, carry, fresh)
        _, outputs = act_step(self.model, carry, puzzle_rows, None, sees_gates=True)
        assert outputs.gated is not None
        table = torch.cat([gate_statistics(*gated) for gated in outputs.gated])
        return gate_metrics(self.world.all_reduce(table) / self.world.size)

    # ---------------------------------------------------------------------------------------- evaluation

    def inference(self, batch_size: int) -> Inference:
        """The program that solves `batch_size` sequences at a time with the present weights."""
        if batch_size not in self._inferences:
            self._inferences[batch_size] = Inference(
                self.model,
                batch_size,
                self.metadata.seq_len,
                mode=self.mode,
                loss=self.config.loss,
            )
        return self._inferences[batch_size]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[str, Batch, int]]) -> dict[str, dict[str, float]]:
        """Runs every sequence for halt_max_steps steps; returns each set's means over its sequences.

        batches: (set name, this rank's padded rows, ...) as `test_batches` yields them. Training's carry is
        untouched.
        """
        # In float64 where there is one: the sums of a large set outgrow float32's integers.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        totals: dict[str, Tensor] = {}
        with self._enough_memory():
            inference = self.inference(self._part_rows)
            for set_name, batch, _ in batches:
                for first in range(0, self._rows, self._part_rows):
                    inference.run(batch.rows(first, first + self._part_rows))
                    totals.setdefault(set_name, torch.zeros((), dtype=wide, device=self.device))
                    totals[set_name] = totals[set_name] + inference.sums.to(wide)
        results = {}
        for set_name, total in totals.items():
            reduced = self.world.all_reduce(total).tolist()
            set_sums = dict(zip(inference.names, reduced, strict=True))
            results[set_name] = means(set_sums, set_sums["count"])
        return results

    def enter(self, arch: ArchConfig) -> None:
        """Goes on with another stage's architecture, one of the same weights; all state is kept."""
        if arch == self.config.arch:
            return
        self.config = replace(self.config, arch=arch)
        self.model.arch = arch
        # What was compiled or captured took the earlier one's numbers for constants.
        torch.compiler.reset()
        self._whole, self._programs, self._inferences = compiled(self._forward), [], {}

    # --------------------------------------------------------------------------------------------- state

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, under the official checkpoints' names."""
        return {**self.model.state_dict(), **self.parameters.views(self.parameters.data)}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over the given weights; names that are missing keep their values."""
        own = self.weights()
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
            self.parameters.refresh_copy()
            if self.average is not None:
                self.average.restart()

    def agree(self) -> None:
        """Gives every rank the main one's weights, and makes sure that they all start from one state.

        Raises UserError naming the ranks that do not, for instance for having read another checkpoint.
        """
        if self.world.size == 1:
            return
        average = [] if self.average is None else [self.average.data]
        for tensor in (self.parameters.data, *average, *self.model.buffers()):
            self.world.broadcast(tensor)
        self.parameters.refresh_copy()
        state = {"weights": self.parameters.data, "first moments": self.optimizer.exp_avg}
        state |= {"second moments": self.optimizer.exp_avg_sq, **dict(self.model.named_buffers())}
        if self.average is not None:
            state["average"] = self.average.data
        self.world.check_equal({name: digest(tensor) for name, tensor in state.items()})

    def training_state(self) -> dict[str, Any]:
        """Everything besides the weights that the next step depends on; the carry in global-batch order."""
        carry = {name: self.world.all_gather(tensor) for name, tensor in self.carry._asdict().items()}
        state = {"step": self.step, "carry": carry, "optimizer": self.optimizer.state_dict()}
        return {**state, "tally": self.tally.state_dict(self.world), "compiled": self.mode.compiled}

    def load_training_state(self, state: dict[str, Any], *, carry: bool = True) -> None:
        """Continues from a `training_state`; without its carry the sequences in flight are given up."""
        rows = self.world.rows(self.config.global_batch_size)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if carry:
            for name, tensor in state["carry"].items():
                getattr(self.carry, name).copy_(tensor[rows])
        if carry and "tally" in state:
            self.tally.load_state_dict(state["tally"], self.world)
        if self._mode is None and "compiled" in state:
            # What was measured then goes on, for the same rounding and so the same run.
            self._mode = COMPILE if state["compiled"] and not compiler_fault(self.device) else EAGER

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # A CPU's allocator has no class of error for it.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            # Here, for it rehearses an engine.
            from hrm.engine.memory_estimate import available_bytes, does_not_fit

            available = available_bytes(self.device)
            raise UserError(
                does_not_fit(self.config, self.metadata, self.device, available, ranks=self.world.size)
            ) from None

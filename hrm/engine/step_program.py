"""One training step as a program of fixed shape: an ACT step forward and backward, then one update."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hrm.common.errors import UserError
from hrm.common.regions import region
from hrm.config.load import Config
from hrm.config.schema import ArchConfig
from hrm.distributed import World
from hrm.engine.compilation import Compilation
from hrm.engine.cuda_graph import WARM_UP, Program, aside
from hrm.engine.modes import Mode, compiled
from hrm.engine.muon import in_stacks, make_optimizer
from hrm.engine.optim import FlatParameters, MovingAverage
from hrm.engine.step_inputs import Feed
from hrm.engine.step_metrics import Tally
from hrm.model.act import Carry, Randomness, Sequences, act_step, initial_carry, replace_halted
from hrm.model.chains import chains_step
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from kernels import get_backend, sign_sgd
from kernels.backend import BackendError


class StepProgram:
    """The static buffers of a training step, and the computation on them.

    A step takes its inputs from `feed` and copies no value to the host, so a CUDA graph can replay it. rows:
    number of this rank's sequences; part_rows: of one part with gradient_accumulation. parameters, optimizer,
    average, carry: the state. row_grads: gradient of each row's puzzle embedding, (rows, puzzle_emb_ndim)
    float32; all_row_grads: the same for all ranks; both None without a puzzle table.
    """

    def __init__(self, config: Config, model: HRM, seq_len: int, device: torch.device, world: World) -> None:
        """Raises UserError if gradient_accumulation does not divide the rows."""
        self.config, self.model, self.device, self.world = config, model, device, world
        self.rows = config.global_batch_size // world.size
        self.part_rows, left = divmod(self.rows, config.gradient_accumulation)
        if left:
            raise UserError(
                f"gradient_accumulation={config.gradient_accumulation} does not divide the {self.rows} "
                f"sequences of each device: change it or global_batch_size={config.global_batch_size}"
            )
        parts: dict[str, int] = {}
        if config.optimizer == "muon":
            parts = in_stacks(model.matrices(), {name: p.shape for name, p in model.named_parameters()})
        self.parameters = FlatParameters(model, model.dtype, model.wide, first=[*parts])
        self.average: MovingAverage | None = None
        if config.ema:
            self.average = MovingAverage(self.parameters, config.ema_rate, config.ema_start)
        self.randomness = Randomness.of(config.arch)
        self.feed = Feed(
            self.rows, seq_len, self.device, self.parameters.data.dtype, self.randomness.key_words
        )
        self.optimizer = make_optimizer(config, self.parameters, parts, self.feed.muon_lr, world)
        # Passes the gradient norm and the skip flag between programs.
        self._judged: tuple[Tensor, Tensor] | None = None
        if self.optimizer.exchanges:
            norm = self.parameters.grad.new_zeros(())
            self._judged = norm, torch.zeros_like(norm, dtype=torch.bool)
        keeps_gates = config.loss.gate_stability_weight > 0
        self.carry = initial_carry(
            model,
            self.rows,
            seq_len,
            self.device,
            keeps_gates=keeps_gates,
            randomness=self.randomness,
            chains=config.arch.chains,
        )
        self.row_grads: Tensor | None = None
        if model.puzzle_emb is not None:
            self.row_grads = model.puzzle_emb.weights.new_zeros(self.rows, config.arch.puzzle_emb_ndim)
        # The update needs the rows of every rank.
        self._identifiers, self.all_row_grads = self.carry.puzzle_identifiers, self.row_grads
        if world.size > 1:
            self._identifiers = world.all_gather(self._identifiers)
            if self.row_grads is not None:
                self.all_row_grads = world.all_gather(self.row_grads)
        self.tally = Tally(self.device, config.log_interval)
        self.compiled, self._is_compiled = compiled(self.forward), False
        self._programs: list[Callable[[], None]] = []
        # Keep the metric sums that its graph adds to; another stage may have other metrics.
        self._captured: list[tuple[ArchConfig, list[Callable[[], None]], Tensor | None]] = []

    def run(self, mode: Mode) -> None:
        """Runs one step on the data in `feed`; the mode is that of the first call."""
        self._programs = self._programs or self._build(mode)
        for program in self._programs:
            program()

    def reset(self, config: Config) -> None:
        """Switches to another architecture with the same shapes.

        Its step is compiled and captured again, unless `capture` has captured it.
        """
        self.config = config
        torch.compiler.reset()
        self.compiled, self._is_compiled, self._programs = compiled(self.forward), False, []
        for arch, programs, place in self._captured:
            if arch == config.arch and place is self.tally.place:
                self._is_compiled, self._programs = True, programs

    def capture(self, mode: Mode) -> None:
        """Captures the step of this architecture for later stages; keeps the state.

        Warm-up steps run first, on the current buffers with learning rates of 0. Their changes are undone.
        """
        if self._programs:
            return
        buffers = [
            self.parameters.data,
            *self.optimizer.buffers().values(),
            self.optimizer.count,
            *self.carry,
        ]
        buffers += [] if self.parameters.copy is None else [self.parameters.copy]
        buffers += [] if self.average is None else [self.average.data]
        kept, put_back = [buffer.clone() for buffer in buffers], self.tally.keep()
        for rate in (self.feed.lr, self.feed.puzzle_emb_lr, self.feed.muon_lr):
            rate.zero_()
        # The last call captures the step.
        for _ in range(WARM_UP + 1):
            self.run(mode)
        captured = self.config.arch, self._programs, self.tally.place
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
        put_back()
        self._captured.append(captured)

    def rehearse(self, forward: Callable[..., Any]) -> None:
        """Runs a step's forward and backward on the current buffers, without an update."""
        inputs = self.inputs(slice(self.part_rows))
        self.differentiate(forward(*inputs)[1], inputs[2])
        self._is_compiled |= forward is self.compiled

    def compiling(self, compilation: Compilation) -> AbstractContextManager[None]:
        """The context in which this step's forward and backward are compiled."""
        config, inputs = self.config, self.feed.fresh.inputs[: self.part_rows]
        shape = (config.arch, config.loss, tuple(inputs.shape), self.model.dtype, inputs.device.type)
        return compilation.of("the training step", *shape)

    def prepare(self, mode: Mode, compilation: Compilation) -> None:
        """Compiles forward and backward if necessary; changes no state."""
        if self._is_compiled:
            return
        rehearse = partial(self.rehearse, self.compiled)
        with self.compiling(compilation):
            if mode.captured:
                aside(rehearse, self.device)
            else:
                rehearse()

    def _build(self, mode: Mode) -> list[Callable[[], None]]:
        """The parts of a step in order: one program, or several with the exchanges between ranks."""
        forward = self.compiled if mode.compiled else self.forward
        program = partial(Program, device=self.device, captured=mode.captured)

        def whole() -> None:
            self.compute(forward)
            self.update()

        if self.world.size == 1:
            return [program(whole)]
        compute: list[Callable[[], None]] = [program(partial(self.compute, forward)), self.exchange]
        if not self.optimizer.exchanges:
            return [*compute, program(self.update)]
        return [*compute, program(self.propose), self.optimizer.exchange, program(self.step)]

    def forward(
        self,
        carry: Carry,
        fresh: Sequences,
        puzzle_rows: Tensor | None,
        min_halt_steps: Tensor,
        gate_loss_scale: Tensor,
    ) -> tuple[Carry, Tensor, dict[str, Tensor]]:
        """An ACT step with its loss: the carry after it, the loss () over the batch size, metric sums."""
        config = self.config
        carry = replace_halted(self.model, carry, fresh, randomness=self.randomness)
        previous_gates, winners = carry.gates, None
        options: Any = {"sees_gates": config.loss.uses_gates, "randomness": self.randomness}
        if config.arch.chains > 1:
            carry, outputs, winners = chains_step(
                self.model, config.loss, carry, puzzle_rows, min_halt_steps, **options
            )
        else:
            carry, outputs = act_step(self.model, carry, puzzle_rows, min_halt_steps, **options)
        with region("head and loss"):
            head = self.model.lm_head
            loss, sums = act_loss(config.loss, head, carry, outputs, previous_gates, gate_loss_scale)
        if winners is not None:
            sums["first_chain_wins"] = (winners == 0).sum()
        return carry, loss / config.global_batch_size, sums

    def inputs(self, part: slice) -> tuple[Carry, Sequences, Tensor | None, Tensor, Tensor]:
        """The arguments of `forward` for a part of the rows."""
        carry = Carry(*(tensor[part] for tensor in self.carry))
        fresh = Sequences(*(tensor[part] for tensor in self.feed.fresh))
        puzzle_rows = None
        if self.model.puzzle_emb is not None:
            # Make the rows a leaf outside forward, so that only they get a gradient, not the whole table.
            identifiers = torch.where(carry.halted, fresh.puzzle_identifiers, carry.puzzle_identifiers)
            puzzle_rows = self.model.puzzle_emb(identifiers).requires_grad_()
        return carry, fresh, puzzle_rows, self.feed.min_halt_steps[part], self.feed.gate_loss_scale

    def compute(self, forward: Callable[..., Any]) -> None:
        """Computes gradients, the new carry and the metric sums for the sequences in `feed`."""
        self.tally.begin()
        for first in range(0, self.rows, self.part_rows):
            part = slice(first, first + self.part_rows)
            with region("forward"):
                carry, fresh, puzzle_rows, *rest = self.inputs(part)
                after, loss, sums = forward(carry, fresh, puzzle_rows, *rest)
            with region("backward"):
                grads, row_grads = self.differentiate(loss, puzzle_rows)
                self.parameters.collect(grads, adds=first > 0)
            # Overwrite the carry only after backward, which may read it.
            for old, new in zip(carry, after, strict=True):
                old.copy_(new)
            if row_grads is not None and self.row_grads is not None:
                self.row_grads[part] = row_grads
            self.tally.add({**sums, "loss": loss.detach() * self.config.global_batch_size})
            # Free these tensors before the next part allocates its own.
            del after, loss, sums, puzzle_rows, grads, row_grads
        # Include the loss, so that a non-finite loss reaches every rank through the gradient.
        self.parameters.grad[:1].add_(self.tally.loss * 0)

    def differentiate(
        self, loss: Tensor, puzzle_rows: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """Gradients of the loss with respect to the parameters' leaves, and to the puzzle rows if there are
        any."""
        rows = () if puzzle_rows is None else (puzzle_rows,)
        grads = torch.autograd.grad(loss, (*self.parameters.leaves, *rows), allow_unused=True)
        return (grads[:-1], grads[-1]) if rows else (grads, None)

    def exchange(self) -> None:
        """Sums the ranks' gradients and gathers their puzzle rows."""
        with region("all-reduce"):
            self.world.all_reduce(self.parameters.grad)
            if self.row_grads is not None and self.all_row_grads is not None:
                self._identifiers.copy_(self.world.all_gather(self.carry.puzzle_identifiers))
                self.all_row_grads.copy_(self.world.all_gather(self.row_grads))

    def update(self) -> None:
        """Updates parameters, average and puzzle table, unless the gradient is not finite."""
        with region("optimiser"):
            norm, skip = self._judge()
            self.optimizer.propose(skip)
            self._finish(norm, skip)

    def propose(self) -> None:
        """The part of an update before the optimiser's exchange between ranks."""
        with region("optimiser"):
            norm, skip = self._judge()
            assert self._judged is not None
            self._judged[0].copy_(norm)
            self._judged[1].copy_(skip)
            self.optimizer.propose(skip)

    def step(self) -> None:
        """The part of an update after it."""
        with region("optimiser"):
            assert self._judged is not None
            self._finish(*self._judged)

    def _judge(self) -> tuple[Tensor, Tensor]:
        """The norm of the whole gradient, which is then clipped, and whether to skip the update."""
        norm = torch.linalg.vector_norm(self.parameters.grad)
        if self.all_row_grads is not None:
            norm = norm + 0 * self.all_row_grads.sum()
        skip = ~torch.isfinite(norm)
        if self.config.grad_clip is not None:
            scale = self.config.grad_clip / norm.clamp(min=self.config.grad_clip)
            # Do not scale a skipped step: NaN would spread and hide its source.
            self.parameters.grad.mul_(torch.where(skip, 1, scale))
        return norm, skip

    def _finish(self, norm: Tensor, skip: Tensor) -> None:
        """Updates everything, unless `skip` is True."""
        self.optimizer.step(self.feed.lr, skip)
        if self.average is not None:
            self.average.update(skip, self.optimizer.count)
        if self.model.puzzle_emb is not None and self.all_row_grads is not None:
            sign_sgd(
                self.model.puzzle_emb.weights,
                self._identifiers,
                self.all_row_grads,
                self.feed.puzzle_emb_lr,
                self.config.puzzle_emb_weight_decay,
                skip,
            )
        # The states of a skipped step may hold NaN: replace its sequences.
        self.carry.halted.logical_or_(skip)
        self.carry.gates.copy_(torch.where(skip, 0, self.carry.gates))
        self.tally.end(norm, skip)


def check_kernels(config: Config, model: HRM, seq_len: int) -> None:
    """Tests one sequence if implementations are selected by name; raises UserError if one cannot run here."""
    try:
        named = get_backend() == "triton" or config.attention.backend != "auto"
    except ValueError as error:
        raise UserError(str(error)) from None
    if not named:
        return
    carry, rows = initial_carry(model, 1, seq_len, model.H_init.device), None
    if model.puzzle_emb is not None:
        rows = model.puzzle_emb(carry.puzzle_identifiers)
    try:
        after, outputs = act_step(model, carry, rows, torch.zeros_like(carry.steps))
        act_loss(config.loss, model.lm_head, after, outputs)
    except BackendError as error:
        raise UserError(str(error)) from None

"""A run's model on one device: training steps, metrics, evaluation, and the state for resumption.

Random numbers in a step are a function of (seed, step), and its sums stay on the device, so the state is the
tensors in `weights` and `training_state` and a step number.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm.common.errors import Stopped
from hrm.common.regions import region
from hrm.config.load import Config
from hrm.config.schema import ArchConfig
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.distributed import World, digest
from hrm.engine.compilation import Compilation
from hrm.engine.inference import Inference
from hrm.engine.modes import COMPILE, EAGER, Mode, compiler_fault, faster_mode, resolve_dtype, resolve_mode
from hrm.engine.optim import learning_rate
from hrm.engine.step_metrics import Interval, gate_metrics, means
from hrm.engine.step_program import StepProgram, check_kernels
from hrm.model.act import act_step, draw_min_halt_steps, replace_halted, training_keys
from hrm.model.chains import with_states
from hrm.model.gating import gate_loss_scale, gate_statistics
from hrm.model.hrm import HRM

# Number of sequences in the carry whose gates are measured for a log line.
GATES_SEEN = 16


class Engine:
    """A model in training on one device: `train_step`, `pop`, `evaluate`, and its state."""

    def __init__(
        self,
        config: Config,
        metadata: Metadata,
        total_steps: int,
        device: torch.device | str = "cpu",
        world: World | None = None,
        compilation: Compilation | None = None,
    ) -> None:
        """total_steps: the schedule's length. compilation: announces and interrupts the compiler.

        Every rank builds the same model from config.seed.
        """
        self.config, self.metadata, self.total_steps = config, metadata, total_steps
        self.device, self.world = torch.device(device), world or World()
        self._compilation, self._is_prepared = compilation or Compilation(), False
        self._mode = resolve_mode(config.mode, self.device)
        if self._mode is None and config.deterministic:
            # A measurement may choose another mode next time.
            self._mode = EAGER._replace(note="deterministic=true measures none")
        self.model = HRM.from_config(config, metadata, resolve_dtype(config, self.device))
        self.model = self.model.to(self.device)
        check_kernels(config, self.model, metadata.seq_len)
        self.step = 0
        self.program = StepProgram(config, self.model, metadata.seq_len, self.device, self.world)
        self.parameters, self.optimizer = self.program.parameters, self.program.optimizer
        self.average, self.carry = self.program.average, self.program.carry
        self._inferences: dict[int, Inference] = {}

    # -------------------------------------------------------------------------------------------- the mode

    @property
    def mode(self) -> Mode:
        """The mode in which steps run. On a CPU, the first access with mode=auto measures it and may raise
        Stopped."""
        if self._mode is None:
            self._mode = self._measured_mode()
        return self._mode

    def _measured_mode(self) -> Mode:
        """The faster mode for the remaining steps; the main rank measures it without updating anything."""
        mode, program = EAGER, self.program

        def measure() -> None:
            nonlocal mode
            steps, compiling = self.total_steps - self.step, partial(program.compiling, self._compilation)
            mode = faster_mode(
                program.forward, program.compiled, program.rehearse, steps, self.device, compiling
            )

        self._together(measure if self.world.is_main else lambda: None)
        compiles = self.world.broadcast(torch.tensor([mode.compiled], dtype=torch.int32)).item()
        return mode if self.world.is_main else (COMPILE if compiles else EAGER)

    def _together(self, work: Callable[[], None]) -> None:
        """Runs work that a stop may end by raising Stopped; all ranks then raise it."""
        code = 0
        try:
            work()
        except Stopped as stopped:
            code = stopped.code
        if code := self.world.highest_now(code):
            raise Stopped(code)

    # ------------------------------------------------------------------------------------------ training

    def prepare(self, later: Sequence[ArchConfig] = ()) -> None:
        """Compiles the step if its mode requires it; all ranks call it together.

        later: the architectures of later stages, whose steps are compiled as well, so that no later
        compilation interrupts the run. A mode that captures also captures all of them, without changing the
        state. If a stop ends the compilation, it raises Stopped without changing the state.
        """
        if later and (self.mode.compiled or self.mode.captured):
            present = self.config.arch
            for arch in (*later, present):
                self.enter(arch)
                self.prepare()
                if self.mode.captured:
                    self.program.capture(self.mode)
            return
        if self.mode.compiled and not self._is_prepared:
            self._together(lambda: self.program.prepare(self.mode, self._compilation))
        self._is_prepared = True

    def train_step(self, batch: Batch) -> None:
        """One ACT step and one update. batch: this rank's rows; a halted sequence is replaced by its row."""
        with region("step"):
            self.prepare()
            config, mode = self.config, self.mode
            self.step += 1
            with region("data"):
                min_halt_steps = draw_min_halt_steps(
                    config.arch, config.seed, self.step, config.global_batch_size
                )
                self.program.feed.push(
                    batch,
                    min_halt_steps[self.world.rows(config.global_batch_size)],
                    self.learning_rate(config.lr),
                    self.learning_rate(config.puzzle_emb_lr),
                    gate_loss_scale(
                        self.step, config.loss.gate_loss_warmup_steps, config.loss.gate_loss_ramp_steps
                    ),
                    self._keys(),
                    self.learning_rate(config.muon_lr),
                )
            self.program.run(mode)

    def _keys(self) -> np.ndarray | int:
        """The keys of the step's new rows: the seed, the row's index in the whole run, path 1."""
        if not self.program.randomness.key_words:
            return 0
        size = self.config.global_batch_size
        return training_keys(self.config.seed, self.step, size)[self.world.rows(size)]

    def learning_rate(self, base_lr: float) -> float:
        """The learning rate of the current step. base_lr: lr, puzzle_emb_lr or muon_lr."""
        config = self.config
        return learning_rate(
            self.step,
            base_lr=base_lr,
            warmup_steps=config.lr_warmup_steps,
            total_steps=self.total_steps,
            min_ratio=config.lr_min_ratio,
        )

    def pop(self) -> Interval:
        """The metrics of the steps since the last call, over all ranks. Training waits for the device only
        here.

        Metrics are means over halted sequences, all sequences or steps, without skipped steps; means over
        halted sequences are missing if none has halted.
        """
        steps, skipped, in_a_row, sums, losses, norms = self.program.tally.read(self.world)
        kept, batch_size = steps - skipped, self.config.global_batch_size
        grad_norm = sums.pop("grad_norm")
        metrics: dict[str, float] = {"skipped": skipped} if skipped else {}
        if kept:
            metrics |= means(sums, kept * batch_size)
            metrics |= {"grad_norm": grad_norm / kept, "lr": self.learning_rate(self.config.lr)}
            if self.config.optimizer == "muon":
                metrics["muon_lr"] = self.learning_rate(self.config.muon_lr)
        if kept and not in_a_row:
            metrics |= {**self._puzzle_metrics(), **self.gate_metrics()}
        return Interval(metrics, [loss / batch_size for loss in losses], norms, in_a_row)

    def diagnosis(self) -> str:
        """A text with the non-finite tensors of the last step and the largest weight."""
        found = [] if bool(torch.isfinite(self.program.tally.loss)) else ["the loss"]
        gradients = self.parameters.views(self.parameters.grad)
        names = [name for name, grad in gradients.items() if not bool(torch.isfinite(grad).all())]
        row_grads = self.program.all_row_grads
        if row_grads is not None and not bool(torch.isfinite(row_grads).all()):
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
        """For the puzzle rows of the last step: their mean norm, and the norm of all their gradients."""
        table, row_grads = self.model.puzzle_emb, self.program.row_grads
        if table is None or row_grads is None:
            return {}
        norms = table(self.carry.puzzle_identifiers).norm(dim=1).sum()
        both = self.world.all_reduce(torch.stack([norms, row_grads.square().sum()])).tolist()
        return {
            "puzzle_emb_norm": both[0] / self.config.global_batch_size,
            "puzzle_emb_grad_norm": math.sqrt(both[1]),
        }

    @torch.no_grad()
    def gate_metrics(self) -> dict[str, float]:
        """Gate statistics from an additional forward pass of GATES_SEEN sequences; empty without gates."""
        if not self.config.arch.use_gating:
            return {}
        carry, fresh, puzzle_rows, *_ = self.program.inputs(slice(min(GATES_SEEN, self.program.rows)))
        randomness = self.program.randomness
        carry = replace_halted(self.model, carry, fresh, randomness=randomness)
        if self.config.arch.chains > 1:
            carry = with_states(carry, carry.z_L[:, 0], carry.keys)
        _, outputs = act_step(self.model, carry, puzzle_rows, None, sees_gates=True, randomness=randomness)
        assert outputs.gated is not None
        table = torch.cat([gate_statistics(*gated) for gated in outputs.gated])
        return gate_metrics(self.world.all_reduce(table) / self.world.size)

    # ---------------------------------------------------------------------------------------- evaluation

    def inference(self, batch_size: int) -> Inference:
        """The program that solves batches of `batch_size` sequences, with the current weights at each call.

        Raises Stopped if a stop ends its compilation.
        """
        if batch_size not in self._inferences:
            inference = Inference(
                self.model,
                batch_size,
                self.metadata.seq_len,
                mode=self.mode,
                loss=self.config.loss,
            )
            if self.mode.compiled:
                self._together(lambda: inference.prepare(self._compilation))
            self._inferences[batch_size] = inference
        return self._inferences[batch_size]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[str, Batch, int]]) -> dict[str, dict[str, float]]:
        """Runs every sequence for halt_max_steps steps; returns each set's means over its sequences.

        batches: (set name, this rank's padded rows, ...) as `test_batches` yields them. The training carry
        does not change.
        """
        # float32 cannot represent the counts of a large set; MPS has no float64.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        totals: dict[str, Tensor] = {}
        rows, part_rows = self.program.rows, self.program.part_rows
        inference = self.inference(part_rows)
        for set_name, batch, _ in batches:
            for first in range(0, rows, part_rows):
                inference.run(batch.rows(first, first + part_rows))
                totals.setdefault(set_name, torch.zeros((), dtype=wide, device=self.device))
                totals[set_name] = totals[set_name] + inference.sums.to(wide)
        results = {}
        for set_name, total in totals.items():
            reduced = self.world.all_reduce(total).tolist()
            set_sums = dict(zip(inference.names, reduced, strict=True))
            results[set_name] = means(set_sums, set_sums["count"])
        return results

    def enter(self, arch: ArchConfig) -> None:
        """Switches to the architecture of another stage, which has the same weights; keeps all state."""
        if arch == self.config.arch:
            return
        self.config = replace(self.config, arch=arch)
        self.model.arch = arch
        # Compiled code and graphs hold the earlier stage's values as constants.
        self.program.reset(self.config)
        self._inferences, self._is_prepared = {}, False

    # --------------------------------------------------------------------------------------------- state

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, by their names in official checkpoints."""
        return {**self.model.state_dict(), **self.parameters.views(self.parameters.data)}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Loads the given weights; the others keep their values."""
        own = self.weights()
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
            self.parameters.refresh_copy()
            if self.average is not None:
                self.average.restart()

    def agree(self) -> None:
        """Broadcasts the main rank's weights and checks that all ranks start from the same state.

        Raises UserError with the ranks that differ, for example because they read another checkpoint.
        """
        if self.world.size == 1:
            return
        average = [] if self.average is None else [self.average.data]
        for tensor in (self.parameters.data, *average, *self.model.buffers()):
            self.world.broadcast(tensor)
        self.parameters.refresh_copy()
        state = {"weights": self.parameters.data, **self.optimizer.buffers()}
        state |= dict(self.model.named_buffers())
        if self.average is not None:
            state["average"] = self.average.data
        self.world.check_equal({name: digest(tensor) for name, tensor in state.items()})

    def training_state(self) -> dict[str, Any]:
        """Everything that the next step depends on except the weights, with the carry in global-batch
        order."""
        carry = {name: self.world.all_gather(tensor) for name, tensor in self.carry._asdict().items()}
        state = {"step": self.step, "carry": carry, "optimizer": self.optimizer.state_dict()}
        return {**state, "tally": self.program.tally.state_dict(self.world), "compiled": self.mode.compiled}

    def load_training_state(self, state: dict[str, Any], *, carry: bool = True) -> None:
        """Continues from a `training_state`; carry=False starts new sequences instead."""
        rows = self.world.rows(self.config.global_batch_size)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if carry:
            for name, tensor in state["carry"].items():
                getattr(self.carry, name).copy_(tensor[rows])
        if carry and "tally" in state:
            self.program.tally.load_state_dict(state["tally"], self.world)
        if self._mode is None and "compiled" in state:
            # Keep the measured mode, because another mode rounds differently.
            self._mode = COMPILE if state["compiled"] and not compiler_fault(self.device) else EAGER

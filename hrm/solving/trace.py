"""A trace of a model that solves one puzzle: board, confidence and gates after every ACT step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hrm.common.errors import UserError
from hrm.data.format import IGNORE_LABEL, Metadata
from hrm.data.puzzle_kinds import kind_of
from hrm.model.act import Outputs, Sequences, act_step, initial_carry, replace_halted
from hrm.model.hrm import HRM

# The order of the gates in the outputs of an ACT step.
LEVELS = ("L", "H")
SOURCES = ("primary", "secondary", "input")


@dataclass(frozen=True)
class Gate:
    """One gate in one step, 0 (closed) to 1 (open), for one source of one module.

    mean: over tokens and channels. cells: (S), the mean over the channels of each cell.
    """

    mean: float
    cells: list[float]


@dataclass(frozen=True)
class Step:
    """One ACT step.

    board: (S) tokens, the prediction after it. q_halt, q_continue: the model's estimates, as probabilities,
    that the board is correct now, and that further steps make it correct; q_continue is None for a model
    without that output. halts: whether the model halts here. problems: the rules that the board breaks.
    gates: by module ("L", "H"), then by source ("primary", "secondary", "input"); empty without gating.
    """

    board: list[int]
    q_halt: float
    q_continue: float | None
    halts: bool
    problems: list[str]
    gates: dict[str, dict[str, Gate]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A puzzle and the steps that a model took to solve it.

    kind: a name of `puzzle_kinds` ("sudoku", "maze", "arc", "tokens"). question, answer: (S) tokens of that
    kind, S = rows * cols; answer is None if unknown. model: one line that identifies it. title: the puzzle's.
    """

    kind: str
    rows: int
    cols: int
    question: list[int]
    answer: list[int] | None
    steps: list[Step]
    model: str
    title: str


@torch.no_grad()
def record_trace(
    model: HRM,
    metadata: Metadata,
    tokens: Sequence[int] | np.ndarray,
    puzzle: int | Tensor | None = None,
    *,
    steps: int | None = None,
    act: bool = False,
    answer: Sequence[int] | np.ndarray | None = None,
    name: str = "",
    title: str = "",
) -> Trace:
    """Solves one puzzle and records every ACT step.

    tokens, answer: (S). puzzle: an identifier, a row of the puzzle table (puzzle_emb_ndim), or None for the
    data set's blank identifier; a model without a puzzle table ignores it. steps: ACT steps, None for
    arch.halt_max_steps; act: stop at the first step that halts. name, title: of the model and the puzzle.
    The last board equals that of `Inference.solve` after as many steps.
    Raises UserError for an identifier without a row, ValueError for a wrong number of cells.
    """
    question = np.asarray(tokens, dtype=np.int32)
    if question.shape != (metadata.seq_len,):
        raise ValueError(f"trace: tokens must be {(metadata.seq_len,)}, got {question.shape}")
    kind = kind_of(metadata)
    row = puzzle_row(model, metadata.blank_identifier_id if puzzle is None else puzzle)
    taken: list[Step] = []
    for halts, outputs in _act_steps(model, question, row, steps or model.arch.halt_max_steps):
        board = model.lm_head(outputs.answer).argmax(-1)[0].tolist()
        step = Step(
            board=board,
            q_halt=outputs.q_halt_logits.sigmoid().item(),
            q_continue=outputs.q_continue_logits.sigmoid().item() if model.arch.q_continue else None,
            halts=halts,
            problems=kind.problems(question, board),
            gates=_gates(model, outputs),
        )
        taken.append(step)
        if act and step.halts:
            break
    known = None if answer is None else np.asarray(answer).tolist()
    return Trace(kind.name, kind.rows, kind.cols, question.tolist(), known, taken, name, title)


def puzzle_row(model: HRM, puzzle: int | Tensor) -> Tensor | None:
    """The puzzle embedding for the model, (1, puzzle_emb_ndim); None for a model without a puzzle table.

    puzzle: an identifier, or the row itself (puzzle_emb_ndim). Raises UserError for an identifier without
    a row.
    """
    if model.puzzle_emb is None:
        return None
    table = model.puzzle_emb.weights
    if isinstance(puzzle, Tensor):
        return puzzle.to(table).view(1, table.shape[1])
    if not 0 <= puzzle < len(table):
        raise UserError(
            f"puzzle identifier {puzzle}: the model has rows 0 to {len(table) - 1}; give one of them, "
            "or none for a puzzle outside the training data"
        )
    return table[puzzle : puzzle + 1]


def _act_steps(
    model: HRM, question: np.ndarray, row: Tensor | None, steps: int
) -> Iterator[tuple[bool, Outputs]]:
    """For each ACT step: whether the model halts, and its outputs with the gates."""
    device = model.H_init.device
    inputs = torch.from_numpy(question).to(device)[None]
    fresh = Sequences(inputs, torch.full_like(inputs, IGNORE_LABEL), inputs.new_zeros(1))
    carry = replace_halted(model, initial_carry(model, 1, len(question), device), fresh)
    at_once = torch.zeros_like(carry.steps)
    for _ in range(steps):
        # No minimum of steps: `halted` is the model's own choice, and the caller may take further steps.
        carry, outputs = act_step(
            model, carry, row, at_once, sees_gates=model.arch.use_gating, with_target=False
        )
        yield bool(carry.halted), outputs


def _gates(model: HRM, outputs: Outputs) -> dict[str, dict[str, Gate]]:
    """The gates of each level's last update, by level and source."""
    found: dict[str, dict[str, Gate]] = {}
    for level, gated in zip(LEVELS, outputs.gated or (), strict=False):
        found[level] = {}
        for source, gate in zip(SOURCES, gated.gates, strict=False):
            tokens = gate[0].float().mean(-1)
            found[level][source] = Gate(tokens.mean().item(), tokens[model.puzzle_emb_len :].tolist())
    return found

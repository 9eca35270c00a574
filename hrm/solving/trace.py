"""Traces how a model solves a puzzle: board, confidence and gates after every ACT step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm.common.errors import UserError
from hrm.data.format import IGNORE_LABEL, Metadata
from hrm.data.puzzle_kinds import kind_of
from hrm.evaluation.race import RULED, compared
from hrm.evaluation.selection import Outcomes, same_answers, unfinished
from hrm.evaluation.views import PlainViews, Views
from hrm.model.act import (
    PLAIN,
    Outputs,
    Randomness,
    Sequences,
    act_step,
    initial_carry,
    keys_of,
    replace_halted,
)
from hrm.model.hrm import HRM

# Order of the gates in the outputs of an ACT step.
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
    without that output. halts: whether the model halts here, by choice or at halt_max_steps. problems: the
    rules that the board breaks. gates: by module ("L", "H"), then by source ("primary", "secondary",
    "input"); empty without gating.
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


@dataclass(frozen=True)
class Recorded:
    """The traces of a puzzle's K paths, and the outcomes of the paths, arrays (1, K)."""

    traces: list[Trace]
    outcomes: Outcomes


@dataclass(frozen=True)
class Paths:
    """The differences between a puzzle's K paths; see `hrm.evaluation.paths.Plan`. example: the puzzle's
    number."""

    paths: int = 1
    views: Views = field(default_factory=lambda: PlainViews(0))
    randomness: Randomness = PLAIN
    seed: int = 0
    example: int = 0


def record_trace(
    model: HRM,
    metadata: Metadata,
    tokens: Sequence[int] | np.ndarray,
    puzzle: int | Tensor | None = None,
    **options: Any,
) -> Trace:
    """Solves one puzzle on path 0 and records every ACT step; see `record_paths`."""
    return record_paths(model, metadata, tokens, puzzle, **options).traces[0]


@torch.inference_mode()
def record_paths(
    model: HRM,
    metadata: Metadata,
    tokens: Sequence[int] | np.ndarray,
    puzzle: int | Tensor | None = None,
    *,
    paths: Paths | None = None,
    steps: int | None = None,
    act: bool = False,
    answer: Sequence[int] | np.ndarray | None = None,
    name: str = "",
    title: str = "",
) -> Recorded:
    """Solves one puzzle on every path and records all ACT steps, each board mapped back to the puzzle.

    tokens, answer: (S). puzzle: an identifier, a row of the puzzle table (puzzle_emb_ndim), or None for the
    data set's blank identifier; a model without a puzzle table ignores it. steps: ACT steps, None for
    arch.halt_max_steps; act: stop each path at the first step that halts. name, title: of the model and the
    puzzle. The last board of path 0 equals that of `Inference.solve` after the same number of steps. Gates
    per cell refer to the path's own view. Raises UserError for an identifier without a row, ValueError for a
    wrong number of cells.
    """
    question = np.asarray(tokens, dtype=np.int32)
    if question.shape != (metadata.seq_len,):
        raise ValueError(f"trace: tokens must be {(metadata.seq_len,)}, got {question.shape}")
    kind, paths = kind_of(metadata), paths or Paths()
    K = paths.paths
    puzzle = metadata.blank_identifier_id if puzzle is None else puzzle
    view = paths.views.of(question, 0 if isinstance(puzzle, Tensor) else puzzle, paths.example, K)
    asked = [puzzle] * K if isinstance(puzzle, Tensor) else view.identifiers.tolist()
    rows = [row for each in asked if (row := puzzle_row(model, each)) is not None]
    taken: list[list[Step]] = [[] for _ in range(K)]
    found = unfinished(1, K, kind.name in RULED)
    changes: list[np.ndarray] = []
    before: Tensor | None = None
    known = None if answer is None else np.asarray(answer)
    going = np.ones(K, bool)
    walk = _act_steps(model, view.inputs, torch.cat(rows) if rows else None, paths)
    for number, (halts, outputs) in enumerate(islice(walk, steps or model.arch.halt_max_steps), 1):
        logits = model.lm_head(outputs.answer)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        boards = view.answers(logits.argmax(-1).cpu().numpy().astype(np.int32), np.arange(K))
        if before is not None:
            changes.append((logits - before).norm(dim=-1).mean(-1).cpu().numpy())
        before = logits
        q_halt, q_continue = (q.cpu().double() for q in (outputs.q_halt_logits, outputs.q_continue_logits))
        # For paths, a halt forced by halt_max_steps does not count.
        wishes = (q_halt > (q_continue if model.arch.q_continue else 0)).numpy() & going
        found.halts_at[0, wishes] = np.minimum(found.halts_at[0, wishes], number)
        found.q_halt[0, going] = q_halt.numpy()[going]
        if changes:
            found.residual[0, going] = np.mean(changes[-3:], axis=0)[going]
        for path in np.flatnonzero(going).tolist():
            board = boards[path].tolist()
            step = Step(
                board=board,
                q_halt=outputs.q_halt_logits[path].sigmoid().item(),
                q_continue=q_continue[path].sigmoid().item() if model.arch.q_continue else None,
                halts=bool(halts[path]),
                problems=kind.problems(question, board),
                gates=_gates(model, outputs, path),
            )
            taken[path].append(step)
        if act:
            going &= ~halts
            if not going.any():
                break
    ends = np.array([steps_of[-1].board for steps_of in taken])
    found.answer[0] = same_answers(compared(kind, ends))
    if known is not None:
        found.right[0] = (ends == known).all(axis=1)
    if found.lawful is not None:
        found.lawful[0] = [not steps_of[-1].problems for steps_of in taken]
    labels = None if known is None else known.tolist()
    traces = [
        Trace(kind.name, kind.rows, kind.cols, question.tolist(), labels, steps_of, name, title)
        for steps_of in taken
    ]
    return Recorded(traces, found)


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
            "or None for a puzzle outside the training data"
        )
    return table[puzzle : puzzle + 1]


def _act_steps(
    model: HRM, questions: np.ndarray, rows: Tensor | None, paths: Paths
) -> Iterator[tuple[np.ndarray, Outputs]]:
    """Yields for each ACT step: which of the K paths halt, (K,) bool, and the outputs with the gates."""
    device, randomness = model.H_init.device, paths.randomness
    inputs = torch.from_numpy(np.array(questions)).to(device)
    K, S = inputs.shape
    numbers = keys_of(paths.seed, np.full(K, paths.example), np.arange(K))[:, : randomness.key_words]
    keys = torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
    fresh = Sequences(inputs, torch.full_like(inputs, IGNORE_LABEL), inputs.new_zeros(K), keys)
    blank = initial_carry(model, K, S, device, randomness=randomness)
    carry = replace_halted(model, blank, fresh, randomness=randomness)
    at_once = torch.zeros_like(carry.steps)
    while True:
        # No minimum number of steps: `halted` is the model's choice, and the caller may take further steps.
        carry, outputs = act_step(
            model,
            carry,
            rows,
            at_once,
            sees_gates=model.arch.use_gating,
            with_target=False,
            randomness=randomness,
        )
        yield carry.halted.cpu().numpy(), outputs


def _gates(model: HRM, outputs: Outputs, path: int) -> dict[str, dict[str, Gate]]:
    """The gates of each level's last update on a path, by level and source."""
    found: dict[str, dict[str, Gate]] = {}
    for level, gated in zip(LEVELS, outputs.gated or (), strict=False):
        found[level] = {}
        for source, gate in zip(SOURCES, gated.gates, strict=False):
            tokens = gate[path].float().mean(-1)
            found[level][source] = Gate(tokens.mean().item(), tokens[model.prefix_len :].tolist())
    return found

"""Watching a model solve one puzzle: its board, its confidence and its gates after every ACT step."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hrm.common.errors import UserError
from hrm.data.dataset import IGNORE_LABEL
from hrm.data.format import Metadata
from hrm.data.puzzle_kinds import kind_of
from hrm.model.act import Outputs, Sequences, act_step, initial_carry, replace_halted
from hrm.model.hrm import HRM
from hrm.solving.trace import Gate, Step, Trace

# The order in which an ACT step hands over its gates.
LEVELS = ("L", "H")
SOURCES = ("primary", "secondary", "input")


@torch.no_grad()
def trace(
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
    """Solves one puzzle and keeps what every ACT step made of it.

    tokens, answer: (S). puzzle: the identifier whose row of the puzzle table the model is given, that row
    itself (puzzle_emb_ndim), or None for the data set's blank identifier; a model without a table reads
    none. steps: ACT steps to take, None for arch.halt_max_steps; act: stop at the first that halts. name,
    title: of the model and of the puzzle. The last board is that of `Inference.solve` for as many steps.
    Raises UserError for an identifier without a row, ValueError for another number of cells.
    """
    question = np.asarray(tokens, dtype=np.int32)
    if question.shape != (metadata.seq_len,):
        raise ValueError(f"trace: tokens must be {(metadata.seq_len,)}, got {question.shape}")
    kind = kind_of(metadata)
    row = puzzle_row(model, metadata.blank_identifier_id if puzzle is None else puzzle)
    taken: list[Step] = []
    for halts, outputs in _think(model, question, row, steps or model.arch.halt_max_steps):
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
    """What the model is given of a puzzle besides its cells, (1, puzzle_emb_ndim); None without a table.

    puzzle: an identifier, or a row of (puzzle_emb_ndim). Raises UserError for an identifier without a row.
    """
    if model.puzzle_emb is None:
        return None
    table = model.puzzle_emb.weights
    if isinstance(puzzle, Tensor):
        return puzzle.to(table).view(1, table.shape[1])
    if not 0 <= puzzle < len(table):
        raise UserError(
            f"puzzle identifier {puzzle}: the model has rows 0 to {len(table) - 1}; give one of them, or "
            "none for a puzzle that it was not trained on"
        )
    return table[puzzle : puzzle + 1]


def _think(
    model: HRM, question: np.ndarray, row: Tensor | None, steps: int
) -> Iterator[tuple[bool, Outputs]]:
    """Of one ACT step after the other: whether a sequence halts that may, and the outputs with the gates."""
    device = model.H_init.device
    inputs = torch.from_numpy(question).to(device)[None]
    fresh = Sequences(inputs, torch.full_like(inputs, IGNORE_LABEL), inputs.new_zeros(1))
    carry = replace_halted(model, initial_carry(model, 1, len(question), device), fresh)
    at_once = torch.zeros_like(carry.steps)
    for _ in range(steps):
        # With no fewest steps it halts by choice as well; going on is up to who takes the next step.
        carry, outputs = act_step(
            model, carry, row, at_once, sees_gates=model.arch.use_gating, with_target=False
        )
        yield bool(carry.halted), outputs


def _gates(model: HRM, outputs: Outputs) -> dict[str, dict[str, Gate]]:
    """The gates of the last update of each level, by level and source."""
    found: dict[str, dict[str, Gate]] = {}
    for level, gated in zip(LEVELS, outputs.gated or (), strict=False):
        found[level] = {}
        for source, gate in zip(SOURCES, gated.gates, strict=False):
            tokens = gate[0].float().mean(-1)
            found[level][source] = Gate(tokens.mean().item(), tokens[model.puzzle_emb_len :].tolist())
    return found

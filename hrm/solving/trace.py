"""What a model did while it solved one puzzle: board, confidence and gates after every ACT step."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gate:
    """How far one source of one module was let through in a step, 0 to 1.

    mean: over tokens and channels. cells: (S), the mean over channels at each cell.
    """

    mean: float
    cells: list[float]


@dataclass(frozen=True)
class Step:
    """One ACT step.

    board: (S) tokens, the prediction after it. q_halt: the probability that the model gives its board of
    being right; q_continue: of getting there by going on, None where it is not learnt. halts: whether the
    model would stop here, left to itself. problems: the rules that the board breaks, none when it is valid.
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
    """A puzzle and what was thought about it.

    kind: of `puzzle_kinds` ("sudoku", "maze", "arc", "other"), whose tokens `question` (S) and, where it is
    known, `answer` (S) hold; the board has rows x cols = S cells. model: one line that says which. title: of
    the puzzle.
    """

    kind: str
    rows: int
    cols: int
    question: list[int]
    answer: list[int] | None
    steps: list[Step]
    model: str
    title: str

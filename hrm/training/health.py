"""Recognises symptoms of a failing run in its log lines, and gives remedies."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from hrm.config.schedule import interval_epochs
from hrm.config.schema import Config

# Number of consecutive log lines that must show a symptom; a single line may be chance.
LINES = 10
# Symptoms are ignored before this share of the run and before the end of the warm-up.
SETTLED = 0.1
# A model that solves nothing before this share of the run may still start to.
UNSOLVED = 1 / 3
# Share of solved sequences from which halting can be learnt.
SOLVED = 0.2
# If the mean number of steps is this close to its limit, almost no sequence halts earlier.
STEPS_MARGIN = 0.01
# A mean below SHUT is a closed gate, above 1 - SHUT an open one. Initial gates are at 0.1, or 0.05 with a
# gate_init_strategy, so the shares below 0.1 and above 0.9 do not suffice.
SHUT = 0.02
# Minimum share of values above 0.9 for a gate saturated at both ends; initial gates have almost none.
OPEN = 0.1
# Minimum share of values below 0.1 or above 0.9 for a saturated gate.
AT_THE_EDGES = 0.95
# Initial gates have a standard deviation of at least 0.03; below UNIFORM a gate is a constant factor.
UNIFORM = 0.005
# Share of all evaluations without a solved puzzle that is a symptom; at least two evaluations, if there are
# two.
EVALUATIONS = 0.5
# A model that solves this share of training sequences but no test puzzle does not generalise.
OVERFITTED = 0.5
# Minimum number of ACT steps for Sudoku.
ENOUGH_STEPS = 8

_EXACT = re.compile(r"eval(_ema)?/.+/exact_accuracy")
_GATE = re.compile(r"train/gates/(\w+/\w+)/mean")


class Symptoms:
    """Reads a run's log lines one by one and reports each lasting symptom once.

    The reports depend only on the configuration and the lines, so a saved metrics.jsonl reproduces them. A
    resumed run counts lines from its resumption on.
    """

    def __init__(self, config: Config, total_steps: int) -> None:
        """total_steps: the length of the run."""
        self.config = config
        start = config.lr_warmup_steps
        self._settled, self._should_solve = (max(start, share * total_steps) for share in (SETTLED, UNSOLVED))
        stages = [stage.halt_max_steps for stage in config.stages or []]
        self._limits = {config.arch.halt_max_steps, *(limit for limit in stages if limit)} - {1}
        epochs = interval_epochs(config)
        evaluations = math.ceil(config.epochs / epochs)
        self._patience = min(max(2, math.ceil(EVALUATIONS * evaluations)), evaluations)
        self._evaluations = evaluations
        self._streaks: Counter[str] = Counter()
        self._told: set[str] = set()
        self._unsolved, self._solves = 0, False
        self._train_exact: float | None = None

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """A text for each symptom that the log line of `step` completes, with numbers and remedies.

        metrics: any of the names in metrics.jsonl, `train/...`, `eval/<set>/...`; NaN counts as missing.
        """
        line = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._train_exact = line.get("train/exact_accuracy", self._train_exact)
        return [
            *self._puzzle_embeddings(step, line),
            *self._halting(step, line),
            *self._gates(step, line),
            *self._test_sets(step, line),
        ]

    def _lasts(self, symptom: str, shows: bool) -> bool:
        """Whether a symptom has shown on LINES lines in a row and was not reported before."""
        self._streaks[symptom] = self._streaks[symptom] + 1 if shows else 0
        return self._streaks[symptom] >= LINES and symptom not in self._told

    def _tell(self, symptom: str, seen: str, *remedies: str) -> Iterator[str]:
        self._told.add(symptom)
        yield f"{seen}; try {', or '.join(remedy for remedy in remedies if remedy)}"

    # -------------------------------------------------------------------------------- puzzle embeddings

    def _puzzle_embeddings(self, step: int, line: Mapping[str, float]) -> Iterator[str]:
        config, late = self.config, step > self._settled
        norm, gradient = line.get("train/puzzle_emb_norm"), line.get("train/puzzle_emb_grad_norm")
        if norm is None or gradient is None or "puzzle_emb" in self._told:
            return
        if self._lasts("frozen", late and config.puzzle_emb_lr == 0):
            yield from self._tell(
                "puzzle_emb",
                "the puzzle embeddings do not change: puzzle_emb_lr=0",
                f"puzzle_emb_lr={Config.puzzle_emb_lr:g}",
                f"puzzle_emb_lr={config.lr:g} as for Sudoku" if config.lr else "",
            )
        elif self._lasts("no gradient", late and gradient == 0):
            yield from self._tell(
                "puzzle_emb",
                f"the puzzle embeddings get no gradient: train/puzzle_emb_grad_norm=0 on {LINES} lines up to "
                f"step {step}",
                "arch.gate_init_strategy=input_focused" if config.arch.use_gating else "",
                self._calmer(),
            )
        elif self._lasts("zero", late and norm == 0):
            yield from self._tell(
                "puzzle_emb",
                f"the puzzle embeddings are still zero at step {step}, though their gradient is "
                f"{gradient:.2g}",
                f"a puzzle_emb_lr above {config.puzzle_emb_lr:g}",
            )

    # ------------------------------------------------------------------------------------------ halting

    def _halting(self, step: int, line: Mapping[str, float]) -> Iterator[str]:
        steps, exact = line.get("train/steps"), line.get("train/exact_accuracy")
        if steps is None or exact is None:
            return
        # Each stage of a run has its own limit.
        limit = next((limit for limit in self._limits if abs(steps - limit) <= STEPS_MARGIN), None)
        if self._lasts("never solved", step > self._should_solve and limit is not None and exact == 0):
            accuracy = line.get("train/accuracy", math.nan)
            yield from self._tell(
                "never solved",
                f"every sequence takes all {limit} ACT steps, as none is solved yet at step {step} "
                f"({accuracy:.1%} of cells right), and halting is learnt only from solved ones",
                *self._learns_nothing(),
            )
        if self._lasts("never halts", step > self._settled and limit is not None and exact >= SOLVED):
            yield from self._tell(
                "never halts",
                f"{exact:.1%} of the sequences are solved at step {step}, yet all of them take {limit} steps",
                f"an arch.halt_exploration_prob above {self.config.arch.halt_exploration_prob:g}",
                "arch.q_continue=false" if self.config.arch.q_continue else "",
                f"an arch.halt_max_steps below {limit}, which saves their time",
                self._calmer(),
            )

    # -------------------------------------------------------------------------------------------- gates

    def _gates(self, step: int, line: Mapping[str, float]) -> Iterator[str]:
        late = step > self._settled
        saturated, uniform = [], []
        for gate in [match[1] for name in line if (match := _GATE.fullmatch(name))]:
            mean, spread, low, high = (
                line.get(f"train/gates/{gate}/{name}", math.nan) for name in ("mean", "std", "low", "high")
            )
            at_an_end = mean < SHUT or high >= OPEN
            if self._lasts(f"{gate} saturated", late and at_an_end and low + high >= AT_THE_EDGES):
                self._told.add(f"{gate} saturated")
                state = "shut" if mean < SHUT else "wide open" if mean > 1 - SHUT else "shut or wide open"
                saturated.append(f"{gate} {state} (mean {mean:.3f}, {low + high:.0%} below 0.1 or above 0.9)")
            if self._lasts(f"{gate} uniform", late and not at_an_end and spread < UNIFORM):
                self._told.add(f"{gate} uniform")
                uniform.append(f"{gate} (mean {mean:.3f}, std {spread:.4f})")
        if saturated:
            yield from self._tell(
                "saturated",
                f"gates are saturated at step {step}: {', '.join(saturated)}",
                self._calmer(),
                "in a new run arch.gate_init_bias=-1.5 for closed gates or -3.0 for open gates",
                f"a loss.gate_saturation_weight above {self.config.loss.gate_saturation_weight:g}",
            )
        if uniform:
            yield from self._tell(
                "uniform",
                f"gates are the same everywhere at step {step}, like a constant factor: {', '.join(uniform)}",
                rates(self.config, 2),
                f"in a new run arch.gate_hidden_ratio={2 * self.config.arch.gate_hidden_ratio:g}",
            )

    # -------------------------------------------------------------------------------------- evaluations

    def _test_sets(self, step: int, line: Mapping[str, float]) -> Iterator[str]:
        found = [value for name, value in line.items() if _EXACT.fullmatch(name)]
        self._solves = self._solves or any(found)
        if not found or self._solves or "unsolved" in self._told:
            return
        self._unsolved += 1
        if self._unsolved < self._patience or step <= self.config.lr_warmup_steps:
            return
        count = f"{self._unsolved} of {self._evaluations}"
        seen = f"no test puzzle is solved at step {step}, after {count} evaluations"
        if self._train_exact is not None:
            seen += f", and {self._train_exact:.1%} of the training sequences"
        if self._train_exact is not None and self._train_exact >= OVERFITTED:
            more = "sudoku.num_aug or sudoku.num_train" if self.config.data_path is None else "augmentations"
            weight_decay = f"a weight_decay above {self.config.weight_decay:g}"
            yield from self._tell("unsolved", seen, f"more {more}", weight_decay, "early_stop_patience=3")
        else:
            yield from self._tell("unsolved", seen, *self._learns_nothing())

    # ----------------------------------------------------------------------------------------- remedies

    def _learns_nothing(self) -> list[str]:
        """Remedies for a model that solves nothing: more computation, or easier puzzles to start with."""
        config, arch = self.config, self.config.arch
        thinks_short = arch.halt_max_steps < ENOUGH_STEPS
        easier = "easier puzzles (sudoku.min_difficulty=0, more sudoku.clues)"
        if config.data_path is not None:
            easier = "easier puzzles (--min-difficulty 0 when the data set is built)"
        return [
            f"arch.halt_max_steps={ENOUGH_STEPS} or more" if thinks_short else "",
            "arch.H_cycles=2 arch.L_cycles=2" if min(arch.H_cycles, arch.L_cycles) < 2 else "",
            easier,
            "--arch balanced" if arch.halt_max_steps > ENOUGH_STEPS else "",
            "stages of growing halt_max_steps" if not (config.stages or thinks_short) else "",
            self._calmer(),
        ]

    def _calmer(self) -> str:
        """Remedy for steps that are too large."""
        return f"{rates(self.config, 0.5)} or lr_warmup_steps={max(2 * self.config.lr_warmup_steps, 1000)}"


def rates(config: Config, factor: float) -> str:
    """The arguments that scale the learning rates of all weights except the puzzle embeddings."""
    names = ("muon_lr", "lr") if config.optimizer == "muon" else ("lr",)
    return " ".join(f"{name}={factor * getattr(config, name):g}" for name in names)

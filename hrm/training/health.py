"""What goes wrong in a run, seen in its log lines, each with what to try against it."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from hrm.config.schedule import interval_epochs
from hrm.config.schema import Config

# Log lines in a row that must show a symptom: one line may be chance, ten are a state.
LINES = 10
# The share of the run before which a model is still finding its feet, beside the warm-up.
SETTLED = 0.1
# And before which a model that solves nothing at all may yet begin to.
UNSOLVED = 1 / 3
# The share of solved sequences from which halting has had something to learn from.
SOLVED = 0.2
# How close to its limit the mean number of steps is, when next to none halts before.
STEPS_MARGIN = 0.01
# A gate this far from open, or from shut, hardly lets anything through, or hold anything back. Fresh gates
# are 0.1 open, or 0.05 at the least by a strategy, so the shares below 0.1 and above 0.9 do not suffice.
SHUT = 0.02
# And of gates at both ends, the share that is above 0.9: of fresh ones next to none is.
OPEN = 0.1
# The share of a saturated gate's values that are below 0.1 or above 0.9.
AT_THE_EDGES = 0.95
# Fresh gates spread by 0.03 or more; below this they are a constant factor.
UNIFORM = 0.005
# Evaluations without a solved puzzle that count: this share of all, one alone only where there is one.
EVALUATIONS = 0.5
# From which share of solved training sequences a test set of which nothing is solved was not generalised to.
OVERFITTED = 0.5
# Fewer thinking steps than this were too few for Sudoku.
ENOUGH_STEPS = 8

_EXACT = re.compile(r"eval(_ema)?/.+/exact_accuracy")
_GATE = re.compile(r"train/gates/(\w+/\w+)/mean")


class Symptoms:
    """Reads a run's log lines one by one and answers what has gone wrong for long, each symptom once.

    The answers depend on the configuration and the lines alone, so a saved metrics.jsonl gives them again. A
    resumed run, which shows its later lines only, takes as many of them as a new one.
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
        """What the line of `step` adds: a line of text for each new symptom, with its numbers and remedies.

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
        """Whether a symptom has shown on LINES lines in a row, and was not told before."""
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
                "the puzzle embeddings stay as they are: puzzle_emb_lr=0",
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
        # Of the limits, for the stages of a run have their own.
        limit = next((limit for limit in self._limits if abs(steps - limit) <= STEPS_MARGIN), None)
        if self._lasts("never solved", step > self._should_solve and limit is not None and exact == 0):
            accuracy = line.get("train/accuracy", math.nan)
            yield from self._tell(
                "never solved",
                f"every sequence takes all {limit} ACT steps, for none is solved yet at step {step} "
                f"({accuracy:.1%} of cells right), and only solved ones teach when to halt",
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
                "in a new run arch.gate_init_bias=-1.5 against shut gates and -3.0 against open ones",
                f"a loss.gate_saturation_weight above {self.config.loss.gate_saturation_weight:g}",
            )
        if uniform:
            yield from self._tell(
                "uniform",
                f"gates are the same everywhere at step {step}, a mere factor: {', '.join(uniform)}",
                f"lr={2 * self.config.lr:g}",
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
        """Against a model that solves nothing: what it needs to think, and what is easier to begin with."""
        config, arch = self.config, self.config.arch
        thinks_short = arch.halt_max_steps < ENOUGH_STEPS
        easier = "easier puzzles (sudoku.min_difficulty=0, more sudoku.clues)"
        if config.data_path is not None:
            easier = "easier puzzles (--min-difficulty 0 when the data are made)"
        return [
            f"arch.halt_max_steps={ENOUGH_STEPS} or more" if thinks_short else "",
            "arch.H_cycles=2 arch.L_cycles=2" if min(arch.H_cycles, arch.L_cycles) < 2 else "",
            easier,
            "--arch balanced" if arch.halt_max_steps > ENOUGH_STEPS else "",
            "stages of growing halt_max_steps" if not (config.stages or thinks_short) else "",
            self._calmer(),
        ]

    def _calmer(self) -> str:
        """Against steps that are too large."""
        return f"lr={self.config.lr / 2:g} or lr_warmup_steps={max(2 * self.config.lr_warmup_steps, 1000)}"

"""Solves puzzles with a trained model, and shows how: `python -m hrm.solve CHECKPOINT PUZZLE`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from hrm.common.errors import UserError, run_command
from hrm.common.files import check_file, write_whole
from hrm.common.text import counted, one_line, with_sources
from hrm.common.threads import THREADS_HELP
from hrm.data.arc.augment import grid_of
from hrm.data.puzzle_kinds import Kind, kind_of
from hrm.evaluation.selection import RULES, Rule, choose
from hrm.solving.read_puzzles import Puzzle, arc_puzzles, read_puzzles, shortened
from hrm.solving.read_tokens import may_be_tokens, read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from hrm.solving.trace import Recorded, Step, Trace

MAX_STEPS = 100_000
# Maximum number of listed answers of paths.
MOST_VOTES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0 if no answer is wrong, 1 if one is, else the status of
    `run_command`."""
    return run_command(lambda: int(bool(solve(_parse(argv)))), "nothing was solved")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hrm.solve",
        description="Solve puzzles with a trained model.\n"
        "Exit status: 1 if an answer is wrong, 2 if a puzzle has no answer.",
        epilog=THREADS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's folder, one of its checkpoints, or hub:OWNER/NAME"
    )
    parser.add_argument(
        "puzzle",
        metavar="PUZZLE",
        nargs="?",
        help="the cells of a Sudoku ('.' or 0 is blank) or of a maze; a file of puzzles, with one puzzle per "
        "line or one row per line; an ARC task's .json; - for standard input",
    )
    parser.add_argument(
        "--tokens",
        metavar="NUMBERS",
        help="instead of PUZZLE: input tokens of any task, such as 3,5,1; a file with one sequence per line; "
        "- for standard input. A short sequence is padded",
    )
    parser.add_argument("--trace", action="store_true", help="show the board after every step")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that plays the steps")
    parser.add_argument(
        "--steps", "--depth", type=_whole, metavar="N", help="ACT steps (default: as in training)"
    )
    parser.add_argument(
        "--paths", type=_paths, default=1, metavar="K", help="solve the puzzle K times and choose one answer"
    )
    parser.add_argument(
        "--by",
        metavar="WHAT",
        help="differences between paths: init (random initial states), noise, symmetry, or several with "
        "commas between them; path 0 is deterministic (default: init)",
    )
    parser.add_argument(
        "--noise",
        type=_deviation,
        metavar="SIGMA",
        help="standard deviation of the noise (default: that of training, or 0.01)",
    )
    parser.add_argument(
        "--select",
        choices=[rule for rule in RULES if rule != "oracle"],
        help="the chosen path: highest q_halt, first to halt, most common "
        "answer, smallest change, puzzle's rules satisfied (default: q)",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the paths (0)")
    parser.add_argument("--act", action="store_true", help="stop at the first step at which the model halts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--adapt-steps",
        type=_whole,
        metavar="N",
        help="ARC: first learn the task's puzzle embedding from its demonstrations, in N updates",
    )
    parser.add_argument(
        "--identifier",
        metavar="NAME|N",
        help="puzzle embedding to use (default: an ARC task's own if it was trained on, else the blank one)",
    )
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.parse_args(argv)


def solve(args: argparse.Namespace) -> list[str]:
    """Solves the puzzles of the command line and prints the answers; returns the titles of wrong ones."""
    if (args.puzzle is None) == (args.tokens is None):
        raise UserError("give either PUZZLE or --tokens; --help explains both")
    # Whether numbers are a puzzle or tokens depends on the model.
    is_numbers = args.tokens is not None or may_be_tokens(args.puzzle)
    given = None if is_numbers else read_puzzles(args.puzzle)
    if args.adapt_steps and (given is None or given.task is None or args.identifier is not None):
        raise UserError(
            "--adapt-steps learns an ARC task's embedding from the demonstrations in its .json, instead of "
            "--identifier: leave one out"
        )
    by = (args.by or "init").split(",")
    select: Rule = args.select or "q"
    if unknown := [word for word in by if word not in ("init", "noise", "symmetry")]:
        raise UserError(f"--by {one_line(args.by)}: {one_line(unknown[0])} is not init, noise or symmetry")
    for option in ("by", "select", "noise"):
        if args.paths == 1 and getattr(args, option) is not None:
            raise UserError(f"--{option} has no effect on one path: add --paths 16, or leave it out")
    if args.noise is not None and "noise" not in by:
        raise UserError(f"--noise {args.noise:g} has no effect: add --by noise, or leave it out")
    if args.html is not None:
        check_file(args.html)

    screen = _Screen(sys.stderr if args.json else sys.stdout)
    # Import late: PyTorch takes seconds, and mistakes in the puzzle and the options are reported before.
    from hrm.solving.player import page
    from hrm.solving.prepare import adapted_embedding, check_fits, identifier_for, load_for, paths_for
    from hrm.solving.trace import record_paths

    trained = load_for(
        None if given is None else given.kind,
        args.puzzle if args.tokens is None else args.tokens,
        args.checkpoint,
        device=args.device,
        ema=args.ema or None,
        note=screen.note,
    )
    if given is None:
        kind = kind_of(trained.metadata)
        if args.tokens is not None or kind.name == "tokens":
            source = args.puzzle if args.tokens is None else args.tokens
            given = read_tokens(source, kind, trained.metadata)
        else:
            given = read_puzzles(args.puzzle)
            check_fits(given.kind, args.puzzle, args.checkpoint, trained)
    elif given.task is not None:
        given = arc_puzzles(given.task, kind_of(trained.metadata).rows)
    embedding: Tensor | int | None
    losses: list[float] = []
    if args.adapt_steps:
        assert given.task is not None
        embedding, losses = adapted_embedding(args.adapt_steps, given.task.train, trained, screen.note)
    else:
        embedding = identifier_for(given.task, args.identifier, trained, screen.note)

    name = f"{trained.path}, {sum(p.numel() for p in trained.model.parameters()):,} parameters"
    results: list[dict[str, Any]] = []
    paths = paths_for(args.paths, by, select, args.seed, args.noise, given.kind, embedding, trained)
    for number, puzzle in enumerate(given.puzzles, 1):
        recorded = record_paths(
            trained.model,
            trained.metadata,
            puzzle.question,
            embedding,
            paths=replace(paths, example=number - 1),
            steps=args.steps,
            act=args.act,
            answer=puzzle.answer,
            name=name,
            title=puzzle.title,
        )
        chosen = int(choose(select, recorded.outcomes)[0])
        found = recorded.traces[chosen]
        results.append(_result(puzzle, found, whole=args.trace))
        if args.paths > 1:
            results[-1] |= {"path": chosen, "votes": _votes(puzzle, recorded, args.trace)}
        if not args.json:
            screen.result(given.kind, found, results[-1], whole=args.trace, titled=len(given.puzzles) > 1)
        if args.html is not None:
            path = args.html if number == 1 else args.html.with_stem(f"{args.html.stem}-{number}")
            write_whole(path, page(recorded, chosen))
            screen.note(f"the page is {path}")
    right = [result["right"] for result in results].count(True)
    if len(results) > 1:
        screen.say(f"{right} of {len(results)} right")
    if args.json:
        told = {"model": name, "kind": given.kind.name, "notes": screen.notes, "adaptation": losses}
        print(json.dumps({**told, "puzzles": results}))
    return [result["title"] for result in results if result["right"] is False]


def _whole(text: str, least: int = 1, most: int = MAX_STEPS) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _deviation(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, up to 100")
    return value


# Same bounds as in `hrm.evaluate`.
_paths = partial(_whole, most=4096)
_seed = partial(_whole, least=0, most=2**32 - 1)


class _Screen:
    """Human-readable output: in colour on a terminal, unless NO_COLOR is set."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.notes = stream, list[str]()
        self.color = stream.isatty() and not os.environ.get("NO_COLOR")

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Prints a line for the user."""
        self.notes.append(with_sources(text))
        self.say(f"note: {self.notes[-1]}")

    def result(
        self, kind: Kind, trace: "Trace", result: dict[str, Any], *, whole: bool, titled: bool
    ) -> None:
        """Prints the board and the verdict; whole: also the question and every step."""
        blocks = [f"{trace.title}:"] if titled else []
        if whole:
            blocks.append(f"question:\n{kind.text(trace.question)}")
            before = trace.question
            for number, step in enumerate(trace.steps, 1):
                board = kind.text(step.board, before, self.color)
                blocks.append(f"{_step_line(kind, number, step, before)}\n{board}")
                before = step.board
        blocks.append("answer:\n" + kind.text(trace.steps[-1].board, trace.question, self.color))
        blocks.append("\n".join(_verdict(result)))
        if "votes" in result:
            blocks.append("\n".join(_vote_lines(result)))
        self.say("\n\n".join(blocks) + "\n")


def _result(puzzle: Puzzle, trace: "Trace", *, whole: bool) -> dict[str, Any]:
    """The result for the last board. right: None if it breaks no rule and the right answer is unknown."""
    last, is_arc = trace.steps[-1], trace.kind == "arc"
    problems = last.problems
    # The rules of these kinds do not identify a right answer.
    right = None if trace.kind in ("arc", "tokens") and not problems else not problems
    if puzzle.answer is not None:
        # For ARC only the grid on the canvas counts, as in the official evaluation.
        boards = np.array(last.board), puzzle.answer
        shown, known = map(grid_of, boards) if is_arc else boards
        same = shown is not None and known is not None and np.array_equal(shown, known)
        right = same and (is_arc or not problems)
        problems = [] if right else problems or ["it is not the known answer"]
    halted = next((number for number, step in enumerate(trace.steps, 1) if step.halts), None)
    result = {
        "title": puzzle.title,
        "right": right,
        "problems": problems,
        "q_halt": last.q_halt,
        "steps": len(trace.steps),
        "halts_at": halted,
        "question": trace.question,
        "board": last.board,
        "answer": trace.answer,
    }
    return {**result, "trace": [asdict(step) for step in trace.steps]} if whole else result


def _votes(puzzle: Puzzle, recorded: "Recorded", whole: bool) -> list[dict[str, Any]]:
    """The different answers of the paths, the most common first, each with its paths."""
    answer, q_halt = recorded.outcomes.answer[0], recorded.outcomes.q_halt[0]
    firsts, counts = np.unique(answer, return_counts=True)
    votes = []
    for first in firsts[np.argsort(-counts, kind="stable")].tolist():
        paths = np.flatnonzero(answer == first)
        best = int(paths[q_halt[paths].argmax()])
        votes.append({"paths": paths.tolist(), **_result(puzzle, recorded.traces[best], whole=whole)})
    return votes


def _vote_lines(result: dict[str, Any]) -> list[str]:
    """The votes of the paths: a line for each of the most common answers."""
    total = sum(len(vote["paths"]) for vote in result["votes"])
    answers = counted(len(result["votes"]), "answer")
    lines = [f"this is the answer of path {result['path']}; the {total} paths gave {answers}:"]
    for vote in result["votes"][:MOST_VOTES]:
        differ = sum(a != b for a, b in zip(vote["board"], result["board"], strict=True))
        is_chosen = result["path"] in vote["paths"]
        same = "this answer" if is_chosen else f"differs in {counted(differ, 'cell')}"
        faults = counted(len(vote["problems"]), "fault")
        verdict = {True: ", right", False: f", {faults}", None: ""}[vote["right"]]
        sure = f"confidence up to {100 * vote['q_halt']:.1f} %"
        lines.append(f"  {counted(len(vote['paths']), 'path')}, {sure}: {same}{verdict}")
    if more := result["votes"][MOST_VOTES:]:
        lines.append(f"  and {counted(len(more), 'further answer')}")
    return lines


def _verdict(result: dict[str, Any]) -> list[str]:
    """The result in two lines."""
    told = {
        True: "right",
        False: "wrong: " + shortened(result["problems"]),
        None: "no answer to compare with",
    }
    halts = "would continue" if result["halts_at"] is None else f"halts at step {result['halts_at']}"
    confidence = f"confidence {100 * result['q_halt']:.1f} % after {counted(result['steps'], 'step')}"
    return [told[result["right"]], f"{confidence}; with early halting the model {halts}"]


def _step_line(kind: Kind, number: int, step: "Step", before: Sequence[int]) -> str:
    """A line for a step: broken rules, the model's confidence, changes since the previous board."""
    changed = [
        kind.at(n) for n, (now, then) in enumerate(zip(step.board, before, strict=True)) if now != then
    ]
    rules = counted(len(step.problems), "fault") if step.problems else "no fault"
    sure = f"confidence {100 * step.q_halt:.1f} %, {'halts' if step.halts else 'continues'}"
    where = f": {shortened(changed)}" if changed and number > 1 else ""
    return f"step {number}: {rules}, {sure}; {counted(len(changed), 'cell')} changed{where}"


if __name__ == "__main__":
    sys.exit(main())

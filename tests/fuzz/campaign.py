"""Many inputs to every reader, and what came of them:

    python -m tests.fuzz.campaign --inputs 100000 --seed 0 [--target NAME ...] [--write FILE.json]

Input i of a target is drawn from (seed, target, i) alone, so a finding is found again by
`--target NAME --first i --inputs 1`. Each target runs in a process of its own: that it dies or hangs is a
finding as well. Findings are written to --keep FOLDER, by target; exit status 1 when there are any.
"""

import argparse
import hashlib
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.judge import Finding, judge, leave, warm
from tests.fuzz.targets import TARGETS

# Of all inputs, the share of each target, in parts: fewer where a reader opens files or makes configurations.
SHARES = {
    **dict.fromkeys(("puzzle", "board", "task", "sudokus", "mazes"), 8),
    **dict.fromkeys(("tokens", "kaggle"), 4),
    **dict.fromkeys(("manifest", "tensors", "training", "official", "metrics"), 3),
    **dict.fromkeys(("words", "architecture", "run_config", "array", "dataset", "identifiers"), 2),
    **dict.fromkeys(("config", "official_config", "plan"), 1),
}
# Seconds without a new input after which a process is ended, and address space that it may add.
PATIENCE, ROOM = 1800.0, 4 << 30
MOST_FINDINGS = 20


@dataclass
class Result:
    """What came of a target's inputs. places: how often each line of the project has refused one."""

    inputs: int = 0
    values: int = 0
    refusals: int = 0
    seconds: float = 0.0
    places: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)


def draw(seed: int, name: str, number: int) -> bytes:
    """Input `number` of a target."""
    return TARGETS[name].draw(Random(f"{seed}/{name}/{number}"))


def explore(name: str, seed: int, first: int, last: int) -> Result:
    """Hands the inputs `first` to `last` - 1 to a target, in a process that may die of them."""
    context = multiprocessing.get_context("fork")
    warm(TARGETS[name])
    result = Result()
    while first < last and len(result.findings) < MOST_FINDINGS:
        at = context.Value("q", first)
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, seed, first, last, at, there))
        process.start()
        there.close()
        part, why = _wait(process, here, at)
        if why is not None:
            leave()
            part.findings.append(_finding(name, seed, at.value, why))
            part.inputs = at.value + 1 - first
        result.inputs += part.inputs
        result.values += part.values
        result.refusals += part.refusals
        result.seconds += part.seconds
        result.places += part.places
        result.findings += part.findings
        first += part.inputs
    return result


def _wait(process: Any, pipe: Any, at: "Synchronized[int]") -> tuple[Result, str | None]:
    """The process's result, or an empty one and how it ended before it could tell."""
    seen, since = -1, time.monotonic()
    while not pipe.poll(1.0):
        if at.value != seen:
            seen, since = at.value, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            process.kill()
            process.join()
            return Result(), f"no answer within {PATIENCE:g} s"
    try:
        result = pipe.recv()
    except EOFError:
        process.join()
        return Result(), f"the process died, exit code {process.exitcode}"
    process.join()
    return result, None


def _work(name: str, seed: int, first: int, last: int, at: "Synchronized[int]", pipe: Any) -> None:
    target, result = TARGETS[name], Result()
    # Far beyond what any input may take, and below what would end the machine's other processes.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    start = time.monotonic()
    for number in range(first, last):
        at.value = number
        result.inputs += 1
        try:
            refusal = judge(target, draw(seed, name, number))
        except Finding as finding:
            result.findings.append(_finding(name, seed, number, str(finding)))
            if len(result.findings) >= MOST_FINDINGS:
                break
        else:
            result.values += refusal is None
            result.refusals += refusal is not None
            if refusal is not None:
                result.places[refusal.where] += 1
    result.seconds = time.monotonic() - start
    pipe.send(result)


def _finding(name: str, seed: int, number: int, why: str) -> dict[str, Any]:
    return {"target": name, "input": number, "why": why, "data": draw(seed, name, number)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Hands the project's readers inputs that are nearly valid.")
    parser.add_argument("--inputs", type=int, default=100_000, help="how many, over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that were findings")
    parser.add_argument("--write", type=Path, help="a JSON file for the result")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    parts = sum(SHARES[name] for name in names)
    results = {}
    for name in names:
        count = -(-args.inputs * SHARES[name] // parts)
        result = results[name] = explore(name, args.seed, args.first, args.first + count)
        print(
            f"{name:16} {result.inputs:7,} inputs, {result.values:7,} taken, {result.refusals:7,} refused in "
            f"{len(result.places):3} places, {len(result.findings)} findings, {result.seconds:.0f} s",
            flush=True,
        )
        for finding in result.findings:
            print(f"    input {finding['input']}: {finding['why']}; {finding['data'][:100]!r}")
            if args.keep is not None:
                folder = args.keep / name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / hashlib.sha256(finding["data"]).hexdigest()[:12]).write_bytes(finding["data"])
    total = sum(result.inputs for result in results.values())
    found = sum(len(result.findings) for result in results.values())
    print(f"{total:,} inputs, {found} findings")
    if args.write is not None:
        args.write.write_text(json.dumps(_record(args, results), indent=2) + "\n", encoding="utf-8")
    return 1 if found else 0


def _record(args: argparse.Namespace, results: dict[str, Result]) -> dict[str, Any]:
    def asked(*words: str) -> str:
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    packages = ("numpy", "omegaconf", "PyYAML", "safetensors", "torch")
    return {
        "commit": asked("git", "rev-parse", "HEAD"),
        "dirty": bool(asked("git", "status", "--porcelain", "--", "../../hrm", "../../tests/fuzz")),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seed": args.seed,
        "inputs": sum(result.inputs for result in results.values()),
        "findings": sum(len(result.findings) for result in results.values()),
        "targets": {
            name: {
                "inputs": result.inputs,
                "taken": result.values,
                "refused": result.refusals,
                "places": len(result.places),
                "seconds": round(result.seconds, 1),
                "findings": [f"{finding['input']}: {finding['why']}" for finding in result.findings],
            }
            for name, result in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())

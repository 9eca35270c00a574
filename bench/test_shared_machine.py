"""Times a training step on a shared CPU: alone, with one busy process and with two.

`pytest bench/test_shared_machine.py --benchmark-only --benchmark-json=bench/results/shared_cpu.json`

Each setting of wait policy and threads runs in a separate process, because OpenMP reads them once. The
processes alternate, so that a ratio compares neighbouring measurements. The benchmark is skipped if the
machine is not idle at the start or while a process runs alone.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench.beside import IDLE_CPUS, Beside

ROOT = Path(__file__).parents[1]
MODELS = ("gated-quick-B64-S16", "v1-D128-B32-S81")
# The default setting of a run comes first. An empty value means an unset variable.
SETTINGS = {
    "as chosen": {"OMP_WAIT_POLICY": "", "OMP_NUM_THREADS": ""},
    "threads that spin": {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": ""},
    "one thread": {"OMP_WAIT_POLICY": "", "OMP_NUM_THREADS": "1"},
}
# Maximum step time by number of busy processes, relative to the fastest setting without busy processes.
LIMITS = {0: 1.1, 1: 1.6, 2: 2.6}
ROUNDS, STEPS = 5, 10


class NotIdle(Exception):
    """Other processes use more than IDLE_CPUS CPUs."""


class Worker:
    """A process that runs training steps on request, and is stopped in between."""

    def __init__(self, model: str, setting: dict[str, str]) -> None:
        environ = {key: value for key, value in os.environ.items() if key not in setting}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.test_shared_machine", model],
            cwd=ROOT,
            env=environ | {key: value for key, value in setting.items() if value},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def steps(self, count: int) -> dict[str, float]:
        """Runs `steps` steps. Returns their median seconds, and this process's CPU seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        return found


@contextmanager
def busy(count: int) -> Iterator[None]:
    """A context with `count` processes that compute continuously."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def check_idle(others: float | None) -> None:
    """Raises NotIdle if others used more than IDLE_CPUS CPUs."""
    if others is None or others > IDLE_CPUS:
        taken = "an unknown number" if others is None else f"{others:.2f}"
        raise NotIdle(f"the machine is not idle, so nothing is timed: others use {taken} of its CPUs")


def measure(model: str, rounds: int, count: int) -> dict[str, dict[int, list[float]]]:
    """Seconds per step by setting and number of busy processes, one value per round."""
    seconds: dict[str, dict[int, list[float]]] = {
        name: {number: [] for number in LIMITS} for name in SETTINGS
    }
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(model, setting)) for name, setting in SETTINGS.items()}
        for worker in workers.values():
            worker.steps(5)
        for _ in range(rounds):
            for number in LIMITS:
                for name, worker in workers.items():
                    with busy(number), Beside() as beside:
                        found = worker.steps(count)
                    seconds[name][number].append(found["seconds"])
                    if number == 0 and beside.others is not None:
                        check_idle(beside.others - found["cpu_seconds"] / beside.seconds)
    return seconds


def ratios(seconds: dict[str, dict[int, list[float]]]) -> dict[str, dict[int, float]]:
    """Medians over the rounds, relative to the fastest setting without busy processes."""
    medians = {
        name: {number: statistics.median(each) for number, each in by_number.items()}
        for name, by_number in seconds.items()
    }
    fastest = min(by_number[0] for by_number in medians.values())
    return {
        name: {number: round(median / fastest, 3) for number, median in by_number.items()}
        for name, by_number in medians.items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_step_with_busy_processes(benchmark, model):
    from bench.rows import CUDA, machine

    if CUDA:
        pytest.skip("steps on a GPU do not depend on the CPU; CUDA_VISIBLE_DEVICES= hides it")
    benchmark.group = "a step on a shared machine"
    try:
        with Beside() as beside:
            time.sleep(2)
        check_idle(beside.others)
        seconds = benchmark.pedantic(measure, args=(model, ROUNDS, STEPS), rounds=1)
    except NotIdle as reason:
        pytest.skip(str(reason))
    found = ratios(seconds)
    benchmark.extra_info |= {"model": model, "ratios": found, "limits": LIMITS, **machine()}
    chosen = found["as chosen"]
    assert all(chosen[number] <= limit for number, limit in LIMITS.items()), chosen


def work(model: str) -> None:
    """The worker process: reads a number of steps per line, and prints their time per line."""
    import torch

    from bench.implementations import Ours
    from bench.rows import Code, quick, setting, small

    models = dict(zip(MODELS, (quick("gated", 64), small("v1")), strict=True))
    config, data = setting(models[model], Code("ours", "compile", "float32"))
    ours = Ours(config, data, torch.device("cpu"))
    for line in sys.stdin:
        times, cpu = [], time.process_time()
        for _ in range(int(line)):
            start = time.perf_counter()
            ours.train()
            times.append(time.perf_counter() - start)
        taken = time.process_time() - cpu
        print(json.dumps({"seconds": statistics.median(times), "cpu_seconds": taken}), flush=True)


if __name__ == "__main__":
    # Import first: it sets how threads wait, which OpenMP reads when PyTorch loads.
    import hrm  # noqa: F401

    work(sys.argv[1])

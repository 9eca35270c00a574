"""The cost of gate statistics: the time of a log line relative to the steps between two lines.

`pytest bench/test_gates.py --benchmark-only --benchmark-json=bench/results/gates_cpu.json`
"""

import statistics

import pytest
import torch

from bench.implementations import Ours
from bench.rows import CUDA, Code, clock, machine, published, quick, setting, small
from hrm.engine.step_metrics import GATE_STATISTICS, GATES

MODELS = (
    [(f"gated-B{B}-S81", published("gated", B, 81)) for B in (96, 768)]
    if CUDA
    else [("gated-quick-B64-S16", quick("gated", 64)), ("gated-D128-B32-S81", small("gated"))]
)
# Number of steps timed for each line's statistics.
STEPS = 5
# Maximum share of step time for gate statistics.
LIMIT = 0.01


@pytest.mark.parametrize(("name", "model"), MODELS, ids=[name for name, _ in MODELS])
def test_statistics_of_the_gates(benchmark, name, model):
    code = Code("ours", "graph", "bfloat16") if CUDA else Code("ours", "compile", "float32")
    config, data = setting(model, code)
    torch._dynamo.reset()
    ours = Ours(config, data, torch.device(model.device))
    for _ in range(5):
        ours.train()
    found = ours.engine.gate_metrics()
    assert len(found) == len(GATES) * len(GATE_STATISTICS)
    assert all(0 < found[f"gates/{gate}/mean"] < 1 for gate in GATES)
    steps, lines = list[float](), list[float]()

    def train() -> None:
        start = clock()
        for _ in range(STEPS):
            ours.train()
        steps.append((clock() - start) / STEPS)

    def line() -> None:
        start = clock()
        ours.engine.gate_metrics()
        lines.append(clock() - start)

    benchmark.group = "statistics of the gates"
    benchmark.pedantic(line, setup=train, rounds=20)
    step_seconds, line_seconds = statistics.median(steps), statistics.median(lines)
    share = line_seconds / (config.log_interval * step_seconds)
    benchmark.extra_info |= {
        "model": name,
        **code._asdict(),
        "log_interval": config.log_interval,
        "step_seconds": step_seconds,
        "line_seconds": line_seconds,
        "share": share,
        **machine(),
    }
    assert share < LIMIT

"""Times the solution of a batch with halt_max_steps steps: the latency of one puzzle, the throughput of many.

`pytest bench/test_inference.py --benchmark-only`; models, rows and selection as in test_step.py. A call
includes the copy of puzzles from the host and of answers to it.
"""

import pytest

from bench.rows import INFERENCE, clock, published, quick, rows, time_row

MODELS = rows(
    *((f"{arch}-B{B}-S81", published(arch, B, 81)) for arch in ("v1", "gated") for B in (1, 768)),
    *((f"{arch}-quick-B{B}-S16", quick(arch, B)) for arch in ("v1", "gated") for B in (1, 64)),
)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("name", "model", "code"), MODELS)
def test_inference(benchmark, name, model, code):
    time_row(benchmark, INFERENCE, name, model, code)

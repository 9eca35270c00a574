"""Training steps and evaluations by different code, side by side.

`pytest bench/test_step.py --benchmark-only`; HRM_REPO=PATH of a checkout of sapientinc/HRM adds the official
model. On CUDA it is the published model, v1 and gated, of three batches and two lengths, in bfloat16;
elsewhere small models in float32, and one row of bfloat16 where the processor multiplies it. Rows of one
group are one model, timed one after the other in one process; `-k "v1 and B768 and graph"` chooses.
`bench/rows.py` says how a row is checked and timed.
"""

import pytest

from bench.rows import EVALUATION, TRAINING, clock, published, quick, rows, small, time_row

PUBLISHED = [
    (f"{arch}-B{B}-S{S}", published(arch, B, S))
    for S in (81, 900)
    for arch in ("v1", "gated")
    for B in (96, 384, 768)
]
SMALL = [("v1-D128-B32-S81", small("v1")), ("gated-quick-B64-S16", quick("gated", 64))]
ALSO_TRAINED = [("gated-D128-B32-S81", small("gated"))]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("name", "model", "code"), rows(*PUBLISHED, *SMALL, *ALSO_TRAINED))
def test_training_step(benchmark, name, model, code):
    time_row(benchmark, TRAINING, name, model, code)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("name", "model", "code"), rows(*PUBLISHED, *SMALL))
def test_evaluation(benchmark, name, model, code):
    time_row(benchmark, EVALUATION, name, model, code)

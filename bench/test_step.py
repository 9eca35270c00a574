"""Times training steps and evaluations of several implementations.

`pytest bench/test_step.py --benchmark-only`; HRM_REPO=PATH, a checkout of sapientinc/HRM, adds the official
model. On CUDA the rows have the published model, v1 and gated, with three batches and two lengths, in
bfloat16; elsewhere small models in float32, and one bfloat16 row if the processor supports it. A group has
the rows of one model, timed back to back in one process; `-k "v1 and B768 and graph"` selects rows.
`bench/rows.py` describes how a row is checked and timed.
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

"""The cost of checkpoints: times steps with and without a background save.

`pytest bench/test_saving.py --benchmark-only --benchmark-json=bench/results/saving_cpu.json`
"""

import statistics

import pytest
import torch

from bench.implementations import Ours
from bench.rows import CUDA, Code, clock, machine, published, quick, setting, small
from hrm.checkpoint.read import load_checkpoint
from hrm.checkpoint.save import Saver, save_checkpoint

# Models, and steps between checkpoints: a few seconds, whereas a run's default is ten minutes.
MODELS = (
    [(f"gated-B{B}-S81", published("gated", B, 81), 100) for B in (96, 768)]
    if CUDA
    else [("gated-quick-B64-S16", quick("gated", 64), 100), ("gated-D128-B32-S81", small("gated"), 30)]
)
ROUNDS = 8
# Maximum share of step time for checkpoints.
LIMIT = 0.02


@pytest.mark.parametrize(("name", "model", "interval"), MODELS, ids=[name for name, *_ in MODELS])
def test_saving_in_the_background(benchmark, name, model, interval, tmp_path):
    code = Code("ours", "graph", "bfloat16") if CUDA else Code("ours", "compile", "float32")
    config, data = setting(model, code)
    torch._dynamo.reset()
    ours = Ours(config, data, torch.device(model.device))
    for _ in range(5):
        ours.train()
    engine = ours.engine

    def state() -> dict:
        return {"weights": engine.weights(), "training": engine.training_state(), "run": {}}

    start = clock()
    folder = save_checkpoint(tmp_path / "foreground", engine.step, **state())
    foreground = clock() - start
    saver = Saver(tmp_path / "background", keep=2)
    saver.save(engine.step, **state())
    saver.wait()
    there, here = load_checkpoint(folder), load_checkpoint(tmp_path / "background")
    assert there.manifest["files"]["model.safetensors"] == here.manifest["files"]["model.safetensors"]
    plain, saving, stalls = list[float](), list[float](), list[float]()

    def steps() -> float:
        start = clock()
        for _ in range(interval):
            ours.train()
        return (clock() - start) / interval

    def without() -> None:
        saver.wait()
        plain.append(steps())

    def with_one() -> None:
        start = clock()
        saver.save(engine.step, **state())
        stalls.append(clock() - start)
        saving.append(steps() + stalls[-1] / interval)

    benchmark.group = "checkpoints"
    benchmark.pedantic(with_one, setup=without, rounds=ROUNDS)
    saver.wait()
    assert load_checkpoint(tmp_path / "background").step == engine.step - interval
    # Compare neighbouring measurements, which have the same background load.
    share = statistics.median(one / other - 1 for one, other in zip(saving, plain, strict=True))
    benchmark.extra_info |= {
        "model": name,
        **code._asdict(),
        "interval": interval,
        "step_seconds": statistics.median(plain),
        "stall_seconds": statistics.median(stalls),
        "foreground_seconds": foreground,
        "bytes": sum(entry["size"] for entry in here.manifest["files"].values()),
        "share": share,
        **machine(),
    }
    assert share < LIMIT

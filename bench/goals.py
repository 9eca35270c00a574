"""The goals on a GPU: target, prediction by the roofline, and measurement by first light.

stages: results of `bench.first_light` by stage, as in its file.
"""

from typing import Any

from bench.ceilings import MACHINES, Ceilings
from bench.roofline import step, totals
from bench.rows import INFERENCE, Code, Shape, counted, published, setting


def predictions(limits: Ceilings) -> dict[str, float]:
    """The roofline's prediction of each goal at these ceilings, without launch overhead."""
    config, data = setting(published("v1", 1, 81)._replace(device="cpu"), Code("ours", "eager", "bfloat16"))
    found = {"solve_b1_ms": 1e3 * totals(counted(INFERENCE, config, data), limits)["predicted_s"]}
    for B in (768, 96):
        shape = Shape(B)
        ours, theirs = (totals(step(shape, way), limits)["predicted_s"] for way in ("kernels", "compiled"))
        found |= {f"step_b{B}_ms": 1e3 * ours, f"step_b{B}_ratio": theirs / ours}
    return found


GOALS = {
    "step_b768_ms": ("training step, v1, S=81, bf16, B=768, H200", "at most 45 ms"),
    "step_b768_ratio": ("the same, against the official compiled step, H100 and H200", "at least 1.35 times"),
    "step_b96_ratio": ("the same at B=96", "at least 2.5 times"),
    "solve_b1_ms": ("solution of one puzzle, 16 steps", "under 10 ms"),
}


def measurements(stages: dict[str, Any]) -> dict[str, float]:
    """The values of the goals measured on a CUDA device."""
    found: dict[str, float] = {}
    timed = {name: stages.get(name, {}).get("result", {}).get("rows", []) for name in ("step", "solve")}
    for B in (768, 96):
        own, rival = (
            [row for row in timed["step"] if row["gpu"] and row["batch_size"] == B and row["mode"] == mode]
            for mode in ("graph", "compile")
        )
        if own:
            found[f"step_b{B}_ms"] = 1e3 * own[0]["median_s"]
        if own and rival and rival[0]["implementation"] == "official":
            found[f"step_b{B}_ratio"] = rival[0]["median_s"] / own[0]["median_s"]
    for row in timed["solve"]:
        if row["gpu"]:
            found["solve_b1_ms"] = 1e3 * row["median_s"]
    return found


def goals(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with its prediction, by measured ceilings if there are any, and its measurement."""
    limits, ceiling = MACHINES["H200"], stages.get("ceilings", {}).get("result", {})
    if "bf16_tflop_s" in ceiling:
        limits = Ceilings(ceiling["copy_gb_s"] * 1e9, ceiling["bf16_tflop_s"] * 1e12, "measured")
    predicted, found = predictions(limits), measurements(stages)
    return [
        {"what": what, "goal": goal, "predicted": predicted[name], "measured": found.get(name)}
        for name, (what, goal) in GOALS.items()
    ]


def table(stages: dict[str, Any]) -> str:
    lines = [f"{'goal':<62}{'aim':<22}{'predicted':>10}{'measured':>10}"]
    for row in goals(stages):
        value = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        lines.append(f"{row['what']:<62}{row['goal']:<22}{row['predicted']:>10.3g}{value:>10}")
    return "\n".join(lines)

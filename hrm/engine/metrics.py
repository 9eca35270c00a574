"""The numbers of a log line, from the sums and tables that a device hands over."""

import math

from torch import Tensor

# The sums that are means over sequences which halted; every other one is a mean over all sequences.
PER_HALTED = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")
# The rows and columns of the gates' statistics.
GATES = ("L/primary", "L/secondary", "L/input", "H/primary", "H/secondary")
GATE_STATISTICS = ("mean", "std", "low", "high", "contribution")


def means(sums: dict[str, float], sequences: float) -> dict[str, float]:
    """Means from sums: of PER_HALTED over the halted, without them if none has; of the rest over all.

    A sum of squares, `NAME_square`, becomes the standard deviation `NAME_std` around `NAME_mean`.
    """
    halted = sums["count"]
    found = {name: sums[name] / halted for name in PER_HALTED if halted}
    for name, value in sums.items():
        if name not in PER_HALTED and name != "count":
            found[name] = value / max(sequences, 1)
    for name in [name for name in found if name.endswith("_square")]:
        kind = name.removesuffix("_square")
        found[f"{kind}_std"] = math.sqrt(max(found.pop(name) - found[f"{kind}_mean"] ** 2, 0.0))
    return {"count": halted, **found}


def gate_metrics(table: Tensor) -> dict[str, float]:
    """Log names for statistics (5, 5) of the gates, L's three sources and then H's two."""
    return {
        f"gates/{gate}/{statistic}": value
        for gate, row in zip(GATES, table.tolist(), strict=True)
        for statistic, value in zip(GATE_STATISTICS, row, strict=True)
    }

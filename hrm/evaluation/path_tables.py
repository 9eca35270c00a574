"""Tables of accuracy with many paths: by rule and number of paths, and by depth and number of paths."""

from collections.abc import Iterator, Mapping

from hrm.common.tables import Table
from hrm.evaluation.metrics import Metrics

_NOTE = (
    "% of the puzzles solved by the first K paths under each rule, with the half-width of the 95 % interval. "
    "oracle: a right answer among the first K; pass@K: among K of all paths (unbiased estimate)"
)


def rules_table(name: str, paths: Metrics) -> Table:
    """Accuracy by number of paths and rule. paths: results of `evaluate_paths` for the set `name`."""
    rules, pass_at = paths["rules"], paths["pass_at"]
    rows = [[k, *(_cell(of_rule[k]) for of_rule in rules.values()), _cell(pass_at[k])] for k in pass_at]
    lines = [_NOTE]
    for rule, counts in paths["failures"].items():
        if rule != "oracle" and counts["wrong"]:
            lines.append(
                f"{rule}: {counts['wrong']:,} wrong answers; on {counts['another_right']:,} of these puzzles "
                "another path is right"
            )
    return Table(f"{name}, by number of paths and rule", ["K", *rules, "pass@K"], rows, "\n".join(lines))


def depth_tables(name: str, paths: Metrics) -> Iterator[Table]:
    """Accuracy by depth and number of paths, for the rule that was selected and for the oracle."""
    for rule in dict.fromkeys((paths["select"], "oracle")):
        by_depth: Mapping[str, Mapping[str, Mapping[str, float]]] = {
            depth: of_rule[rule] for depth, of_rule in paths["depths"].items()
        }
        counts = list(paths["pass_at"])
        rows = [[depth, *(_cell(cells[k]) for k in counts)] for depth, cells in by_depth.items()]
        columns = ["ACT steps", *(f"K={k}" for k in counts)]
        yield Table(f"{name}, {rule}: by ACT steps and number of paths", columns, rows)


def _cell(share: Mapping[str, float]) -> str:
    return f"{100 * share['mean']:.2f} ±{50 * (share['high'] - share['low']):.2f}"

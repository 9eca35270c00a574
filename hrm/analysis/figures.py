"""The plots of an analysis: curves with intervals, bars, reliability diagrams, boards, trajectories."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hrm.analysis.statistics import BINS, Calibration, Estimate
from hrm.study.plots import COLOURS, MARKERS, PANEL_SIZE, Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours by their place in COLOURS: right answers are blue, wrong ones orange.
RIGHT, WRONG = 0, 1


def curves(
    title: str,
    x: Sequence[int],
    named: Mapping[str, Sequence[Estimate]],
    *,
    mark: int | None = None,
    is_share: bool = False,
    logarithmic: bool = False,
    x_label: str = "ACT steps",
) -> Drawing:
    """A curve for each name, with its interval as a band. mark: the x of a vertical line."""

    def draw(ax: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        ax.set_title(title, loc="left")
        factor = 100 if is_share else 1
        for place, (name, estimates) in enumerate(named.items()):
            ink = COLOURS[place % len(COLOURS)][0]
            value, low, high, _ = (factor * np.array(part) for part in zip(*estimates, strict=True))
            ax.fill_between(x, low, high, color=ink, alpha=0.15, linewidth=0)
            marker = MARKERS[place % len(MARKERS)]
            every: int | list[int] = max(1, len(x) // 6)
            if max(x) > 8 * min(x):
                every = [i for i, value in enumerate(x) if value & (value - 1) == 0]
            ax.plot(
                x, value, color=ink, linewidth=1.8, marker=marker, markersize=4, markevery=every, label=name
            )
        if mark is not None:
            ax.axvline(
                mark, color=COLOURS[5][0], linewidth=1, linestyle="--", label=f"{mark} steps in training"
            )
        ax.set_xlabel(x_label)
        if max(x) > 8 * min(x):
            ax.set_xscale("log", base=2)
            ticks = [place for place in (1 << power for power in range(13)) if min(x) <= place <= max(x)]
            ax.set_xticks(ticks, [str(place) for place in ticks])
            ax.xaxis.set_minor_formatter(NullFormatter())
        if is_share:
            ax.set_ylim(-3, 103)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        elif logarithmic and min(each.value for of in named.values() for each in of) > 0:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(bottom=0)
        ax.legend(loc="best", fontsize=8)

    ends = "; ".join(
        f"{name} from {_shown(of[0], is_share)} to {_shown(of[-1], is_share)}" for name, of in named.items()
    )
    return Drawing(title, draw, f"{title}, from {x[0]} to {x[-1]}: {ends}.")


def bars(title: str, named: Mapping[str, Estimate]) -> Drawing:
    """A bar for each name, with its interval as an error bar."""

    def draw(ax: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter

        ax.set_title(title, loc="left")
        for place, each in enumerate(named.values()):
            value, low, high = (100 * part for part in each[:3])
            ax.barh(place, value, height=0.62, color=COLOURS[0][0], alpha=0.75)
            ax.plot([low, high], [place, place], color=COLOURS[1][0], linewidth=2)
            ax.annotate(
                f"{value:.1f} %", (max(high, value), place), (4, 0), textcoords="offset points", va="center"
            )
        ax.set_yticks(range(len(named)), list(named))
        middle, half = (len(named) - 1) / 2, max(3, len(named)) / 2
        ax.set_ylim(middle + half, middle - half)
        ax.set_xlim(0, 125)
        ax.set_xticks([0, 25, 50, 75, 100])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        ax.grid(axis="y", visible=False)

    words = "; ".join(f"{name} {_shown(each, True)}" for name, each in named.items())
    return Drawing(
        title, draw, f"{title}: {words}.", (PANEL_SIZE[0] * 1.2, max(2.0, 0.8 + 0.36 * len(named)))
    )


def reliability(title: str, found: Calibration) -> Drawing:
    """A reliability diagram: accuracy by confidence, the diagonal, and the number of puzzles in each bin."""

    def draw(ax: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter

        ax.set_title(title, loc="left")
        edges = 100 * np.arange(BINS) / BINS
        most = max(1, found.counts.max())
        ax.bar(
            edges,
            20 * found.counts / most,
            100 / BINS,
            align="edge",
            color=COLOURS[5][0],
            alpha=0.35,
            label="puzzles (height by number)",
        )
        ax.plot([0, 100], [0, 100], color=COLOURS[5][0], linewidth=1, linestyle="--", label="calibrated")
        some = found.counts > 0
        ax.plot(
            100 * found.confidence[some],
            100 * found.accuracy[some],
            "o-",
            color=COLOURS[0][0],
            label="this model",
        )
        ax.set_xlim(0, 100)
        ax.set_ylim(-3, 103)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        ax.set_xlabel("sigmoid(q_halt)")
        ax.set_ylabel("right")
        ax.legend(loc="upper left", fontsize=8)

    words = "; ".join(
        f"at {100 * confidence:.0f} % confidence {100 * accuracy:.0f} % right of {count}"
        for count, confidence, accuracy in zip(found.counts, found.confidence, found.accuracy, strict=True)
        if count
    )
    return Drawing(title, draw, f"{title}: {words}.")


def board(title: str, values: np.ndarray, most: float, label: str) -> Drawing:
    """A heat map of a board (rows, cols), values from 0 to most; small boards also show the numbers."""

    def draw(ax: "Axes") -> None:
        ax.set_title(title, loc="left")
        ax.pcolormesh(values, cmap="Blues", vmin=0, vmax=most, edgecolor="white", linewidth=0.3)
        if values.size <= 100:
            for (row, column), value in np.ndenumerate(values):
                ink = "#ffffff" if value > 0.6 * most else "#08306b"
                ax.text(
                    column + 0.5, row + 0.5, f"{value:.3g}", color=ink, ha="center", va="center", fontsize=8
                )
        ax.set_xlim(0, values.shape[1])
        # Draw row 0 at the top.
        ax.set_ylim(values.shape[0], 0)
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(label)
        ax.grid(visible=False)

    words = f"{title}: from {values.min():.3g} to {values.max():.3g} {label}."
    return Drawing(title, draw, words, (3.4, 3.6))


def plane(title: str, paths: np.ndarray, right: np.ndarray, mark: int, shares: np.ndarray) -> Drawing:
    """Trajectories (n, steps + 1, 2) in the plane of two principal components; shares: of the variance."""

    def draw(ax: "Axes") -> None:
        ax.set_title(title, loc="left")
        for path, good in zip(paths, right, strict=True):
            ink = COLOURS[RIGHT if good else WRONG][0]
            line = "-" if good else "--"
            ax.plot(path[:, 0], path[:, 1], line, color=ink, linewidth=1, alpha=0.8)
            ax.plot(*path[mark], "o" if good else "X", color=ink, markersize=6)
        ax.plot(*paths[0, 0], "s", color=COLOURS[3][0], markersize=6)
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=COLOURS[RIGHT][0], marker="o", linewidth=1),
            Line2D([], [], color=COLOURS[WRONG][0], marker="X", linewidth=1, linestyle="--"),
            Line2D([], [], color=COLOURS[3][0], marker="s", linewidth=0),
        ]
        ax.legend(handles, [f"right after {mark} steps", "wrong", "start"], loc="best", fontsize=8)
        ax.set_xlabel(f"component 1 ({100 * shares[0]:.0f} % of the variance)")
        ax.set_ylabel(f"component 2 ({100 * shares[1]:.0f} %)")

    words = f"{title}: {int(right.sum())} right and {int((~right).sum())} wrong trajectories of z_H."
    return Drawing(title, draw, words, (5.2, 3.9))


def _shown(estimate: Estimate, is_share: bool) -> str:
    return f"{100 * estimate.value:.1f} %" if is_share else f"{estimate.value:.3g}"

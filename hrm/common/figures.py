"""The only module that imports matplotlib, an optional package: figures without pyplot, with fixed
settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hrm.common.errors import UserError

# Colours of text and lines, and of the grid.
INK, GRID = "#24292f", "#d8dee4"


@contextmanager
def figures(svg_salt: str | None = None) -> Iterator[Any]:
    """matplotlib's class Figure, without pyplot and its global state, under this module's settings.

    svg_salt: makes the identifiers in an SVG reproducible. Raises UserError where matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "drawing needs matplotlib, which is missing: run pip install -c constraints.txt -e '.[plots]'"
        ) from None
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "grid.color": GRID,
        "legend.frameon": False,
        # A run's name may contain dollar signs, which start a formula.
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": svg_salt,
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        **{f"axes.{part}color": INK for part in ("edge", "label")},
    }
    # The user's matplotlibrc would change colours that the HTML page replaces.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield Figure


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing; call it before long work that ends in a drawing."""
    with figures():
        pass

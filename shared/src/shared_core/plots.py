"""The style of every picture, so that ten packages look like one."""

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["COLORS", "new_figure", "style"]

# Okabe & Ito's palette: told apart with any kind of colour vision.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the house style to the figures made inside the block.

    Examples:
        >>> import matplotlib
        >>> with style():
        ...     matplotlib.rcParams["savefig.dpi"]
        150.0
    """
    import matplotlib as mpl
    from cycler import cycler

    settings = {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "savefig.dpi": 150,
    }
    with mpl.rc_context(settings):
        yield


def new_figure(rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """Make a figure and its axes without a display, in the house style.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        options: Passed to `matplotlib.figure.Figure.subplots`; ``figsize`` in inches.

    Returns:
        The pair ``(figure, axes)`` as `matplotlib.pyplot.subplots` gives it.

    Examples:
        >>> figure, axes = new_figure(1, 2)
        >>> len(axes)
        2
    """
    from matplotlib.figure import Figure

    with style():
        size = options.pop("figsize", (4.8 * columns, 3.6 * rows))
        figure = Figure(figsize=size)
        return figure, figure.subplots(rows, columns, **options)

"""What all figures share: their style, their panels, their marks and their files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pandas as pd

from gradiometer.bench import selection
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.tables import unit_text

__all__ = ["FORMATS", "Plot", "axis", "decades", "floor", "legend_of", "panels", "point", "rendered", "style"]

FORMATS = ("png", "svg", "pdf")
_SIGNS = {
    "†": "has not passed a check.",
    "§": "declared biased, for some group here: low noise is precision about a wrong value.",
    "∝": "declared rescaled, for some group here: its gradient has a factor of its own, and so have its errors.",
    "ℓ": "learns beside the estimate: of one memory, and another may be far from it.",
    "¶": "heavy tails: an interval may be too short.",
}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
VEIL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}  # behind words that cross lines
_RC: Any = {
    "svg.hashsalt": "gradiometer",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "figure.titlesize": 9.5,
    "grid.color": "0.91",
    "axes.edgecolor": "0.5",
    "xtick.bottom": True,
    "ytick.left": True,
    "xtick.color": "0.2",
    "ytick.color": "0.2",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
}


@dataclass(frozen=True)
class Plot:
    """A drawn figure: the stem of its files, its title, how to read it, and matplotlib's figure."""

    name: str
    title: str
    caption: str
    figure: Any


@contextmanager
def style() -> Iterator[None]:
    """Seaborn's grid with letters for print; nothing of it stays behind."""
    import matplotlib as mpl
    import seaborn as sns

    with mpl.rc_context(), sns.axes_style("whitegrid"), mpl.rc_context(_RC):
        yield


def rendered(plot: Plot, form: str) -> bytes:
    """A figure as the bytes of a PNG (200 dpi), SVG or PDF file; the same figure gives the same bytes."""
    held = BytesIO()
    with style():
        plot.figure.savefig(held, format=form, dpi=200, metadata=_METADATA[form], bbox_inches="tight", pad_inches=0.06)
    return held.getvalue()


def panels(groups: Sequence[str], width: float, height: float, **shared: Any) -> tuple[Any, Sequence[Any]]:
    """A figure of inches `width` x `height` with a titled panel per parameter group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(groups), squeeze=False, **shared)[0]
    for axes, group in zip(row, groups, strict=True):
        axes.set_title(selection.group_words(group))
    return figure, row


def point(axes: Any, at: tuple[float, float], interval: Any, colour: str, **look: Any) -> None:
    """A marker with its 95 % interval; `interval` holds low and high along x, or None, and along y, or None."""
    for number, bounds in enumerate(interval):
        if bounds is not None and all(map(math.isfinite, bounds)):
            ends = [(bounds[0], bounds[1]), (at[1], at[1])] if number == 0 else [(at[0], at[0]), (bounds[0], bounds[1])]
            axes.plot(*ends, color=colour, linewidth=1.3, solid_capstyle="butt", zorder=3)
    axes.plot(
        *at, **{"markersize": 5.2, "markeredgewidth": 1.1, "zorder": 4, "color": colour, "linestyle": "none"} | look
    )


def blended(colour: str, amount: float) -> tuple[float, float, float]:
    """A colour mixed with white: 0 is white, 1 the colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - amount * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def axis(metric: str) -> str:
    """An axis label in words with the unit."""
    definition = METRICS[metric]
    words = "variance" if metric == "variance" else definition.label
    unit = unit_text(definition.unit)
    return f"{words} [{unit}]" if unit else words


def floor(axes: Any, floors: pd.Series, *, along: str) -> None:
    """The SNR of a gradient of mean zero: what lies in its shade is noise. Far below the axis, the title says it."""
    known = floors.dropna()
    if known.empty:
        return
    highest = float(known.max())
    low = (axes.get_xlim() if along == "x" else axes.get_ylim())[0]
    if low > highest:
        axes.set_title(f"{axes.get_title()} (noise floor {highest:.2g})")
        return
    words: dict[str, Any] = {"textcoords": "offset points", "fontsize": 6.5, "color": "0.35", "zorder": 5}
    span, line = (axes.axvspan, axes.axvline) if along == "x" else (axes.axhspan, axes.axhline)
    span(min(low, highest / 1.5), highest, color="0.5", alpha=0.13, linewidth=0, zorder=1)
    line(highest, color="0.35", linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    if along == "x":
        words |= {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "top"}
        axes.annotate("noise floor", (highest, 1), (-2, -3), **words)
    else:
        words |= {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "top"}
        axes.annotate("noise floor", (1, highest), (-3, -2), **words)


def reaching(values: pd.Series, floors: pd.Series) -> float:
    """Where an SNR axis starts: at its floor, if that is within a decade of the lowest value, else at the value."""
    lowest, highest_floor = float(values.min()), float(floors.max())
    return min(lowest, highest_floor / 1.15) if lowest < 10 * highest_floor else lowest


def decades(axis_of: Any, low: float, high: float) -> None:
    """Limits of a logarithmic axis around the data, and labels that a reader can count by."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    margin = max(1.2, (high / low) ** 0.05)
    low, high = low / margin, high * margin
    span = math.log10(high / low)
    axis_of.axes.set_xlim(low, high) if axis_of.axis_name == "x" else axis_of.axes.set_ylim(low, high)
    if span < 2.2:
        axis_of.set_major_locator(LogLocator(subs=(1, 2, 5) if span > 0.75 else (1, 1.5, 2, 3, 4, 6, 8), numticks=12))
        axis_of.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    else:
        axis_of.set_major_locator(LogLocator(numticks=9))
    axis_of.set_minor_formatter(NullFormatter())


def legend_of(signs: Mapping[str, str], found: pd.DataFrame) -> str:
    """What the signs in a figure mean, for the end of its caption; and that nothing in it was checked, where that is so."""
    used = {sign for text in signs.values() for sign in text.strip()}
    said = [f"{sign} {words}" for sign, words in _SIGNS.items() if sign in used]
    if len(found) and not found["checked"].any():
        said.append("No estimator here has passed a check.")
    return "".join(f" {text}" for text in said)


def wrapped(label: str) -> str:
    """A long word on two lines, broken after the comma nearest its middle."""
    commas = [i for i, character in enumerate(label) if character == ","]
    if len(label) <= 26 or not commas:
        return label
    middle = min(commas, key=lambda i: abs(i - len(label) / 2)) + 1
    return f"{label[:middle]}\n{label[middle:]}"


def _tick(value: float) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    return f"${value / 10.0**power:g}{{\\times}}10^{{{power}}}$"

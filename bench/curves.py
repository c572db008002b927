"""Figures with lines: a metric against the number of particles, error against cost, a test objective along training."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from gradiometer.bench import canvas, figures, selection
from gradiometer.bench.canvas import Plot
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.palette import Look
from gradiometer.bench.placement import place_labels

__all__ = ["BUDGETS", "against_particles", "cost_plane", "learning_curves"]

BUDGETS = {  # the cost on the axis, the product with it, and what a budget of it is called
    "seconds": ("time per gradient [s]", "time", "time budget"),
    "evaluations": ("evaluations of the joint, per datum and gradient", "evaluations", "budget of evaluations"),
}


def against_particles(found: pd.DataFrame, problem: str, look: Mapping[str, Look]) -> Plot:
    """SNR against K, both logarithmic, a panel per group, with the floor and the slopes that theory names."""
    groups = figures.shared_groups(found)
    figure, row = canvas.panels(groups, 0.9 + 2.7 * len(groups), 2.9, sharex=True)
    drawn: dict[str, Any] = {}
    signs = selection.marks(found, by="series")
    for axes, group in zip(row, groups, strict=True):
        of_group = found[(found["group"] == group) & (found["value"] > 0)]
        axes.set(xscale="log", yscale="log", xlabel="particles K")
        for series, line in of_group.groupby("series", sort=True):
            drawn[f"{series}{signs[str(series)]}"] = _line(axes, line, look[str(series)])
        particles = sorted(set(of_group["K"]))
        axes.set_xlim(particles[0] / 1.35, particles[-1] * 1.35)
        axes.set_xticks(particles, [f"{K:g}" for K in particles])
        axes.minorticks_off()
        ends = of_group[["value", "low"]]
        low = canvas.reaching(ends[ends > 0].min(), of_group["floor"])
        canvas.decades(axes.yaxis, low / 1.1, of_group["value"].max() * 1.1)
        canvas.floor(axes, of_group["floor"], along="y")
        _slopes(axes, of_group)
    row[0].set_ylabel(canvas.axis("snr"))
    figure.legend(
        drawn.values(), map(canvas.wrapped, drawn), loc="outside center right", frameon=False, handlelength=2.8
    )
    title = f"Signal-to-noise ratio of one gradient against the number of particles: {problem}"
    figure.suptitle(title)
    caption = (
        "Both axes logarithmic. Dotted guides have slope ½ and −½, as theory gives them for large K; a curve also "
        "depends on the distance from the optimum. Within the shade, up to the dashed floor, a gradient of mean zero "
        "would look the same. Bars are 95 % intervals."
    ) + canvas.legend_of(signs, found)
    return Plot(f"snr-against-K-{problem}", title, caption, figure)


def learning_curves(found: pd.DataFrame, metric: str, problem: str, look: Mapping[str, Look]) -> Plot:
    """A test objective against steps and against seconds, a line per estimator, a band over seeds."""
    import seaborn as sns

    timed = found["seconds"].notna().any()
    figure, row = canvas.panels([""] * (2 if timed else 1), 5.2 + (2.4 if timed else 0), 3.0, sharey=True)
    final = found.sort_values("step").groupby("label").tail(1).set_index("label")["value"].sort_values(ascending=False)
    several = {
        series: list(dict.fromkeys(found.loc[found["series"] == series, "label"])) for series in set(found["series"])
    }
    drawn = {}
    signs = selection.marks(found.assign(biased=False, rescaled=False, tails=""))  # a run shows what its bias leads to
    for label in final.index:
        line = found[found["label"] == label].sort_values("step")
        name = line["series"].iloc[0]
        dashes = ("-", "--", ":", "-.")[several[name].index(label) % 4] if len(several[name]) > 1 else look[name].line
        for axes, x in zip(row, ("step", "seconds"), strict=False):
            kept = line[line[x].notna()]
            mark = {
                "marker": look[name].marker,
                "markersize": 4.5,
                "markevery": max(1, len(kept) // 6),
                "markeredgewidth": 0,
            }
            line_of = {"color": look[name].colour, "linestyle": dashes, "linewidth": 1.4} | mark
            sns.lineplot(data=kept, x=x, y="value", ax=axes, errorbar=None, legend=False, **line_of)
            axes.fill_between(kept[x], kept["low"], kept["high"], color=look[name].colour, alpha=0.16, linewidth=0)
            drawn[f"{label}{signs[label]}"] = axes.lines[-1]
    low, high = _worth_showing(found, final)
    for axes, x in zip(row, ("training step", "training time [s]"), strict=False):
        axes.set(xlabel=x, ylabel=canvas.axis(metric), ylim=(low, high))
        axes.margins(x=0.02)
    row[0].set_ylabel(canvas.axis(metric))
    figure.legend(
        drawn.values(), map(canvas.wrapped, drawn), loc="outside center right", frameon=False, handlelength=2.8
    )
    title = f"Training: {METRICS[metric].label}, {problem}"
    figure.suptitle(title)
    seeds = sorted(set(found["seeds"].astype(int)))
    caption = f"Mean over {' to '.join(map(str, {seeds[0]: 0, seeds[-1]: 0}))} seeds; the band spans the seeds. "
    caption += "Left by training steps, right by the time they took. " if timed else ""
    caption += "The legend is in the order of the last values. "
    caption += "The earliest steps lie below the picture." if found["low"].min() < low else ""
    caption = caption.strip() + canvas.legend_of(signs, found)
    return Plot(f"training-{metric.removeprefix('test_')}-{problem}", title, caption, figure)


def cost_plane(found: pd.DataFrame, unknown: pd.DataFrame, problem: str, budget: str, look: Mapping[str, Look]) -> Plot:
    """Error against cost per gradient, a panel per group, with lines of equal product and the Pareto front.

    Args:
        found: as `figures.cost_plane` returns it, of one problem.
        unknown: the rows of estimators whose error is not known, which the caption names.
    """
    groups, of = figures.shared_groups(found), "mse" if (found["of"] == "mse").any() else "variance"
    axis, cost, spent = BUDGETS[budget]
    wide = 3.4 if found["label"].nunique() <= 10 else 4.2
    figure, row = canvas.panels(groups, wide * len(groups), 0.95 * wide)
    signs = selection.marks(found)
    for axes, group in zip(row, groups, strict=True):
        points = found[found["group"] == group]
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=canvas.axis(of))
        canvas.decades(axes.xaxis, points["cost"].min() / 1.3, points["cost"].max() * 1.3)
        canvas.decades(axes.yaxis, points["value"].min() / 1.5, points["value"].max() * 1.5)
        axes.grid(False)
        _equal_products(axes)
        _points(axes, points, look)
    title = (
        f"What a gradient costs{' in evaluations' if budget == 'evaluations' else ''} and how noisy it is: {problem}"
    )
    figure.suptitle(title)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, group in zip(row, groups, strict=True):
        points = found[found["group"] == group]
        own = selection.marks(points)  # of this group
        names = [canvas.wrapped(label + own[label]) for label in points["label"]]
        place_labels(
            axes,
            list(zip(points["cost"], points["value"], strict=True)),
            names,
            axes.lines[-points["ascends"].nunique() :],
        )
    error = "mean squared error" if of == "mse" else "variance"
    caption = (
        f"{cost.capitalize()} against {error}, both logarithmic: further down and left is better. On a grey line their product "
        f"is the same, so a fixed {spent} buys the same error (a bias stays, whatever is bought); each is ten of the next. "
        "Black rims mark the Pareto front: nothing of the same objective is better at both, and surely at one. Dashed steps are "
        "each objective's front of the values alone. Bars: 95 % intervals."
    )
    reasons = {False: "biased by an amount that was not measured", True: "on a scale of its own"}
    for rescaled, rows in unknown.groupby("rescaled"):
        of_labels = rows.drop_duplicates(["label", "group"]).groupby("label", sort=False)["group"]
        said = [f"{label} ({selection.group_words(', '.join(groups))})" for label, groups in of_labels]
        caption += f" Left out, since {reasons[bool(rescaled)]}: {'; '.join(said)}."
    return Plot(
        f"{'cost' if budget == 'seconds' else budget}-{problem}",
        title,
        caption + canvas.legend_of(signs, found),
        figure,
    )


def _points(axes: Any, points: pd.DataFrame, look: Mapping[str, Look]) -> None:
    """Estimators with their intervals, black rims for those on the front, and each objective's front as the last lines."""
    rim: Mapping[str, Any] = {"markeredgecolor": "black", "markersize": 7}
    none: Mapping[str, Any] = {"markeredgecolor": "white", "markersize": 6.5, "markeredgewidth": 0.6}
    for mark in selection.records(points):
        own = look[mark.series]
        intervals = ((mark.cost_low, mark.cost_high), (mark.low, mark.high))
        canvas.point(
            axes, (mark.cost, mark.value), intervals, own.colour, marker=own.marker, **(rim if mark.front else none)
        )
    for _, steps in points[points["step"]].sort_values("cost").groupby("ascends"):
        axes.plot(
            steps["cost"],
            steps["value"],
            color="0.15",
            linewidth=1.0,
            linestyle=(0, (4, 2)),
            drawstyle="steps-post",
            zorder=2,
        )


def _line(axes: Any, line: pd.DataFrame, look: Look) -> Any:
    """A series with its intervals; returns what a legend shows."""
    for mark in selection.records(line):
        canvas.point(axes, (mark.K, mark.value), (None, (mark.low, mark.high)), look.colour, marker=look.marker)
    return axes.plot(
        line["K"],
        line["value"],
        color=look.colour,
        marker=look.marker,
        markersize=5.2,
        linewidth=1.3,
        linestyle=look.line,
        zorder=3,
    )[0]


def _slopes(axes: Any, of_group: pd.DataFrame) -> None:
    """Guides of slope 1/2 and -1/2 through the middle of the data, each named at the end that is farther from them."""
    left, right = float(of_group["K"].min()), float(of_group["K"].max())
    low, high = axes.get_ylim()
    middle = math.exp(np.log(of_group["value"]).mean())

    def room(end: tuple[float, float]) -> float:
        return float(np.abs(np.log(of_group.loc[of_group["K"] == end[0], "value"] / end[1])).min())

    for slope, word in ((0.5, "∝ K$^{1/2}$"), (-0.5, "∝ K$^{-1/2}$")):
        ends = [(K, middle * (K / math.sqrt(left * right)) ** slope) for K in (left, right)]
        axes.plot(*zip(*ends, strict=True), color="0.45", linewidth=0.9, linestyle=":", zorder=1, scaley=False)
        if seen := [end for end in ends if low < end[1] < high]:
            at = max(seen, key=room)
            begins = at[0] == left
            axes.annotate(
                word,
                at,
                (2 if begins else -2, -10 if begins == (slope > 0) else 4),
                textcoords="offset points",
                ha="left" if begins else "right",
                fontsize=7,
                color="0.35",
            )


def _equal_products(axes: Any) -> None:
    """Lines on which cost x error is a power of ten, a handful of them."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    powers = range(math.ceil(math.log10(left * low)), math.floor(math.log10(right * high)) + 1)
    for power in powers:
        axes.plot(
            [left, right],
            [10.0**power / left, 10.0**power / right],
            color="0.8",
            linewidth=0.7,
            zorder=1,
            scalex=False,
            scaley=False,
        )


def _worth_showing(found: pd.DataFrame, final: pd.Series) -> tuple[float, float]:
    """Limits that leave the last differences room: the first, steep steps may lie below."""
    finite = final[np.isfinite(final)]
    top, bottom = float(found["high"].max()), float(finite.min())
    room = max(top - bottom, 1e-3 * abs(top), 1e-9)
    lowest = float(found["low"].min())
    return max(lowest - 0.05 * room, bottom - 2 * room), top + 0.08 * room

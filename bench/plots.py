"""The figures of a report, drawn from the frames of `figures`; what draws is imported when the first is drawn."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from gradiometer.bench import canvas, figures, selection
from gradiometer.bench.canvas import FORMATS, Plot, rendered
from gradiometer.bench.curves import BUDGETS, against_particles, cost_plane, learning_curves
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.palette import Look, looks
from gradiometer.bench.tables import TRAINING

__all__ = ["FORMATS", "Plot", "plots", "rendered"]

_FILLED = {"init": 0.0, "early": 0.4}  # how far a snapshot's marker is filled, wholly for the others
_WORDS = {
    "variance": "Monte-Carlo variance of one gradient",
    "snr": "Signal-to-noise ratio of one gradient, mean over coordinates",
}
_READ = {
    "variance": "Trace of the covariance over a group's parameters, at fixed parameters and a fixed minibatch; further "
    "left is quieter.",
    "snr": "|mean|/standard deviation per coordinate, averaged; further right is better. Within the shade, up to the "
    "dashed floor, a gradient of mean zero would look the same.",
}


def plots(rows: pd.DataFrame) -> list[Plot]:
    """Every figure that the rows hold data for, in reading order.

    Args:
        rows: as the store yields them.
    """
    look = looks(selection.tidy(rows))
    with canvas.style():
        return [
            plot
            for draw in (_by_snapshots, _against_particles, _cost_planes, _learning_curves)
            for plot in draw(rows, look)
        ]


def by_snapshot(found: pd.DataFrame, metric: str, model: str, look: Mapping[str, Look]) -> Plot:
    """A metric by estimator, a panel per group, a model's snapshots within each line."""
    few = [group for group in selection.group_order(found["group"]) if group not in figures.shared_groups(found)]
    groups, snapshots = figures.shared_groups(found), selection.snapshot_order(found["snapshot"])
    found = found[found["group"].isin(groups)]
    order, signs = _ranking(found, METRICS[metric].better, snapshots[-1]), selection.marks(found)
    figure, row = canvas.panels(groups, 1.6 + 2.7 * len(groups), 1.1 + 0.26 * len(order), sharey=True)
    dodges = dict(zip(snapshots, np.linspace(-0.2, 0.2, len(snapshots)) if len(snapshots) > 1 else [0.0], strict=True))
    for axes, group in zip(row, groups, strict=True):
        of_group = found[(found["group"] == group) & (found["value"] > 0)]
        axes.set_xscale("log")
        for mark in selection.records(of_group):
            at = (mark.value, order[mark.label] + dodges[mark.snapshot])
            colour = look[mark.series].colour
            fill = canvas.blended(colour, _FILLED.get(mark.snapshot, 1.0))
            canvas.point(
                axes, at, ((mark.low, mark.high), None), colour, marker=look[mark.series].marker, markerfacecolor=fill
            )
        for band in range(0, len(order), 2):
            axes.axhspan(band - 0.5, band + 0.5, color="0.96", linewidth=0, zorder=0)
        if not of_group.empty:
            ends = of_group[["value", "low", "high"]].replace([np.inf, -np.inf], np.nan)
            low = canvas.reaching(ends[ends > 0].min(), of_group["floor"])
            canvas.decades(axes.xaxis, low, ends.max().max())
        canvas.floor(axes, of_group["floor"], along="x")
        axes.grid(False, axis="y")
        axes.set(ylim=(len(order) - 0.5, -0.5), xlabel=canvas.axis(metric))
    row[0].set_yticks(range(len(order)), [canvas.wrapped(label + signs[label]) for label in order])
    title = f"{_WORDS[metric]}: {model}"
    figure.suptitle(title)
    _legend(figure, snapshots, found, look)
    caption = f"{_READ[metric]} Bars are 95 % intervals (often smaller than the marker)."
    if len(snapshots) > 1:
        caption += f" Snapshots: {', '.join(snapshots)}, from hollow to filled. Best at @{snapshots[-1]} first."
    if metric == "variance" and found["ascends"].nunique() > 1:
        caption += " Gradients of different objectives, or of different K of the K-sample bound, do not compete here."
    caption += f" What few estimators have ({', '.join(few)} parameters) is in the tables." if few else ""
    caption += canvas.legend_of(signs, found)
    return Plot(f"{metric}-{model}", title, caption, figure)


def _by_snapshots(rows: pd.DataFrame, look: Mapping[str, Look]) -> Iterator[Plot]:
    for metric in ("variance", "snr"):
        found = figures.by_snapshot(rows, metric)
        for model in sorted(set(found["model"])):
            yield by_snapshot(found[found["model"] == model], metric, model, look)


def _against_particles(rows: pd.DataFrame, look: Mapping[str, Look]) -> Iterator[Plot]:
    found = figures.against_particles(rows)
    for problem in selection.problem_order(found["problem"]):
        yield against_particles(found[found["problem"] == problem], problem, look)


def _cost_planes(rows: pd.DataFrame, look: Mapping[str, Look]) -> Iterator[Plot]:
    measured = selection.measured(selection.tidy(rows))
    every, key = selection.of_unknown_error(measured), ["problem", "label"]
    timed = measured.loc[measured["metric"] == "seconds_per_gradient", key]
    for budget in BUDGETS:
        unknown = every.merge(timed, on=key) if budget == "seconds" else every
        found = figures.cost_plane(rows, budget)
        for problem in selection.problem_order(found["problem"]):
            of_problem = found[found["problem"] == problem]
            if of_problem["cost"].nunique() > 1:
                yield cost_plane(of_problem, unknown[unknown["problem"] == problem], problem, budget, look)


def _learning_curves(rows: pd.DataFrame, look: Mapping[str, Look]) -> Iterator[Plot]:
    for metric in TRAINING:
        found = figures.learning_curves(rows, metric)
        for problem in selection.problem_order(found["problem"]):
            yield learning_curves(found[found["problem"] == problem], metric, problem, look)


def _ranking(found: pd.DataFrame, better: str, snapshot: str) -> dict[str, int]:
    """The line of each label: best first, by the geometric mean over groups at a snapshot; what lacks it comes last."""
    at = found[(found["snapshot"] == snapshot) & (found["value"] > 0)]
    score = at["value"].map(math.log).groupby(at["label"]).mean() * (-1 if better == "higher" else 1)
    labels = sorted(set(found["label"]), key=lambda label: (score.get(label, math.inf), label))
    return {label: number for number, label in enumerate(labels)}


def _legend(figure: Any, snapshots: list[str], found: pd.DataFrame, look: Mapping[str, Look]) -> None:
    """What fillings mean, where there are snapshots, and colours, where they are families'."""
    from matplotlib.lines import Line2D

    mark: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none"}
    first, others = [], []
    for name in snapshots if len(snapshots) > 1 else []:
        fill = canvas.blended("0.25", _FILLED.get(name, 1.0))
        first.append((f"@{name}", Line2D([], [], color="0.25", markerfacecolor=fill, **mark)))
    families = found.drop_duplicates("family").sort_values("family")
    for family, series in families[["family", "series"]].to_numpy():
        if look[series].family and len(families) > 1:
            others.append((family, Line2D([], [], color=look[series].family, **mark)))
    nothing = ("", Line2D([], [], linestyle="none"))
    lines = [line for line in (first, others[:4], others[4:]) if line]
    columns = max(map(len, lines), default=0)
    if columns:  # matplotlib fills columns first
        marks = [line[i] if i < len(line) else nothing for i in range(columns) for line in lines]
        names, handles = zip(*marks, strict=True)
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            columnspacing=1.2,
            handletextpad=0.3,
        )

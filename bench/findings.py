"""What the rows say, in sentences: computed with their intervals, and said only where these separate."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from gradiometer.bench import figures, selection
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import Value, ratio, student
from gradiometer.bench.uncertain import format_interval, format_uncertain

__all__ = ["findings"]

_SAME = ("seed", "replicates", "B", "digest")  # what two cells share that saw the same noise


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The main findings by topic: who is quietest, where rankings flip, who is cheapest, SNR against K, the best model.

    Ratios are paired over shards of common random numbers, on the log scale, with 95 % intervals. An estimator is
    called best only if the interval of its ratio to the runner-up excludes one.

    Args:
        rows: as the store yields them.

    Returns:
        Sentences with estimators between backticks; topics without any are left out.
    """
    measured = selection.gradients(selection.tidy(rows))
    variance = measured[(measured["metric"] == "variance") & (measured["group"] != "") & (measured["value"] >= 0)]
    found = {
        "Variance at equal K": list(_quietest(variance)),
        "Rankings that flip along training": list(_flips(variance)),
        "Variance x time": list(_cheapest(rows)),
        "SNR against K": list(_slopes(rows)),
        "The model after training": list(_trained(rows)),
    }
    return {topic: sentences for topic, sentences in found.items() if sentences}


def paired_ratio(a: Any, b: Any) -> Value | None:
    """The ratio of two rows' values; None where their shards do not belong together."""
    shards = [jack if isinstance(jack, (list, tuple, np.ndarray)) else [] for jack in (a.jackknife, b.jackknife)]
    if (
        len(shards[0]) != len(shards[1])
        or len(shards[0]) < 2
        or any(str(getattr(a, name)) != str(getattr(b, name)) for name in _SAME)
    ):
        return None
    if not all(np.isfinite(jack).all() and (np.asarray(jack) > 0).all() for jack in shards):
        return None
    return ratio(
        *(Value(row.value, jackknife=tuple(map(float, jack))) for row, jack in zip((a, b), shards, strict=True))
    )


def _quietest(variance: pd.DataFrame) -> Iterator[str]:
    """Per problem and group, at the number of particles most estimators share: the lowest variance, by how much."""
    for problem, group, points in _cells(variance):
        counts = points.groupby("K").size()
        K = counts[counts == counts.max()].index.max()
        ranked = list(selection.records(points[points["K"] == K].sort_values(["value", "label"])))
        if len(ranked) < 2:
            continue
        where = f"{problem}, {selection.group_words(group)}, K = {K:g}"
        if noiseless := [_name(row, points) for row in ranked if row.value == 0]:
            yield f"{where}: without any noise: {', '.join(noiseless)}."
            continue
        ratios = [paired_ratio(row, ranked[0]) for row in ranked[1:]]
        if any(one is None for one in ratios):
            continue
        best, *others = (_name(row, points) for row in ranked)
        apart = [(name, one) for name, one in zip(others, ratios, strict=True) if one is not None and one.low > 1]
        tied = [(name, one) for name, one in zip(others, ratios, strict=True) if one is not None and one.low <= 1]
        largest = f"; that of {apart[-1][0]} {_interval(apart[-1][1])} times" if len(apart) > 1 else ""
        next_best = f" That of {apart[0][0]} is {_interval(apart[0][1])} times as large{largest}." if apart else ""
        if tied:
            names = ", ".join([best, *(name for name, _ in tied[:-1])]) + f" and {tied[-1][0]}"
            low = "lowest " if apart else ""
            if max(abs(one.high - 1) for _, one in tied) < 1e-3:
                yield f"{where}: {names} have the same {low}variance (to 0.1 %).{next_best}"
            else:
                low = "have the lowest variance and " if apart else ""
                yield f"{where}: {names} {low}cannot be told apart (ratios up to {_interval(tied[-1][1])}).{next_best}"
        else:
            yield f"{where}: {best} has the lowest variance.{next_best}"


def _flips(variance: pd.DataFrame) -> Iterator[str]:
    """Per model and group, the pair of estimators of equal K whose order changes most between two snapshots."""
    for (model, group), points in variance.groupby(["model", "group"], sort=True):
        at = {(row.label, row.snapshot): row for row in selection.records(points)}
        labels = points.drop_duplicates("label").sort_values("label")[["label", "K"]].to_numpy()
        pairs = [(a[0], b[0]) for a, b in itertools.permutations(labels, 2) if a[1] == b[1]]
        found = []
        for (a, b), (one, two) in itertools.product(
            pairs, itertools.combinations(selection.snapshot_order(points["snapshot"]), 2)
        ):
            if not all(key in at for key in ((a, one), (b, one), (a, two), (b, two))):
                continue
            if not at[a, one].value > at[b, one].value or not at[a, two].value < at[b, two].value:
                continue
            first, then = paired_ratio(at[a, one], at[b, one]), paired_ratio(at[a, two], at[b, two])
            if first and then and first.low > 1 > then.high:
                found.append((min(math.log(first.value), -math.log(then.value)), a, b, one, two, first, then))
        if found:
            _, a, b, one, two, first, then = max(found, key=lambda flip: flip[0])
            names = [_name(at[label, one], points) for label in (a, b)]
            where = f"{model}, {selection.group_words(str(group))}"
            yield (
                f"{where}: at @{one} the variance of {names[0]} is {_interval(first)} times that of {names[1]}; "
                f"at @{two} it is {_interval(then)} times that."
            )


def _cheapest(rows: pd.DataFrame) -> Iterator[str]:
    """Per problem and group, the lowest variance x time, where its interval lies below every other."""
    measured = selection.measured(selection.tidy(rows))
    for problem, group, points in _cells(
        measured[(measured["metric"] == "variance_seconds") & (measured["value"] >= 0)]
    ):
        ranked = list(selection.records(points.sort_values(["value", "label"])))
        if len(ranked) < 2 or ranked[0].value == 0 or not ranked[0].high < min(other.low for other in ranked[1:]):
            continue
        best, second = ranked[0], ranked[1]
        names = [_name(row, points) for row in (best, second)]
        value = second.value / best.value
        factor = math.exp(1.96 * math.hypot(best.stderr / best.value, second.stderr / second.value))
        yield (
            f"{problem}, {selection.group_words(group)}: {names[0]} makes the most of a second on this machine. {names[1]}, next, "
            f"needs {format_interval(value, value / factor, value * factor)} times as long for the same error."
        )


def _slopes(rows: pd.DataFrame) -> Iterator[str]:
    """How the SNR moves with K: the slope of its logarithm, over the values that exceed their floor."""
    found = figures.against_particles(rows, "snr_corrected")
    floors = figures.against_particles(rows, "snr").set_index(["problem", "group", "label"])["floor"]
    found = found.join(floors.rename("lowest"), on=["problem", "group", "label"])
    found = found[(found["value"] > found["lowest"].fillna(0)) & (found["low"] > 0)]
    for (problem, series), lines in found.groupby(["problem", "series"], sort=True):
        parts = []
        for group in selection.group_order(lines["group"]):
            line = lines[lines["group"] == group]
            if len(line) >= 3:
                parts.append(
                    f"K^({_slope(line)}) for the {selection.group_words(group)} (K = {line['K'].min():g} to {line['K'].max():g})"
                )
        if parts:
            yield f"{problem}: the SNR of `{series}`, its floor removed, goes as " + " and as ".join(parts) + "."


def _trained(rows: pd.DataFrame) -> Iterator[str]:
    """Per problem and test objective, the best last value over seeds, and the runner-up by paired seeds."""
    runs = selection.training(selection.tidy(rows))
    for (problem, metric), lines in runs.groupby(["problem", "metric"], sort=True):
        last = lines[lines["step"] == lines.groupby(["label", "seed"])["step"].transform("max")]
        table = last.pivot_table(index="seed", columns="label", values="value")
        means = table.mean().sort_values(ascending=False)
        if len(means) < 2 or len(table) < 2:
            continue
        gaps = (table[means.index[0]] - table[means.index[1]]).dropna()
        stderr = gaps.std() / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        half = student(max(len(gaps) - 1, 1)) * stderr
        first, second = (str(label) for label in means.index[:2])
        best = format_uncertain(float(means.iloc[0]), float(table[first].std()) / math.sqrt(len(table)))
        verdict = "ahead of" if gaps.mean() > half else "not separated from"
        yield (
            f"{problem}, trained over {len(table)} seeds: `{first}` ends with the highest "
            f"{METRICS[str(metric)].label}, {best} nats, {verdict} `{second}` "
            f"(difference {format_interval(gaps.mean(), gaps.mean() - half, gaps.mean() + half)})."
        )


def _cells(points: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for problem in selection.problem_order(points["problem"]):
        of_problem = points[points["problem"] == problem]
        for group in selection.group_order(of_problem["group"]):
            yield problem, group, of_problem[of_problem["group"] == group]


def _slope(line: pd.DataFrame) -> str:
    """The slope of log value against log K, weighted by the values' errors; its own error allows for curvature."""
    x, y = np.log(line["K"].to_numpy()), np.log(line["value"].to_numpy())
    error = np.maximum((np.log(line["high"]) - np.log(line["low"])).to_numpy() / 4, 1e-9)
    weight = 1 / error**2
    middle = (weight * x).sum() / weight.sum()
    spread = (weight * (x - middle) ** 2).sum()
    slope = (weight * (x - middle) * y).sum() / spread
    residual = y - (weight * y).sum() / weight.sum() - slope * (x - middle)
    excess = max(1.0, float((weight * residual**2).sum()) / (len(x) - 2))
    return format_uncertain(float(slope), math.sqrt(excess / spread))


def _interval(value: Value) -> str:
    return format_interval(value.value, value.low, value.high)


def _name(row: Any, points: pd.DataFrame) -> str:
    """An estimator's word; it says so if others have been checked and this one has not."""
    return f"`{row.label}`" + (" (unchecked)" if points["checked"].any() and not row.checked else "")

"""What the rows say, in sentences: computed with their intervals, and said only where these separate."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from gradiometer.bench import figures, selection
from gradiometer.bench.compare import independent, paired_ratio, value_of
from gradiometer.bench.efficiency import Work, times, work
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import SHARDS, Value, exact, student
from gradiometer.bench.tables import NONE_CHECKED, objective_words
from gradiometer.bench.uncertain import format_interval, format_uncertain

__all__ = ["findings"]

_BUDGETS = {"evaluations": "evaluations", "seconds": "seconds on this machine"}


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The main findings by topic: who is quietest, where rankings flip, who is cheapest, which K, SNR against K, the best model.

    Ratios are paired over shards of common random numbers, on the log scale, with 95 % intervals. An estimator is
    called best only if the interval of its ratio to the runner-up excludes one. What is declared biased is judged by its mean
    squared error alone, and where that is not known it is not judged.

    Args:
        rows: as the store yields them.

    Returns:
        Sentences with estimators between backticks; topics without any are left out.
    """
    tidied = selection.tidy(rows)
    measured = selection.measured(tidied)
    errors = selection.squared_errors(measured)
    errors = errors[errors["value"] >= 0]
    found = {
        "Variance at equal K": list(_quietest(errors)),
        "Rankings that flip along training": list(_flips(errors)),
        "Variance x time": list(_cheapest(measured)),
        "K at a fixed budget": list(_particles(measured)),
        "SNR against K": list(_slopes(tidied)),
        "The model after training": list(_trained(tidied)),
    }
    found = {topic: sentences for topic, sentences in found.items() if sentences}
    if found and not tidied["checked"].any():
        found["Checks"] = [NONE_CHECKED]
    return found


def _quietest(errors: pd.DataFrame) -> Iterator[str]:
    """Per problem, group and objective, at the number of particles most estimators share: the lowest squared error, by how much."""
    for problem, group, points in _cells(errors, by="ascends"):
        counts = points.groupby("K").size()
        K = counts[counts == counts.max()].index.max()
        ranked = list(selection.records(points[points["K"] == K].sort_values(["value", "label"])))
        if len(ranked) < 2:
            continue
        where = f"{problem}, {selection.group_words(group)}{_objective(ranked[0])}, K = {K:g}"
        quantity = "mean squared error" if any(row.metric == "mse" for row in ranked) else "variance"
        if noiseless := [_name(row) for row in ranked if row.value == 0]:
            yield f"{where}: without any noise: {', '.join(noiseless)}."
            continue
        ratios = [paired_ratio(row, ranked[0]) for row in ranked[1:]]
        if any(one is None for one in ratios):
            continue
        best, *others = (_name(row) for row in ranked)
        apart = [(name, one) for name, one in zip(others, ratios, strict=True) if one is not None and one.low > 1]
        tied = [(name, one) for name, one in zip(others, ratios, strict=True) if one is not None and one.low <= 1]
        largest = f"; that of {apart[-1][0]} {_interval(apart[-1][1])} times" if len(apart) > 1 else ""
        next_best = f" That of {apart[0][0]} is {_interval(apart[0][1])} times as large{largest}." if apart else ""
        if tied:
            names = ", ".join([best, *(name for name, _ in tied[:-1])]) + f" and {tied[-1][0]}"
            low = "lowest " if apart else ""
            if max(abs(one.high - 1) for _, one in tied) < 1e-3:
                yield f"{where}: {names} have the same {low}{quantity} (to 0.1 %).{next_best}"
            else:
                low = f"have the lowest {quantity} and " if apart else ""
                yield f"{where}: {names} {low}cannot be told apart (ratios up to {_interval(tied[-1][1])}).{next_best}"
        else:
            yield f"{where}: {best} has the lowest {quantity}.{next_best}"


def _flips(errors: pd.DataFrame) -> Iterator[str]:
    """Per model and group, the pair of unbiased estimators of equal K whose order changes most between two snapshots."""
    for (model, group), points in errors[errors["metric"] == "variance"].groupby(["model", "group"], sort=True):
        at = {(row.label, row.snapshot): row for row in selection.records(points)}
        labels = points.drop_duplicates("label").sort_values("label")[["label", "K", "ascends"]].to_numpy()
        pairs = [(a[0], b[0]) for a, b in itertools.permutations(labels, 2) if (a[1:] == b[1:]).all()]
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
            names = [_name(at[label, one]) for label in (a, b)]
            where = f"{model}, {selection.group_words(str(group))}"
            yield (
                f"{where}: at @{one} the variance of {names[0]} is {_interval(first)} times that of {names[1]}; "
                f"at @{two} it is {_interval(then)} times that."
            )


def _cheapest(measured: pd.DataFrame) -> Iterator[str]:
    """Per problem, group and objective, the lowest variance x time of what is unbiased, where its interval is below all others."""
    measured = measured[(measured["metric"] == "variance_seconds") & ~measured["biased"] & ~measured["rescaled"]]
    for problem, group, points in _cells(measured[measured["value"] >= 0], by="ascends"):
        ranked = list(selection.records(points.sort_values(["value", "label"])))
        if len(ranked) < 2 or ranked[0].value == 0 or not ranked[0].high < min(other.low for other in ranked[1:]):
            continue
        best, second = ranked[0], ranked[1]
        names = [_name(row) for row in (best, second)]
        times_as_long = paired_ratio(second, best) or independent(value_of(second), value_of(best))
        yield (
            f"{problem}, {selection.group_words(group)}{_objective(best)}: {names[0]} makes the most of a second on this machine. "
            f"{names[1]}, next, needs {_interval(times_as_long)} times as long for the same error."
        )


def _particles(measured: pd.DataFrame) -> Iterator[str]:
    """Per problem and group, each series' K that makes the most of a budget, by the relative error of the mean gradient."""
    seconds = measured[measured["metric"] == "seconds_per_gradient"].set_index(["problem", "label"])
    time_of = {row.Index: value_of(row) for row in selection.records(seconds)}
    gradients = measured[measured["metric"].isin(["variance", "gradient_norm"]) & ~measured["biased"]]
    for problem, group, points in _cells(gradients):
        said: dict[str, list[str]] = {}
        for series, cells in points.groupby("series", sort=True):
            norms = {row.label: row for row in selection.records(cells[cells["metric"] == "gradient_norm"])}
            rows = [r for r in selection.records(cells[cells["metric"] == "variance"]) if r.label in norms]
            if len({row.K for row in rows}) < len(rows):  # other settings than K, too
                continue
            for budget, words in _BUDGETS.items():
                costs = {
                    r.label: exact(r.evaluations) if budget == "evaluations" else time_of.get((problem, r.label))
                    for r in rows
                }
                found = [
                    work(int(row.K), value_of(row), value_of(norms[row.label]), cost)
                    for row in rows
                    if (cost := costs[row.label]) is not None
                ]
                known = sorted((one for one in found if one is not None), key=lambda one: one.value.value)
                if len(known) > 1:
                    said.setdefault(_best_particles(known, words), []).append(f"`{series}`{_doubts(rows[0])}")
        yield from (
            f"{problem}, {selection.group_words(group)}: {' and '.join(names)}: {words}"
            for words, names in said.items()
        )


def _best_particles(ranked: list[Work], words: str) -> str:
    """Which K needs the least for the same relative error, which cannot be told from it, and what the others need."""
    best, *others = ranked
    ratios = {other.K: times(other, best) for other in others}
    tied = sorted([best.K, *(K for K, one in ratios.items() if one.low <= 1)])
    apart = [f"K = {K} needs {_interval(one)} times" for K, one in sorted(ratios.items()) if one.low > 1]
    needs = f" ({', '.join(apart)} as many for the same relative error)" if apart else ""
    if len(tied) == 1:
        return f"K = {best.K} makes the most of a budget of {words}{needs}."
    listed = f"K = {', '.join(map(str, tied[:-1]))} and {tied[-1]}"
    return f"{listed} cannot be told apart in what they make of a budget of {words}{needs}."


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
                parts.append(f"K^({_slope(line)}) for the {selection.group_words(group)} (K = {_listed(line['K'])})")
        if parts:
            name = f"`{series}`{_doubts(next(selection.records(lines)))}"
            yield f"{problem}: the SNR of {name}, its floor removed, goes as " + " and as ".join(parts) + "."


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
        of = {row.label: row for row in selection.records(lines)}
        names = [_name(of[label]._replace(biased=False, rescaled=False, tails="")) for label in (first, second)]
        best = format_uncertain(float(means.iloc[0]), float(table[first].std()) / math.sqrt(len(table)))
        verdict = "ahead of" if gaps.mean() > half else "not separated from"
        yield (
            f"{problem}, trained over {len(table)} seeds: {names[0]} ends with the highest "
            f"{METRICS[str(metric)].label}, {best} nats, {verdict} {names[1]} "
            f"(difference {format_interval(gaps.mean(), gaps.mean() - half, gaps.mean() + half)})."
        )


def _cells(points: pd.DataFrame, by: str = "") -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The points of each problem and group, and of each value of a further column if one is given."""
    for problem in selection.problem_order(points["problem"]):
        of_problem = points[points["problem"] == problem]
        for group in selection.group_order(of_problem["group"]):
            of_group = of_problem[of_problem["group"] == group]
            apart = [of for _, of in of_group.groupby(by)] if by else [of_group]
            yield from ((problem, group, of) for of in sorted(apart, key=lambda of: of["K"].max()))


def _objective(row: Any) -> str:
    """The objective of a row in a list of what is told of it."""
    return f", {objective_words(row.ascends)}" if row.ascends else ""


def _listed(K: pd.Series) -> str:
    return ", ".join(f"{k:g}" for k in sorted(K))


def _slope(line: pd.DataFrame) -> str:
    """The slope of log value against log K, weighted by the values' errors; its own error allows for curvature."""
    x, y = np.log(line["K"].to_numpy()), np.log(line["value"].to_numpy())
    error = np.maximum((np.log(line["high"]) - np.log(line["low"])).to_numpy() / (2 * student(SHARDS - 1)), 1e-9)
    weight = 1 / error**2
    middle = (weight * x).sum() / weight.sum()
    spread = (weight * (x - middle) ** 2).sum()
    slope = (weight * (x - middle) * y).sum() / spread
    residual = y - (weight * y).sum() / weight.sum() - slope * (x - middle)
    excess = max(1.0, float((weight * residual**2).sum()) / (len(x) - 2))
    return format_uncertain(float(slope), math.sqrt(excess / spread))


def _interval(value: Value) -> str:
    return format_interval(value.value, value.low, value.high)


def _name(row: Any) -> str:
    """An estimator's word, and what limits what is said of it."""
    return f"`{row.label}`{_doubts(row)}"


def _doubts(row: Any) -> str:
    """That an estimator has not been checked where others have, that it is biased or rescaled, that its tails are heavy."""
    said = [word for word in ("unchecked", "biased", "rescaled") if getattr(row, word)]
    said += ["one memory"] * (row.settled > 0)
    said += ["heavy tails"] * (row.tails == "heavy")
    return f" ({', '.join(said)})" if said else ""

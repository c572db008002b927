"""The data behind figures and tables: rows in, one tidy frame out, which tests look at and others only draw or print."""

import math
from typing import Literal

import pandas as pd

from gradiometer.bench import selection, statistics
from gradiometer.bench.compare import SAME_NOISE, value_of
from gradiometer.bench.efficiency import front
from gradiometer.bench.statistics import Value

__all__ = [
    "against_particles",
    "by_snapshot",
    "cost_plane",
    "final",
    "learning_curves",
    "on_front",
    "ranks",
    "ranks_by_objective",
    "shared_groups",
    "shares",
]

_WHO = [
    "problem",
    "model",
    "label",
    "series",
    "name",
    "family",
    "K",
    "checked",
    "unchecked",
    "biased",
    "rescaled",
    "tails",
    "ascends",
    "settled",
]
_INTERVAL = ["value", "low", "high"]


def by_snapshot(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric of every estimator, group and snapshot with its 95 % interval, best first at the last snapshot.

    Args:
        rows: as the store yields them.
        metric: of a parameter group, such as "variance" or "snr".

    Returns:
        Columns model, snapshot, group, label, name, family, K, value, low, high, floor (NaN for all but the SNR).
    """
    measured = selection.gradients(selection.tidy(rows))
    found = measured[(measured["metric"] == metric) & (measured["group"] != "") & measured["value"].map(math.isfinite)]
    found = found[[*_WHO, "snapshot", "group", *_INTERVAL]]
    return found.assign(floor=_floors(measured, found) if metric == "snr" else math.nan).reset_index(drop=True)


def against_particles(rows: pd.DataFrame, metric: str = "snr") -> pd.DataFrame:
    """A metric against K, for estimators measured at three or more numbers of particles on one problem.

    Returns:
        Columns problem, model, group, label, series, name, family, K, value, low, high, floor, sorted by K.
    """
    found = by_snapshot(rows, metric)
    several = found.groupby(["problem", "group", "series"])["K"].transform("nunique") >= 3
    return found[several & (found["K"] > 0)].sort_values(["problem", "group", "series", "K"]).reset_index(drop=True)


def learning_curves(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A test objective along training, averaged over seeds, and the range of the seeds.

    Returns:
        Columns problem, label, name, family, step, seconds (mean over seeds), value, low, high, seeds (how many).
    """
    runs = selection.training(selection.tidy(rows))
    runs = runs[(runs["metric"] == metric) & runs["step"].notna()]
    found = []
    for _, at in runs.groupby([*_WHO[:6], "step"], sort=True):
        value = at["value"]
        numbers = {"value": value.mean(), "low": value.min(), "high": value.max(), "seeds": len(at)}
        found.append(at.iloc[0][[*_WHO, "step"]].to_dict() | {"seconds": at["seconds"].mean()} | numbers)
    return pd.DataFrame(found, columns=[*_WHO, "step", "seconds", *_INTERVAL, "seeds"])


def cost_plane(rows: pd.DataFrame, budget: str = "seconds") -> pd.DataFrame:
    """Squared error and cost per gradient of every estimator measured for both, and which lie on the Pareto front.

    Args:
        rows: as the store yields them.
        budget: the cost, "seconds" or "evaluations".

    Returns:
        Columns problem, group, label, name, family, K, of ("mse" for biased groups, else "variance"), cost, cost_low, cost_high,
        value, low, high, front (no other estimator of the problem and group surely dominates it), step (nor does any by the
        values alone).
    """
    return on_front(selection.measured(selection.tidy(rows)), budget)


def on_front(measured: pd.DataFrame, budget: str) -> pd.DataFrame:
    """What `cost_plane` returns, of rows that `selection.measured` returned."""
    errors = selection.squared_errors(measured).rename(columns={"metric": "of"})
    found = errors[errors["value"] > 0]
    names = {"value": "cost", "low": "cost_low", "high": "cost_high"}
    if budget == "seconds":
        time = measured[measured["metric"] == "seconds_per_gradient"].set_index(["problem", "label"])[_INTERVAL]
        found = found.join(time.rename(columns=names), on=["problem", "label"], how="inner")
    else:
        found = found.assign(**dict.fromkeys(names.values(), found["evaluations"]))
    found = found[found["cost"] > 0].reset_index(drop=True).assign(front=False, step=False)
    for _, points in found.groupby(["problem", "group", "ascends"]):
        same = _same_noise(points)
        every = {row.Index: value_of(row) for row in selection.records(points)}
        values = every if same else {k: Value(v.value, v.stderr, v.low, v.high) for k, v in every.items()}
        costs = {row.Index: Value(row.cost, math.nan, row.cost_low, row.cost_high) for row in selection.records(points)}
        found.loc[sorted(front(costs, values)) if len(points) > 1 else [], "front"] = True
        best = points.sort_values(["cost", "value"])["value"].cummin()
        found.loc[best.index, "step"] = (points.loc[best.index, "value"] == best) & (best != best.shift())
    return found[[*_WHO, "group", "of", *names.values(), *_INTERVAL, "front", "step"]]


def ranks_by_objective(rows: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """The places of each row, by label, among those that ascend the same objective: the lowest comes first."""
    found: dict[str, tuple[int, int]] = {}
    for _, of in rows.groupby("ascends"):
        found |= ranks(of, "lower")
    return found


def ranks(rows: pd.DataFrame, better: Literal["lower", "higher"]) -> dict[str, tuple[int, int]]:
    """The first and the last place of each row, by label, that the data allow, at 95 % for all pairs together.

    By paired ratios where all rows share their noise, else by whether intervals overlap. What is exactly zero comes first, or
    last, without an interval.
    """
    known = {row.label: value_of(row) for row in selection.records(rows) if math.isfinite(row.value)}
    zeros = {label for label, value in known.items() if value.value == 0}
    others = {label: value for label, value in known.items() if label not in zeros}
    shards = {len(value.jackknife) for value in others.values()}
    of = rows[rows["label"].isin(list(others))]
    same = _same_noise(of) and not (of["metric"] == "variance_seconds").any()  # no shard holds the error of the time
    positive = all(v.value > 0 and min(v.jackknife, default=0) > 0 for v in others.values())
    if len(others) > 1 and same and positive and len(shards) == 1 and min(shards) > 1:
        found = statistics.ranking(others, better)
    else:
        found = _by_intervals(others, better)
    first = better == "lower"
    for label, (low, high) in found.items():
        found[label] = (low + len(zeros) * first, high + len(zeros) * first)
    return found | dict.fromkeys(zeros, (1, len(zeros)) if first else (len(others) + 1, len(known)))


def _same_noise(rows: pd.DataFrame) -> bool:
    return all(rows[name].nunique(dropna=False) == 1 for name in SAME_NOISE)


def _by_intervals(values: dict[str, Value], better: str) -> dict[str, tuple[int, int]]:
    def before(a: Value, b: Value) -> bool:
        return a.high < b.low if better == "lower" else a.low > b.high

    return {
        label: (
            1 + sum(before(other, value) for other in values.values()),
            len(values) - sum(before(value, other) for other in values.values()),
        )
        for label, value in values.items()
    }


def final(training: pd.DataFrame) -> pd.DataFrame:
    """The last step of every run as one row per estimator: mean over seeds, its standard error and t interval."""
    last = training[training["step"] == training.groupby(["label", "seed", "metric"])["step"].transform("max")]
    found = []
    for _, runs in last.groupby(["label", "metric"], sort=False):
        n = len(runs)
        stderr = runs["value"].std() / math.sqrt(n) if n > 1 else math.nan
        half = statistics.student(n - 1) * stderr if n > 1 else math.nan
        mean = runs["value"].mean()
        found.append(runs.iloc[[0]].assign(value=mean, stderr=stderr, low=mean - half, high=mean + half, replicates=n))
    return pd.concat(found) if found else last


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """The part of a group's variance that sits in each of its tensors, in percent, paired over shards.

    Returns:
        The rows of single tensors' variance, with value, stderr, low, high and unit replaced.
    """
    key = ["problem", "label", "group"]
    parts = selection.parts(selection.tidy(rows))
    parts = parts[parts["randomness"].isin(["estimator", ""]) & (parts["tensor"] != "")].drop_duplicates(
        [*key, "tensor"]
    )
    found = []
    for _, tensors in parts.groupby(key, sort=False):
        values = [value_of(row) for row in selection.records(tensors)]
        total = sum(value.value for value in values)
        without = [sum(shard) for shard in zip(*(value.jackknife for value in values), strict=False)]
        for (_, row), value in zip(tensors.iterrows(), values, strict=True):
            if total > 0:
                ratios = [100 * v / of for v, of in zip(value.jackknife, without, strict=False)]
                share = statistics.jackknife(100 * value.value / total, ratios, positive=True)
                share = statistics.exact(100.0) if len(values) == 1 else share
                numbers = {name: getattr(share, name) for name in ("value", "stderr", "low", "high")}
                found.append(row.to_dict() | numbers | {"unit": "%"})
    return pd.DataFrame(found, columns=parts.columns)


def shared_groups(found: pd.DataFrame) -> list[str]:
    """The parameter groups that at least half of the estimators have, in order: those that a figure gives a panel."""
    counts = found.groupby("group")["label"].nunique()
    return [group for group in selection.group_order(found["group"]) if 2 * counts[group] >= counts.max()]


def _floors(measured: pd.DataFrame, found: pd.DataFrame) -> pd.Series:
    """The SNR floor of each row of `found`."""
    key = ["problem", "label", "group"]
    floors = measured[measured["metric"] == "snr_floor"].drop_duplicates(key).set_index(key)["value"]
    return found.join(floors.rename("floor"), on=key)["floor"]

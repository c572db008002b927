"""Work-normalised error: what a budget of time, or of evaluations, buys; the Pareto front; the K that makes most of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import Value, normal, ratio

if TYPE_CHECKING:
    import pandas as pd

CELL = ["problem", "estimator", "B", "device", "dtype"]


def with_products(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` and, wherever a variance and its cost were both measured, rows of their products, errors combined."""
    import pandas as pd

    variances = rows[(rows["metric"] == "variance") & whole(rows)]
    seconds = rows[rows["metric"] == "seconds_per_gradient"].set_index(CELL)
    made: list[dict[str, Any]] = []
    for record in variances.to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        by_count = {"value": row["evaluations"], "stderr": 0.0}
        made.append(_product(row, by_count, "variance_evaluations"))
        key = tuple(row[name] for name in CELL)
        if key in seconds.index:
            cost = seconds.loc[[key]].iloc[0]
            timed = {"machine": cost["machine"], "threads": cost["threads"]}  # what is kept may be of another machine
            made.append(_product(row | timed, {"value": cost["value"], "stderr": cost["stderr"]}, "variance_seconds"))
    if not made:
        return rows
    return pd.concat([rows, pd.DataFrame(made, columns=rows.columns).astype(rows.dtypes.to_dict())], ignore_index=True)


def whole(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of all of a group's coordinates at one fixed minibatch: not of a tensor, nor over minibatches."""
    return (rows["tensor"] == "") & rows["randomness"].isin(["estimator", ""]) & rows["minibatches"].isna()


def mse_or_variance(rows: pd.DataFrame, key: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The mean squared errors of groups, and the variances of those groups that have none, or have one in a unit of their own.

    Args:
        rows: of whole gradients.
        key: the columns that tell one group's gradient from another's.
    """
    of_groups = rows[(rows["group"] != "") & rows["value"].notna()]
    known, variance = (of_groups[of_groups["metric"] == metric] for metric in ("mse", "variance"))
    known = known[~known["rescaled"]]
    return known, variance[~variance.set_index(key).index.isin(known.set_index(key).index)]


def _product(row: dict[str, Any], cost: dict[str, float], name: str) -> dict[str, Any]:
    """Relative errors add in quadrature: the two are measured independently."""
    metric, price = METRICS[name], cost["value"]
    found = Value(*(row[of] * price for of in ("value", "stderr", "low", "high")))
    if found.value > 0:
        found = widened(found, cost["stderr"] / price)
    scaled = row["jackknife"] if isinstance(row["jackknife"], list) else []
    return row | {
        "kind": "cost",
        "metric": name,
        "reduction": metric.reduction,
        "unit": metric.unit,
        "version": metric.version,
        "value": found.value,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
        "jackknife": [j * price for j in scaled] or None,
    }


def front(costs: Mapping[str, Value], errors: Mapping[str, Value]) -> set[str]:
    """The Pareto front with its uncertainty: those that no other dominates.

    One dominates another if it is as cheap and as good by its values, and surely cheaper or surely better. Surely means that
    intervals separate; of two errors with shards of the same noise, that the interval of their ratio does.

    >>> one, two = Value(1.0, 0.1, 0.8, 1.2), Value(2.0, 0.1, 1.8, 2.2)
    >>> sorted(front({"a": one, "b": two}, {"a": one, "b": two}))
    ['a']
    >>> sorted(front({"a": one, "b": two}, {"a": two, "b": one}))
    ['a', 'b']
    """
    return {
        name
        for name in costs
        if not any(
            other != name and _dominates(costs[other], errors[other], costs[name], errors[name]) for other in costs
        )
    }


def _dominates(cost: Value, error: Value, other_cost: Value, other_error: Value) -> bool:
    no_worse = cost.value <= other_cost.value and error.value <= other_error.value
    return no_worse and (_below(cost, other_cost) or _below(error, other_error))


def _below(a: Value, b: Value) -> bool:
    """Whether a is surely less than b."""
    if len(a.jackknife) == len(b.jackknife) > 1 and min(*a.jackknife, *b.jackknife) > 0:
        return ratio(a, b).high < 1
    return a.high < b.low


@dataclass(frozen=True)
class Work:
    """Variance x cost / |mean|^2 of an estimator at one K, and the relative error of the cost, which no shard holds.

    The squared relative error of a mean of n gradients is variance / n / |mean|^2, and a budget buys budget / cost of them.
    It is relative, since with K the bound changes, and its gradient with it; where it does not, the norm cancels.
    """

    K: int
    value: Value
    slack: float = 0.0


def work(K: int, variance: Value, norm: Value, cost: Value) -> Work | None:
    """The work for a given relative error; None where the mean gradient is not told from zero, or shards are lacking."""
    shards = list(zip(variance.jackknife, norm.jackknife, strict=False))
    if len(variance.jackknife) != len(norm.jackknife) or not shards:
        return None
    if not (variance.value > 0 and norm.low > 0 and cost.value > 0 and min(min(pair) for pair in shards) > 0):
        return None
    value = variance.value * cost.value / norm.value**2
    return Work(K, Value(value, jackknife=tuple(v * cost.value / m**2 for v, m in shards)), cost.stderr / cost.value)


def times(one: Work, other: Work) -> Value:
    """How many times another's budget one needs for the same relative error, with the errors of both costs."""
    return widened(ratio(one.value, other.value), one.slack, other.slack)


def widened(value: Value, *slacks: float) -> Value:
    """A positive value with further, independent relative errors in quadrature."""
    if not any(slacks):
        return value
    further = [normal() * slack for slack in slacks]
    sides = value.value / value.low, value.high / value.value
    down, up = (math.hypot(math.log(side), *further) for side in sides)
    stderr = value.value * math.hypot(value.stderr / value.value, *slacks)
    return Value(value.value, stderr, value.value * math.exp(-down), value.value * math.exp(up))

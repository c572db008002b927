"""Paired ratios of a metric between estimators, from stored rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradiometer.bench.errors import RequestError
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import Value, ratio

if TYPE_CHECKING:
    import pandas as pd

SAME_NOISE = ["seed", "replicates", "B", "digest"]


@dataclass(frozen=True)
class Ratio:
    """An estimator's value over the baseline's; `paired` if both saw the same noise."""

    problem: str
    group: str
    estimator: str
    K: int
    evaluations: float
    value: Value
    paired: bool


def ratios(rows: pd.DataFrame, metric: str, baseline: str) -> list[Ratio]:
    """Every estimator's `metric` over the baseline's, per problem and group.

    Raises:
        RequestError: the metric or the baseline was not measured, or the two stand for different parameters or data.
    """
    measured = rows[(rows["metric"] == metric) & (rows["status"] == "ok") & (rows["kind"] != "training")]
    if measured.empty:
        known = ", ".join(sorted(set(rows["metric"]) - {""}))
        raise RequestError(f"{metric!r} was not measured here; these were: {known}")
    if baseline not in set(measured["estimator"]):
        raise RequestError(
            f"the baseline {baseline!r} was not measured here; these were: {', '.join(sorted(set(measured['estimator'])))}"
        )
    found = list(_ratios(measured, baseline))
    if not found:
        raise RequestError(f"no problem has both {baseline!r} and another estimator with a positive {metric}")
    return found


def _ratios(measured: pd.DataFrame, baseline: str) -> Iterator[Ratio]:
    for (problem, group), cells in measured.groupby(["problem", "group"], sort=False):
        bases = cells[cells["estimator"] == baseline]
        for _, row in cells[cells["estimator"] != baseline].iterrows():
            for _, base in bases[bases["B"] == row["B"]].iterrows():
                if row["digest"] != base["digest"]:
                    raise RequestError(
                        f"{problem} stands for different parameters or data in these results (other snapshots): rerun one"
                    )
                if row["version"] != base["version"]:
                    raise RequestError(f"{row['metric']} was redefined between these results: rerun the older one")
                if row["value"] > 0 and base["value"] > 0:
                    shards = [len(r["jackknife"]) if isinstance(r["jackknife"], list) else 0 for r in (row, base)]
                    paired = all(row[c] == base[c] for c in SAME_NOISE) and shards[0] == shards[1] > 0
                    value = ratio(_value(row), _value(base)) if paired else _independent(row, base)
                    yield Ratio(
                        str(problem), str(group), row["estimator"], int(row["K"]), row["evaluations"], value, paired
                    )


def _value(row: Any) -> Value:
    return Value(row["value"], row["stderr"], row["low"], row["high"], tuple(row["jackknife"] or ()))


def _independent(row: Any, base: Any) -> Value:
    """The ratio of two values with independent errors, its interval on the log scale."""
    value = row["value"] / base["value"]
    relative = math.hypot(row["stderr"] / row["value"], base["stderr"] / base["value"])
    factor = math.exp(1.96 * relative)
    return Value(value, value * relative, value / factor, value * factor)


def table(found: list[Ratio], metric: str, baseline: str) -> Any:
    """The ratios as a table for a terminal, a section per problem and group."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, title=f"{METRICS[metric].label}, relative to {baseline}")
    for column in ("estimator", "K", "evaluations", "ratio", "95 % interval", "noise"):
        made.add_column(column, justify="left" if column in ("estimator", "noise") else "right", no_wrap=True)
    section = ("", "")
    for row in sorted(found, key=lambda r: [f.problem for f in found].index(r.problem)):
        if (row.problem, row.group) != section:
            section = (row.problem, row.group)
            made.add_section()
            made.add_row(Text(f"{row.problem} {row.group}".strip(), style="bold italic"))
        value = row.value
        interval = f"[{value.low:.3g}, {value.high:.3g}]"
        paired = "paired" if row.paired else "independent"
        made.add_row(row.estimator, str(row.K), f"{row.evaluations:g}", f"{value.value:.3g}", Text(interval), paired)
    return made

"""Work-normalised variance: what a budget of time, or of evaluations, buys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import LEVEL

if TYPE_CHECKING:
    import pandas as pd

CELL = ["problem", "estimator", "B", "device"]


def with_products(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` and, wherever a variance and its cost were both measured, rows of their products, errors combined."""
    import pandas as pd

    variances = rows[rows["metric"] == "variance"]
    seconds = rows[rows["metric"] == "seconds_per_gradient"].set_index(CELL)
    made: list[dict[str, Any]] = []
    for record in variances.to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        by_count = {"value": row["evaluations"], "stderr": 0.0}
        made.append(_product(row, by_count, "variance_evaluations"))
        key = tuple(row[name] for name in CELL)
        if key in seconds.index:
            cost = seconds.loc[[key]].iloc[0]
            made.append(_product(row, {"value": cost["value"], "stderr": cost["stderr"]}, "variance_seconds"))
    if not made:
        return rows
    return pd.concat([rows, pd.DataFrame(made, columns=rows.columns).astype(rows.dtypes.to_dict())], ignore_index=True)


def _product(row: dict[str, Any], cost: dict[str, float], name: str) -> dict[str, Any]:
    """Relative errors add in quadrature: the two are measured independently."""
    metric, value = METRICS[name], row["value"] * cost["value"]
    relative = math.hypot(row["stderr"] / row["value"], cost["stderr"] / cost["value"]) if value > 0 else math.nan
    factor = math.exp(_normal() * relative) if math.isfinite(relative) else math.nan
    scaled = row["jackknife"] if isinstance(row["jackknife"], list) else []
    return row | {
        "kind": "cost",
        "metric": name,
        "reduction": metric.reduction,
        "unit": metric.unit,
        "version": metric.version,
        "value": value,
        "stderr": value * relative,
        "low": value / factor,
        "high": value * factor,
        "jackknife": [j * cost["value"] for j in scaled] or None,
    }


def _normal() -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + LEVEL) / 2))

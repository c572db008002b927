"""The data behind each figure: rows in, one tidy frame out, which tests look at and plots only draw."""

import math

import pandas as pd

from gradiometer.bench import selection

__all__ = ["against_particles", "by_snapshot", "cost_plane", "learning_curves", "shared_groups"]

_WHO = ["problem", "model", "label", "series", "name", "family", "K"]
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
    for _, at in runs.groupby([*_WHO[:-1], "step"], sort=True):
        value = at["value"]
        numbers = {"value": value.mean(), "low": value.min(), "high": value.max(), "seeds": len(at)}
        found.append(at.iloc[0][[*_WHO, "step"]].to_dict() | {"seconds": at["seconds"].mean()} | numbers)
    return pd.DataFrame(found, columns=[*_WHO, "step", "seconds", *_INTERVAL, "seeds"])


def cost_plane(rows: pd.DataFrame) -> pd.DataFrame:
    """Variance and time per gradient of every estimator measured for both, and which lie on the Pareto front.

    Returns:
        Columns problem, group, label, name, family, K, seconds, seconds_low, seconds_high, value, low, high, front: no
        other estimator of the problem and group is both faster and quieter (by the values, not their intervals).
    """
    measured = selection.measured(selection.tidy(rows))
    time = measured[measured["metric"] == "seconds_per_gradient"].set_index(["problem", "label"])[_INTERVAL]
    time = time.rename(columns={"value": "seconds", "low": "seconds_low", "high": "seconds_high"})
    variance = measured[(measured["metric"] == "variance") & (measured["group"] != "") & (measured["value"] > 0)]
    found = variance[[*_WHO, "group", *_INTERVAL]].join(time, on=["problem", "label"], how="inner")
    found = found[found["seconds"] > 0].reset_index(drop=True)
    found["front"] = False
    for _, points in found.groupby(["problem", "group"]):
        best = points.sort_values(["seconds", "value"])["value"].cummin()
        values = points.loc[best.index, "value"]
        found.loc[best.index, "front"] = (values == best) & (best != best.shift())
    return found


def shared_groups(found: pd.DataFrame) -> list[str]:
    """The parameter groups that at least half of the estimators have, in order: those that a figure gives a panel."""
    counts = found.groupby("group")["label"].nunique()
    return [group for group in selection.group_order(found["group"]) if 2 * counts[group] >= counts.max()]


def _floors(measured: pd.DataFrame, found: pd.DataFrame) -> pd.Series:
    """The SNR floor of each row of `found`."""
    key = ["problem", "label", "group"]
    floors = measured[measured["metric"] == "snr_floor"].drop_duplicates(key).set_index(key)["value"]
    return found.join(floors.rename("floor"), on=key)["floor"]

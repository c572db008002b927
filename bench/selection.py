"""What tables and figures take from rows: the measured cells, their display names and their order."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from gradiometer.bench.efficiency import mse_or_variance, whole
from gradiometer.bench.records import series_of

__all__ = [
    "cost",
    "gradients",
    "group_order",
    "group_words",
    "in_order",
    "marks",
    "measured",
    "parts",
    "problem_order",
    "snapshot_order",
    "squared_errors",
    "tidy",
    "training",
    "unmeasured",
]

_TEXT = (
    *(
        "suite",
        "cell",
        "kind",
        "problem",
        "model",
        "dataset",
        "snapshot",
        "digest",
        "estimator",
        "family",
        "device",
        "dtype",
    ),
    *("group", "ascends", "tensor", "metric", "randomness", "unit", "tails", "status", "reason"),
)
_NUMBERS = (
    "step",
    "seconds",
    "K",
    "B",
    "evaluations",
    "value",
    "stderr",
    "low",
    "high",
    "replicates",
    "minibatches",
    "settled",
)
_DEFAULTS: dict[str, Any] = dict.fromkeys(_TEXT, "") | dict.fromkeys(_NUMBERS, math.nan)
_DEFAULTS |= {"kind": "gradient", "status": "ok", "seed": 0, "checked": False, "biased": False, "rescaled": False}
_DEFAULTS |= {"jackknife": None, "precision_met": None}
_GROUP = ["problem", "label", "group"]
# What cells of one word may differ in, and how labels call it.
_SETTINGS = {"B": "B", "device": "device", "dtype": "dtype", "digest": "parameters", "settled": "settled"}
_SNAPSHOTS = ("init", "early", "late")
_GROUPS = ("generative", "inference")


def tidy(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with every column that reports read, and three more: how a line, a series and a colour are called.

    Args:
        rows: as the store yields them; columns that are absent get their defaults, so a bare measurement's rows do too.
            Rows that are tidy already are returned as they are.

    Returns:
        The rows without repetitions, with `label` (the estimator's word, with the settings in
        which its problem's cells differ), `series` (the word without K) and `name` (without any parameter); and `unchecked`,
        which tells those that have not passed a check from others that have.
    """
    if "label" in rows:
        return rows
    columns = {
        name: rows[name] if name in rows else pd.Series([default] * len(rows)) for name, default in _DEFAULTS.items()
    }
    found = pd.DataFrame({name: column.to_numpy() for name, column in columns.items()})
    for name in _TEXT:
        found[name] = found[name].astype(object).where(found[name].notna(), _DEFAULTS[name]).astype(str)
    for name in _NUMBERS:
        found[name] = pd.to_numeric(found[name], errors="coerce").astype(float)
    counted = found.groupby("estimator")["evaluations"].transform("first")  # an estimator's own, whatever is measured
    found["evaluations"] = found["evaluations"].fillna(counted)
    found["seed"] = pd.to_numeric(found["seed"], errors="coerce").fillna(0).astype(int)
    for name in ("checked", "biased", "rescaled"):
        found[name] = found[name].map(lambda said: said is True or str(said) == "True").astype(bool)
    found["unchecked"] = ~found["checked"] & bool(found["checked"].any())
    named, model = found["problem"].str.partition("@"), found["model"]
    found["model"] = model.where(model != "", named[0])
    found["snapshot"] = found["snapshot"].where(found["snapshot"] != "", named[2])
    found["series"] = [series_of(word) for word in found["estimator"]]
    found["name"] = found["estimator"].str.partition(":")[0]
    found["label"] = found["estimator"]
    for _, cells in found.groupby("problem", sort=False):
        found.loc[cells.index, "label"] = _labels(cells)
    key = ["kind", "problem", "label", "seed", "group", "tensor", "randomness", "minibatches", "metric", "step"]
    key += ["status", "reason"]
    # where two suites measured the same, the one with more replicates counts; no later choice hangs on the rows' order
    found = found.sort_values("replicates", ascending=False, kind="stable").drop_duplicates(key)
    return found.sort_values(["family", "name", "series", "K", *key], kind="stable").reset_index(drop=True)


def gradients(tidied: pd.DataFrame) -> pd.DataFrame:
    """The rows that measured whole gradients held still; a label says which seed where a problem's cells have several."""
    found = _ok(tidied, "gradient")
    return found[whole(found)]


def parts(tidied: pd.DataFrame) -> pd.DataFrame:
    """The rows that measured parts of a gradient's variance: that of single tensors, and that of the minibatch."""
    found = _ok(tidied[(tidied["metric"] == "variance") & ~tidied["kind"].isin(["cost", "training"])], "")
    return found[~whole(found)]


def cost(tidied: pd.DataFrame) -> pd.DataFrame:
    """The rows that measured time and memory, and their products with variance."""
    return _ok(tidied, "cost")


def squared_errors(measured: pd.DataFrame) -> pd.DataFrame:
    """What one gradient misses, squared: the mean squared error where it was measured, else the variance of unbiased groups.

    Groups that are declared biased, and whose bias was not measured, are left out: their error is not known. So are those that are
    declared rescaled, whose errors are not in the unit of the others'.
    """
    known, alone = mse_or_variance(measured, _GROUP)
    unbiased = alone[~alone["biased"] & ~alone["rescaled"]]
    return pd.concat([known, unbiased], ignore_index=True) if len(known) else unbiased


def of_unknown_error(measured: pd.DataFrame) -> pd.DataFrame:
    """The variances of biased and of rescaled groups that `squared_errors` leaves out."""
    _, alone = mse_or_variance(measured, _GROUP)
    return alone[alone["biased"] | alone["rescaled"]]


def marks(found: pd.DataFrame, by: str = "label") -> dict[str, str]:
    """The signs that each label carries, "" for none.

    † not checked, where others are, § biased, ∝ rescaled, ℓ learned beside, ¶ heavy tails.
    """
    some = bool(found["checked"].any())
    signs = {}
    for name, rows in found.groupby(by, sort=False):
        sign = "†" * (some and not rows["checked"].all()) + "§" * bool(rows["biased"].any())
        sign += "∝" * bool(rows["rescaled"].any()) + "ℓ" * bool((rows["settled"] > 0).any())
        sign += "¶" * bool((rows["tails"] == "heavy").any())
        signs[str(name)] = f" {sign}" if sign else ""
    return signs


def _ok(tidied: pd.DataFrame, kind: str) -> pd.DataFrame:
    of_kind = (tidied["kind"] == kind) if kind else True
    return _by_seed(tidied[of_kind & (tidied["status"] == "ok") & (tidied["metric"] != "")])


def _by_seed(found: pd.DataFrame) -> pd.DataFrame:
    """Rows with `configuration`, the label so far, and the seed in the label of those measured with several."""
    several = found.groupby(["problem", "label", "group", "metric"])["seed"].transform("nunique") > 1
    seeded = [f"{label} [seed {seed}]" for label, seed in zip(found["label"], found["seed"], strict=True)]
    return found.assign(
        configuration=found["label"], label=pd.Series(seeded, found.index).where(several, found["label"])
    )


def measured(tidied: pd.DataFrame) -> pd.DataFrame:
    """Gradient rows, and the cost rows of their configurations under the same labels."""
    held_still, costs = gradients(tidied), cost(tidied)
    names = held_still[["problem", "configuration", "label"]].drop_duplicates().rename(columns={"label": "name_of"})
    costs = costs.merge(names, on=["problem", "configuration"], how="left")
    own = costs["label"] != costs["configuration"]  # measured with several seeds itself
    costs = costs[~own | costs["name_of"].isna() | (costs["name_of"] == costs["label"])]
    costs["label"] = costs["name_of"].where(costs["name_of"].notna() & ~own, costs["label"])
    return pd.concat([held_still, costs.drop(columns="name_of")], ignore_index=True)


def training(tidied: pd.DataFrame) -> pd.DataFrame:
    """The rows of training runs, one per seed and step."""
    return tidied[(tidied["kind"] == "training") & (tidied["status"] == "ok") & (tidied["metric"] != "")]


def unmeasured(tidied: pd.DataFrame) -> pd.DataFrame:
    """One row per cell that was skipped or failed: `problem`, `label`, `status`, `reason`."""
    found = tidied[tidied["status"].isin(["skipped", "failed"])]
    columns = ["problem", "label", "status", "reason"]
    return found.drop_duplicates(columns).sort_values(["status", "problem", "label"])[columns].reset_index(drop=True)


def records(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a frame one by one, their columns as attributes."""
    return iter(frame.itertuples())


def group_order(groups: Iterable[str]) -> list[str]:
    """Parameter groups as they are shown: generative, inference, then the others by name."""
    return sorted(set(groups) - {""}, key=lambda group: (_rank(group, _GROUPS), group))


def group_words(group: str) -> str:
    """A parameter group in a title: ``generative parameters``, ``kernel parameters``."""
    return f"{group.removesuffix('s')} parameters" if group else ""


def snapshot_order(snapshots: Iterable[str]) -> list[str]:
    """Snapshots along training: init, early, late, then the others by name."""
    return sorted(set(snapshots), key=lambda snapshot: (_rank(snapshot, _SNAPSHOTS), snapshot))


def problem_order(problems: Iterable[str]) -> list[str]:
    """Problems by model, and a model's snapshots along training."""
    return sorted(set(problems), key=lambda p: (p.partition("@")[0], _rank(p.partition("@")[2], _SNAPSHOTS), p))


def in_order(tidied: pd.DataFrame) -> pd.DataFrame:
    """Rows by family, estimator and K, as tables list them."""
    return tidied.sort_values(["family", "name", "series", "K", "label"], kind="stable")


def _rank(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)


def _labels(cells: pd.DataFrame) -> list[str]:
    """The words of one problem's cells, each with the settings that two cells of the same word and kind differ in."""
    labels = cells["estimator"].tolist()
    ok = cells[cells["status"] == "ok"]
    for setting, shown in _SETTINGS.items():
        if ok.empty or ok.groupby(["estimator", "kind"])[setting].nunique().max() < 2:
            continue
        # A number that is none, or zero, is no setting of a cell: costs have no memory, nor have most estimators.
        values = [f"{v:g}" * (v > 0) if isinstance(v, float) else str(v)[:8] for v in cells[setting]]
        labels = [f"{label} [{shown} {of}]" if of else label for label, of in zip(labels, values, strict=True)]
    return labels

"""Paired ratios of a metric between estimators, from stored rows, and what each says in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradiometer.bench import statistics
from gradiometer.bench.efficiency import mse_or_variance, whole, widened
from gradiometer.bench.errors import RequestError
from gradiometer.bench.metrics import COST, METRICS
from gradiometer.bench.statistics import Value

if TYPE_CHECKING:
    import pandas as pd

SAME_NOISE = ("seed", "replicates", "B", "digest")
MACHINE = {"device": "device", "machine": "machine", "dtype": "precision", "threads": "number of threads"}
TIMED = frozenset(COST) - {"evaluations", "variance_evaluations"}  # what depends on the machine
NOISY = ("variance", "variance_seconds", "variance_evaluations", "snr", "snr_corrected", "directional_snr")
# What a factor of the gradient changes.
SCALED = ("variance", "variance_seconds", "variance_evaluations", "gradient_norm", "mse")
NEEDS = {  # what a ratio of variances, with or without costs, is a ratio of
    "variance": "the replicates of {} for the same error",
    "variance_evaluations": "the evaluations of {} for the same error",
    "variance_seconds": "the time of {} on this machine for the same error",
}


@dataclass(frozen=True)
class Ratio:
    """An estimator's value over the baseline's; `paired` if both saw the same noise, `remarks` on what limits it.

    `same_scale` unless one of the two is declared rescaled, or they ascend different objectives, so that a ratio of variances
    says nothing of replicates.
    `folder` and `against_folder` are named where the results are of several folders.
    """

    problem: str
    group: str
    metric: str
    estimator: str
    against: str
    K: int
    B: int
    seed: int
    evaluations: float
    value: Value
    paired: bool
    same_scale: bool = True
    remarks: tuple[str, ...] = ()
    folder: str = ""
    against_folder: str = ""

    @property
    def verdict(self) -> str:
        """What the ratio says, to be read after the estimator's word: ``needs 0.21x [0.19, 0.23] the replicates of ...``."""
        value, against = self.value, _named(self.against, self.against_folder)
        label = METRICS[self.metric].label
        digits = 4 if abs(value.value - 1) < 0.05 else 3  # not 1x for what is told from 1
        one, low, high = (f"{of:.{digits}g}" for of in (value.value, value.low, value.high))
        shown = f"{one}x" + (f" [{low}, {high}]" if value.low < value.high else "")
        if not (math.isfinite(value.low) and math.isfinite(value.high)):
            said = f"has {value.value:.3g}x the {label} of {against}, without an interval: no verdict"
        elif max(abs(value.low - 1), abs(value.high - 1)) < 1e-3:
            said = f"has the same {label} as {against}{'' if value.low == value.high else ' (to 0.1 %)'}"
        elif value.low <= 1 <= value.high:
            said = f"cannot be told from {against}: {shown}"
        elif self.metric in NEEDS and self.same_scale:
            said = f"needs {shown} {NEEDS[self.metric].format(against)}"
        else:
            said = f"has {shown} the {label} of {against}"
        noise = [] if self.paired or self.metric in TIMED - {"variance_seconds"} else ["independent noise"]
        return "; ".join([said, *noise, *self.remarks])


def ratios(rows: pd.DataFrame, metric: str, baseline: str) -> list[Ratio]:
    """Every estimator's `metric` over the baseline's, per problem and group.

    Rows may be of several folders, told apart by a column `folder`. The baseline is that of the first folder that has it on a
    problem. An estimator measured in several folders has a line for each, and the later ones a line against the first, too:
    before and after.

    Raises:
        RequestError: the metric or the baseline was not measured, or the two may not be compared: other parameters or data,
            another definition of the metric, other code under one word, another minibatch size, costs of another machine.
    """
    if "folder" not in rows:
        rows = rows.assign(folder="")
    along = set(rows.loc[rows["kind"] == "training", "metric"])
    rows = rows[(rows["status"] == "ok") & (rows["kind"] != "training") & whole(rows)]
    measured = _squared_errors(rows) if metric == "mse" else rows[rows["metric"] == metric]
    if measured.empty:
        known = ", ".join(sorted(set(rows["metric"]) - {""})) or (
            "none but of training" if along else "none: every cell was skipped or failed"
        )
        how = "measured along training alone, which is not compared" if metric in along else "not measured here"
        raise RequestError(f"{metric!r} was {how}; these were: {known}")
    if baseline not in set(measured["estimator"]):
        raise RequestError(
            f"the baseline {baseline!r} was not measured here; these were: {', '.join(sorted(set(measured['estimator'])))}"
        )
    _refuse_other_code(measured)
    found = list(_ratios(measured, rows, baseline))
    if not found:
        raise RequestError(
            f"no problem has both {baseline!r} and another estimator with a positive {metric}, of which a ratio could be taken"
        )
    return found


def _squared_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean squared errors, which are variances where nothing is biased; none where no bias was measured."""
    import pandas as pd

    known, alone = mse_or_variance(rows, ["folder", "cell", "problem", "estimator", "group"])
    unbiased = alone[~alone["biased"] & ~alone["rescaled"]].assign(metric="mse", version=METRICS["mse"].version)
    return pd.concat([known, unbiased], ignore_index=True) if len(known) else known


def paired_ratio(a: Any, b: Any) -> Value | None:
    """The ratio of two rows' values over shards of the same replicates; None where these do not belong together.

    Across K the draws differ, and the shards are merely independent, for which the jackknife of the ratio is right, too.
    """
    one, other = value_of(a), value_of(b)
    if len(one.jackknife) != len(other.jackknife) or len(one.jackknife) < 2:
        return None
    if any(str(getattr(a, name)) != str(getattr(b, name)) for name in SAME_NOISE):
        return None
    if not all(math.isfinite(v) and v > 0 for v in (*one.jackknife, *other.jackknife)):
        return None
    found = statistics.ratio(one, other)
    return widened(found, _slack(a), _slack(b)) if a.metric == "variance_seconds" else found


def _slack(row: Any) -> float:
    """The part of a product's relative error that is the cost's: its shards hold that of the variance alone."""
    value = value_of(row)
    of_shards = statistics.jackknife(value.value, value.jackknife, positive=True).stderr
    return math.sqrt(max(0.0, value.stderr**2 - of_shards**2)) / value.value


def value_of(row: Any) -> Value:
    """A row's value with its error and shards."""
    shards = row.jackknife if isinstance(row.jackknife, Sequence) and not isinstance(row.jackknife, str) else ()
    return Value(float(row.value), float(row.stderr), float(row.low), float(row.high), tuple(map(float, shards)))


def _ratios(measured: pd.DataFrame, rows: pd.DataFrame, baseline: str) -> Iterator[Ratio]:
    folders = list(dict.fromkeys(measured["folder"]))
    some = bool(measured["checked"].any())
    for _, cells in measured.groupby(["problem", "group"], sort=False):
        every: list[Any] = list(cells.itertuples())
        bases = [row for row in every if row.estimator == baseline]
        bases = [row for row in bases if row.folder == bases[0].folder]
        for row in every:
            earlier = [r for r in every if r.estimator == row.estimator and r.folder == _first(every, row.estimator)]
            pairs = [bases] + ([earlier] if row.folder != earlier[0].folder and row.estimator != baseline else [])
            for candidates in filter(None, pairs):
                base = _partner(row, candidates)
                elsewhere = base.B != row.B and any(r.estimator == row.estimator and r.B == base.B for r in every)
                if base.Index == row.Index or elsewhere:
                    continue
                _refuse(row, base)
                if row.value > 0 and base.value > 0:
                    yield _ratio(row, base, _remarks(row, base, rows, some), named=len(folders) > 1)


def _first(rows: Sequence[Any], estimator: str) -> str:
    return next(str(row.folder) for row in rows if row.estimator == estimator)


def _partner(row: Any, bases: Sequence[Any]) -> Any:
    """Of several rows of the baseline the one most alike, the size of the minibatch first."""

    def alike(base: Any) -> tuple[bool, ...]:
        return tuple(str(getattr(row, n)) == str(getattr(base, n)) for n in ("B", "digest", *MACHINE, *SAME_NOISE[:2]))

    return max(bases, key=alike)  # the first of equals


def _refuse(row: Any, base: Any) -> None:
    """Say which of the two may not be compared, and why."""
    who = f"{_named(row.estimator, row.folder)} and {_named(base.estimator, base.folder)}"
    if row.B != base.B:
        raise RequestError(
            f"{who} were measured on {row.problem} with minibatches of {row.B:g} and {base.B:g}, whose gradients are not as "
            "noisy: rerun one with the other's"
        )
    if row.digest != base.digest:
        raise RequestError(
            f"{row.problem} stands for different parameters or data in these results (other snapshots): rerun one"
        )
    if row.version != base.version:
        raise RequestError(f"{row.metric} was redefined between these results: rerun the older one")
    if row.metric in TIMED:
        for name, called in MACHINE.items():
            one, other = str(getattr(row, name)), str(getattr(base, name))
            if one != other:
                raise RequestError(
                    f"{who} have a {METRICS[row.metric].label} of another {called} ({one or 'unknown'} and "
                    f"{other or 'unknown'}): a cost belongs to its machine; rerun one beside the other"
                )


def _refuse_other_code(measured: pd.DataFrame) -> None:
    """One word must not stand for two estimators."""
    known = measured[measured["code"] != ""]
    for word, of in known.groupby("estimator", sort=False):
        if of["code"].nunique() > 1:
            first = of.drop_duplicates("code")
            places = " and ".join(
                f"{code}{f' in {at}' if at else ''}" for code, at in first[["code", "folder"]].to_numpy()
            )
            raise RequestError(
                f"{word} is not the same code in these results ({places}): rerun one, or give the changed one another name"
            )


def _ratio(row: Any, base: Any, remarks: tuple[str, ...], *, named: bool) -> Ratio:
    found = paired_ratio(row, base)
    return Ratio(
        problem=str(row.problem),
        group=str(row.group),
        metric=str(row.metric),
        estimator=str(row.estimator),
        against=str(base.estimator),
        K=int(row.K),
        B=int(row.B),
        seed=int(row.seed),
        evaluations=float(row.evaluations),
        value=independent(value_of(row), value_of(base)) if found is None else found,
        paired=found is not None and row.K == base.K,
        same_scale=not (_own_scale(row, base) or _another_objective(row, base)),
        remarks=remarks,
        folder=str(row.folder) if named else "",
        against_folder=str(base.folder) if named else "",
    )


def independent(row: Value, base: Value) -> Value:
    """The ratio of two values with independent errors: on the log scale, the ends of their own intervals in quadrature."""
    value = row.value / base.value
    relative = math.hypot(row.stderr / row.value, base.stderr / base.value)
    if not (row.low > 0 and base.low > 0):
        return Value(value, value * relative)
    down = math.hypot(math.log(row.value / row.low), math.log(base.high / base.value))
    up = math.hypot(math.log(row.high / row.value), math.log(base.value / base.low))
    return Value(value, value * relative, value * math.exp(-down), value * math.exp(up))


def _remarks(row: Any, base: Any, rows: pd.DataFrame, some_checked: bool) -> tuple[str, ...]:
    """What limits a ratio: heavy tails, a bias, code that nobody has checked."""
    both = [row] if row.estimator == base.estimator and row.biased == base.biased else [row, base]
    said = []
    if heavy := [r for r in both if r.tails == "heavy"]:
        said.append(f"heavy tails of {_names(heavy)}: the interval is not to be trusted")
    if row.metric in NOISY:
        biased = [f"{r.estimator} is biased ({_bias(r, rows)})" for r in both if r.biased]
        if biased:
            said.append(f"{', and '.join(biased)}: replicates buy precision about a wrong value")
    if row.metric in SCALED and _another_objective(row, base):
        said.append(
            f"{row.estimator} ascends {row.ascends} and {base.estimator} {base.ascends}: compare ratios of signal to noise instead"
        )
    if row.metric in SCALED and (own := _own_scale(row, base)):
        said.append(f"{_names(own)} has a scale of its own: compare ratios of signal to noise instead")
    if row.metric in NOISY and (learned := [r for r in (row, base) if r.settled > 0]):
        steps = " and ".join(dict.fromkeys(f"{r.settled:g}" for r in learned))
        said.append(f"of one memory of {_names(learned)}, after {steps} steps: the interval holds no other")
    if some_checked and (unchecked := [r for r in both if not r.checked]):
        said.append(
            f"{_names(unchecked)} has not passed a check" if len(unchecked) == 1 else "neither has passed a check"
        )
    return tuple(said)


def _own_scale(*rows: Any) -> list[Any]:
    """Those whose gradient is declared to have a positive factor of its own."""
    return [row for row in rows if row.rescaled]


def _another_objective(row: Any, base: Any) -> bool:
    """Whether the two are noisy about different gradients."""
    return bool(row.ascends and base.ascends and row.ascends != base.ascends)


def _bias(row: Any, rows: pd.DataFrame) -> str:
    """The bias of a row's group as a part of the mean gradient, or that it is not known."""
    of = rows[(rows["metric"] == "relative_bias") & (rows["cell"] == row.cell) & (rows["folder"] == row.folder)]
    of = of[(of["problem"] == row.problem) & (of["group"] == row.group) & (of["estimator"] == row.estimator)]
    if of.empty or not math.isfinite(of["value"].iloc[0]):
        return "by how much was not measured"
    value, low, high = of[["value", "low", "high"]].iloc[0]
    interval = f" [{low:.2g}, {high:.2g}]" if math.isfinite(low) and math.isfinite(high) else ", without an interval,"
    return f"by {value:.2g}{interval} of the mean gradient"


def _names(rows: Sequence[Any]) -> str:
    return " and ".join(dict.fromkeys(str(row.estimator) for row in rows))


def _named(word: str, folder: str) -> str:
    return f"{word} in {folder}" if folder else word

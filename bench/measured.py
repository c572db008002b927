"""What a measurement leaves: moments, projections and values by shard, and from them typed values with error bars."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradiometer.bench import bias, formulas, metrics, statistics, tails
from gradiometer.bench.formulas import Sums
from gradiometer.bench.metrics import Metric
from gradiometer.bench.moments import Array, Moments
from gradiometer.bench.problems import Problem
from gradiometer.bench.records import code_of, passed
from gradiometer.bench.statistics import Value, exact, jackknife, root
from gradiometer.bench.tails import Tails
from gradiometer.estimators.base import Estimator


@dataclass(frozen=True)
class Compared:
    """The difference of a gradient to that of a reference on the same noise, and the reference's own, by parameter."""

    reference: Estimator
    difference: Mapping[str, Moments]
    trusted: Mapping[str, Moments]


@dataclass(frozen=True)
class Measurement:
    """What a measurement leaves: moments per parameter, projections and values per replicate, by shard.

    Attributes:
        moments: of each parameter's gradient.
        groups: the parameters of each group.
        projections: per group and shard of the second half, ``g.u`` and ``|g|^2`` of each replicate.
        samples: per quantity and shard, its value in each replicate.
        evaluations: of the joint, per data point and gradient, with those that control variates learn by.
        active_units: how many, or None where the problem holds no data for them.
        engine, chunk: how it was computed.
        note: what went otherwise than planned.
        precision_met: whether the variances are as precise as asked, if that was asked.
        directed: the direction of the projections is a reference's.
        turns: per group and shard of the first half, the first-order change of `directional_snr` without it in the direction.
        compared: by group, what its bias is told by, where there is something.
        settled: steps that its memory was given, if it has one.
    """

    problem: Problem
    estimator: Estimator
    replicates: int
    seed: int
    moments: Mapping[str, Moments]
    groups: Mapping[str, tuple[str, ...]]
    projections: Mapping[str, list[tuple[Array, Array]]]
    samples: Mapping[str, list[Array]]
    evaluations: float
    active_units: int | None
    engine: str
    chunk: int
    note: str = ""
    precision_met: bool | None = None
    directed: bool = False
    turns: Mapping[str, Array] = field(default_factory=dict)
    settled: int = 0
    compared: Mapping[str, Compared] = field(default_factory=dict)

    @functools.cached_property
    def mean(self) -> dict[str, Array]:
        """Mean gradient of the batch-mean objective (ascent), by parameter, float64."""
        return {name: m.pooled.mean for name, m in self.moments.items()}

    @functools.cached_property
    def variance(self) -> dict[str, Array]:
        """Variance of one gradient, by parameter and coordinate, float64."""
        return {name: m.pooled.variance for name, m in self.moments.items()}

    def metrics(self, name: str) -> dict[str, Value]:
        """The typed metrics of a parameter group; of a single parameter, by its name, those of its moments.

        Raises:
            KeyError: the estimator has neither on this problem.
        """
        if name not in self.groups and name not in self.moments:
            raise KeyError(f"no group and no parameter {name!r}; groups are {', '.join(self.groups)}")
        return self._of_group(name) if name in self.groups else self._of([name])

    def _of_group(self, group: str) -> dict[str, Value]:
        found, parts = self._of(self.groups[group]), self.projections[group]
        along, squared = _stacked(parts)
        without = [_stacked(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
        found["directional_snr"] = self._directional(group)
        found["cosine"] = estimate(metrics.PROJECTION["cosine"], (along, squared), without)
        shape = Value(math.nan) if self.directed else tails.pareto_k(tails.distances(along, squared))
        return found | {"pareto_k": shape}

    def _directional(self, group: str) -> Value:
        """The directional signal-to-noise ratio, with the error of the mean as well where the direction is its own."""
        metric, parts = metrics.PROJECTION["directional_snr"], self.projections[group]
        whole, without = _stacked(parts), [_stacked(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
        if self.directed:
            return estimate(metric, whole, without)
        mean, *means = _summed([self.moments[name] for name in self.groups[group]])
        turns = self.turns[group].tolist()  # the first half of the shards is not projected, and gives the direction
        without, turns = [whole] * len(turns) + without, turns + [0.0] * len(parts)
        parts_of = [(*part, m, turn) for part, m, turn in zip(without, means, turns, strict=True)]
        found = estimate(metric, (*whole, mean), parts_of)
        return found if formulas.has_direction(whole[0], mean) else Value(found.value, jackknife=found.jackknife)

    def tails(self, group: str) -> Tails:
        """Whether the group's gradient has tails too heavy for the intervals of what is made of its variance.

        Not told where the direction is another estimator's: distances to the mean are made from projections on it.
        """
        return "" if self.directed else tails.verdict(tails.distances(*_stacked(self.projections[group])))

    def _of(self, parameters: Sequence[str]) -> dict[str, Value]:
        members = [self.moments[name] for name in parameters]
        known = [name for name in metrics.GRADIENT if self.engine != "ghost" or name not in metrics.OF_COORDINATES]
        return {name: of_moments(name, members) for name in known} | self._bias_of(parameters)

    def _bias_of(self, parameters: Sequence[str]) -> dict[str, Value]:
        """Bias and error of a group's parameters, or of some of them, where there is a reference."""
        group = next(group for group, members in self.groups.items() if set(parameters) <= set(members))
        if group not in self.compared:
            return {}
        of = self.compared[group]
        made = [_summed([m[name] for name in parameters]) for m in (self.moments, of.difference, of.trusted)]
        whole, *without = (bias.arguments(*sums) for sums in zip(*made, strict=True))
        found = {
            name: estimate(metric, whole[name], [part[name] for part in without])
            for name, metric in metrics.BIAS.items()
        }
        norm = estimate(metrics.GRADIENT["gradient_norm"], (made[2][0],), [(part,) for part in made[2][1:]])
        if not norm.low > norm.value / 2:  # a ratio to what is not known has no interval
            found["relative_bias"] = Value(found["relative_bias"].value, jackknife=found["relative_bias"].jackknife)
        return found

    def values(self) -> dict[str, Value]:
        """Objective, bounds and weight statistics, averaged over replicates and the minibatch; evaluations; active units."""
        found = {name: _mean(parts) for name, parts in self.samples.items()}
        found["evaluations"] = exact(self.evaluations)
        if self.active_units is not None:
            found["active_units"] = exact(self.active_units)
        return found

    def rows(self, tensors: bool = False) -> list[dict[str, Any]]:
        """Tidy rows, one per group and metric, as the store keeps them; with `tensors` one per parameter and metric, too."""
        about = columns_of(self) | {"precision_met": self.precision_met}
        found = [about | row_of(name, value) for name, value in self.values().items()]
        for group, members in self.groups.items():
            of_group = about | columns_of_group(self.estimator, group)
            rows = [of_group | self._row(group, name, value) for name, value in self._of_group(group).items()]
            heavy = {"tails": self.tails(group)}
            found += [row | heavy if row["metric"] in metrics.OF_VARIANCE else row for row in rows]
            for tensor in members if tensors else ():
                of_tensor = of_group | {"tensor": tensor, "space": "tensor"}
                found += [of_tensor | self._row(group, name, value) for name, value in self._of([tensor]).items()]
        return found

    def _row(self, group: str, name: str, value: Value) -> dict[str, Any]:
        row = row_of(name, value)
        return row | {"reference": str(self.compared[group].reference)} if name in metrics.BIAS else row


def columns_of(made: Any) -> dict[str, Any]:
    """The columns that all rows of a measurement share, or of a decomposition."""
    return {
        "kind": "gradient",
        "problem": made.problem.name,
        **made.problem.about,
        "estimator": str(made.estimator),
        "code": code_of(made.estimator),
        "checked": passed(str(made.estimator), code_of(made.estimator)),
        "family": made.estimator.facts.family,
        "K": made.estimator.K,
        "B": len(made.problem.x),
        "evaluations": made.evaluations,
        "seed": made.seed,
        "settled": made.settled,
        "engine": made.engine,
        "chunk": made.chunk,
        "randomness": "estimator",
        "scale": "batch mean",
        "replicates": made.replicates,
        "reason": made.note,
    }


def columns_of_group(estimator: Estimator, group: str) -> dict[str, Any]:
    """The columns that all rows of a group share."""
    facts = estimator.facts
    claims = {"biased": group in facts.biased, "rescaled": group in facts.rescaled}
    return {"group": group, "space": "group", "ascends": estimator.ascends(group)} | claims


def row_of(name: str, value: Value) -> dict[str, Any]:
    """The columns of a row that a metric and its value fill."""
    metric = metrics.METRICS[name]
    return {
        "metric": name,
        "reduction": metric.reduction,
        "unit": metric.unit,
        "version": metric.version,
        "value": value.value,
        "stderr": value.stderr,
        "low": value.low,
        "high": value.high,
        "jackknife": list(value.jackknife) or None,
        "status": "ok",
    }


def of_moments(name: str, members: Sequence[Moments]) -> Value:
    """A metric of the parameters of a group."""
    whole, *without = _summed(members)
    metric = metrics.GRADIENT[name]
    if name == "snr_floor":
        return exact(formulas.snr_floor(whole))
    return estimate(metric, (whole,), [(part,) for part in without])


def estimate(metric: Metric, whole: tuple[Any, ...], without: Sequence[tuple[Any, ...]]) -> Value:
    """A metric of what it is a function of, over all shards, with its error from those without each shard."""
    if metric.square is not None:
        found = metric.square(*whole)
        of = statistics.square(found.value, [metric.square(*part).value for part in without], found.noise)
        return root(of) if metric.scale == "root" else of
    assert metric.of is not None
    parts, biased = [metric.of(*part) for part in without], metric.scale == "biased log"
    return jackknife(metric.of(*whole), parts, positive=metric.positive, biased=biased)


def _summed(members: Sequence[Moments]) -> list[Sums]:
    """Sums over the coordinates of all members; over all shards, and without each."""
    each = [(m.sums, *m.without) for m in members]
    return [functools.reduce(operator.add, parts) for parts in zip(*each, strict=True)]


def _stacked(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _mean(parts: list[Array]) -> Value:
    totals, counts = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
    without = (totals.sum() - totals) / (counts.sum() - counts)
    return jackknife(float(totals.sum() / counts.sum()), list(without), positive=False)

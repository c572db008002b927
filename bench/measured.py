"""What a measurement leaves: moments, projections and values by shard, and from them typed values with error bars."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradiometer.bench import metrics
from gradiometer.bench.moments import Array, Moments
from gradiometer.bench.problems import Problem
from gradiometer.bench.records import code_of, passed
from gradiometer.bench.statistics import Value, exact, jackknife
from gradiometer.estimators.base import Estimator


@dataclass(frozen=True)
class Measurement:
    """What a measurement leaves: moments per parameter, projections and values per replicate, by shard.

    Attributes:
        moments: of each parameter's gradient.
        groups: the parameters of each group.
        projections: per group and shard of the second half, ``g.u`` and ``|g|^2`` of each replicate.
        samples: per quantity and shard, its value in each replicate.
        evaluations: of the joint, per data point and gradient.
        units: active units and how many there are, or None where the problem holds no data for them.
        engine, chunk: how it was computed.
        note: what went otherwise than planned.
        precision_met: whether the variances are as precise as asked, if that was asked.
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

    @functools.cached_property
    def mean(self) -> dict[str, Array]:
        """Mean gradient of the batch-mean objective (ascent), by parameter, float64."""
        return {name: m.pooled.mean for name, m in self.moments.items()}

    @functools.cached_property
    def variance(self) -> dict[str, Array]:
        """Variance of one gradient, by parameter and coordinate, float64."""
        return {name: m.pooled.variance for name, m in self.moments.items()}

    def metrics(self, group: str) -> dict[str, Value]:
        """The typed metrics of a parameter group.

        Raises:
            KeyError: the estimator has no such group on this problem.
        """
        if group not in self.groups:
            raise KeyError(f"no group {group!r}; there are {', '.join(self.groups)}")
        members = [self.moments[name] for name in self.groups[group]]
        known = [name for name in metrics.GRADIENT if self.engine != "ghost" or name not in metrics.OF_COORDINATES]
        found = {name: of_moments(name, members) for name in known}
        parts = self.projections[group]
        for name, metric in metrics.PROJECTION.items():
            assert metric.of is not None
            without = [metric.of(*_stacked(parts[:i] + parts[i + 1 :])) for i in range(len(parts))]
            found[name] = jackknife(metric.of(*_stacked(parts)), without, positive=metric.positive)
        return found

    def values(self) -> dict[str, Value]:
        """Objective, bounds and weight statistics, averaged over replicates and the minibatch; evaluations; active units."""
        found = {name: _mean(parts) for name, parts in self.samples.items()}
        found["evaluations"] = exact(self.evaluations)
        if self.active_units is not None:
            found["active_units"] = exact(self.active_units)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows, one per group and metric, as the store keeps them."""
        about = {
            "kind": "gradient",
            "problem": self.problem.name,
            **self.problem.about,
            "estimator": str(self.estimator),
            "code": code_of(self.estimator),
            "checked": passed(self.estimator),
            "family": self.estimator.facts.family,
            "K": self.estimator.K,
            "B": len(self.problem.x),
            "evaluations": self.evaluations,
            "seed": self.seed,
            "engine": self.engine,
            "chunk": self.chunk,
            "randomness": "estimator",
            "scale": "batch mean",
            "replicates": self.replicates,
            "precision_met": self.precision_met,
            "reason": self.note,
        }
        found = [about | row_of(name, value) for name, value in self.values().items()]
        for group in self.groups:
            of_group = {"group": group, "space": "group", "ascends": self.estimator.facts.objective_of(group)}
            of_group["biased"] = group in self.estimator.facts.biased
            found += [about | of_group | row_of(name, value) for name, value in self.metrics(group).items()]
        return found


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
    metric = metrics.GRADIENT[name]
    assert metric.of is not None
    total = metric.of(functools.reduce(operator.add, [m.sums for m in members]))
    parts = zip(*(m.without for m in members), strict=True)
    without = [metric.of(functools.reduce(operator.add, part)) for part in parts]
    return exact(total) if name == "snr_floor" else jackknife(total, without, positive=metric.positive)


def _stacked(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _mean(parts: list[Array]) -> Value:
    totals, counts = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
    without = (totals.sum() - totals) / (counts.sum() - counts)
    return jackknife(float(totals.sum() / counts.sum()), list(without), positive=False)

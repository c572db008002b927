"""Measuring one estimator on one problem: replicate gradients in, typed values with error bars out."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradiometer.bench import metrics
from gradiometer.bench.folding import Failure, Folding
from gradiometer.bench.gradients import Counted, trainable
from gradiometer.bench.moments import SHARED_FEW, Array, Cancelled, Moments
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.bench.products import full_precision
from gradiometer.bench.replicates import MEMORY, Plan, Subject, active_units, draws, looped, plans
from gradiometer.bench.statistics import Value, exact, jackknife
from gradiometer.bench.tape import NotRows
from gradiometer.bench.training import settled
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.noise import BLOCK

Engine = Literal["auto", "rows", "ghost", "loop"]


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
        found = {name: _of_moments(name, members) for name in known}
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


def measure(problem: Problem, estimator: Estimator, **options: Any) -> Measurement:
    """Measure the gradient `estimator` gives on `problem`; the options are those of `measure_all`.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> from gradiometer.estimators import parse
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> sorted(measure(toy, parse("iwae:K=4"), replicates=64).groups)
        ['generative', 'inference']
    """
    (found,) = measure_all(problem, [estimator], **options)
    return found


def measure_all(
    problem: Problem,
    estimators: Sequence[Estimator],
    *,
    replicates: int = 1024,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: Estimator | None = None,
    only: Sequence[str] = (),
    precision: float | None = None,
    budget: int | None = None,
    memory: int = MEMORY,
    chunk: int | None = None,
) -> list[Measurement]:
    """Measure the gradients of `estimators`, those given by weights of equally many particles in one pass over the same particles.

    The numbers do not depend on which estimators are measured together, but for rounding.

    Args:
        problem: a model held still; it is copied, not changed.
        estimators: as `gradiometer.estimators.parse` returns them.
        replicates: independent gradients, at least 4.
        seed: of the noise; the same seed gives the same noise to every estimator.
        engine: "rows" batches replicates, "ghost" too and keeps squared norms alone, "loop" takes one at a time, "auto" chooses.
        device, dtype: where and how precisely the gradients are computed; moments of all are float64.
        reference: the estimator whose mean gradient is the direction of `cosine` and `directional_snr`; each one's own if None.
        only: the metrics that are wanted; all if none is named. Without those of single coordinates "auto" takes "ghost", where
            that is faster: from 2 to 32 rows in a replicate.
        precision: go on until every interval of a variance is at most this wide on either side, relative to the variance.
        budget: the most replicates that a precision may take; 100 times `replicates` if None.
        memory: bytes to take beside the model and the data, from which the replicates in a batch follow.
        chunk: replicates in a batch; from B, K, the device and `memory` if None.

    Raises:
        ValueError: the problem lacks what an estimator needs, or there are too few replicates.
        Failure: a gradient is not finite.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> from gradiometer.estimators import parse
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> found = measure_all(toy, [parse("iwae:K=4"), parse("dreg:K=4")], replicates=64)
        >>> [str(m.estimator) for m in found]
        ['iwae:K=4', 'dreg:K=4']
    """
    for estimator in estimators:
        if (reason := reason_to_skip(problem, estimator)) is not None:
            raise ValueError(reason)
    model, x = copy.deepcopy(problem.model).to(device, dtype), problem.x.to(device, dtype)
    units = None if problem.held_out is None else active_units(model, problem.held_out)
    counted = Counted(model)
    with full_precision():
        means = _reference_means(problem, reference, replicates, seed, device, dtype)
        subjects = []
        for estimator in estimators:
            state = settled(estimator, model, x, seed)
            subjects.append(Subject(estimator, counted, x, state, trainable(model, state)))
        asked = _Asked(problem, replicates, seed, means, precision, budget or 100 * replicates, units)
        traces = engine == "ghost" or (engine == "auto" and bool(only) and not set(only) & set(metrics.OF_COORDINATES))
        found: dict[int, Measurement] = {}
        waiting = plans(subjects, engine, seed, memory, chunk)
        while waiting:
            plan = waiting.pop(0)
            if traces and plan.engine == "rows" and 1 < plan.rows_each <= SHARED_FEW:
                plan = replace(plan, engine="ghost")
            try:
                made = asked.of(plan)
            except (Cancelled, NotRows, torch.OutOfMemoryError) as error:
                traces = traces and not isinstance(error, Cancelled)
                waiting = [*_another_way(plan, error, engine), *waiting]
            else:
                found |= {id(subject): m for subject, m in zip(plan.subjects, made, strict=True)}
    return [found[id(subject)] for subject in subjects]


def _another_way(plan: Plan, error: Exception, engine: Engine) -> list[Plan]:
    """Plans in the place of one that could not be carried out.

    Raises:
        Failure: there is no other way, or none that was asked for.
    """
    if isinstance(error, torch.OutOfMemoryError):
        if plan.chunk > 1:
            return [plan.halved()]
        raise Failure("memory ran out with one replicate in a batch") from error
    if len(plan.subjects) > 1 and isinstance(error, NotRows):
        return plan.apart()
    if engine != "auto":
        raise Failure(f"{error}: measure with another --engine") from error
    return [replace(plan, engine="rows")] if isinstance(error, Cancelled) else [looped(plan.subjects[0], str(error))]


@dataclass(frozen=True)
class _Asked:
    """What every pass is asked for."""

    problem: Problem
    replicates: int
    seed: int
    means: Mapping[str, Tensor] | None
    precision: float | None
    budget: int
    units: int | None

    def of(self, plan: Plan) -> list[Measurement]:
        """Measure the estimators of a plan together."""
        parameters = [s.parameters for s in plan.subjects]
        estimators, traces = [s.estimator for s in plan.subjects], plan.engine == "ghost"
        folding = Folding(estimators, parameters, self.replicates, traces=traces, means=self.means)
        counted = plan.subjects[0].model
        before = counted.evaluations
        self._fold(plan, folding, range(self.replicates))
        found: dict[int, Measurement] = {}
        while True:
            more = self._further(folding)
            for position, subject in enumerate(plan.subjects):
                met = self._precise(folding, position)
                if position not in found and (met or not more):
                    done = folding.replicates * len(self.problem.x)
                    found[position] = Measurement(
                        self.problem,
                        subject.estimator,
                        folding.replicates,
                        self.seed,
                        folding.moments(position),
                        {group: tuple(members) for group, members in subject.parameters.items()},
                        folding.projections(position),
                        folding.samples(position),
                        (counted.evaluations - before) / done,
                        self.units,
                        plan.engine,
                        plan.chunk,
                        plan.note,
                        met if self.precision else None,
                    )
            if len(found) == len(plan.subjects):
                return [found[position] for position in range(len(found))]
            self._fold(plan, folding, folding.extend(more))

    def _fold(self, plan: Plan, folding: Folding, replicates: range) -> None:
        for at, made in draws(plan, self.seed, replicates):
            folding.add(made, at)

    def _precise(self, folding: Folding, position: int) -> bool:
        """Whether the variances of an estimator are as precise as asked, in every group."""
        if self.precision is None:
            return True
        moments = folding.moments(position)
        for members in folding.parameters[position].values():
            value = _of_moments("variance", [moments[name] for name in members])
            if value.value > 0 and not (value.high - value.low) / 2 <= self.precision * value.value:
                return False
        return True

    def _further(self, folding: Folding) -> int:
        """How many replicates more before the next look: a fixed schedule, so that no look depends on what was seen."""
        unit = folding.number * (BLOCK if self.replicates >= 2 * BLOCK * folding.number else 1)
        left = max(0, self.budget - folding.replicates) // unit
        return min(left, math.ceil(folding.replicates / 4 / unit)) * unit


def _of_moments(name: str, members: Sequence[Moments]) -> Value:
    """A metric of the parameters of a group."""
    metric = metrics.GRADIENT[name]
    assert metric.of is not None
    total = metric.of(functools.reduce(operator.add, [m.sums for m in members]))
    parts = zip(*(m.without for m in members), strict=True)
    without = [metric.of(functools.reduce(operator.add, part)) for part in parts]
    return exact(total) if name == "snr_floor" else jackknife(total, without, positive=metric.positive)


def _reference_means(
    problem: Problem, reference: Estimator | None, replicates: int, seed: int, device: str, dtype: Any
) -> dict[str, Tensor] | None:
    """A trusted estimator's mean gradient, measured on noise of its own."""
    if reference is None:
        return None
    trusted = measure(problem, reference, replicates=replicates, seed=seed + 1, device=device, dtype=dtype)
    return {name: torch.as_tensor(mean, device=device) for name, mean in trusted.mean.items()}


def _stacked(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _mean(parts: list[Array]) -> Value:
    totals, counts = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
    without = (totals.sum() - totals) / (counts.sum() - counts)
    return jackknife(float(totals.sum() / counts.sum()), list(without), positive=False)

"""Measuring one estimator on one problem: replicate gradients in, typed values with error bars out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from gradiometer.bench import metrics
from gradiometer.bench.folding import Directions, Folding, direction
from gradiometer.bench.gradients import Counted, trainable
from gradiometer.bench.moments import Array, Moments, shards
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.bench.replicates import active_units, choose, chunk_size, draws
from gradiometer.bench.statistics import Value, exact, jackknife
from gradiometer.bench.training import settled
from gradiometer.estimators.base import Estimator

Engine = Literal["auto", "rows", "loop"]


@dataclass(frozen=True)
class Measurement:
    """What a measurement leaves: moments per parameter, projections and values per replicate, by shard.

    Attributes:
        moments: of each parameter's gradient.
        groups: the parameters of each group.
        shapes: of the parameters.
        projections: per group and shard of the second half, ``g.u`` and ``|g|^2`` of each replicate.
        samples: per quantity and shard, its value in each replicate.
        evaluations: of the joint, per data point and gradient.
        units: active units and how many there are, or None where the problem holds no data for them.
        engine, chunk: how it was computed.
    """

    problem: Problem
    estimator: Estimator
    replicates: int
    seed: int
    moments: Mapping[str, Moments]
    groups: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, torch.Size]
    projections: Mapping[str, list[tuple[Array, Array]]]
    samples: Mapping[str, list[Array]]
    evaluations: float
    active_units: int | None
    engine: str
    chunk: int

    @cached_property
    def mean(self) -> dict[str, Array]:
        """Mean gradient of the batch-mean objective (ascent), by parameter, float64."""
        return {name: m.pooled().mean.reshape(self.shapes[name]) for name, m in self.moments.items()}

    @cached_property
    def variance(self) -> dict[str, Array]:
        """Variance of one gradient, by parameter and coordinate, float64."""
        return {name: m.pooled().variance.reshape(self.shapes[name]) for name, m in self.moments.items()}

    def metrics(self, group: str) -> dict[str, Value]:
        """The typed metrics of a parameter group.

        Raises:
            KeyError: the estimator has no such group on this problem.
        """
        if group not in self.groups:
            raise KeyError(f"no group {group!r}; there are {', '.join(self.groups)}")
        moments = Moments.joined([self.moments[name] for name in self.groups[group]])
        number = len(moments.count)
        leave_out = [moments.pooled(without=shard) for shard in range(number)]
        found: dict[str, Value] = {}
        for name, metric in metrics.GRADIENT.items():
            assert metric.of is not None
            value = metric.of(moments.pooled())
            if name == "snr_floor":
                found[name] = exact(value)
            else:
                found[name] = jackknife(value, [metric.of(g) for g in leave_out], positive=metric.positive)
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


def measure(
    problem: Problem,
    estimator: Estimator,
    *,
    replicates: int = 1024,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: Estimator | None = None,
    chunk: int | None = None,
) -> Measurement:
    """Measure the gradient `estimator` gives on `problem`.

    Args:
        problem: a model held still; it is copied, not changed.
        estimator: as `gradiometer.estimators.parse` returns it.
        replicates: independent gradients, at least 4.
        seed: of the noise; the same seed gives the same noise to every estimator.
        engine: "rows" batches replicates, "loop" takes one at a time, "auto" chooses by the model and by B x K.
        device, dtype: where and how precisely the gradients are computed; moments of all are float64.
        reference: the estimator whose mean gradient is the direction of `cosine` and `directional_snr`; this one's own if None.
        chunk: replicates per batch; from B and K if None.

    Raises:
        ValueError: the problem lacks what the estimator needs, or there are too few replicates.
        Failure: a gradient is not finite.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> from gradiometer.estimators import parse
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> sorted(measure(toy, parse("iwae:K=4"), replicates=64).groups)
        ['generative', 'inference']
    """
    if (reason := reason_to_skip(problem, estimator)) is not None:
        raise ValueError(reason)
    bounds = shards(replicates)
    model, x = copy.deepcopy(problem.model).to(device, dtype), problem.x.to(device, dtype)
    state = settled(estimator, model, x, seed)
    parameters = trainable(model, state)
    size = chunk or chunk_size(len(x) * estimator.K)
    counted = Counted(model)
    chosen = engine if engine != "auto" else choose(estimator, model, x, state, parameters, seed)
    folding = Folding(estimator, parameters, bounds)
    folding.directions = _reference_directions(problem, reference, parameters, replicates, seed, device, dtype)
    middle = bounds[folding.half].start
    for wanted in (range(middle), range(middle, replicates)):
        if wanted.start and folding.directions is None:
            folding.directions = folding.mean_directions()
        for of, draw in draws(chosen, estimator, counted, x, seed, state, parameters, wanted, size):
            folding.add(draw, of)
    return Measurement(
        problem,
        estimator,
        replicates,
        seed,
        {name: accumulator.moments() for name, accumulator in folding.sums.items()},
        folding.groups,
        {name: accumulator.shape for name, accumulator in folding.sums.items()},
        folding.projections(),
        folding.samples(),
        counted.evaluations / (replicates * len(x)),
        None if problem.held_out is None else active_units(model, problem.held_out),
        chosen,
        size,
    )


def _reference_directions(
    problem: Problem, reference: Estimator | None, parameters: Any, replicates: int, seed: int, device: str, dtype: Any
) -> Directions | None:
    """The directions of a trusted estimator's mean gradient, measured on noise of its own."""
    if reference is None:
        return None
    trusted = measure(problem, reference, replicates=replicates, seed=seed + 1, device=device, dtype=dtype)
    means = {name: torch.as_tensor(mean, device=device) for name, mean in trusted.mean.items()}
    return {
        group: direction({name: means.get(name, torch.zeros_like(p).double()) for name, p in members.items()})
        for group, members in parameters.items()
    }


def _stacked(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _mean(parts: list[Array]) -> Value:
    totals, counts = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
    without = (totals.sum() - totals) / (counts.sum() - counts)
    return jackknife(float(totals.sum() / counts.sum()), list(without), positive=False)

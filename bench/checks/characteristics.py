"""What is measured of an estimator that passed: its evaluations, how it is run and how fast, and how its SNR goes with K."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.differences import at
from gradiometer.bench.checks.expectations import INVERTED, asked
from gradiometer.bench.checks.identities import apart, experienced
from gradiometer.bench.checks.worlds import World, wide
from gradiometer.bench.costs import cost
from gradiometer.bench.measured import Measurement
from gradiometer.bench.measurement import measure
from gradiometer.bench.models.settings import TOYS
from gradiometer.bench.problems import Problem
from gradiometer.bench.statistics import jackknife
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.registry import configured, parse

REPLICATES = 24
SINGLE = 1e-3  # what rounding leaves of a mean, relative to its largest coordinate; it is some 1e-5
EPSILON = 1e-16  # of a square, what rounding leaves of it in double precision
COUNTS = (2, 4, 8, 16, 32)


def _world(estimator: Estimator) -> World:
    return next(world for world in reversed(wide()) if world.admits(estimator))


def engine_agrees(estimator: Estimator) -> Claim:
    """The moments of the way that the harness chooses, in odd chunks, are those of one replicate at a time."""
    problem = _world(estimator).problem
    fast, slow = (
        measure(problem, estimator, replicates=REPLICATES, dtype=torch.float64, engine=engine, chunk=chunk)  # type: ignore[arg-type]
        for engine, chunk in (("auto", 7), ("loop", None))
    )
    means, variances = ([_tensors(getattr(m, kind)) for m in (fast, slow)] for kind in ("mean", "variance"))
    squares = [
        {n: v + EPSILON * means[1][n] ** 2 for n, v in of.items()} for of in variances
    ]  # without noise, rounding
    worst = max(apart(*means)[0], apart(*squares)[0])
    said = f"mean and variance by {fast.engine}, in chunks of 7, and one by one"
    return Claim("engine", worst < 1e-9, problem.name, said, worst, 1e-9)


def single_precision(estimator: Estimator) -> Iterator[Claim]:
    """In float32, in which it will be measured, its gradients are those of float64 but for rounding."""
    world = _world(estimator)
    if any(ask.choices == INVERTED for ask in asked(estimator, world, experienced(estimator, world))):
        return  # torch draws other numbers of such a family in another precision
    single, double = (
        measure(world.problem, estimator, replicates=REPLICATES, dtype=dtype, engine="loop")
        for dtype in (torch.float32, torch.float64)
    )
    off, name = apart(_tensors(single.mean), _tensors(double.mean))
    said = (
        "means of a few gradients in float32 and in float64"
        if off < SINGLE
        else f"in float32 its mean is another, in {name!r}"
    )
    yield Claim("precision", off < SINGLE, world.name, said, off, SINGLE)


def _tensors(of: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in of.items()}


def characteristics(estimator: Estimator, level: str) -> dict[str, Any]:
    problem = _world(estimator).problem
    measured = measure(problem, estimator, replicates=64)
    found: dict[str, Any] = {"evaluations": measured.evaluations, "engine": measured.engine}
    plain = at(parse("sgvb-a" if "gaussian" in problem.name else "reinforce"), estimator.K)
    if plain is not None:
        found |= {"relative_time": _relative_time(problem, estimator, plain), "relative_to": str(plain)}
    found["snr_exponents"] = _exponents(estimator, 512 if level == "quick" else 8192)
    return found


def _relative_time(problem: Problem, estimator: Estimator, plain: Estimator) -> float:
    """Of one gradient as a training step takes it: interleaved, medians."""
    ratios = []
    for _ in range(3):
        own, other = (
            cost(problem, one, seconds=0.05, threads=1)["seconds_per_gradient"].value for one in (estimator, plain)
        )
        ratios.append(own / other)
    return statistics.median(ratios)


def _exponents(estimator: Estimator, replicates: int) -> dict[str, Any]:
    """By group, the slope of log SNR (its floor removed) against log K, with its jackknife error."""
    setting = "gaussian-toy" if "rsample" in estimator.facts.needs else "enumerable-vae"
    model, data = configured(TOYS[setting], setting, "").build()
    problem = Problem(model, data[:1], name=setting)
    if problem.lacks(estimator):
        return {}
    known = [one for K in COUNTS if (one := at(estimator, K)) is not None]
    measured = [measure(problem, one, replicates=replicates) for one in known]
    found = {}
    for group in measured[0].groups:
        slope = _slope(measured, group)
        if slope is not None:
            found[group] = slope | {"K": [one.K for one in known], "on": setting}
    return found


def _slope(measured: list[Measurement], group: str) -> dict[str, Any] | None:
    values = [m.metrics(group)["snr_corrected"] for m in measured]
    table = np.array([[v.value, *v.jackknife] for v in values])
    if len(values) < 3 or not (np.isfinite(table).all() and (table > 0).all()):
        return None
    x = np.log([m.estimator.K for m in measured])
    slope, *without = np.polyfit(x, np.log(table), 1)[0]  # of all shards, and without each
    return {"value": float(slope), "stderr": jackknife(float(slope), without, positive=False).stderr}

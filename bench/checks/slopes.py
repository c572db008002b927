"""Gradients against finite differences of exact means, where the guide's particles alone do not give the objective.

A nested estimator moves its particles by kernels that it learns, and ascends a bound of the last weights; a relaxation ascends the
mean of a function that is not the objective. That mean can be evaluated at shifted parameters on the same quadrature nodes, which
gives a finite difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.differences import Difference, statistical
from gradiometer.bench.checks.expectations import Effort, Gradients, Objective, expectation
from gradiometer.bench.checks.targets import OBJECTIVES
from gradiometer.bench.checks.worlds import World
from gradiometer.bench.gradients import trainable
from gradiometer.estimators.base import Estimator, State

STEP = 1e-4  # of finite differences


def nested(estimator: Estimator, world: World) -> bool:
    """Whether it learns moves of its own, and ascends a bound of theirs."""
    return bool(estimator.facts.named - set(world.model.groups))


def of_last_weights(
    estimator: Estimator, world: World, state: State, group: str, samples: Gradients, effort: Effort
) -> Claim:
    """The claim of a group of an estimator that moves its particles: the gradient of a bound of the last weights."""
    where, name = f"{world.name}, K = {estimator.K}", estimator.facts.objective_of(group)
    if group in estimator.facts.biased:
        said = f"there is no exact gradient of {name!r} to compare with"
        return Claim("biased as declared", None, where, said, group=group)
    own: Mapping[str, Objective] = {"nested KL": OBJECTIVES["elbo"]}
    objective = own.get(name, estimator.objective)

    smooth = not nested(estimator, world)  # on the points that its gradient was taken on

    def value() -> Tensor:
        made = expectation(estimator, world, state, effort, smooth=smooth, objective=objective, gradients=False)
        assert made.objective is not None
        return made.objective

    held, said, slope = _along(f"its {name}", value, trainable(world.model, state)[group], samples, world, effort)
    return Claim("unbiased", held, where, said, slope.off, slope.detectable, group)


def of_own_value(
    estimator: Estimator, world: World, state: State, group: str, samples: Gradients, effort: Effort
) -> Claim:
    """The claim of terms that are the derivative of one function, whose mean may be another than the objective."""

    def value() -> Tensor:
        made = expectation(estimator, world, state, effort, gradients=False)
        assert made.value is not None
        return made.value

    held, said, slope = _along(
        "the value it names", value, trainable(world.model, state)[group], samples, world, effort
    )
    return Claim("own value", held, f"{world.name}, K = {estimator.K}", said, slope.off, slope.detectable, group)


def _along(
    name: str,
    value: Callable[[], Tensor],
    members: Mapping[str, Tensor],
    samples: Gradients,
    world: World,
    effort: Effort,
) -> tuple[bool, str, Difference]:
    """Along a random direction, against finite differences of a value's mean; tensor by tensor, if they differ."""
    slope = _slope(value, members, samples, world, effort)
    if not slope.shows:
        return True, f"the gradient of {name}, by finite differences of its mean", slope
    alone = [_slope(value, {n: p}, samples, world, effort) for n, p in members.items()]
    slope = max([slope, *alone], key=lambda found: found.off / found.detectable)
    said = f"not the gradient of {name}: along {slope.tensor!r} it is off by {slope.off:.2g} of its norm"
    return False, said, slope


def _slope(
    value: Callable[[], Tensor], members: Mapping[str, Tensor], samples: Gradients, world: World, effort: Effort
) -> Difference:
    """The gradient along one direction, in which every tensor counts alike, less the slope of the mean value ``[S]``."""
    generator = torch.Generator().manual_seed(5)
    norms = {n: float(samples[n].mean(0).norm()) for n in members}
    largest = max(norms.values()) or 1.0
    along = {}
    for n, parameter in members.items():
        u = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        along[n] = u / u.norm() * largest / max(norms[n], 1e-3 * largest)
    step = STEP / max(float(u.norm()) for u in along.values())
    values = []
    for sign in (1, -1):
        for n, parameter in members.items():
            parameter.data += sign * step * along[n]
        values.append(value())
        for n, parameter in members.items():
            parameter.data -= sign * step * along[n]
    slopes = (values[0] - values[1]) / (2 * step)  # [S]
    found = sum((samples[n] * u).flatten(1).sum(1) for n, u in along.items())
    name, error = ", ".join(members), (found - slopes).unsqueeze(1)
    if len(error) == 1:
        apart = Difference(name, float(error.abs()) / largest, world.accuracy)
    else:
        apart = statistical(name, error, largest, len(members), effort)
    return replace(apart, detectable=max(apart.detectable, 1e-6))  # what finite differences leave

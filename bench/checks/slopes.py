"""Bounds of weights that the guide alone does not decide: their gradients against finite differences of their exact values.

A nested estimator moves its particles by kernels that it learns, and ascends a bound of the last weights. Whatever the moves are,
the mean of the bound can be had at shifted parameters, on the same nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def named(estimator: Estimator) -> set[str]:
    """The groups that its facts name one by one."""
    objective = estimator.facts.objective
    return set() if isinstance(objective, str) else set(objective)


def nested(estimator: Estimator, world: World) -> bool:
    """Whether it learns moves of its own, and ascends a bound of theirs."""
    return bool(named(estimator) - set(world.model.groups))


def along_directions(
    estimator: Estimator, world: World, state: State, group: str, samples: Gradients, effort: Effort
) -> Claim:
    """Along random directions, against finite differences of the value of its own objective: it holds for any chain of moves."""
    where = f"{group}, {world.name}, K = {estimator.K}"
    name = estimator.facts.objective_of(group)
    if group in estimator.facts.biased:
        return Claim("biased as declared", None, where, f"there is no exact gradient of {name!r} to compare with")
    own: Mapping[str, Objective] = {"nested KL": OBJECTIVES["elbo"]}
    objective = own.get(name, estimator.objective)
    members = trainable(world.model, state)[group]
    slope = _slope(estimator, world, state, members, samples, objective, effort)
    if slope.shows:  # find the tensor
        alone = [_slope(estimator, world, state, {n: p}, samples, objective, effort) for n, p in members.items()]
        slope = max([slope, *alone], key=lambda found: found.off / found.detectable)
        said = f"not the gradient of its {name}: along {slope.tensor!r} it is off by {slope.off:.2g} of its norm"
        return Claim("unbiased", False, where, said, slope.off, slope.detectable)
    said = f"the gradient of its {name}, by finite differences of the value"
    return Claim("unbiased", True, where, said, slope.off, slope.detectable)


def _slope(
    estimator: Estimator,
    world: World,
    state: State,
    members: Mapping[str, Tensor],
    samples: Gradients,
    objective: Objective,
    effort: Effort,
) -> Difference:
    """The gradient along a random direction, in which every tensor counts alike, against finite differences of the value."""
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
        values.append(_values(estimator, world, state, objective, effort))
        for n, parameter in members.items():
            parameter.data -= sign * step * along[n]
    slopes = (values[0] - values[1]) / (2 * step)  # [S]
    found = sum((samples[n] * u).flatten(1).sum(1) for n, u in along.items())
    apart = statistical(", ".join(members), (found - slopes).unsqueeze(1), largest, len(members), effort)
    return replace(apart, detectable=max(apart.detectable, 1e-6))  # what finite differences leave


def _values(estimator: Estimator, world: World, state: State, objective: Objective, effort: Effort) -> Tensor:
    """The mean of an objective of the last log weights, by randomisation ``[S]``."""
    found = expectation(estimator, world, state, effort, smooth=False, objective=objective).objective
    assert found is not None
    return found

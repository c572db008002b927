"""Claims about expectations, each against an exact gradient: unbiased, rescaled, biased as declared, and of what objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.diagnosis import diagnose
from gradiometer.bench.checks.expectations import Expectation, Gradients, Objective, expectation
from gradiometer.bench.checks.identities import experienced
from gradiometer.bench.checks.targets import INCLUSIVE, OBJECTIVES, inclusive, objective_of, target
from gradiometer.bench.checks.worlds import World
from gradiometer.bench.gradients import trainable
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.registry import parse

Planted = Callable[[Gradients], Gradients]  # what a fault in single layers does to a gradient
STEP = 1e-4  # of finite differences


@dataclass(frozen=True)
class Effort:
    """How much to spend.

    Args:
        alpha: the rate of false alarms of one comparison.
        randomisations, points: of scrambled Sobol rules, points as a power of two.
    """

    alpha: float = 1e-7
    randomisations: int = 32
    points: int = 10


@dataclass(frozen=True)
class Difference:
    """Found and wanted gradients of one group: where they differ most, by how much, and from where on that would be seen."""

    tensor: str
    off: float
    detectable: float

    @property
    def shows(self) -> bool:
        return not self.off <= self.detectable


def at(estimator: Estimator, K: int) -> Estimator | None:
    """The estimator with K particles, if it can have so many."""
    try:
        return replace(estimator, K=K)
    except ValueError:
        return None


def claims(estimator: Estimator, world: World, effort: Effort, planted: Planted | None = None) -> Iterator[Claim]:
    """What the estimator's expectation on a world says about its facts; with a fault `planted`, about the faulty one's."""
    where = f"{world.name}, K = {estimator.K}"
    state = experienced(estimator, world)
    try:
        found = _expectation(estimator, world, state, effort)
    except NotImplementedError as error:
        yield Claim("unbiased", None, where, f"its expectation cannot be had: {error}")
        return
    if planted is not None:
        found = replace(found, samples=planted(found.samples))
    for group, members in trainable(world.model, state).items():
        if group in state.learned and group not in _named(estimator):
            continue
        samples = {name: found.samples[name] for name in members}
        if _nested(estimator, world) and group != "inference":
            yield _directional(estimator, world, state, group, samples, effort)
        else:
            yield _of_group(estimator, world, group, samples, found.exact, effort)
    if found.objective is not None and not _nested(estimator, world):
        yield _value(estimator, world, found, effort)
    for settings, word in estimator.facts.same_mean.items():
        yield from _same_mean(estimator, settings, word, world, found, effort)


def _expectation(estimator: Estimator, world: World, state: State, effort: Effort, seed: int = 0) -> Expectation:
    return expectation(
        estimator,
        world,
        state,
        randomisations=effort.randomisations,
        points=effort.points,
        seed=seed,
        smooth=not _nested(estimator, world),
    )


def _named(estimator: Estimator) -> set[str]:
    objective = estimator.facts.objective
    return set() if isinstance(objective, str) else set(objective)


def _nested(estimator: Estimator, world: World) -> bool:
    """Whether its weights are not of the guide's particles alone: it learns moves of its own, and ascends a bound of theirs."""
    return bool(_named(estimator) - set(world.model.groups))  # type: ignore[arg-type]


def difference(samples: Gradients, wanted: Gradients, world: World, exact: bool, effort: Effort) -> Difference:
    """The largest error of a tensor's coordinates, relative to the tensor's largest, beside what could be seen."""
    largest = max(float(g.abs().max()) for g in wanted.values())
    coordinates = sum(g.numel() for g in wanted.values())
    worst = Difference("", 0.0, world.accuracy)
    for name, sample in samples.items():
        error = sample - wanted[name]  # [S, *shape]
        scale = max(float(wanted[name].abs().max()), 1e-3 * largest, 1e-12)
        if exact:
            found = Difference(name, float(error.abs().max()) / scale, world.accuracy)
        else:
            found = _statistical(
                name, error.reshape(len(error), -1), scale, max(1, sum(g.numel() for g in wanted.values())), effort
            )
        if not found.off / found.detectable <= worst.off / worst.detectable:
            worst = found
    return worst


def _statistical(name: str, error: Tensor, scale: float, coordinates: int, effort: Effort) -> Difference:
    """Of independent randomisations ``[S, P]``: the coordinate with the largest t, every one of them allowed for."""
    from scipy.special import stdtrit

    threshold = float(stdtrit(len(error) - 1, 1 - effort.alpha / coordinates / 2))
    mean, stderr = error.mean(0), error.std(0) / math.sqrt(len(error))
    limit = (threshold * stderr).clamp(min=1e-9 * scale)
    place = int((mean.abs() / limit).nan_to_num(math.inf).argmax())
    return Difference(name, float(mean[place].abs()) / scale, float(limit[place]) / scale)


def _of_group(estimator: Estimator, world: World, group: str, samples: Gradients, exact: bool, effort: Effort) -> Claim:
    where = f"{group}, {world.name}, K = {estimator.K}"
    name = estimator.facts.objective_of(group)
    wanted = wanted_of(estimator, world, group)
    if wanted is None:
        return Claim("unbiased", None, where, f"there is no exact gradient of {name!r} to compare with")
    wanted = {n: wanted[n] for n in samples}
    if group in estimator.facts.rescaled:
        return _rescaled(estimator, world, group, samples, wanted, exact, effort)
    apart = difference(samples, wanted, world, exact, effort)
    if group in estimator.facts.biased:
        said = f"declared biased for {name}, and off by {apart.off:.2g} in {apart.tensor!r}"
        return Claim("biased as declared", apart.shows, where, said, apart.off, apart.detectable)
    if not apart.shows:
        said = f"the gradient of {name}, to {max(apart.off, 1e-16):.0e} of a tensor's largest"
        return Claim("unbiased", True, where, said, apart.off, apart.detectable)
    means = {n: sample.mean(0) for n, sample in samples.items()}
    said = f"not the gradient of {name}: {diagnose(means, wanted, world, estimator.K)}; off by {apart.off:.2g} in {apart.tensor!r}"
    return Claim("unbiased", False, where, said, apart.off, apart.detectable)


def wanted_of(estimator: Estimator, world: World, group: str) -> Gradients | None:
    """The exact gradient of what a group ascends, if there is one."""
    if estimator.facts.objective_of(group) == INCLUSIVE:
        return inclusive(world)
    objective = objective_of(estimator, group)
    return None if objective is None else target(world, objective, estimator.K)[0]


def _rescaled(
    estimator: Estimator,
    world: World,
    group: str,
    samples: Gradients,
    wanted: Gradients,
    exact: bool,
    effort: Effort,
) -> Claim:
    where = f"{group}, {world.name}, K = {estimator.K}"
    product = sum(float((samples[n].mean(0) * wanted[n]).sum()) for n in samples)
    factor = product / sum(float((wanted[n] ** 2).sum()) for n in samples)
    apart = difference(samples, {n: factor * wanted[n] for n in samples}, world, exact, effort)
    name = estimator.facts.objective_of(group)
    if factor > 0 and not apart.shows:
        said = f"{factor:.3g} times the gradient of {name}, as declared"
        return Claim("direction", True, where, said, apart.off, apart.detectable)
    means = {n: sample.mean(0) for n, sample in samples.items()}
    said = f"not a positive multiple of the gradient of {name}: {diagnose(means, wanted, world, estimator.K)}"
    return Claim("direction", False, where, said, apart.off, apart.detectable)


def _value(estimator: Estimator, world: World, found: Expectation, effort: Effort) -> Claim:
    """The objective it reports is the objective it names."""
    where = f"{world.name}, K = {estimator.K}"
    name = estimator.facts.objective_of("generative")
    objective = OBJECTIVES.get(name, estimator.objective)
    wanted = target(world, objective, estimator.K)[1]
    assert found.objective is not None
    values = {name: found.objective}
    apart = difference(values, {name: torch.tensor(wanted, dtype=torch.float64)}, world, found.exact, effort)
    mean = float(found.objective.mean())
    if not apart.shows:
        return Claim("value", True, where, f"the value it reports is {name}", apart.off, apart.detectable)
    return Claim(
        "value", False, where, f"it reports {mean:.6g} where {name} is {wanted:.6g}", apart.off, apart.detectable
    )


def _same_mean(
    estimator: Estimator, settings: str, word: str, world: World, found: Expectation, effort: Effort
) -> Iterator[Claim]:
    own = all(f"{getattr(estimator, key)}" == value for key, value in (s.split("=") for s in settings.split(",") if s))
    other = at(parse(word), estimator.K)
    if not own or other is None or not world.admits(other):
        return
    theirs = _expectation(other, world, experienced(other, world), effort, seed=1)
    shared = {n: s - theirs.samples[n].mean(0) for n, s in found.samples.items() if n in theirs.samples}
    scale = {n: theirs.samples[n].mean(0) for n in shared}
    wanted = {n: torch.zeros_like(g) for n, g in scale.items()}
    exact = found.exact and theirs.exact
    worst = Difference("", 0.0, world.accuracy)
    for n, sample in shared.items():
        one = difference({n: sample + scale[n]}, {n: wanted[n] + scale[n]}, world, exact, effort)
        worst = one if one.off / one.detectable > worst.off / worst.detectable else worst
    where = f"{world.name}, K = {estimator.K}"
    if worst.shows:
        said = f"its mean is not that of {other}: off by {worst.off:.2g} in {worst.tensor!r}"
        yield Claim("same mean", False, where, said, worst.off, worst.detectable)
    else:
        yield Claim("same mean", True, where, f"its mean is that of {other}", worst.off, worst.detectable)


def _directional(
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
    apart = _statistical(", ".join(members), (found - slopes).unsqueeze(1), largest, len(members), effort)
    return replace(apart, detectable=max(apart.detectable, 1e-6))  # what finite differences leave


def _values(estimator: Estimator, world: World, state: State, objective: Objective, effort: Effort) -> Tensor:
    """The mean of an objective of the last log weights, by randomisation ``[S]``."""
    found = expectation(
        estimator,
        world,
        state,
        randomisations=effort.randomisations,
        points=effort.points,
        smooth=False,
        objective=objective,
    )
    assert found.objective is not None
    return found.objective

"""Claims about expectations, each against an exact gradient: unbiased, rescaled, biased as declared, and of what objective."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.diagnosis import diagnose
from gradiometer.bench.checks.differences import difference
from gradiometer.bench.checks.expectations import Effort, Expectation, Gradients, expectation
from gradiometer.bench.checks.identities import experienced, pair
from gradiometer.bench.checks.slopes import nested, of_last_weights, of_own_value
from gradiometer.bench.checks.targets import INCLUSIVE, OBJECTIVES, evidence, inclusive, objective_of, sampled, target
from gradiometer.bench.checks.worlds import World
from gradiometer.bench.gradients import estimated, trainable
from gradiometer.estimators.base import Estimator

LEVEL = 1000.0  # nats by which log p is shifted, as large as the log joint of an image
Planted = Callable[[Gradients], Gradients]  # what a fault in single layers does to a gradient


@dataclass(frozen=True)
class Wanted:
    """The gradient of an objective, ``[1, *shape]`` if it is exact, and by randomisation ``[S, *shape]`` if not; and its value."""

    gradients: Gradients
    value: Tensor | None = None


def claims(estimator: Estimator, world: World, effort: Effort, planted: Planted | None = None) -> Iterator[Claim]:
    """What the estimator's expectation on a world says about its facts; with a fault `planted`, about the faulty one's."""
    where, facts = f"{world.name}, K = {estimator.K}", estimator.facts
    state = experienced(estimator, world)
    try:
        found = expectation(estimator, world, state, effort, smooth=not nested(estimator, world))
    except NotImplementedError as error:
        yield Claim("unbiased", None, where, f"its expectation cannot be had: {error}")
        return
    if planted is not None:
        found = replace(found, samples=planted(found.samples))
    groups = estimated(estimator, state, trainable(world.model, state))
    wanted = {name: wanted_of(estimator, world, name, effort) for name in {facts.objective_of(g) for g in groups}}
    moved = not nested(estimator, world) and _moves(estimator, world, found, wanted, effort)
    for group, members in groups.items():
        own = replace(found, samples={name: found.samples[name] for name in members})
        if nested(estimator, world) and group != "inference":
            yield of_last_weights(estimator, world, state, group, own.samples, effort)
            if group in facts.biased and group in world.model.groups:
                yield _uphill(estimator, world, group, own.mean, evidence(world), "log p(x)")
        elif moved and facts.objective_of(group) == facts.objective_of("generative"):
            yield of_last_weights(estimator, world, state, group, own.samples, effort)
        else:
            yield from _of_group(estimator, world, group, own, wanted[facts.objective_of(group)], effort)
        if found.value is not None:
            yield of_own_value(estimator, world, state, group, own.samples, effort)
    if moved:
        said = f"{facts.objective_of('generative')} is of weights of its own, and its gradient that of the value it reports"
        yield Claim("value", True, where, said)
    elif found.objective is not None and not nested(estimator, world):
        yield from _value(estimator, world, found, wanted.get(facts.objective_of("generative")), effort)
    for settings, word in facts.same_mean.items():
        yield from _same_mean(estimator, settings, word, world, found, effort)


def _moves(
    estimator: Estimator, world: World, found: Expectation, wanted: Mapping[str, Wanted | None], effort: Effort
) -> bool:
    """Whether its objective, which has no name here, is another function than its own of the guide's particles' weights.

    It may move them first, as annealing does, or weigh groups of them. Then its objective is what it reports.
    """
    name = estimator.facts.objective_of("generative")
    plain = wanted.get(name)
    if name in OBJECTIVES or plain is None or plain.value is None or found.objective is None:
        return False
    return difference({name: found.objective}, {name: plain.value}, world, found.exact, effort).shows


def _of_group(
    estimator: Estimator, world: World, group: str, found: Expectation, wanted: Wanted | None, effort: Effort
) -> Iterator[Claim]:
    where, name = f"{world.name}, K = {estimator.K}", estimator.facts.objective_of(group)
    if wanted is None:
        yield Claim("unbiased", None, where, f"there is no exact gradient of {name!r} to compare with", group=group)
        return
    exact = {n: wanted.gradients[n] for n in found.samples}
    if group in estimator.facts.rescaled:
        yield from _rescaled(estimator, world, group, found, exact, effort)
        return
    apart = difference(found.samples, exact, world, found.exact, effort)
    if group in estimator.facts.biased:
        said = f"declared biased for {name}, and off by {apart.off:.2g} in {apart.tensor!r}"
        yield Claim("biased as declared", apart.shows, where, said, apart.off, apart.detectable, group)
        if estimator.K >= 2:  # with one particle a self-normalised one need not
            yield _uphill(estimator, world, group, found.mean, _means(exact), name)
        return
    said = f"the gradient of {name}, to {max(apart.off, 1e-16):.0e} of a tensor's largest"
    if apart.shows:
        kind = diagnose(found.mean, _means(exact), world, estimator.K)
        said = f"not the gradient of {name}: {kind}; off by {apart.off:.2g} in {apart.tensor!r}"
    yield Claim("unbiased", not apart.shows, where, said, apart.off, apart.detectable, group)


def _uphill(estimator: Estimator, world: World, group: str, mean: Gradients, exact: Gradients, name: str) -> Claim:
    """A biased gradient that is of any use points uphill."""
    one, other = (torch.cat([of[n].flatten() for n in mean]) for of in (mean, exact))
    cosine = float(one @ other / (one.norm() * other.norm()).clamp(min=1e-300))
    said = f"its cosine to the gradient of {name} is {cosine:.2g}"
    return Claim("uphill", cosine > 0, f"{world.name}, K = {estimator.K}", said, cosine, group=group)


def _means(samples: Gradients) -> Gradients:
    return {name: sample.mean(0) for name, sample in samples.items()}


def wanted_of(estimator: Estimator, world: World, name: str, effort: Effort) -> Wanted | None:
    """The gradient and the value of an objective of the estimator's, if there are any to be had."""
    if name == INCLUSIVE:
        return Wanted(_exactly(inclusive(world)))
    if (objective := objective_of(estimator, name)) is None:
        return None
    K = 1 if name == "elbo" else estimator.K  # the ELBO is the same for every K
    if world.most < K and "rsample" in world.offered:
        return Wanted(*sampled(world, objective, K, effort))
    gradients, value = target(world, objective, K)
    return Wanted(_exactly(gradients), torch.tensor([value], dtype=torch.float64))


def _exactly(gradients: Gradients) -> Gradients:
    return {name: g.unsqueeze(0) for name, g in gradients.items()}


def _rescaled(
    estimator: Estimator, world: World, group: str, found: Expectation, exact: Gradients, effort: Effort
) -> Iterator[Claim]:
    where, name = f"{world.name}, K = {estimator.K}", estimator.facts.objective_of(group)
    mean, right = found.mean, _means(exact)
    factor = sum(float((mean[n] * right[n]).sum()) for n in mean) / sum(float((right[n] ** 2).sum()) for n in mean)
    apart = difference(found.samples, {n: factor * exact[n] for n in mean}, world, found.exact, effort)
    holds = factor > 0 and not apart.shows
    said = f"{factor:.3g} times the gradient of {name}, as declared"
    if not holds:
        said = f"not a positive multiple of the gradient of {name}: {diagnose(mean, right, world, estimator.K)}"
    yield Claim("direction", holds, where, said, apart.off, apart.detectable, group)
    if holds:
        off = abs(factor - 1)
        yield Claim("rescaled as declared", off > apart.detectable, where, said, off, apart.detectable, group)


def _value(
    estimator: Estimator, world: World, found: Expectation, wanted: Wanted | None, effort: Effort
) -> Iterator[Claim]:
    """The objective it reports is the objective it names."""
    if wanted is None or wanted.value is None or found.objective is None:
        return
    name = estimator.facts.objective_of("generative")
    apart = difference({name: found.objective}, {name: wanted.value}, world, found.exact, effort)
    said = f"the value it reports is {name}"
    if apart.shows:
        said = f"it reports {float(found.objective.mean()):.6g} where {name} is {float(wanted.value.mean()):.6g}"
    where = f"{world.name}, K = {estimator.K}"
    yield Claim("value", not apart.shows, where, said, apart.off, apart.detectable)


def _same_mean(
    estimator: Estimator, settings: str, word: str, world: World, found: Expectation, effort: Effort
) -> Iterator[Claim]:
    both = pair(estimator, settings, word, world)
    if both is None or both[0] != estimator:
        return
    other = both[1]
    theirs = expectation(other, world, experienced(other, world), effort)  # on the same points
    wanted = {n: theirs.samples[n] for n in found.samples if n in theirs.samples}
    worst = difference({n: found.samples[n] for n in wanted}, wanted, world, found.exact and theirs.exact, effort)
    said = f"its mean is that of {other}"
    if worst.shows:
        said = f"its mean is not that of {other}: off by {worst.off:.2g} in {worst.tensor!r}"
    where = f"{world.name}, K = {estimator.K}"
    yield Claim("same mean", not worst.shows, where, said, worst.off, worst.detectable)


def lower(world: World) -> World:
    """The world with a joint that is less by a constant, as that of many pixels is: no mean gradient is changed by it."""
    model = copy.copy(world.model)
    model.log_joint = lambda x, z: world.model.log_joint(x, z) - LEVEL
    return replace(world, model=model)


def level(estimator: Estimator, world: World, effort: Effort) -> Claim:
    """Log weights of any size: nothing overflows, and nothing is cut off."""
    where = f"{world.name}, K = {estimator.K}"
    state = experienced(estimator, world)
    plain = expectation(estimator, world, state, effort)
    low = expectation(estimator, lower(world), state, effort)
    wanted = {n: of for n, of in plain.samples.items() if bool(of.any())}
    apart = difference({n: low.samples[n] for n in wanted}, wanted, world, plain.exact, effort)
    if not all(bool(of.isfinite().all()) for of in low.samples.values()):
        said = f"its gradient is not finite where log p is less by {LEVEL:g}: normalise log weights, not weights"
        return Claim("level", False, where, said)
    limit = max(apart.detectable, LEVEL * 1e-9)
    if limit > 1:
        said = f"with log p less by {LEVEL:g} it is too noisy to be told from another gradient"
        return Claim("level", None, where, said, detectable=limit)
    said = f"log p less by {LEVEL:g} gives the same mean gradient"
    if not apart.off <= limit:
        said = f"log p less by {LEVEL:g} changes its mean gradient by {apart.off:.2g} in {apart.tensor!r}: something is cut off"
    return Claim("level", apart.off <= limit, where, said, apart.off, limit)

"""Claims about expectations, each against an exact gradient: unbiased, rescaled, biased as declared, and of what objective."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.diagnosis import diagnose
from gradiometer.bench.checks.differences import at, difference
from gradiometer.bench.checks.expectations import Effort, Expectation, Gradients, expectation
from gradiometer.bench.checks.identities import experienced, named
from gradiometer.bench.checks.slopes import nested, of_last_weights, of_own_value
from gradiometer.bench.checks.targets import INCLUSIVE, OBJECTIVES, inclusive, objective_of, sampled, target
from gradiometer.bench.checks.worlds import World
from gradiometer.bench.gradients import trainable
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.registry import parse

LEVEL = 1000.0  # nats: the joint of a picture
Planted = Callable[[Gradients], Gradients]  # what a fault in single layers does to a gradient


def claims(estimator: Estimator, world: World, effort: Effort, planted: Planted | None = None) -> Iterator[Claim]:
    """What the estimator's expectation on a world says about its facts; with a fault `planted`, about the faulty one's."""
    where = f"{world.name}, K = {estimator.K}"
    state = experienced(estimator, world)
    try:
        found = expectation(estimator, world, state, effort, smooth=not nested(estimator, world))
    except NotImplementedError as error:
        yield Claim("unbiased", None, where, f"its expectation cannot be had: {error}")
        return
    if planted is not None:
        found = replace(found, samples=planted(found.samples))
    for group, members in trainable(world.model, state).items():
        if group in state.learned and group not in named(estimator):
            continue
        samples = {name: found.samples[name] for name in members}
        if nested(estimator, world) and group != "inference":
            yield of_last_weights(estimator, world, state, group, samples, effort)
        else:
            yield _of_group(estimator, world, group, samples, found.exact, effort)
            yield from _ascends(estimator, world, group, found, effort)
        if found.value is not None:
            yield of_own_value(estimator, world, state, group, samples, effort)
    if found.objective is not None and not nested(estimator, world):
        yield _value(estimator, world, found, effort)
    for settings, word in estimator.facts.same_mean.items():
        yield from _same_mean(estimator, settings, word, world, found, effort)


def _of_group(estimator: Estimator, world: World, group: str, samples: Gradients, exact: bool, effort: Effort) -> Claim:
    where = f"{group}, {world.name}, K = {estimator.K}"
    name = estimator.facts.objective_of(group)
    wanted = wanted_of(estimator, world, group, effort)
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
    kind = diagnose(_means(samples), _means(wanted), world, estimator.K)
    said = f"not the gradient of {name}: {kind}; off by {apart.off:.2g} in {apart.tensor!r}"
    return Claim("unbiased", False, where, said, apart.off, apart.detectable)


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
    said = f"log p less by {LEVEL:g} gives the same mean gradient"
    if not apart.off <= limit:
        said = f"log p less by {LEVEL:g} changes its mean gradient by {apart.off:.2g} in {apart.tensor!r}: something is cut off"
    return Claim("level", apart.off <= limit, where, said, apart.off, limit)


def _means(samples: Gradients) -> Gradients:
    return {name: sample.mean(0) for name, sample in samples.items()}


def _ascends(estimator: Estimator, world: World, group: str, found: Expectation, effort: Effort) -> Iterator[Claim]:
    """A biased gradient that is of any use points uphill; with one particle a self-normalised one need not."""
    if group not in estimator.facts.biased or estimator.K < 2:
        return
    if (wanted := wanted_of(estimator, world, group, effort)) is None:
        return
    names = list(trainable(world.model, State())[group])
    mean, exact = (torch.cat([of[name].flatten() for name in names]) for of in (found.mean, _means(wanted)))
    cosine = float(mean @ exact / (mean.norm() * exact.norm()).clamp(min=1e-300))
    said = f"its cosine to the gradient of {estimator.facts.objective_of(group)} is {cosine:.2g}"
    yield Claim("uphill", cosine > 0, f"{group}, {world.name}, K = {estimator.K}", said, cosine)


def wanted_of(estimator: Estimator, world: World, group: str, effort: Effort) -> Gradients | None:
    """The gradient of what a group ascends, if there is one: exact ``[1, *shape]``, or by randomisation ``[S, *shape]``."""
    name = estimator.facts.objective_of(group)
    if name == INCLUSIVE:
        return {n: g.unsqueeze(0) for n, g in inclusive(world).items()}
    if (objective := objective_of(estimator, group)) is None:
        return None
    if name == "elbo":
        return {n: g.unsqueeze(0) for n, g in target(world, objective, 1)[0].items()}  # the same for every K
    if world.most < estimator.K and "rsample" in world.offered:
        return sampled(world, objective, estimator.K, effort)[0]
    return {n: g.unsqueeze(0) for n, g in target(world, objective, estimator.K)[0].items()}


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
    product = sum(float((samples[n].mean(0) * wanted[n].mean(0)).sum()) for n in samples)
    factor = product / sum(float((wanted[n].mean(0) ** 2).sum()) for n in samples)
    apart = difference(samples, {n: factor * wanted[n] for n in samples}, world, exact, effort)
    name = estimator.facts.objective_of(group)
    if factor > 0 and not apart.shows:
        said = f"{factor:.3g} times the gradient of {name}, as declared"
        return Claim("direction", True, where, said, apart.off, apart.detectable)
    kind = diagnose(_means(samples), _means(wanted), world, estimator.K)
    return Claim(
        "direction",
        False,
        where,
        f"not a positive multiple of the gradient of {name}: {kind}",
        apart.off,
        apart.detectable,
    )


def _value(estimator: Estimator, world: World, found: Expectation, effort: Effort) -> Claim:
    """The objective it reports is the objective it names."""
    where = f"{world.name}, K = {estimator.K}"
    name = estimator.facts.objective_of("generative")
    objective = OBJECTIVES.get(name, estimator.objective)
    if world.most < estimator.K and "rsample" in world.offered:
        wanted = sampled(world, objective, estimator.K, effort)[1]
    else:
        wanted = torch.tensor([target(world, objective, estimator.K)[1]], dtype=torch.float64)
    assert found.objective is not None
    apart = difference({name: found.objective}, {name: wanted}, world, found.exact, effort)
    said = f"it reports {float(found.objective.mean()):.6g} where {name} is {float(wanted.mean()):.6g}"
    if not apart.shows:
        said = f"the value it reports is {name}"
    return Claim("value", not apart.shows, where, said, apart.off, apart.detectable)


def _same_mean(
    estimator: Estimator, settings: str, word: str, world: World, found: Expectation, effort: Effort
) -> Iterator[Claim]:
    own = all(f"{getattr(estimator, key)}" == value for key, value in (s.split("=") for s in settings.split(",") if s))
    other = at(parse(word), estimator.K)
    if not own or other is None or not world.admits(other):
        return
    theirs = expectation(other, world, experienced(other, world), effort)  # on the same points
    wanted = {n: theirs.samples[n] for n in found.samples if n in theirs.samples}
    worst = difference({n: found.samples[n] for n in wanted}, wanted, world, found.exact and theirs.exact, effort)
    where = f"{world.name}, K = {estimator.K}"
    if worst.shows:
        said = f"its mean is not that of {other}: off by {worst.off:.2g} in {worst.tensor!r}"
        yield Claim("same mean", False, where, said, worst.off, worst.detectable)
    else:
        yield Claim("same mean", True, where, f"its mean is that of {other}", worst.off, worst.detectable)

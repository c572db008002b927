"""`check`: everything an estimator claims, tested; what it costs, measured; and mistakes planted in it, to see them found."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gradiometer.bench.checks import exact, identities
from gradiometer.bench.checks.card import Card
from gradiometer.bench.checks.characteristics import characteristics, engine_agrees, single_precision
from gradiometer.bench.checks.claims import Broken, Claim
from gradiometer.bench.checks.consistency import consistent
from gradiometer.bench.checks.differences import at
from gradiometer.bench.checks.expectations import Effort
from gradiometer.bench.checks.faults import Fault, faults
from gradiometer.bench.checks.means import learning_helps, no_bias_found
from gradiometer.bench.checks.slopes import nested
from gradiometer.bench.checks.trials import Schedule
from gradiometer.bench.checks.worlds import World, bit, gaussian, small, wide
from gradiometer.bench.errors import place_of
from gradiometer.bench.gradients import trainable
from gradiometer.bench.records import code_of
from gradiometer.estimators.base import Estimator

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class Thoroughness:
    """What a level spends.

    Attributes:
        particles: K of the exact comparisons, beside the smallest that an estimator can have.
        effort: of Sobol rules.
        schedule: of the sequential tests.
        everywhere: mistakes are planted on every world that is meant for it, not on the first.
    """

    particles: tuple[int, ...]
    effort: Effort
    schedule: Schedule
    everywhere: bool


DECLARED = ("biased as declared", "rescaled as declared")  # claims that admit a defect
LEVELS: dict[str, Thoroughness] = {
    "quick": Thoroughness((2, 3), Effort(randomisations=16), Schedule(256, 4, 1e-5), False),
    "full": Thoroughness((1, 2, 3, 4), Effort(points=13), Schedule(256, 7, 1e-5), True),
}


def check(estimator: Estimator, level: Level = "quick") -> Card:
    """Hold an estimator to its facts.

    Args:
        estimator: ours or a stranger's, at the settings that are meant; its K is that of the statistical tests.
        level: "quick" takes seconds, "full" a minute or two.

    Example:
        >>> from gradiometer.estimators import parse
        >>> check(parse("stl")).passed
        True
    """
    began = time.perf_counter()
    how = LEVELS[level]
    claims: list[Claim] = []
    planted: dict[str, bool] = {}
    about: dict[str, Any] = {}
    worlds = [world for world in small() if world.admits(estimator)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the engine, which says it in a claim
        for part in (_identities, _exact, _statistical):
            claims += _guarded(part.__name__, lambda part=part: part(estimator, worlds, how))
            if any(claim.name in identities.FIRST and claim.holds is False for claim in claims):
                break  # its expectation means nothing
        claims = _settled(claims)
        if not any(claim.holds is False for claim in claims):
            try:
                planted = dict(_planted(estimator, worlds, how))
            except Broken as broken:
                claims.append(Claim("planted", None, "mistakes in it", str(broken)))
            claims += _guarded("engine", lambda: [engine_agrees(estimator), *single_precision(estimator)])
            try:
                about = characteristics(estimator, level)
            except (Exception, SystemExit) as error:  # of a stranger's code; what it costs is no claim of its
                claims.append(Claim("measured", None, "its characteristics", _sentence(error)))
    seconds = time.perf_counter() - began
    return replace(_blank(estimator, level), claims=claims, planted=planted, about=about, seconds=seconds)


def failed(estimator: Estimator, level: Level, why: str) -> Card:
    """The card of an estimator whose check came to no end."""
    return replace(_blank(estimator, level), claims=[Claim("runs", False, "the check itself", why)])


def _blank(estimator: Estimator, level: Level) -> Card:
    objective = estimator.facts.objective
    said = (
        objective if isinstance(objective, str) else ", ".join(f"{group}: {name}" for group, name in objective.items())
    )
    return Card(str(estimator), estimator.facts.family, f"ascends {said}", code_of(estimator), level, [])


def _guarded(name: str, part: Any) -> list[Claim]:
    """A part's claims; whatever a stranger's code raises is a broken claim."""
    found: list[Claim] = []
    try:
        found.extend(part())
    except Broken as broken:
        found.append(Claim("runs", False, name.strip("_"), str(broken)))
    except (Exception, SystemExit) as error:
        found.append(Claim("runs", False, name.strip("_"), _sentence(error)))
    return found


def _sentence(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]]) + place_of(error)


def _identities(estimator: Estimator, worlds: Sequence[World], how: Thoroughness) -> Iterator[Claim]:
    if not worlds:
        needs = ", ".join(estimator.facts.needs)
        raise Broken(f"no model here offers what it needs ({needs})")
    for world in worlds:
        yield from identities.identities(estimator, world)
    if (claim := identities.noiseless(estimator)) is not None:
        yield claim


def _exact(estimator: Estimator, worlds: Sequence[World], how: Thoroughness) -> Iterator[Claim]:
    for world in worlds:
        for one in _at_particles(estimator, how):
            if world.most >= one.K:
                yield from exact.claims(one, world, how.effort)
    if not any(nested(estimator, world) for world in worlds):
        # At its own K, where outcomes are few or integrated by Sobol points.
        for world, most in ((bit(), 12), (gaussian(), 16)):
            if world.admits(estimator) and how.particles[-1] < estimator.K <= most:
                yield from exact.claims(estimator, world, how.effort)
    few = at(estimator, max(2, estimator.facts.least_particles))
    if worlds and few is not None:
        yield exact.level(few, worlds[0], how.effort)
    yield from consistent(estimator, how.effort)


def _at_particles(estimator: Estimator, how: Thoroughness) -> Iterator[Estimator]:
    for K in sorted({estimator.facts.least_particles, *how.particles}):
        if (one := at(estimator, K)) is not None:
            yield one


def _statistical(estimator: Estimator, worlds: Sequence[World], how: Thoroughness) -> Iterator[Claim]:
    for world in wide():
        if world.admits(estimator):
            yield from no_bias_found(estimator, world, how.schedule)
    if worlds:
        yield from learning_helps(estimator, worlds[0])


def _settled(claims: Sequence[Claim]) -> list[Claim]:
    """A declared bias or rescaling must be seen on at least one world; if on none, the claim is broken."""
    shown = {(c.name, c.group) for c in claims if c.name in DECLARED and c.holds}
    kept = [c for c in claims if c.name not in DECLARED or c.holds is not False]
    missing: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        if claim.name in DECLARED and claim.holds is False and (claim.name, claim.group) not in shown:
            of = claim.name.partition(" ")[0]
            said = f"declared {of}, and not so wherever it was looked at (off by {claim.off:.1g}): drop it from `{of}`"
            missing.setdefault((claim.name, claim.group), replace(claim, says=said))
    return [*kept, *missing.values()]


def _planted(estimator: Estimator, worlds: Sequence[World], how: Thoroughness) -> Iterator[tuple[str, bool]]:
    """Mistakes, and whether each was refused by the claims that let the estimator itself pass."""
    few = at(estimator, max(2, estimator.facts.least_particles)) or estimator
    fit = [world for world in worlds if world is worlds[0] or (world.planted and world.most >= few.K)]
    for world in fit if how.everywhere else fit[:1]:
        if _refused(Fault("nothing", few), world, how):
            raise Broken(f"{few} is refused on {world.name} without one, too, so that finding them says nothing")
        state = identities.experienced(few, world)
        groups = {g: m for g, m in trainable(world.model, state).items() if g in world.model.groups}
        for fault in faults(few, groups):
            yield f"{fault.name} ({world.name})", _refused(fault, world, how)


def _refused(fault: Fault, world: World, how: Thoroughness) -> bool:
    claims = itertools.chain(
        exact.claims(fault.estimator, world, how.effort, fault.planted),
        identities.identities(fault.estimator, world) if fault.planted is None else (),
        consistent(fault.estimator, how.effort, fault.planted),
    )
    try:
        return any(claim.holds is False for claim in claims if claim.name not in DECLARED)  # as far as the first
    except (Exception, SystemExit):
        return True


__all__ = ["LEVELS", "Level", "check", "failed"]

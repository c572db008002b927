"""The sequential test on models of about a thousand parameters: against the exact gradient, or a trusted one on the same noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gradiometer.bench.batched import dense
from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.differences import at
from gradiometer.bench.checks.identities import experienced
from gradiometer.bench.checks.targets import objective_of, target
from gradiometer.bench.checks.trials import Array, Schedule, Source, Verdict, trial
from gradiometer.bench.checks.worlds import World
from gradiometer.bench.gradients import trainable
from gradiometer.bench.replicates import Limits, draws, plans
from gradiometer.bench.subject import Subject
from gradiometer.bench.training import initial_state, learn
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.registry import parse

SEED = 11  # the same for both of two estimators: they are told apart on the same noise
LEARNING = 1024  # replicates of a variance
STEPS, RATE = 150, 1e-2  # of learning between two of them
NOISIER = 1.2  # by how much learning may multiply it: the variances are estimates


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in a flat gradient, and the blocks that are tested: tensors, groups, everything."""

    columns: Mapping[str, slice]
    blocks: Mapping[str, slice]

    @classmethod
    def of(cls, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> Layout:
        columns, blocks, start = {}, {}, 0
        for group, members in groups.items():
            begun = start
            for name, parameter in members.items():
                columns[name] = slice(start, start + parameter.numel())
                start += parameter.numel()
            blocks[group] = slice(begun, start)
        return cls(columns, {**columns, **blocks, "all parameters": slice(0, start)})

    def flat(self, gradients: Mapping[str, torch.Tensor]) -> Array:
        return np.concatenate([gradients[name].detach().reshape(-1).double().numpy() for name in self.columns])


def no_bias_found(estimator: Estimator, world: World, schedule: Schedule) -> Iterator[Claim]:
    """A claim on the groups whose mean is known, if there are any."""
    groups = {
        group: members
        for group, members in trainable(world.model, experienced(estimator, world)).items()
        if group in world.model.groups and group not in estimator.facts.biased and group not in estimator.facts.rescaled
    }
    if not groups:
        return
    where = f"{world.name}, K = {estimator.K}"
    if (made := _errors(estimator, world, groups)) is None:
        said = "no exact gradient at this K, and no estimator of the same objective that is trusted"
        yield Claim("no bias found", None, where, said)
        return
    source, towards, layout, against = made
    verdict = trial(source, layout.blocks, towards, schedule)
    yield _claim(verdict, where, against, groups)


def _claim(verdict: Verdict, where: str, against: str, groups: Iterable[str]) -> Claim:
    worst = max((verdict.scale[group] for group in groups if group in verdict.scale), default=float("nan"))
    if not verdict.found:
        said = (
            f"{where}, {verdict.replicates} replicates against {against}; would see {verdict.coordinate:.2g} sd in one "
            f"coordinate, {_percent(worst)} of a group's scale"
        )
        return Claim("no bias found", True, where, said, detectable=verdict.coordinate)
    size = f"{_percent(verdict.size)} of its scale" if verdict.kind == "scale" else f"{verdict.size:.2g} sd"
    said = (
        f"biased in {verdict.where} ({verdict.kind}) by {size}, against {against}: t = {verdict.t:.1f} where "
        f"{verdict.threshold:.1f} would do, after {verdict.replicates} replicates"
    )
    return Claim("no bias found", False, where, said, verdict.size, verdict.coordinate)


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %" if part < 1 else f"{100 * part:.0f} %"


def _errors(
    estimator: Estimator, world: World, groups: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[Source, Array, Layout, str] | None:
    """What a trial takes: errors of replicates, the exact or trusted gradient, where everything lies, and its name."""
    layout = Layout.of(groups)
    own = gradients(estimator, world, layout, experienced(estimator, world))
    if (exact := _exact(estimator, world, groups)) is not None:
        wanted = layout.flat(exact)
        return (lambda r: own(r) - wanted), wanted, layout, "the exact gradient"
    if (trusted := _trusted(estimator, world)) is None:
        return None
    theirs = gradients(trusted, world, layout, experienced(trusted, world))
    return (lambda r: own(r) - theirs(r)), theirs(range(4096)).mean(0), layout, f"{trusted} on the same noise"


def _exact(
    estimator: Estimator, world: World, groups: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor] | None:
    """The exact gradient of every group, where particles are few enough to be enumerated."""
    found: dict[str, torch.Tensor] = {}
    for group, members in groups.items():
        name = estimator.facts.objective_of(group)
        of_elbo, objective = name == "elbo", objective_of(estimator, name)
        if objective is None or "binary" not in world.name or (estimator.K > 8 and not of_elbo):
            return None
        gradient = target(world, objective, 1 if of_elbo else estimator.K)[0]
        found |= {name: gradient[name] for name in members}
    return found


def _trusted(estimator: Estimator, world: World) -> Estimator | None:
    """An estimator of the same objective, of other making, that has exact tests of its own."""
    objectives = {estimator.facts.objective_of(group) for group in world.model.groups} - {""}
    pathwise = "rsample" in world.offered
    known = {
        frozenset({"elbo"}): ("sgvb-a", "stl") if pathwise else ("reinforce", "rloo"),
        frozenset({"iwelbo"}): ("iwae", "dreg") if pathwise else ("iwae-score", "vimco"),
    }
    for word in known.get(frozenset(objectives), ()):
        if word != estimator.facts.name and (other := at(parse(word), estimator.K)) is not None:
            return other
    return None


def learning_helps(estimator: Estimator, world: World) -> Iterator[Claim]:
    """A claim on what is learned beside the estimate: some steps of it leave the inference gradient no noisier."""
    state = initial_state(estimator, world.model, world.x, 0)
    if not set(state.learned) - set(estimator.facts.named):
        return
    layout = Layout.of({"inference": trainable(world.model, State())["inference"]})
    noise = [float(gradients(estimator, world, layout, state)(range(LEARNING)).var(0).sum())]
    learn(estimator, world.model, world.x, state, STEPS, 0, rate=RATE)
    noise.append(float(gradients(estimator, world, layout, state)(range(LEARNING)).var(0).sum()))
    ratio = noise[1] / noise[0]
    said = f"{STEPS} steps of learning multiply the variance of its inference gradient by {ratio:.2g}"
    where = f"{world.name}, K = {estimator.K}"
    yield Claim("learning", ratio < NOISIER, where, said, ratio, NOISIER, "inference")


def gradients(estimator: Estimator, world: World, layout: Layout, state: State, seed: int = SEED) -> Source:
    """A source of an estimator's gradients, flat ``[n, P]``, made as the harness makes them."""
    subject = Subject(estimator, world.model, world.x, state, trainable(world.model, state))
    (plan,) = plans([subject], "auto", seed, Limits())

    def source(replicates: range) -> Array:
        rows = []
        for some, made in draws(plan, seed, replicates):
            found = dense(made, 0, subject.parameters).gradients
            flat = [found[name].reshape(len(some), -1) for name in layout.columns]
            rows.append(torch.cat(flat, 1).detach().double().numpy())
        return np.concatenate(rows)

    return source

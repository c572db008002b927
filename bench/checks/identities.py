"""What holds draw by draw, with no statistics: shapes, determinism, rows that do not touch, equal estimators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from gradiometer.bench.checks.claims import Broken, Claim
from gradiometer.bench.checks.expectations import add
from gradiometer.bench.checks.worlds import Conjugate, World, bits
from gradiometer.bench.gradients import Draw, one, surrogates, trainable
from gradiometer.bench.training import initial_state, learn
from gradiometer.estimators.base import Estimator, State, Surrogate
from gradiometer.estimators.noise import Rng, seeded
from gradiometer.estimators.registry import configured, parse

IDLE = "nothing is learned beside the estimate"
EQUAL = 1e-10  # relative to the largest entry: what rounding leaves of an identity in double precision
LEARNT = 8  # steps from which an estimator's memory is not what it was at birth


def experienced(estimator: Estimator, world: World) -> State:
    """Memory that a few steps have moved from where it began; claims must hold whatever is remembered."""
    state = initial_state(estimator, world.model, world.x, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in _learned(state):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    try:
        learn(estimator, world.model, world.x, state, LEARNT, 0, rate=0.0)  # averages follow, and modules are held
    except RuntimeError as error:
        raise Broken(f"a step of learning fails: {str(error).partition('.')[0]}") from error
    return state


def identities(estimator: Estimator, world: World) -> Iterator[Claim]:
    """Every identity that the facts promise on one world."""
    where = f"{world.name}, K = {estimator.K}"
    for name, test in TESTS.items():
        if name in ("rows", "data apart") and (
            estimator.facts.couples_data or (name == "rows" and not estimator.facts.in_batches)
        ):
            continue
        claim = _claimed(name, where, partial(test, estimator, world))
        if claim.says != IDLE:
            yield claim
        if name in FIRST and not claim.holds:
            return
    for settings, word in estimator.facts.same_draws.items():
        if (both := pair(estimator, settings, word, world)) is not None:
            yield _claimed("same draws", world.name, partial(_same_draws, *both, world))


def _claimed(name: str, where: str, test: Callable[[], str]) -> Claim:
    try:
        return Claim(name, True, where, test())
    except Broken as broken:
        return Claim(name, False, where, str(broken))


def pair(estimator: Estimator, settings: str, word: str, world: World) -> tuple[Estimator, Estimator] | None:
    """This estimator at some settings and its equal at the same K; None where either cannot be."""
    name = estimator.facts.name
    given = {f.name: getattr(estimator, f.name) for f in dataclasses.fields(estimator)}
    keys = [setting.partition("=")[0] for setting in settings.split(",") if setting]
    asked = configured(type(estimator), name, settings)
    try:
        own = type(estimator)(**(given | {key: getattr(asked, key) for key in keys}))
        other = parse(f"{word}{',' if ':' in word else ':'}K={own.K}")
    except ValueError as error:
        if "needs K" in str(error):
            return None
        raise Broken(f"{name} claims to be {word} at {settings!r}: {error}") from error
    return (own, other) if world.admits(own) and world.admits(other) else None


def draw(estimator: Estimator, world: World, replicate: int = 0, state: State | None = None) -> Draw:
    state = experienced(estimator, world) if state is None else state
    return one(estimator, world.model, world.x, Rng(3, replicate), state, trainable(world.model, state))


def apart(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest entry, and in which parameter it is."""
    scale = max((float(g.abs().max()) for of in (first, second) for g in of.values()), default=0.0) or 1.0
    off = {name: float((first[name] - second[name]).abs().max()) / scale for name in first if name in second}
    name = max(off, key=lambda key: off[key] if off[key] == off[key] else float("inf"), default="")
    return off.get(name, 0.0), name


def _shapes(estimator: Estimator, world: World) -> str:
    """Terms are of each data point, for groups there are, and finite; log weights are detached."""
    state, facts = experienced(estimator, world), estimator.facts
    there = set(world.model.groups) | set(state.learned)
    if unknown := sorted({*facts.named, *facts.biased, *facts.consistent, *facts.rescaled} - there):
        raise Broken(f"its facts claim something of the group {unknown[0]!r}, and there are {', '.join(sorted(there))}")
    batches = (
        (world.x,) if estimator.facts.couples_data else (world.x, world.x[:1])
    )  # what is squeezed away shows at one
    for x in batches:
        for surrogate in surrogates(estimator, world.model, x, Rng(3, 0), state):
            _well_formed(surrogate, x, set(trainable(world.model, state)))
    return "terms are [*batch], log weights [K, *batch] and detached"


def _well_formed(surrogate: Surrogate, x: Tensor, known: set[str]) -> None:
    for group, term in surrogate.terms.items():
        if group not in known:
            raise Broken(f"a term is for the group {group!r}, and there are {', '.join(sorted(known))}")
        if term.shape != x.shape[:1]:
            raise Broken(f"the term of {group!r} has shape {tuple(term.shape)} where [*batch] is {(len(x),)}")
        if not bool(term.isfinite().all()):
            raise Broken(f"the term of {group!r} is not finite" + (" for one data point" if len(x) == 1 else ""))
    if surrogate.log_w is not None:
        if surrogate.log_w.requires_grad:
            raise Broken("log_w carries a graph: detach it")
        if surrogate.log_w.shape[1:] != x.shape[:1]:
            raise Broken(f"log_w has shape {tuple(surrogate.log_w.shape)}, not [K, *batch]")


def _deterministic(estimator: Estimator, world: World) -> str:
    """The same noise gives the same gradient, whatever the global generator is at, and other noise another."""
    state = experienced(estimator, world)
    with seeded(1):
        first = draw(estimator, world, 0, state).gradients
    with seeded(2):
        second = draw(estimator, world, 0, state).gradients
    if any(not torch.equal(first[name], second[name]) for name in first):
        name = next(name for name in first if not torch.equal(first[name], second[name]))
        raise Broken(f"the same noise gave two gradients of {name!r}: it draws from another source than rng")
    return "the same noise gives the same gradient, bit by bit"


def _frozen(estimator: Estimator, world: World) -> str:
    """Measuring changes neither the model nor what is remembered."""
    state = experienced(estimator, world)
    x, generator, training = world.x.clone(), torch.random.get_rng_state(), world.model.training
    kept = [p.detach().clone() for p in [*world.model.parameters(), *_learned(state)]]
    tracked = {name: float(torch.as_tensor(a.value).mean()) for name, a in state.tracked.items()}
    draw(estimator, world, 0, state)
    _learning(estimator, world, state)
    now = [*world.model.parameters(), *_learned(state)]
    if not torch.equal(x, world.x):
        world.x.copy_(x)
        raise Broken("taking a gradient changed the data in place")
    if not torch.equal(generator, torch.random.get_rng_state()):
        torch.random.set_rng_state(generator)
        raise Broken("taking a gradient moved torch's global generator: all noise comes from rng")
    if world.model.training != training:
        world.model.train(training)
        raise Broken("taking a gradient changed the model's mode")
    if any(not torch.equal(a, b) for a, b in zip(kept, now, strict=True)):
        raise Broken("taking a gradient changed a parameter")
    if any(p.grad is not None for p in world.model.parameters()):
        raise Broken("taking a gradient left a .grad behind: return terms, and let the harness differentiate them")
    if tracked != {name: float(torch.as_tensor(a.value).mean()) for name, a in state.tracked.items()}:
        raise Broken(
            "taking a gradient moved a tracked average: observe() is what they follow, and the harness folds it"
        )
    return "model and memory are as they were after a gradient"


def _learned(state: State) -> list[Tensor]:
    return [p for module in state.learned.values() for p in module.parameters()]


def _learning(estimator: Estimator, world: World, state: State) -> dict[str, Tensor]:
    """The terms that train what is learned beside the estimate."""
    made = surrogates(estimator, world.model, world.x, Rng(3, 0), state)
    return {group: term for surrogate in made for group, term in surrogate.learn().items()}


def _learns(estimator: Estimator, world: World) -> str:
    """What is learned beside the estimate has a gradient from `learn`, in every parameter, and none from the surrogate."""
    state = experienced(estimator, world)
    groups = {group: list(module.parameters()) for group, module in state.learned.items()}
    own = {group: members for group, members in groups.items() if group not in estimator.facts.named}
    terms = _learning(estimator, world, state)
    if others := sorted(set(terms) - set(groups)):
        raise Broken(
            f"learn() has a term of {others[0]!r}: it trains what is learned beside the estimate, and nothing else"
        )
    if not own:
        return IDLE
    for group, members in own.items():
        if group not in terms or not terms[group].requires_grad:
            raise Broken(f"nothing trains {group!r}: learn() has no term of it that carries a graph")
        found = torch.autograd.grad(
            terms[group].mean(), members, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if all(not bool(gradient.any()) for gradient in found):
            raise Broken(f"nothing trains {group!r}: the gradient of its term is zero")
    for surrogate in surrogates(estimator, world.model, world.x, Rng(3, 0), state):
        for group in own:
            if group in surrogate.terms:
                raise Broken(
                    f"the surrogate has a term of {group!r}, which is no part of the estimate: put it into learn()"
                )
    return f"learn() trains {', '.join(own)}"


def _rows(estimator: Estimator, world: World) -> str:
    """A row of a batch of replicates is that replicate alone, also where R is B or K, and in any chunks."""
    state = experienced(estimator, world)
    parameters = trainable(world.model, state)
    for replicates in (range(len(world.x)), range(estimator.K), range(2, 7)):
        try:
            batch = _of_rows(estimator, world, replicates, state)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise Broken(f"it cannot run {len(replicates)} replicates as rows of one batch: {said}") from error
        for row, replicate in enumerate(replicates):
            alone = one(estimator, world.model, world.x, Rng(3, replicate), state, parameters).gradients
            off, name = apart(batch[row], alone)
            if not off < EQUAL:
                raise Broken(
                    f"row {row} of {len(replicates)} replicates is not that replicate alone: the gradient of {name!r} differs by "
                    f"{off:.1g} of the largest; reduce over the particle axis only, or set replicates_as_rows=False"
                )
    return "rows of a batch are the replicates alone, in any chunks"


def _of_rows(estimator: Estimator, world: World, replicates: range, state: State) -> list[dict[str, Tensor]]:
    parameters = trainable(world.model, state)
    x = world.x.expand(len(replicates), *world.x.shape)
    found = [
        {n: torch.zeros_like(p) for members in parameters.values() for n, p in members.items()} for _ in replicates
    ]
    for surrogate in surrogates(estimator, world.model, x, Rng(3, replicates), state):
        for group, term in surrogate.terms.items():
            if group not in parameters or not term.requires_grad:
                continue
            if term.shape != x.shape[:2]:
                raise Broken(f"of {len(replicates)} replicates the term of {group!r} has shape {tuple(term.shape)}")
            for row in range(len(replicates)):
                add(found[row], parameters[group], term[row].mean())
    return found


def _apart_from_others(estimator: Estimator, world: World) -> str:
    """A data point's gradient does not hang on the other points of its batch, nor on their order."""
    state = experienced(estimator, world)
    others = world.x.clone()
    others[1:] = 1 - others[1:]
    first, second = (_of_first(estimator, world, x, state) for x in (world.x, others))
    off, name = apart(first, second)
    if not off < EQUAL:
        raise Broken(
            f"the first data point's gradient of {name!r} moves by {off:.2g} of the largest when the others change: something is "
            "summed or normalised over the batch (or set couples_data=True)"
        )
    return "a data point's gradient does not hang on the others of its batch"


def _of_first(estimator: Estimator, world: World, x: Tensor, state: State) -> dict[str, Tensor]:
    parameters = trainable(world.model, state)
    found = {n: torch.zeros_like(p) for members in parameters.values() for n, p in members.items()}
    for surrogate in surrogates(estimator, world.model, x, Rng(3, 0), state):
        for group, term in surrogate.terms.items():
            if group in parameters and term.requires_grad:
                add(found, parameters[group], term[0])
    return found


def _same_draws(own: Estimator, other: Estimator, world: World) -> str:
    for replicate in range(3):
        off, name = apart(draw(own, world, replicate).gradients, draw(other, world, replicate).gradients)
        if not off < EQUAL:
            raise Broken(
                f"{own} is not {other}: on the same noise their gradients of {name!r} differ by {off:.2g} of the largest"
            )
    return f"{own} gives the gradients of {other} on the same noise"


def noiseless(estimator: Estimator) -> Claim | None:
    """At the exact posterior the inference gradient is zero in every draw, and near it it is not; None if that is not claimed."""
    where = f"exact posterior, K = {estimator.K}"
    x = bits(3, 2) - 0.3
    exact, near = World("posterior", Conjugate(), x), World("near it", Conjugate(off=0.1), x)
    if not estimator.facts.noiseless or not exact.admits(estimator):
        return None

    def test() -> str:
        largest = [
            max(float(g.abs().max()) for r in range(3) for g in draw(estimator, world, r).gradients.values())
            for world in (exact, near)
        ]
        if not largest[0] < 1e-10:
            raise Broken(f"at the exact posterior it is not noiseless: a gradient of {largest[0]:.2g}")
        if not largest[1] > 1e-6:
            raise Broken("near the exact posterior it is zero, too: it is no gradient")
        return "no noise at the exact posterior, and some near it"

    return _claimed("noiseless", where, test)


TESTS: dict[str, Callable[[Estimator, World], str]] = {
    "frozen": _frozen,  # first, while everything is as it was
    "shapes": _shapes,
    "deterministic": _deterministic,
    "learns": _learns,
    "rows": _rows,
    "data apart": _apart_from_others,
}
FIRST = ("shapes", "deterministic", "frozen")  # without which nothing else can be tested

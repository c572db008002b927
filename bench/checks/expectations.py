"""The expectation of an estimator without chance: every outcome of its noise is a row of one batch, weighed by its probability.

What the estimator draws is found by letting it draw once. Finite and Gaussian noise of few dimensions is enumerated and
integrated by Gauss-Hermite quadrature; anything else by scrambled Sobol points, whose randomisations give an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Size, Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical, Uniform

from gradiometer.bench.checks.worlds import World
from gradiometer.bench.gradients import surrogates, trainable
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import Ancestral

Gradients = dict[str, Tensor]  # {parameter: its gradient}
Objective = Callable[[Tensor], Tensor]  # [K, *batch] -> [*batch]
MOST = 70_000  # rows of an exact rule
UNIFORM = 0  # of an `Ask` that is no choice among finitely many
NORMAL = -1
INVERTED = -2  # a uniform put through the inverse of a distribution function


@dataclass(frozen=True)
class Ask:
    """Noise that an estimator asked for: so many scalars per data point, each normal, uniform, or one of `choices`."""

    size: int
    choices: int


class Nodes:
    """A source of noise that hands out the nodes of a rule, one per row of a batch ``(T, B)``, or notes what it is asked for.

    Args:
        columns: ``[T, scalars]``: uniforms, or normals and choices if they are `exact`; None to note only.
        log_weight: of each node, ``[T]``.
        exact: draws of finite families are choices, and weigh their probability; else they are made from uniforms.
        single: there is one node, for one replicate ``(B,)`` whose data points have noise of their own each.
    """

    def __init__(
        self, columns: Tensor | None, log_weight: Tensor | None = None, *, exact: bool, single: bool = False
    ) -> None:
        self.columns, self.exact, self.single = columns, exact, single
        even = torch.zeros(1 if columns is None else len(columns)).double()
        self.log_weight: Tensor = (even if log_weight is None else log_weight).unsqueeze(
            -1
        )  # [T, B] once there are draws
        self.asks: list[Ask] = []
        self._taken = 0

    def rsample(self, q: Distribution, particles: int | None = None) -> Tensor:
        if not q.has_rsample:
            raise NotImplementedError(f"{type(q).__name__} cannot be reparameterised: draw with sample()")
        return self._draw(q, particles, True)

    def sample(self, q: Distribution, particles: int | None = None) -> Tensor:
        with torch.no_grad():
            return self._draw(q, particles, False)

    def uniform(self, like: Distribution) -> Tensor:
        return self._noise(like.batch_shape, 0, UNIFORM)

    def normal(self, like: Distribution) -> Tensor:
        return self._noise(like.batch_shape, 0, NORMAL)

    def _draw(self, q: Distribution, particles: int | None, differentiable: bool) -> Tensor:
        if isinstance(q, Ancestral):
            return q.draw(self, particles, differentiable=differentiable)  # type: ignore[arg-type]
        base = q
        while isinstance(base, Independent):
            base = base.base_dist
        shape = Size(() if particles is None else (particles,)) + q.batch_shape + q.event_shape
        events = len(q.event_shape)
        match base:
            case Normal():
                return base.loc + base.scale * self._noise(shape, events, NORMAL)
            case Uniform():
                return base.low + (base.high - base.low) * self._noise(shape, events, UNIFORM)
            case Bernoulli():
                found = self._noise(shape, events, 2)
                value = found if self.exact else (found < base.probs).to(base.probs.dtype)
            case OneHotCategorical():
                found = self._noise(shape[:-1], events - 1, shape[-1])
                if not self.exact:
                    found = (found.unsqueeze(-1) > base.probs.cumsum(-1)).sum(-1).clamp(max=shape[-1] - 1)
                value = torch.nn.functional.one_hot(found.long(), shape[-1]).to(base.probs.dtype)
            case _:
                return base.icdf(self._noise(shape, events, INVERTED))
        if self.exact:
            self._weigh(q.log_prob(value))
        return value

    def _weigh(self, log_probability: Tensor) -> None:
        """Of some particles of each row, ``[..., T, B]``."""
        rows = log_probability.flatten(0, -3).sum(0) if log_probability.dim() > 2 else log_probability
        self.log_weight = self.log_weight + rows.detach()

    def _noise(self, shape: Size, events: int, choices: int) -> Tensor:
        end = len(shape) - events
        lead, event = (shape, Size()) if self.single else (shape[: end - 2], shape[end:])
        size = lead.numel() * event.numel()
        if self.columns is None:
            self.asks.append(Ask(size, choices))
            return torch.full(shape, {NORMAL: 0.1, UNIFORM: 0.3, INVERTED: 0.3}.get(choices, 0.0), dtype=torch.float64)
        taken = self.columns[:, self._taken : self._taken + size]
        if taken.shape[1] < size:
            raise NotImplementedError("it asks for more noise than it did at first")
        self._taken += size
        if choices == NORMAL and not self.exact:
            taken = torch.special.ndtri(taken)
        if self.single:
            return taken.reshape(shape)
        return taken.reshape(len(taken), *lead, *event).movedim(0, len(lead)).unsqueeze(len(lead) + 1).expand(shape)


def asked(estimator: Estimator, world: World, state: State) -> list[Ask]:
    """The noise that one gradient takes, per data point."""
    nodes = Nodes(None, exact=True, single=not estimator.facts.in_batches)
    x = world.x if nodes.single else world.x.unsqueeze(0)
    for _ in surrogates(estimator, world.model, x, nodes, state):  # type: ignore[arg-type]
        pass
    return nodes.asks


@dataclass(frozen=True)
class Expectation:
    """The mean gradient of an estimator: exact if there is one sample, else the mean of independent ones.

    Attributes:
        samples: by parameter, ``[S, *shape]``.
        objective: the mean value of the estimator's own objective, ``[S]``; None if it gives no log weights.
        value: likewise, of what its terms are the derivative of, if it says so.
    """

    samples: Gradients
    objective: Tensor | None
    value: Tensor | None
    exact: bool

    @property
    def mean(self) -> Gradients:
        return {name: g.mean(0) for name, g in self.samples.items()}


@dataclass(frozen=True)
class Effort:
    """How much to spend where no rule is exact.

    Args:
        randomisations, points: of scrambled Sobol rules, points as a power of two.
        alpha: the rate of false alarms of one comparison with the mean over randomisations.
    """

    randomisations: int = 32
    points: int = 10
    alpha: float = 1e-7


def expectation(
    estimator: Estimator,
    world: World,
    state: State,
    effort: Effort = Effort(),
    *,
    seed: int = 0,
    smooth: bool = True,
    objective: Objective | None = None,
    gradients: bool = True,
) -> Expectation:
    """The expectation of what the estimator gives, by parameter of the model and of what it learns.

    Args:
        seed: of a Sobol rule's randomisations.
        smooth: quadrature is exact enough; not where a network with kinks moves the particles.
        objective: of the log weights, in the place of the estimator's own.
        gradients: whether they are wanted, or values alone.

    Raises:
        NotImplementedError: it draws from a family that cannot be enumerated or inverted.
    """
    asks, rows = asked(estimator, world, state), estimator.facts.in_batches
    over = partial(_over, estimator, world, state, objective or estimator.objective, gradients)
    rule = _product(asks, world) if rows and smooth else None
    if rule is not None:
        found = [over(Nodes(*rule, exact=True), len(rule[0]))]
    else:
        scalars = sum(ask.size for ask in asks)
        found = [
            over(Nodes(columns, exact=False), len(columns)) if rows else _one_by_one(over, columns)
            for columns in sobol(scalars, effort, seed, fewer=0 if rows else 3)
        ]
    samples = {name: torch.stack([of[0][name] for of in found]) for name in found[0][0]}
    return Expectation(samples, _stacked([of[1] for of in found]), _stacked([of[2] for of in found]), rule is not None)


def _stacked(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.stack(known) if known else None


def _product(asks: Sequence[Ask], world: World) -> tuple[Tensor, Tensor] | None:
    """All outcomes ``[T, scalars]`` with the logarithm of the quadrature's weights ``[T]``, if there are not too many."""
    if any(ask.choices in (UNIFORM, INVERTED) for ask in asks):
        return None
    normals = sum(ask.size for ask in asks if ask.choices == NORMAL)
    if normals and normals not in world.nodes:
        return None
    points, weights = np.polynomial.hermite_e.hermegauss(world.nodes[normals] if normals else 1)
    axes: list[tuple[np.ndarray, np.ndarray]] = []
    for ask in asks:
        even = (np.arange(max(ask.choices, 1)), np.ones(max(ask.choices, 1)))
        axes += [(points, weights / weights.sum()) if ask.choices == NORMAL else even] * ask.size
    if math.prod(len(values) for values, _ in axes) > MOST:
        return None
    outcomes = np.array(list(itertools.product(*(values for values, _ in axes)))).reshape(-1, len(axes))
    weight = np.array([math.prod(of) for of in itertools.product(*(of for _, of in axes))])
    return torch.tensor(outcomes).double(), torch.tensor(weight).log()


def sobol(scalars: int, effort: Effort, seed: int, fewer: int = 0) -> list[Tensor]:
    """Independently scrambled Sobol points in the open unit cube, ``[T, scalars]`` each."""
    from scipy.stats.qmc import Sobol

    sources = np.random.SeedSequence(seed).spawn(effort.randomisations)
    made = [Sobol(scalars, rng=np.random.default_rng(source)).random_base2(effort.points - fewer) for source in sources]
    return [torch.tensor(of).clamp(1e-12, 1 - 1e-12) for of in made]


Means = tuple[Gradients, Tensor | None, Tensor | None]  # of gradients, the objective, and terms' own value


def _one_by_one(over: Callable[[Nodes, int], Means], columns: Tensor) -> Means:
    """Likewise, of an estimator whose replicates cannot be rows."""
    made = [over(Nodes(of.unsqueeze(0), exact=False, single=True), 0) for of in columns]
    gradients = {name: torch.stack([of[0][name] for of in made]).mean(0) for name in made[0][0]}
    means = [_stacked([of[i] for of in made]) for i in (1, 2)]  # type: ignore[misc]
    first, second = (None if mean is None else mean.mean() for mean in means)
    return gradients, first, second


def _over(
    estimator: Estimator,
    world: World,
    state: State,
    objective: Objective,
    gradients: bool,
    nodes: Nodes,
    rows: int,
) -> Means:
    """Weighted means over the rows of a rule."""
    x = world.x.expand(rows, *world.x.shape) if rows else world.x  # [T, B, ...]
    parameters = trainable(world.model, state)
    total = {name: torch.zeros_like(p) for members in parameters.values() for name, p in members.items()}
    of_weights = own = None

    def mean(values: Tensor) -> Tensor:  # the weights so far: later draws integrate to one
        return (nodes.log_weight.softmax(0) * values).sum(0).mean() if rows else values.mean()

    for surrogate in surrogates(estimator, world.model, x, nodes, state):  # type: ignore[arg-type]
        for group, term in surrogate.terms.items():
            if gradients and group in parameters and term.requires_grad:
                add(total, parameters[group], mean(term))
        if surrogate.log_w is not None:
            of_weights = mean(objective(surrogate.log_w)).detach()
        if surrogate.value is not None:
            own = mean(surrogate.value).detach()
    return total, of_weights, own


def add(total: Gradients, members: Mapping[str, Tensor], value: Tensor) -> None:
    """Add the derivative of `value` to the gradients of some parameters, in place."""
    found = torch.autograd.grad(
        value, list(members.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for name, gradient in zip(members, found, strict=True):
        total[name] = total[name] + gradient

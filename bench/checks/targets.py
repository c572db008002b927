"""The exact gradient of a named objective, by enumeration or quadrature over the guide's particles."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, OneHotCategorical

from gradiometer.bench.checks.expectations import Effort, Gradients, Nodes, Objective, sobol
from gradiometer.bench.checks.worlds import World
from gradiometer.bench.models.layers import Chain
from gradiometer.bench.models.protocol import parameters_of
from gradiometer.estimators.base import Estimator

# Written out once more: what is checked is not checked against itself.
OBJECTIVES: Mapping[str, Objective] = {
    "elbo": lambda log_w: log_w.sum(0) / len(log_w),
    "iwelbo": lambda log_w: torch.logsumexp(log_w, 0) - math.log(len(log_w)),
}
INCLUSIVE = "inclusive KL"


def objective_of(estimator: Estimator, name: str) -> Objective | None:
    """The function of K log weights that an objective of the estimator's is the expectation of; None if it is not known."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    return estimator.objective if name and name == estimator.facts.objective_of("generative") else None


def target(world: World, objective: Objective, K: int) -> tuple[Gradients, float]:
    """The gradient of ``E objective(log_w)`` over K particles, of the mean over the batch, and its value."""
    z, log_weight = particles(world, K)
    q = world.model.guide(world.x)
    log_q = q.log_prob(z)
    log_w = world.model.log_joint(world.x, z) - log_q  # [K, T, B]
    value = (_probability(log_weight, log_q) * objective(log_w)).sum(0).mean()
    return _gradient(world, value), float(value.detach())


def sampled(world: World, objective: Objective, K: int, effort: Effort) -> tuple[Gradients, Tensor]:
    """Likewise for reparameterised particles too many to enumerate, by randomisation: gradients ``[S, *shape]``, values ``[S]``.

    On the points that an estimator gets for its first K particles, so that errors of the rule cancel.
    """
    gradients, values = [], []
    for columns in sobol(K * world.model.guide(world.x).event_shape.numel(), effort, 0):
        x = world.x.expand(len(columns), *world.x.shape)
        q = world.model.guide(x)
        z = Nodes(columns, exact=False).rsample(q, K)
        value = objective(world.model.log_joint(x, z) - q.log_prob(z)).mean()
        gradients.append(_gradient(world, value))
        values.append(value.detach())
    return {name: torch.stack([of[name] for of in gradients]) for name in gradients[0]}, torch.stack(values)


def _probability(log_weight: Tensor, log_q: Tensor) -> Tensor:
    """Of each multiset, ``[T, B]``, differentiable for discrete latents; quadrature nodes keep their weights, and move instead."""
    return log_weight.exp().unsqueeze(-1) if log_weight.dim() == 1 else (log_weight + log_q.sum(0)).exp()


def parts(world: World, K: int) -> dict[str, Gradients]:
    """The expectations of which gradients of the K-sample bound, and of the ELBO, are made, by their names."""
    z, log_weight = particles(world, K)
    q = world.model.guide(world.x)
    log_q, still = q.log_prob(z), q.log_prob(z.detach())
    log_p = world.model.log_joint(world.x, z)
    probability = _probability(log_weight, log_q).detach()
    log_w = (log_p - log_q).detach()
    w, bound = log_w.softmax(0), torch.logsumexp(log_w, 0)
    values = {
        "the score of the guide with the normalised weights": (w * still).sum(0),
        "the score of the bound": bound * still.sum(0),
        "the score of the signal": (log_w * still).mean(0),
        "the pathwise part": (w * (log_p - log_q + still)).sum(0),
        "the pathwise part of the ELBO": (log_p - log_q + still).mean(0),
    }
    return {name: _gradient(world, (probability * value).sum(0).mean()) for name, value in values.items()}


def inclusive(world: World) -> Gradients:
    """The gradient of ``-KL(p(z|x) || q(z|x))`` in the guide."""
    posterior, _, log_q = _posterior(world)
    return _gradient(world, (posterior * log_q).sum(0).mean())


def evidence(world: World) -> Gradients:
    """The gradient of ``log p(x)`` in the model (Fisher 1925): what every bound's is near."""
    posterior, log_p, _ = _posterior(world)
    return _gradient(world, (posterior * log_p).sum(0).mean())


def _posterior(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """``p(z|x)`` of every state ``[T, B]``, ``log p(x, z)`` and ``log q(z|x)``."""
    z, log_weight = particles(world, 1)
    z = z.detach()
    log_q = world.model.guide(world.x).log_prob(z)[0]  # [T, B]
    log_p = world.model.log_joint(world.x, z)[0]
    if log_weight.dim() == 1:
        log_weight = log_weight.unsqueeze(-1) - log_q
    return (log_p + log_weight).softmax(0).detach(), log_p, log_q


def particles(world: World, K: int) -> tuple[Tensor, Tensor]:
    """All multisets of K particles ``[K, T, B, *event]``, and the logarithm of how often each is drawn.

    Of finite latents, that is the number of orders ``[T, 1]``, to be multiplied by the guide's probability; of Gaussian ones
    the weight of a node ``[T]``.
    """
    states, log_weight = _states(world)  # [S, B, *event], [S] or None
    chosen = list(itertools.combinations_with_replacement(range(len(states)), K))
    orders = torch.tensor([_orders(of) for of in chosen]).double().log()  # [T]
    z = states[torch.tensor(chosen).T]  # [K, T, B, *event]
    if log_weight is None:
        return z, orders.unsqueeze(-1)
    return z, orders + log_weight[torch.tensor(chosen)].sum(1)


def _orders(chosen: tuple[int, ...]) -> float:
    return math.factorial(len(chosen)) / math.prod(math.factorial(n) for n in Counter(chosen).values())


def _states(world: World) -> tuple[Tensor, Tensor | None]:
    """Every latent of one particle."""
    q, B = world.model.guide(world.x), len(world.x)
    layers = [q] if not isinstance(q, Chain) else [q.first, *q.links]
    kind = _base(q.first if isinstance(q, Chain) else q)
    units = q.units if isinstance(q, Chain) else [q.event_shape[0]]
    if isinstance(kind, Normal):
        return _gaussian(world, layers, units)
    classes = q.event_shape[-1] if isinstance(kind, OneHotCategorical) else 2
    values = torch.tensor(list(itertools.product(range(classes), repeat=sum(units))))  # [S, D]
    if isinstance(kind, OneHotCategorical):
        found = torch.nn.functional.one_hot(values, classes).double()
    elif isinstance(kind, Bernoulli):
        found = values.double()
    else:
        raise NotImplementedError(f"latents of {type(kind).__name__} are not enumerated")
    return found.unsqueeze(1).expand(-1, B, *[-1] * (found.dim() - 1)), None


def _gaussian(world: World, layers: list, units: list[int]) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes of all latents, layer after layer, with the graph of the guide."""
    points, weights = np.polynomial.hermite_e.hermegauss(world.nodes[sum(units)])
    grid = torch.tensor(list(itertools.product(points, repeat=sum(units)))).double()  # [S, D]
    log_weight = torch.tensor(list(itertools.product((weights / weights.sum()), repeat=sum(units)))).log().sum(1)
    made: list[Tensor] = []
    for layer, noise in zip(layers, grid.split(units, dim=-1), strict=True):
        q = layer if not made else layer(made[-1])
        made.append(q.mean + q.stddev * noise.unsqueeze(1))  # [S, B, d]
    return torch.cat(made, -1), log_weight


def _base(q: object) -> object:
    while isinstance(q, Independent):
        q = q.base_dist
    return q


def _gradient(world: World, value: Tensor) -> Gradients:
    parameters = {n: p for members in parameters_of(world.model).values() for n, p in members.items()}
    found = torch.autograd.grad(
        value, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))

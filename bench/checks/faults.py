"""Mistakes planted in an estimator, to see that the checks it passed would have found them: a measured power."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradiometer.bench.checks.exact import Planted
from gradiometer.bench.checks.expectations import Gradients
from gradiometer.bench.gradients import each
from gradiometer.estimators.base import Coefficients, Estimator, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng


@dataclass(frozen=True)
class Fault:
    """A mistake by its name: a faulty estimator, or what is done to the gradients of a right one."""

    name: str
    estimator: Estimator
    planted: Planted | None = None


def faults(estimator: Estimator, groups: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Fault]:
    """Mistakes that could be made in any estimator, and more of those that are weights.

    Args:
        groups: ``{group: {name: parameter}}`` that the estimator has gradients of.
    """
    for group, members in groups.items():
        yield Fault(f"the sign of the {group} gradient", _altered(estimator, group, -1.0))
        yield Fault(f"no {group} gradient", _altered(estimator, group, 0.0))
        if group not in estimator.facts.rescaled:
            yield Fault(f"the {group} gradient 5 % too large", _altered(estimator, group, 1.05))
        layer = list(members)[-1]
        yield Fault(f"the gradient of {layer} alone 1 % too large", estimator, scaled(layer, 1.01))
    if isinstance(estimator, Weighted):
        yield from _of_columns(estimator)


def _with(estimator: Estimator, **methods: Callable[..., Any]) -> Estimator:
    """A copy of an estimator with other methods; whatever else it is, at any K, it stays."""
    faulty = copy.copy(estimator)
    kind = type(f"Faulty{type(estimator).__name__}", (type(estimator),), methods)
    object.__setattr__(faulty, "__class__", kind)
    return faulty


def _altered(estimator: Estimator, group: str, factor: float) -> Estimator:
    def surrogate(self: Estimator, model: Any, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
        for made in each(type(estimator).surrogate(self, model, x, rng, state)):
            terms = {name: factor * term if name == group else term for name, term in made.terms.items()}
            yield replace(made, terms=terms)

    return _with(estimator, surrogate=surrogate)


def scaled(name: str, factor: float) -> Planted:
    """A fault of the scale of one parameter's gradient."""

    def planted(gradients: Gradients) -> Gradients:
        return {n: factor * g if n == name else g for n, g in gradients.items()}

    return planted


def _of_columns(estimator: Weighted) -> Iterator[Fault]:
    right = type(estimator).coefficients
    some = torch.linspace(-1.0, 1.0, 2 * estimator.K, dtype=torch.float64).reshape(estimator.K, 2) ** 3
    one = estimator.coefficients(some)

    def without(score: bool = True, pathwise: bool = True) -> Estimator:
        def coefficients(self: Weighted, log_w: Tensor) -> Coefficients:
            of = right(self, log_w)
            return replace(of, score=of.score if score else None, pathwise=of.pathwise if pathwise else None)

        return _with(estimator, coefficients=coefficients)

    if one.score is not None and float(one.score.std()) > 1e-6:  # the score's own mean is zero
        yield Fault("the score part left out", without(score=False))
    if one.pathwise is not None:
        yield Fault("the pathwise part left out", without(pathwise=False))
    if estimator.K > 1 and float(one.generative.std()) > 1e-6:
        exchanged = _with(estimator, coefficients=lambda self, log_w: right(self, log_w.roll(1, -1)))
        yield Fault("weights of another data point", exchanged)
        yield Fault("weights not detached", _with(estimator, surrogate=_not_detached))


def _not_detached(self: Weighted, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
    """The terms of a weighted estimator whose weights are differentiated along with what they weigh."""
    q = model.guide(x)
    z = rng.rsample(q, self.K) if "rsample" in self.facts.needs else rng.sample(q, self.K)
    log_p, log_q, still = model.log_joint(x, z), q.log_prob(z), q.log_prob(z.detach())
    of: Coefficients = self.coefficients(self.signal(log_p - log_q, x, state))
    inference = 0 * log_q
    if of.pathwise is not None:
        inference = inference + of.pathwise * (log_p - log_q + still)
    if of.score is not None:
        inference = inference + of.score * still
    log_w = (log_p - log_q).detach()
    terms = {"generative": (of.generative * log_p).sum(0), "inference": inference.sum(0)}
    return Surrogate(terms, log_w, self.observe(log_w, x, state))

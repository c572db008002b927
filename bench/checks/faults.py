"""Mistakes planted in an estimator, to see that the checks it passed would have found them: a measured power."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gradiometer.bench.checks.exact import Planted
from gradiometer.bench.checks.expectations import Gradients
from gradiometer.bench.gradients import surrogates
from gradiometer.estimators.base import Coefficients, Estimator, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng

Columns = Callable[[Coefficients], Coefficients]
Terms = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Fault:
    """A mistake by its name: a faulty estimator, or what is done to the gradients of a right one; of `group`, if of one."""

    name: str
    estimator: Estimator
    planted: Planted | None = None
    group: str = ""


@dataclass(frozen=True)
class Altered(Estimator):
    """An estimator whose terms are changed after it made them."""

    inner: Estimator = field(kw_only=True)
    terms: Terms = field(kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", self.inner.facts)
        object.__setattr__(self, "K", self.inner.K)

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
        for made in surrogates(self.inner, model, x, rng, state):
            yield replace(made, terms=self.terms(made.terms))

    def init_state(self, model: Any, x: Tensor) -> State:
        return self.inner.init_state(model, x)

    def learn(self, model: Any, x: Tensor, rng: Rng, state: State) -> Mapping[str, Tensor]:
        return self.inner.learn(model, x, rng, state)

    def objective(self, log_w: Tensor) -> Tensor:
        return self.inner.objective(log_w)


@dataclass(frozen=True)
class AlteredColumns(Weighted):
    """A weighted estimator whose columns, or what they are formed from, are changed."""

    inner: Weighted = field(kw_only=True)
    columns: Columns = field(kw_only=True, default=lambda made: made)
    weights: Callable[[Tensor], Tensor] = field(kw_only=True, default=lambda log_w: log_w)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", self.inner.facts)
        object.__setattr__(self, "K", self.inner.K)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return self.columns(self.inner.coefficients(self.weights(log_w)))

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        return self.inner.signal(log_w, x, state)

    def observe(self, log_w: Tensor, *given: Any) -> Mapping[str, Tensor]:
        return self.inner.observe(log_w, *given)

    def init_state(self, model: Any, x: Tensor) -> State:
        return self.inner.init_state(model, x)

    def learn(self, model: Any, x: Tensor, rng: Rng, state: State) -> Mapping[str, Tensor]:
        return self.inner.learn(model, x, rng, state)

    def objective(self, log_w: Tensor) -> Tensor:
        return self.inner.objective(log_w)


@dataclass(frozen=True)
class NotDetached(AlteredColumns):
    """A weighted estimator whose weights are differentiated along with what they weigh."""

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        pathwise = "rsample" in self.facts.needs
        z = rng.rsample(q, self.K) if pathwise else rng.sample(q, self.K)
        log_p, log_q = model.log_joint(x, z), q.log_prob(z)
        of = self.inner.coefficients(self.inner.signal(log_p - log_q, x, state))
        inference = 0 * log_q
        if of.pathwise is not None:
            inference = inference + of.pathwise * (log_p - log_q + q.log_prob(z.detach()))
        if of.score is not None:
            inference = inference + of.score * q.log_prob(z.detach())
        terms = {"generative": (of.generative * log_p).sum(0), "inference": inference.sum(0)}
        return Surrogate(terms, (log_p - log_q).detach(), self.inner.observe((log_p - log_q).detach(), x, state))


def faults(estimator: Estimator, groups: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Fault]:
    """Mistakes that could be made in any estimator, and more of those that are weights.

    Args:
        groups: ``{group: {name: parameter}}`` that the estimator has gradients of.
    """
    for group, members in groups.items():
        yield Fault(f"the sign of the {group} gradient", _altered(estimator, group, -1.0), group=group)
        yield Fault(f"no {group} gradient", _altered(estimator, group, 0.0), group=group)
        yield Fault(f"the {group} gradient 5 % too large", _altered(estimator, group, 1.05), group=group)
        layer = list(members)[-1]
        yield Fault(f"the gradient of {layer} alone 1 % too large", estimator, scaled(layer, 1.01), group)
    if isinstance(estimator, Weighted):
        yield from _of_columns(estimator)


def _altered(estimator: Estimator, group: str, factor: float) -> Estimator:
    def terms(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: factor * term if name == group else term for name, term in made.items()}

    return Altered(inner=estimator, terms=terms)


def scaled(name: str, factor: float) -> Planted:
    """A fault of the scale of one parameter's gradient."""

    def planted(gradients: Gradients) -> Gradients:
        return {n: factor * g if n == name else g for n, g in gradients.items()}

    return planted


def _of_columns(estimator: Weighted) -> Iterator[Fault]:
    one = estimator.coefficients(_some(estimator.K))
    if one.score is not None and float(one.score.std()) > 1e-6:  # the score's own mean is zero
        without = AlteredColumns(inner=estimator, columns=lambda of: replace(of, score=None))
        yield Fault("the score part left out", without, group="inference")
    if one.pathwise is not None:
        without = AlteredColumns(inner=estimator, columns=lambda of: replace(of, pathwise=None))
        yield Fault("the pathwise part left out", without, group="inference")
    if estimator.K > 1 and float(one.generative.std()) > 1e-6:
        yield Fault(
            "weights of another data point", AlteredColumns(inner=estimator, weights=lambda log_w: log_w.roll(1, -1))
        )
        yield Fault("weights not detached", NotDetached(inner=estimator))


def _some(K: int) -> Tensor:
    import torch

    return torch.linspace(-1.0, 1.0, 2 * K, dtype=torch.float64).reshape(K, 2) ** 3

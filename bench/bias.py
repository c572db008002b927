"""Bias: the difference of two estimators' gradients on the same noise is itself an estimator, whose mean is the bias.

Where the two share noise, and most pairs do, the difference is far quieter than either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradiometer.bench.batched import together
from gradiometer.bench.formulas import Sums
from gradiometer.bench.gradients import surrogates
from gradiometer.bench.metrics import BIAS
from gradiometer.bench.problems import Problem
from gradiometer.estimators.base import Coefficients, Estimator, Facts, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

FIRST, SECOND = "estimator", "reference"
TRUSTED = {  # unbiased estimators of an objective, the first that a problem and a K allow
    "elbo": ("sgvb-a", "rloo"),
    "iwelbo": ("iwae", "vimco"),
}
QUIET = {"rloo": 8}  # particles that it has at least: the objective has no K, and few of them drown a bias


def difference(estimator: Estimator, reference: Estimator) -> Difference | DifferenceOfWeights:
    """The gradient of `estimator` less that of `reference` on the same noise; by columns of weights, where both have them."""
    if together([estimator, reference]):
        return DifferenceOfWeights(estimator, reference)
    return Difference(estimator, reference)


@dataclass(frozen=True)
class _OfTwo(Estimator):
    """What both kinds of difference share: two estimators, whose memories lie side by side."""

    K: int = field(init=False)
    estimator: Estimator
    reference: Estimator

    def __post_init__(self) -> None:
        of = [self.estimator.facts, self.reference.facts]
        facts = Facts(
            "difference",
            family=of[0].family,
            objective="none",
            needs=tuple(dict.fromkeys(need for facts in of for need in facts.needs)),
            couples_data=any(facts.couples_data for facts in of),
            replicates_as_rows=all(facts.replicates_as_rows for facts in of),
        )
        object.__setattr__(self, "K", self.estimator.K)
        object.__setattr__(self, "facts", facts)
        super().__post_init__()

    def __str__(self) -> str:
        return f"{self.estimator} - {self.reference}"

    def init_state(self, model: Any, x: Tensor) -> State:
        return joined(self.estimator.init_state(model, x), self.reference.init_state(model, x))

    def objective(self, log_w: Tensor) -> Tensor:
        return self.estimator.objective(log_w)


@dataclass(frozen=True)
class Difference(_OfTwo):
    """The gradient of one estimator less that of another, each by its own surrogates.

    What either learns beside the model is in its state, and is no part of the difference.
    """

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
        again = copy.copy(rng)  # before a draw is taken from it
        own, other = apart(state)
        for made in surrogates(self.estimator, model, x, rng, own):
            yield Surrogate(_without(made.terms, own), made.log_w)
        for made in surrogates(self.reference, model, x, again, other):
            negative = {id(term): -term for term in made.terms.values()}  # groups that share a term go on sharing it
            yield Surrogate({g: negative[id(t)] for g, t in _without(made.terms, other).items()})


@dataclass(frozen=True)
class DifferenceOfWeights(_OfTwo, Weighted):
    """The gradient of one weighted estimator less that of another with as many particles: their columns subtract."""

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        """Both estimators' signals, ``[2, K, *batch]``."""
        return torch.stack([e.signal(log_w, x, of) for e, of in zip(self._both(), apart(state), strict=True)])

    def coefficients(self, log_w: Tensor) -> Coefficients:
        a, b = (e.coefficients(signal) for e, signal in zip(self._both(), log_w, strict=True))
        return Coefficients(a.generative - b.generative, _less(a.pathwise, b.pathwise), _less(a.score, b.score))

    def _both(self) -> tuple[Weighted, Weighted]:
        assert isinstance(self.estimator, Weighted)
        assert isinstance(self.reference, Weighted)
        return self.estimator, self.reference


def joined(estimator: State, reference: State) -> State:
    """The memory of a difference, from that of its two, each settled by itself."""
    found = State()
    for prefix, state in ((FIRST, estimator), (SECOND, reference)):
        found.tracked |= {f"{prefix} {name}": average for name, average in state.tracked.items()}
        found.learned |= {f"{prefix} {name}": module for name, module in state.learned.items()}
    return found


def apart(state: State) -> tuple[State, State]:
    """The memories that were `joined`."""

    def of(prefix: str) -> State:
        own = len(prefix) + 1
        tracked = {name[own:]: average for name, average in state.tracked.items() if name.startswith(f"{prefix} ")}
        return State(tracked, {n[own:]: module for n, module in state.learned.items() if n.startswith(f"{prefix} ")})

    return of(FIRST), of(SECOND)


def _without(terms: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    return {group: term for group, term in terms.items() if group not in state.learned}


def _less(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    return -b if a is None else a - b


@dataclass(frozen=True)
class Comparison:
    """What an estimator is compared with, in which groups."""

    estimator: Estimator
    reference: Estimator
    groups: tuple[str, ...]

    @property
    def difference(self) -> Estimator:
        """What the bias is the mean of."""
        return difference(self.estimator, self.reference)


def comparisons(problem: Problem, estimator: Estimator, reference: Estimator | None) -> list[Comparison]:
    """What the bias of an estimator can be told by: the reference, or else an unbiased estimator of the same objective.

    Without a reference only the groups that are declared biased are compared; of the others the mean squared error is the
    variance. Groups of which there is no trusted estimator are left out.
    """
    groups = list(problem.model.groups)
    if reference is not None:
        known = tuple(group for group in groups if comparable(estimator, reference, group))
        return [Comparison(estimator, reference, known)] if known and reference != estimator else []
    found: dict[Estimator, list[str]] = {}
    for group in groups:
        if group in estimator.facts.biased and (of := _trusted(problem, estimator, group)) is not None:
            found.setdefault(of, []).append(group)
    return [Comparison(estimator, of, tuple(members)) for of, members in found.items()]


def comparable(estimator: Estimator, reference: Estimator, group: str) -> bool:
    """Whether a reference's mean gradient of a group is that of the estimator's objective."""
    name, facts = estimator.ascends(group), reference.facts
    return bool(name) and name == reference.ascends(group) and group not in (*facts.biased, *facts.rescaled)


def _trusted(problem: Problem, estimator: Estimator, group: str) -> Estimator | None:
    for name in TRUSTED.get(estimator.ascends(group).partition(":")[0], ()):
        try:
            of = parse(f"{name}:K={max(estimator.K, QUIET.get(name, 1))}")
        except ValueError:  # it needs more particles
            continue
        if comparable(estimator, of, group) and not problem.lacks(of):
            return of
    return None


def wanted(only: Sequence[str]) -> bool:
    """Whether a metric that needs a comparison is among those asked for; all are, if none is named."""
    return not only or bool(set(only) & set(BIAS))


def arguments(g: Sums, difference: Sums, reference: Sums) -> dict[str, tuple[Sums, ...]]:
    """What each metric of `metrics.BIAS` is a function of."""
    return {
        "bias_squared": (difference,),
        "bias": (difference,),
        "relative_bias": (difference, reference),
        "mse": (g, difference),
    }

"""Every estimator against the exact gradient of what it says it ascends, and wrong ones that the same check must refuse."""

import inspect
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from oracles import Enumerated, Given, Gradients, Outcomes, Quadrature, bound, derivative, elbo, off, scrambled
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from gradiometer.bench.gradients import one, trainable
from gradiometer.bench.measurement import Measurement, measure
from gradiometer.bench.models.toys import BernoulliToy, FunctionToy, GaussianToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.problems import Problem
from gradiometer.bench.training import initial_state, learning_step, settled
from gradiometer.estimators.base import Average, Coefficients, Facts, State, Surrogate, Weighted
from gradiometer.estimators.importance_weighted import CIWAE, IWAE, IWAESTL, VIMCO, VR, DReG, IWAEScore
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import catalogue, load_plugin, parse, register
from gradiometer.estimators.reparameterization import SGVBA, STL
from gradiometer.estimators.score_function import NVIL, RLOO, Reinforce
from gradiometer.estimators.thermodynamic import TVO
from gradiometer.estimators.wake_sleep import RWS, RWSDReG
from gradiometer.estimators.weights import (
    effective_sample_size,
    log_mean_exp,
    log_mean_exp_of_others,
    log_mean_exp_with,
    mean_of_others,
    normalized,
)

EXACT = 1e-9  # what enumeration leaves of an unbiased estimator
BIASED = 1e-2  # and what a planted mistake leaves at least
Objective = Callable[[Tensor], Tensor]  # [K, *batch] -> [*batch]
OBJECTIVES = {"elbo": elbo, "iwelbo": bound}
SCORES = ["reinforce", "moving-average", "nvil", "rloo", "iwae-score", "vimco", "rws", "tvo:partitions=1"]
RENYI = ["vr", "vr:alpha=-1", "vr:alpha=0.2", "vr:alpha=1", "vr:alpha=2.5"]
COMBINED = ["ciwae", "ciwae:beta=0", "ciwae:beta=0.2", "ciwae:beta=1"]
PATHWISE = ["sgvb-a", "sgvb-b", "stl", "iwae", "iwae-stl", "dreg", "rws-dreg", *RENYI, *COMBINED]
GENERATIVE = ["rws", "rws-dreg", "iwae-stl"]  # whose inference gradients have tests of their own
ELSEWHERE = {
    "test_nested.py": ["nvi"],
    "test_discrete.py": ["disarm", "rebar", "relax"],
    "test_relaxed.py": ["concrete"],
}


def at(word: str, K: int) -> str:
    """The word with that many particles."""
    return f"{word}{',' if ':' in word else ':'}K={K}"


def name_of(word: str) -> str:
    return word.partition(":")[0]


def renyi(alpha: float) -> Objective:
    """The K-sample Renyi bound, with nothing clever in it."""
    return elbo if alpha == 1 else lambda log_w: ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)


def combined(beta: float) -> Objective:
    return lambda log_w: beta * elbo(log_w) + (1 - beta) * bound(log_w)


def named(estimator: Weighted, group: str) -> Objective | None:
    """What the facts name, at the estimator's own settings; None for what is no expectation over K particles."""
    name = estimator.facts.objective_of(group)
    if name == "renyi bound":
        return renyi(estimator.alpha)
    if name == "ciwae bound":
        return combined(estimator.beta)
    if name == "tvo" and estimator.partitions == 1:
        return elbo
    return OBJECTIVES.get(name)


def binary(K: int, units: int = 2) -> Outcomes:
    model = scrambled(VAE(Architecture(data=4, hidden=(3,), latent=(units,), kind="bernoulli")), seed=5, scale=1.2)
    return Enumerated(model, torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]]).double(), K)


def gaussian(K: int) -> Outcomes:
    model = scrambled(VAE(Architecture(data=3, hidden=(3,), latent=(1,))), seed=6, scale=0.4)
    return Quadrature(model, torch.tensor([[1.0, 0, 1], [0, 0, 1]]).double(), K, nodes={1: 80, 2: 64, 3: 30}[K])


def frozen(outcomes: Outcomes, estimator: Weighted) -> State:
    state = initial_state(estimator, outcomes.model, outcomes.x, 0)
    for name, average in state.tracked.items():
        average.update(torch.tensor({"signal": -1.7, "square": 30.0}[name]).double())
    return state


def errors(estimator: Weighted, outcomes: Outcomes, objective: Objective | None = None) -> dict[str, float]:
    """By group, the error of the estimator's expectation for the objective its facts name, or for another one.

    Groups that are biased by their facts are left out of the first; of those that are rescaled, the direction is compared.
    """
    found = outcomes.expected(estimator, frozen(outcomes, estimator))
    objectives = {group: objective or named(estimator, group) for group in found}
    if objective is None:
        objectives |= dict.fromkeys(estimator.facts.biased)
    wanted = {group: outcomes.exact(of)[group] for group, of in objectives.items() if of is not None}
    for group in estimator.facts.rescaled:
        found[group] = found[group] * wanted[group].norm() / found[group].norm()
    return off({group: found[group] for group in wanted}, wanted)


def test_no_estimator_is_left_out() -> None:
    ours = {name for name, cls in catalogue().items() if cls.__module__.startswith("gradiometer.estimators.")}
    tested = {name_of(word) for word in SCORES + PATHWISE}
    assert ours == tested.union(*ELSEWHERE.values()), "an estimator without an exact test"
    for file, names in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert all(f'"{name}' in text or f"{name.upper()}(" in text for name in names)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("word", SCORES)
def test_on_all_outcomes_of_a_binary_model(word: str, K: int) -> None:
    name = name_of(word)
    if catalogue()[name].facts.least_particles > K:
        with pytest.raises(ValueError, match=rf"{name} needs K >= 2, not K=1"):
            parse(at(word, K))
        return
    found = errors(parse(at(word, K)), binary(K))
    assert max(found.values()) < EXACT
    assert set(found) == ({"generative"} if word in GENERATIVE else {"generative", "inference"})


@pytest.mark.parametrize("word", SCORES + PATHWISE)
def test_by_quadrature_of_a_gaussian_model(word: str) -> None:
    found = errors(parse(at(word, 2)), gaussian(2))
    assert max(found.values()) < 1e-6
    assert set(found) == ({"generative"} if word in GENERATIVE else {"generative", "inference"})


@pytest.mark.slow
@pytest.mark.parametrize("word", ["sgvb-a", "stl", "rloo", "iwae", "dreg", "vimco", *RENYI, *COMBINED])
def test_by_quadrature_with_three_particles(word: str) -> None:
    assert max(errors(parse(at(word, 3)), gaussian(3)).values()) < 1e-4


@pytest.mark.parametrize("word", SCORES + PATHWISE)
def test_the_objectives_can_be_told_apart(word: str) -> None:
    """The check above means something: at K = 2 the gradients of other objectives are far away."""
    estimator = parse(at(word, 2))
    outcomes = binary(2) if word in SCORES else gaussian(2)
    log_w = outcomes.log_weights()
    own = named(estimator, "generative")(log_w)
    others = [of for of in (elbo, bound, renyi(-0.4), combined(0.7)) if not torch.allclose(of(log_w), own)]
    assert len(others) >= 3
    for other in others:
        assert min(errors(estimator, outcomes, other).values()) > BIASED


def test_wake_wake_descends_the_inclusive_divergence_with_a_bias_that_shrinks() -> None:
    exact = inclusive(binary(1))
    sizes = {}
    for K in (2, 4, 6):
        outcomes = binary(K)
        found = outcomes.expected(parse(f"rws:K={K}"), State())["inference"]
        assert torch.allclose(found, self_normalized(outcomes), atol=1e-12)
        sizes[K] = float((found - exact).norm() / exact.norm())
    assert BIASED < sizes[6] < 0.85 * sizes[4] < 0.85**2 * sizes[2]
    assert "inference" in parse("rws").facts.biased
    assert "generative" not in parse("rws").facts.biased
    one_particle = errors(parse("rws:K=1"), binary(1), elbo)
    assert one_particle["inference"] == pytest.approx(1)  # its mean is zero


def inclusive(outcomes: Outcomes) -> Tensor:
    """The gradient of ``-KL(p(z|x) || q(z|x))`` in the guide, over all states."""
    z = outcomes.draws()  # [1, S, B, D]: every state once
    posterior = outcomes.model.log_joint(outcomes.x, z)[0].softmax(0).detach()
    log_q = outcomes.model.guide(outcomes.x).log_prob(z)[0]
    return flat((posterior * log_q).sum(0).mean(), outcomes)


def self_normalized(outcomes: Outcomes) -> Tensor:
    z = outcomes.draws()
    log_q = outcomes.model.guide(outcomes.x).log_prob(z)
    weights = (outcomes.model.log_joint(outcomes.x, z) - log_q).exp().detach()
    each = (weights * log_q).sum(0) / weights.sum(0)
    return flat((outcomes.probabilities().detach() * each).sum(0).mean(), outcomes)


@pytest.mark.parametrize("K", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_doubly_reparameterised_wake_wake_is_wake_wake_on_average(K: int) -> None:
    found = from_wake_wake(parse(f"rws-dreg:K={K}"), gaussian(K))
    assert max(found.values()) < {2: 1e-6, 3: 1e-4}[K]
    assert set(found) == {"generative", "inference"}
    assert parse("rws-dreg").facts.objective == parse("rws").facts.objective
    assert parse("rws-dreg").facts.biased == parse("rws").facts.biased


def from_wake_wake(estimator: Weighted, outcomes: Outcomes) -> dict[str, float]:
    """How far the expectation is from that of wake-wake, which has an oracle of its own."""
    return off(outcomes.expected(estimator, State()), outcomes.expected(parse(f"rws:K={outcomes.K}"), State()))


@pytest.mark.parametrize("K", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bound_loses_its_gradient_with_its_score(K: int) -> None:
    """The guide's score has mean zero at equal weights only: without it the K-sample bound's gradient is another, its own."""
    outcomes, estimator = gaussian(K), parse(f"iwae-stl:K={K}")
    assert errors(estimator, outcomes, bound)["inference"] > BIASED
    assert errors(estimator, outcomes, elbo)["inference"] > BIASED
    assert estimator.facts.biased == ("inference",)
    # What is missing is the mean of sum_k w_k grad log q(z_k): the difference to iwae, which keeps it.
    z = outcomes.draws().detach()
    log_q = outcomes.model.guide(outcomes.x).log_prob(z)
    weights = (outcomes.model.log_joint(outcomes.x, z) - log_q).softmax(0).detach()
    missing = flat((outcomes.probabilities() * (weights * log_q).sum(0)).sum(0).mean(), outcomes)
    found = outcomes.expected(estimator, State())["inference"] - missing
    assert torch.allclose(found, outcomes.exact(bound)["inference"], rtol=1e-4, atol=1e-6 if K == 2 else 1e-4)
    assert parse("iwae-stl:K=1").facts.biased == ()
    assert max(errors(parse("iwae-stl:K=1"), gaussian(1), elbo).values()) < 1e-6


def test_the_score_function_of_the_bound_has_the_mean_of_its_pathwise_gradient() -> None:
    outcomes = gaussian(2)
    found, wanted = (outcomes.expected(parse(f"{word}:K=2"), State()) for word in ("iwae-score", "iwae"))
    assert max(off(found, wanted).values()) < 1e-6
    assert parse("iwae-score").facts.same_mean == {"": "iwae"}
    assert off(outcomes.expected(parse("rws:K=2"), State()), wanted)["inference"] > BIASED


# The thermodynamic objective is an expectation under the annealed posteriors, not under K particles.

PARTITIONS = [(1, 0.5), (2, 0.025), (2, 0.4), (4, 0.1)]  # how many, and beta1


def knots(partitions: int, beta1: float) -> list[float]:
    """0, and from beta1 to 1 in equal steps of the logarithm."""
    return [0.0, *np.geomspace(beta1, 1, partitions)] if partitions > 1 else [0.0, 1.0]


def riemann(values: Callable[[float], Tensor], points: list[float]) -> Tensor:
    """The left sum, a lower bound of the integral."""
    return sum((after - before) * values(before) for before, after in pairwise(points))


def thermodynamic(outcomes: Outcomes, points: list[float]) -> Gradients:
    """The exact gradient, over all states: nothing is held fixed."""
    z = outcomes.draws()  # [1, S, B, D]: every state once
    log_p = outcomes.model.log_joint(outcomes.x, z)[0]  # [S, B]
    log_q = outcomes.model.guide(outcomes.x).log_prob(z)[0]
    value = riemann(lambda B: ((B * log_p + (1 - B) * log_q).softmax(0) * (log_p - log_q)).sum(0), points)
    return derivative(value.mean(), outcomes.groups)


def crowd(outcomes: Outcomes, K: int) -> Tensor:
    """Particles ``[K, 1, B, D]`` among which every state is as frequent as in the guide, to one part in K."""
    states = outcomes.draws()[0]  # [S, B, D]
    edges = outcomes.probabilities().detach().cumsum(0)  # [S, B]
    levels = ((torch.arange(K) + 0.5) / K).double().expand(states.shape[1], -1)  # [B, K]
    chosen = torch.searchsorted(edges.T.contiguous(), levels.contiguous())  # [B, K]
    return torch.stack([states[row, b] for b, row in enumerate(chosen)], 1).unsqueeze(1)


def from_thermodynamic(estimator: Weighted, points: list[float]) -> dict[str, float]:
    """How far the estimate is, with as many particles as it has and no chance among them, from the exact gradient."""
    outcomes = binary(1)
    source = Given(crowd(outcomes, estimator.K), standard=False)
    terms = estimator.surrogate(outcomes.model, outcomes.x.unsqueeze(0), source, State()).terms
    found = {group: derivative(term.mean(), outcomes.groups)[group] for group, term in terms.items()}
    return off(found, thermodynamic(outcomes, points))


@pytest.mark.parametrize(("partitions", "beta1"), PARTITIONS)
def test_the_thermodynamic_gradient_is_consistent(partitions: int, beta1: float) -> None:
    word = f"tvo:K=100000,partitions={partitions},beta1={beta1}"
    found = from_thermodynamic(parse(word), knots(partitions, beta1))
    assert max(found.values()) < 1e-3
    assert set(found) == {"generative", "inference"}


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize(("partitions", "beta1"), PARTITIONS)
def test_thermodynamic_columns_at_few_particles(partitions: int, beta1: float, K: int) -> None:
    word = f"tvo:K={K},partitions={partitions},beta1={beta1}"
    assert max(from_covariances(parse(word), binary(K), knots(partitions, beta1)).values()) < EXACT


def from_covariances(estimator: Weighted, outcomes: Outcomes, points: list[float]) -> dict[str, float]:
    """Against autograd of the self-normalised averages, drawn from a proposal that nothing differentiates.

    What the weights' own derivative adds is a sample covariance, to be taken with K - 1.
    """
    z = outcomes.draws()
    log_p, log_q = outcomes.model.log_joint(outcomes.x, z), outcomes.model.guide(outcomes.x).log_prob(z)
    probability, K = outcomes.probabilities().detach(), outcomes.K

    def average(B: float) -> Tensor:
        weights = (B * log_p + (1 - B) * log_q - log_q.detach()).exp()
        held = weights.detach()
        direct = (held * (log_p - log_q)).sum(0) / held.sum(0)
        full = (weights * (log_p - log_q)).sum(0) / weights.sum(0)
        return direct + K / (K - 1) * (full - direct)

    value = riemann(average, points)
    wanted = derivative((probability * value).sum(0).mean(), outcomes.groups)
    return off(outcomes.expected(estimator, State()), wanted)


def test_the_thermodynamic_gradient_has_a_bias_that_shrinks() -> None:
    exact = thermodynamic(binary(1), knots(2, 0.3))
    for group in ("generative", "inference"):
        sizes = {}
        for K in (2, 4, 6):
            found = binary(K).expected(parse(f"tvo:K={K},beta1=0.3"), State())[group]
            sizes[K] = float((found - exact[group]).norm() / exact[group].norm())
        assert BIASED < sizes[6] < 0.85 * sizes[4] < 0.85**2 * sizes[2]
        assert group in parse("tvo").facts.biased
    assert parse("tvo:partitions=1").facts.biased == ()


def flat(value: Tensor, outcomes: Outcomes) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, outcomes.groups["inference"])])


# Wrong estimators. Each has to be refused by the check that the right ones pass.

FACTS = {"elbo": Facts("wrong", family="test"), "iwelbo": Facts("wrong", family="test", objective="iwelbo")}
REPARAMETERIZED = Facts("wrong", family="test", objective="iwelbo", needs=("rsample",))


@dataclass(frozen=True)
class Columns(Weighted):
    """Whatever columns it is given."""

    K: int = 2
    of: Callable[[Tensor], tuple] = None  # type: ignore[assignment]

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(*self.of(log_w))


def wrong(of: Callable[[Tensor], tuple], pathwise: bool = False, K: int = 2) -> Weighted:
    facts = Facts("wrong", family="test", needs=("rsample",) if pathwise else ())
    return type("Wrong", (Columns,), {"facts": facts})(K, of)


def mean(x: Tensor) -> Tensor:
    return torch.full_like(x, 1 / len(x))


def lme(x: Tensor) -> Tensor:
    return x.exp().mean(0).log()


def w(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(0)


def others(x: Tensor) -> Tensor:
    return (x.sum(0) - x) / (len(x) - 1)


def own(x: Tensor) -> Tensor:
    """VIMCO's term with the arithmetic mean of the others, by hand for two particles: the other weight alone."""
    return lme(x) - x.flip(0)


RIGHT_COLUMNS = {
    "reinforce": ("elbo", lambda x: (mean(x), None, x / 2), False),
    "rloo": ("elbo", lambda x: (mean(x), None, (x - others(x)) / 2), False),
    "vimco-arithmetic": ("iwelbo", lambda x: (w(x), None, own(x) - w(x)), False),
    "iwae": ("iwelbo", lambda x: (w(x), w(x), -w(x)), True),
    "dreg": ("iwelbo", lambda x: (w(x), w(x) ** 2, None), True),
}
WRONG_COLUMNS = {
    "sign": ("elbo", lambda x: (mean(x), None, -x / 2), False),
    "sum over particles for mean": ("elbo", lambda x: (mean(x), None, x), False),
    "baseline with its own sample": ("elbo", lambda x: (mean(x), None, (x - x.mean(0)) / 2), False),
    "baseline of the bound with its own sample": ("iwelbo", lambda x: (w(x), None, lme(x) - x - w(x)), False),
    "no score term": ("iwelbo", lambda x: (w(x), None, -w(x)), False),
    "no pathwise part for discrete latents": ("iwelbo", lambda x: (w(x), None, None), False),
    "reinforce of the bound without w": ("iwelbo", lambda x: (w(x), None, lme(x) + 0 * x), False),
    "w for w squared": ("iwelbo", lambda x: (w(x), w(x), None), True),
    "w squared with the score": ("iwelbo", lambda x: (w(x), w(x) ** 2, -w(x)), True),
    "normalised over the batch": ("iwelbo", lambda x: (w(x), x.softmax(-1) ** 2, None), True),
    "equal weights": ("iwelbo", lambda x: (mean(x), w(x) ** 2, None), True),
    "scale right on average": ("iwelbo", lambda x: (1.5 * w(x), 0.5 * w(x) ** 2, None), True),
    "zero guide": ("elbo", lambda x: (mean(x), None, None), True),
    "Renyi without 1 - alpha": (renyi(-1), lambda x: (w(x), w(x), -w(x)), True),
    "Renyi with alpha for 1 - alpha": (renyi(0.2), lambda x: (w(0.2 * x), w(0.2 * x), -w(0.2 * x)), True),
    "Renyi not divided by 1 - alpha": (renyi(-1), lambda x: (2 * w(2 * x), 2 * w(2 * x), -2 * w(2 * x)), True),
    "Renyi without the score": (renyi(0.2), lambda x: (w(0.8 * x), w(0.8 * x), None), True),
    "Renyi with its weights squared": (renyi(0.2), lambda x: (w(0.8 * x), w(0.8 * x) ** 2, None), True),
    "beta and 1 - beta exchanged": (combined(0.2), lambda x: (mix(x, 0.8), mix(x, 0.8), -mix(x, 0.8)), True),
    "beta not divided by K": (combined(0.2), lambda x: (0.2 + 0.8 * w(x), 0.2 + 0.8 * w(x), -0.2 - 0.8 * w(x)), True),
    "combined without the score": (combined(0.2), lambda x: (mix(x, 0.2), mix(x, 0.2), None), True),
}
WRONG_WAKE_WAKE = {
    "w for w - w squared": lambda x: (w(x), w(x), None),
    "w squared for w - w squared": lambda x: (w(x), w(x) ** 2, None),
    "w squared - w": lambda x: (w(x), w(x) ** 2 - w(x), None),
    "both forms at once": lambda x: (w(x), w(x) - w(x) ** 2, w(x)),
    "equal weights for the model": lambda x: (mean(x), w(x) - w(x) ** 2, None),
}


def mix(x: Tensor, beta: float) -> Tensor:
    return beta / len(x) + (1 - beta) * w(x)


def annealed(x: Tensor, a: Callable, c: Callable, parts: list[tuple[float, float]], heat: float = 0.0) -> tuple:
    """Columns of the thermodynamic objective: `a` and `c` of the exponent and the centred signal, over exponents and widths."""
    columns = [0.0, 0.0]
    for B, width in parts:
        u = w((heat or B) * x)
        signal = x - (u * x).sum(0)
        columns = [total + width * u * of(B, signal) for total, of in zip(columns, (a, c), strict=True)]
    return columns[0], None, columns[1]


def lower(points: list[float]) -> list[tuple[float, float]]:
    return [(before, after - before) for before, after in pairwise(points)]


POINTS = knots(3, 0.2)
PARTS = lower(POINTS)
UPPER = [(after, after - before) for before, after in pairwise(POINTS)]
RIGHT_A, RIGHT_C = lambda B, d: 1 + B * d, lambda B, d: (1 - B) * d - 1
WRONG_THERMODYNAMIC = {
    "the model's covariance without B": lambda x: annealed(x, lambda B, d: 1 + d, RIGHT_C, PARTS),
    "the model without its covariance": lambda x: annealed(x, lambda B, d: 1, RIGHT_C, PARTS),
    "the covariance alone": lambda x: annealed(x, lambda B, d: B * d, RIGHT_C, PARTS),
    "the guide's covariance without 1 - B": lambda x: annealed(x, RIGHT_A, lambda B, d: d - 1, PARTS),
    "B for 1 - B": lambda x: annealed(x, RIGHT_A, lambda B, d: B * d - 1, PARTS),
    "no -1": lambda x: annealed(x, RIGHT_A, lambda B, d: (1 - B) * d, PARTS),
    "weights not annealed": lambda x: annealed(x, RIGHT_A, RIGHT_C, PARTS, heat=1.0),
    "signal not centred": lambda x: annealed(x, lambda B, d: 1 + B * x, lambda B, d: (1 - B) * x - 1, PARTS),
    "partitions of equal width": lambda x: annealed(x, RIGHT_A, RIGHT_C, lower(list(np.linspace(0, 1, 4)))),
    "the upper sum": lambda x: annealed(x, RIGHT_A, RIGHT_C, UPPER),
}


@pytest.mark.parametrize("name", RIGHT_COLUMNS)
def test_right_columns_pass(name: str) -> None:
    objective, of, pathwise = RIGHT_COLUMNS[name]
    found = errors(wrong(of, pathwise), gaussian(2) if pathwise else binary(2), OBJECTIVES[objective])
    assert max(found.values()) < (1e-6 if pathwise else EXACT)


@pytest.mark.parametrize("name", WRONG_COLUMNS)
def test_wrong_columns_do_not(name: str) -> None:
    objective, of, pathwise = WRONG_COLUMNS[name]
    found = errors(wrong(of, pathwise), gaussian(2) if pathwise else binary(2), OBJECTIVES.get(objective, objective))
    assert max(found.values()) > BIASED


@pytest.mark.parametrize("name", WRONG_WAKE_WAKE)
def test_wrong_columns_are_not_wake_wake_on_average(name: str) -> None:
    assert max(from_wake_wake(wrong(WRONG_WAKE_WAKE[name], pathwise=True), gaussian(2)).values()) > BIASED


def test_right_thermodynamic_columns_pass() -> None:
    right = wrong(lambda x: annealed(x, RIGHT_A, RIGHT_C, PARTS), K=100_000)
    assert max(from_thermodynamic(right, POINTS).values()) < 1e-3


@pytest.mark.parametrize("name", WRONG_THERMODYNAMIC)
def test_wrong_thermodynamic_columns_do_not(name: str) -> None:
    estimator = wrong(WRONG_THERMODYNAMIC[name], K=100_000)
    assert max(from_thermodynamic(estimator, POINTS).values()) > BIASED


def test_a_covariance_with_its_own_mean_is_refused_at_few_particles() -> None:
    """Right in the limit, and (K - 1) / K of the covariance at K particles: with one partition, of the ELBO's gradient."""
    found = []
    for points in ([0.0, 1.0], POINTS):
        estimator = wrong(lambda x, parts=lower(points): annealed(x, RIGHT_A, RIGHT_C, parts))
        found.append(from_covariances(estimator, binary(2), points))
    assert found[0]["inference"] == pytest.approx(0.5)
    assert min(found[1].values()) > BIASED


@dataclass(frozen=True)
class NotDetached(Weighted):
    """IWAE, whose weights are differentiated along with what they weigh."""

    K: int = 2
    facts = REPARAMETERIZED

    def coefficients(self, log_w: Tensor) -> Coefficients:
        raise NotImplementedError

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        z = rng.rsample(q, self.K)
        log_w = model.log_joint(x, z) - q.log_prob(z)
        term = (log_w.softmax(0) * log_w).sum(0)
        return Surrogate({"generative": term, "inference": term}, log_w.detach())


def test_weights_that_are_not_detached_are_refused() -> None:
    found = errors(NotDetached(), gaussian(2))
    assert min(found.values()) > BIASED


def test_the_hand_formulas_of_weights() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double() * 3
    for k in range(3):
        rest = [i for i in range(3) if i != k]
        assert torch.allclose(mean_of_others(x)[k], x[rest].mean(0))
        assert torch.allclose(log_mean_exp_of_others(x)[k], x[rest].exp().mean(0).log())
        replaced = x.clone()
        replaced[k] = 0.3 * x[k]
        assert torch.allclose(log_mean_exp_with(x, 0.3 * x)[k], replaced.exp().mean(0).log())
    assert torch.allclose(log_mean_exp(x), x.exp().mean(0).log())
    assert torch.allclose(normalized(x), x.exp() / x.exp().sum(0))
    assert torch.allclose(effective_sample_size(x), x.exp().sum(0) ** 2 / (x.exp() ** 2).sum(0))
    assert torch.equal(log_mean_exp_with(x[:1], 0.3 * x[:1]), 0.3 * x[:1])
    huge = torch.tensor([[900.0], [-900.0], [0.0]]).double()
    assert torch.equal(log_mean_exp_of_others(huge)[:, 0].round(), torch.tensor([-1.0, 899, 899]).double())


# Identities, draw by draw.


def draw(word: str, model: nn.Module, x: Tensor, replicate: int = 0) -> dict[str, Tensor]:
    estimator = parse(word)
    state = initial_state(estimator, model, x, 0)
    return one(estimator, model, x, Rng(3, replicate), state, trainable(model, state)).gradients


def same(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str = "") -> bool:
    return all(torch.allclose(first[n], second[n], rtol=1e-12, atol=1e-13) for n in first if n.startswith(prefix))


@pytest.mark.parametrize(
    ("first", "second"),
    [(f"{word}:K=1", "sgvb-a:K=1") for word in ("iwae", "vr", "ciwae")]
    + [("vr:K=1,alpha=-1", "sgvb-a:K=1"), ("dreg:K=1", "stl:K=1"), ("iwae-stl:K=1", "stl:K=1")],
)
@pytest.mark.parametrize("latent", [(3,), (3, 2)], ids=["one layer", "two layers"])
def test_with_one_particle_bounds_are_the_elbo(first: str, second: str, latent: tuple[int, ...]) -> None:
    model = scrambled(VAE(Architecture(data=3, hidden=(4,), latent=latent, between=(3,))))
    x = torch.tensor([[1.0, 0, 1], [0, 0, 1]]).double()
    assert all(same(draw(first, model, x, r), draw(second, model, x, r)) for r in range(5))
    assert not same(draw(first, model, x), draw("sgvb-a" if "stl" in second else "stl", model, x), "encoder")


def test_bounds_between_the_elbo_and_that_of_k_samples_are_them_at_their_ends() -> None:
    outcomes = gaussian(1)
    model, x = outcomes.model, outcomes.x
    for replicate in range(5):
        of_elbo, of_bound = (draw(f"{word}:K=3", model, x, replicate) for word in ("sgvb-a", "iwae"))
        for word, settings in (("vr", ("alpha=1", "alpha=0")), ("ciwae", ("beta=1", "beta=0"))):
            ends = [draw(f"{word}:K=3,{setting}", model, x, replicate) for setting in settings]
            assert same(ends[0], of_elbo)
            assert same(ends[1], of_bound)
            assert not same(draw(f"{word}:K=3", model, x, replicate), of_elbo)
            assert not same(draw(f"{word}:K=3", model, x, replicate), of_bound)
        between = {n: 0.3 * of_elbo[n] + 0.7 * of_bound[n] for n in of_elbo}
        assert same(draw("ciwae:K=3,beta=0.3", model, x, replicate), between)
        for near, tolerance in ((1e-3, 1e-2), (-1e-6, 1e-5)):
            found = draw(f"vr:K=3,alpha={1 - near}", model, x, replicate)
            assert all(torch.allclose(found[n], g, rtol=tolerance, atol=tolerance) for n, g in of_elbo.items())


def test_the_values_of_bounds_between() -> None:
    log_w = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).double() - 20
    for alpha in (-3, 0, 0.2, 0.5, 1, 2.5):
        assert torch.allclose(parse(f"vr:alpha={alpha}").objective(log_w), renyi(alpha)(log_w))
    for beta in (0, 0.2, 1):
        assert torch.allclose(parse(f"ciwae:beta={beta}").objective(log_w), combined(beta)(log_w))
    ordered = [parse(f"vr:alpha={alpha}").objective(log_w) for alpha in (-3, 0, 0.2, 1, 2.5)]
    assert all((more > less).all() for more, less in pairwise(ordered))
    # No digits are lost next to the limit, where log K would cancel, nor to weights too large or small to exponentiate.
    for alpha in (1 - 1e-7, 1 + 1e-7, 1 - 2.0**-53):
        assert torch.allclose(parse(f"vr:alpha={alpha}").objective(log_w.float()), elbo(log_w).float(), rtol=1e-6)
    for alpha in (-3, 0.5, 1, 2.5):
        shifted = parse(f"vr:alpha={alpha}").objective(log_w - 5000)
        assert torch.allclose(shifted, renyi(alpha)(log_w) - 5000)


def test_the_values_of_the_thermodynamic_objective() -> None:
    log_w = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).double() - 20
    for partitions, beta1 in PARTITIONS:
        wanted = riemann(lambda B: (w(B * log_w) * log_w).sum(0), knots(partitions, beta1))
        found = parse(f"tvo:partitions={partitions},beta1={beta1}").objective(log_w)
        assert torch.allclose(found, wanted)
        assert (found < bound(log_w)).all()  # the lower sum of an integral that is the bound of these particles
        assert torch.allclose(found, elbo(log_w)) if partitions == 1 else (found > elbo(log_w)).all()
    fine = parse("tvo:partitions=4000,beta1=0.0001").objective(log_w)
    assert torch.allclose(fine, bound(log_w), rtol=0, atol=1e-2)


def test_rloo_is_vargrad_and_moving_average_starts_as_reinforce() -> None:
    outcomes = binary(3)
    assert same(
        draw("moving-average:K=3", outcomes.model, outcomes.x), draw("reinforce:K=3", outcomes.model, outcomes.x)
    )
    z = Rng(3, 0).sample(outcomes.model.guide(outcomes.x), 3)
    log_q = outcomes.model.guide(outcomes.x).log_prob(z)
    log_w = outcomes.model.log_joint(outcomes.x, z) - log_q
    value = -0.5 * log_w.var(0).mean()  # the log-variance divergence, its gradient taken through q alone
    found = torch.cat(
        [g.flatten() for n, g in draw("rloo:K=3", outcomes.model, outcomes.x).items() if n.startswith("encoder")]
    )
    assert torch.allclose(flat(value, outcomes), found, rtol=1e-10, atol=1e-12)


class Conjugate(nn.Module):
    """``z ~ N(0, I)``, ``x|z ~ N(z, I)``: the posterior is ``N(x/2, 1/2 I)``, and the guide can be exactly that."""

    groups = {"generative": (), "inference": ("encoder", "width")}  # noqa: RUF012

    def __init__(self, units: int, off_by: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.width = nn.Linear(units, units), nn.Linear(1, units, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(units) / 2 + off_by)
            self.encoder.bias.zero_()
            self.width.weight.fill_(-0.5 * math.log(2))
        self.double()
        with torch.no_grad():
            self.width.weight.fill_(-0.5 * math.log(2))

    def guide(self, x: Tensor) -> Independent:
        mean = self.encoder(x)
        return Independent(Normal(mean, self.width(torch.ones_like(x[..., :1])).exp()), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + (x - z) ** 2 + 2 * math.log(2 * math.pi)).sum(-1)

    def evidence(self, x: Tensor) -> Tensor:
        """``x ~ N(0, 2 I)``."""
        return (-(x**2) / 4 - 0.5 * math.log(4 * math.pi)).sum(-1)


@pytest.mark.parametrize("word", ["stl", "stl:K=3", "iwae-stl:K=3", "dreg:K=3", "rws-dreg:K=3", "rloo:K=3"])
def test_noiseless_at_the_exact_posterior(word: str) -> None:
    x = torch.tensor([[1.0, -0.4], [0.3, 2.0]]).double()
    estimator = parse(word)
    state = initial_state(estimator, Conjugate(2), x, 0)
    log_w = estimator.surrogate(Conjugate(2), x, Rng(0), state).log_w
    assert torch.allclose(log_w, Conjugate(2).evidence(x).expand_as(log_w), atol=1e-14)
    assert all(float(g.abs().max()) < 1e-13 for r in range(5) for g in draw(word, Conjugate(2), x, r).values())
    assert max(float(g.abs().max()) for g in draw(word, Conjugate(2, off_by=0.1), x).values()) > 1e-3


@pytest.mark.parametrize(
    "word",
    [
        "sgvb-a",
        "iwae:K=3",
        "iwae-score:K=3",
        "reinforce",
        "nvil",
        "vimco:K=3",
        "rws:K=3",
        "vr:K=3",
        "ciwae:K=3",
        "tvo:K=3",
    ],
)
def test_the_others_are_not_noiseless_there(word: str) -> None:
    x = torch.tensor([[1.0, -0.4], [0.3, 2.0]]).double()
    assert max(float(g.abs().max()) for g in draw(word, Conjugate(2), x).values()) > 0.05


# Exact variances, from the lists of all outcomes.


def exact_moments(estimator: Weighted, outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    g, probability = outcomes.single_draws(estimator, frozen(outcomes, estimator))
    average = (probability.unsqueeze(1) * g).sum(0)
    return average.numpy(), (probability.unsqueeze(1) * (g - average) ** 2).sum(0).numpy()


def bernoulli_variance(word: str, p: float, f0: float, f1: float) -> float:
    D = f1 - f0
    if word == "rloo:K=2":
        return D**2 * p * (1 - p) * (0.5 - p * (1 - p))
    return p * (1 - p) * ((1 - p) * f1 + p * f0) ** 2


@pytest.mark.parametrize("logit", [0.5, -1.3])
@pytest.mark.parametrize("word", ["reinforce", "rloo:K=2"])
def test_variances_of_one_bernoulli(word: str, logit: float) -> None:
    toy = BernoulliToy(p0=0.3, logit=logit).double()
    with torch.no_grad():
        toy.encoder.weight.fill_(logit)
    p, f0, f1 = 1 / (1 + math.exp(-logit)), 0.09, 0.49
    estimator = parse(word)
    average, variance = exact_moments(estimator, Enumerated(toy, torch.ones(1, 1).double(), estimator.K))
    assert average[0] == pytest.approx(p * (1 - p) * (f1 - f0))
    assert variance[0] == pytest.approx(bernoulli_variance(word, p, f0, f1))
    m = measure(Problem(toy, torch.ones(1, 1)), estimator, replicates=20_000, dtype=torch.float64)
    found = m.metrics("inference")["variance"]
    assert abs(found.value - variance[0]) < 5 * found.stderr
    assert found.stderr < 0.05 * variance[0]


@pytest.mark.parametrize("mu", [1.0, -0.7])
def test_variances_of_a_quadratic(mu: float) -> None:
    k = 0.5
    d = mu - k
    toy = FunctionToy("quadratic", k=k, mu=mu).double()
    with torch.no_grad():
        toy.encoder.weight.copy_(torch.tensor([[mu], [1.0]]))
    known = {
        "stl": (4, 4 * d**2 + 8),
        "reinforce": (d**4 + 14 * d**2 + 15, 2 * d**4 + 60 * d**2 + 74),
    }
    for word, wanted in known.items():
        average, variance = exact_moments(parse(word), Quadrature(toy, torch.ones(1, 1).double(), 1))
        assert average == pytest.approx([2 * d, 2.0])  # of d^2 + sigma^2
        assert variance == pytest.approx(wanted)
    with_score = exact_moments(parse("sgvb-a"), Quadrature(toy, torch.ones(1, 1).double(), 1))
    assert with_score[0] == pytest.approx([2 * d, 2.0])
    assert with_score[1] != pytest.approx(known["stl"], rel=0.05)


# Through the measurement, against closed forms.

X = torch.tensor([[1.0, -2.0], [0.5, 0.3], [-1.4, 0.9]])


def gaussian_toy() -> nn.Module:
    return scrambled(GaussianToy(2), seed=8, scale=0.5)


def by_hand(toy: nn.Module) -> dict[str, np.ndarray]:
    """The ELBO is ``-1/2 |x - m|^2 - 1/2 |m - mu|^2 + const`` with ``m = A x + b``, since the guide's width is fixed."""
    A, b = (p.detach().numpy() for p in (toy.encoder.weight, toy.encoder.bias))
    mu, x = toy.mu.weight.detach().numpy()[:, 0], X.double().numpy()
    m = x @ A.T + b
    by_m = (x - m) + (mu - m)
    return {
        "mu.weight": (m - mu).mean(0)[:, None],
        "encoder.weight": by_m.T @ x / len(x),
        "encoder.bias": by_m.mean(0),
    }


def largest_t(m: Measurement, wanted: dict[str, np.ndarray]) -> float:
    return max(float((np.abs(m.mean[n] - wanted[n]) / np.sqrt(m.variance[n] / m.replicates)).max()) for n in wanted)


@pytest.mark.parametrize(
    "word",
    [
        "sgvb-a", "sgvb-b", "stl:K=2", "reinforce:K=2", "moving-average", "rloo:K=3", "iwae:K=1", "dreg:K=1",
        "vr:K=2,alpha=1", "ciwae:K=2,beta=1", "tvo:K=2,partitions=1", "iwae-stl:K=1", "iwae-score:K=1",
    ],
)  # fmt: skip
def test_means_are_the_closed_form(word: str) -> None:
    toy = gaussian_toy()
    m = measure(Problem(toy, X), parse(word), replicates=8192)
    noisy = {n: g for n, g in by_hand(toy).items() if m.variance[n].min() > 0}
    assert set(noisy) == ({"encoder.weight", "encoder.bias"} if word == "sgvb-b" else set(by_hand(toy)))
    assert largest_t(m, noisy) < 5
    quiet = {n: g for n, g in by_hand(toy).items() if n not in noisy}
    assert all(np.allclose(m.mean[n], g, atol=1e-6) for n, g in quiet.items())  # sgvb-b knows this one exactly


def test_wrong_means_are_not_the_closed_form() -> None:
    toy = gaussian_toy()
    problem, wanted = Problem(toy, X), by_hand(toy)
    planted = {
        "another objective": parse("dreg:K=4"),
        "baseline with its own sample": wrong(WRONG_COLUMNS["baseline with its own sample"][1]),
        "sign": wrong(WRONG_COLUMNS["sign"][1]),
    }
    for name, estimator in planted.items():
        assert largest_t(measure(problem, estimator, replicates=8192), wanted) > 5, name


def test_closed_form_and_sampled_divergence_agree_and_the_first_is_quieter() -> None:
    model = scrambled(VAE(Architecture(data=5, hidden=(4,), latent=(3,))), seed=2, scale=0.5)
    x = (torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    sampled, closed = (measure(Problem(model, x), parse(word), replicates=4096) for word in ("sgvb-a", "sgvb-b"))
    worst = max(
        float(
            (
                np.abs(sampled.mean[n] - closed.mean[n]) / np.sqrt((sampled.variance[n] + closed.variance[n]) / 4096)
            ).max()
        )
        for n in sampled.mean
    )
    assert worst < 5
    for group in ("generative", "inference"):
        assert closed.metrics(group)["variance"].value <= sampled.metrics(group)["variance"].value * 1.0001


def test_measured_bounds_are_the_closed_form() -> None:
    toy = gaussian_toy()
    A, b = (p.detach().numpy() for p in (toy.encoder.weight, toy.encoder.bias))
    mu, x = toy.mu.weight.detach().numpy()[:, 0], X.double().numpy()
    m, s2, D = x @ A.T + b, 2 / 3, 2
    entropy = D / 2 * math.log(2 * math.pi * math.e * s2)
    fits = -0.5 * ((x - m) ** 2).sum(1) - 0.5 * ((m - mu) ** 2).sum(1) - D * s2 - D * math.log(2 * math.pi)
    evidence = (-((x - mu) ** 2) / 4 - 0.5 * math.log(4 * math.pi)).sum(1).mean()
    found = {K: measure(Problem(toy, X), parse(f"iwae:K={K}"), replicates=4096).values() for K in (1, 64)}
    assert abs(found[1]["elbo"].value - (fits + entropy).mean()) < 5 * found[1]["elbo"].stderr
    assert found[1]["elbo"].value == found[1]["iwelbo"].value
    assert found[1]["elbo"].value < found[64]["iwelbo"].value - 5 * found[64]["iwelbo"].stderr
    assert evidence - 0.2 < found[64]["iwelbo"].value < evidence
    assert abs(found[64]["elbo"].value - (fits + entropy).mean()) < 5 * found[64]["elbo"].stderr


def test_values_do_not_depend_on_the_estimator() -> None:
    problem = Problem(gaussian_toy(), X)
    elbos = [
        measure(problem, parse(f"{word}:K=4"), replicates=64).values()
        for word in ("stl", "dreg", "rloo", "vimco", "sgvb-b")
    ]
    assert all(v["elbo"].value == pytest.approx(elbos[0]["elbo"].value, rel=1e-5) for v in elbos)
    assert all(v["iwelbo"].value == pytest.approx(elbos[0]["iwelbo"].value, rel=1e-5) for v in elbos)
    assert all(v["iwelbo"].value > v["elbo"].value for v in elbos)
    objectives = [v["objective"].value == v["iwelbo"].value for v in elbos]
    assert objectives == [False, True, False, True, False]
    assert all(v["evaluations"].value == 4 for v in elbos)
    assert all(1 < v["ess"].value < 4 for v in elbos)


def test_bounds_between_are_measured_between() -> None:
    problem = Problem(gaussian_toy(), X)
    found = {word: measure(problem, parse(f"{word}:K=4"), replicates=64).values() for word in ("vr", "ciwae", "tvo")}
    assert all(v["elbo"].value < v["objective"].value < v["iwelbo"].value for v in found.values())
    halfway = (found["ciwae"]["elbo"].value + found["ciwae"]["iwelbo"].value) / 2
    assert found["ciwae"]["objective"].value == pytest.approx(halfway, rel=1e-6)


# The moving average.


def test_the_average_starts_at_its_first_observation() -> None:
    average = Average(0.9)
    assert average.value == 0.0
    for observation in (2.0, 4.0, -1.0):
        average.update(torch.tensor([observation - 1, observation + 1]))
    assert float(average.value) == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 4) - 0.1)


def test_the_average_holds_earlier_draws_only() -> None:
    outcomes = binary(2)
    estimator, model, x = parse("moving-average:K=2,decay=0.5"), outcomes.model, outcomes.x
    state = initial_state(estimator, model, x, 0)
    parameters = trainable(model, state)
    optimizer = torch.optim.SGD([p for members in parameters.values() for p in members.values()], 0.0)
    expected = 0.0
    for step in range(4):
        z = Rng(1, step).sample(model.guide(x), 2)
        log_q = model.guide(x).log_prob(z)
        signal = (model.log_joint(x, z) - log_q).detach()
        wanted = flat(((signal - expected) * log_q).mean(0).mean(), outcomes)
        found = learning_step(estimator, model, x, Rng(1, step), state, parameters, optimizer).gradients
        assert torch.allclose(
            torch.cat([found[n].flatten() for n in found if n.startswith("encoder")]), wanted, atol=1e-12
        )
        expected = 0.5 * expected + 0.5 * float(signal.mean()) if step else float(signal.mean())
        assert float(state.tracked["signal"].value) == pytest.approx(expected)


def test_measuring_leaves_the_average_still() -> None:
    """Replicates of a frozen average are exchangeable: the loop's moments are those of the rows, in any order."""
    toy = BernoulliToy().double()
    found = [
        measure(
            Problem(toy, torch.ones(1, 1)), parse("moving-average"), replicates=64, engine=engine, dtype=torch.float64
        )
        for engine in ("rows", "loop")
    ]
    assert found[0].variance["encoder.weight"] == pytest.approx(found[1].variance["encoder.weight"], rel=1e-12)
    reinforce = measure(Problem(toy, torch.ones(1, 1)), parse("reinforce"), replicates=64, dtype=torch.float64)
    assert found[0].metrics("inference")["variance"].value < 0.1 * reinforce.metrics("inference")["variance"].value


# The baseline that is a network.


def standardised(signal: Tensor, m: float, v: float) -> Tensor:
    return (signal - m) / math.sqrt(max(v, 1))


@pytest.mark.parametrize(("square", "factor"), [(30.0, math.sqrt(30 - 1.7**2)), (3.2, 1.0), (-5.0, 1.0)])
def test_the_signal_is_divided_by_its_deviation_where_that_is_large(square: float, factor: float) -> None:
    outcomes, estimator = binary(2), parse("nvil:K=2")
    state = initial_state(estimator, outcomes.model, outcomes.x, 0)
    for name, value in (("signal", -1.7), ("square", square)):
        state.tracked[name].update(torch.tensor(value, dtype=torch.float64))
    found, wanted = outcomes.expected(estimator, state), outcomes.exact(elbo)
    assert torch.allclose(found["inference"] * factor, wanted["inference"], rtol=1e-10, atol=1e-12)
    assert torch.allclose(found["generative"], wanted["generative"], rtol=1e-10, atol=1e-12)
    assert (factor == 1) == torch.allclose(found["inference"], wanted["inference"])
    assert estimator.facts.rescaled == ("inference",)


class SeesItself(NVIL):
    """Its averages hold the draw that they centre and scale."""

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        signal = self._less_baseline(log_w, x, state).detach()
        m, square = (
            self.decay * state.tracked[name].value + (1 - self.decay) * seen.mean(0)
            for name, seen in (("signal", signal), ("square", signal**2))
        )
        return (signal - m) / (square - m**2).clamp(min=1) ** 0.5


def test_averages_that_hold_the_present_draw_turn_the_gradient() -> None:
    for K in (1, 2):
        assert errors(SeesItself(K=K), binary(K))["inference"] > BIASED
        assert errors(NVIL(K=K), binary(K))["inference"] < EXACT


def test_nvil_by_hand_step_by_step() -> None:
    """Averages and the network hold earlier draws only; the network descends the squared error on the step's own."""
    outcomes = binary(2)
    estimator, model, x = parse("nvil:K=2,decay=0.5"), outcomes.model, outcomes.x
    state = initial_state(estimator, model, x, 0)
    network = state.learned["baseline"]
    groups = trainable(model, state)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    m = square = 0.0
    for step in range(4):
        q = model.guide(x)
        z = Rng(1, step).sample(q, 2)
        log_w = (model.log_joint(x, z) - q.log_prob(z)).detach()
        signal = (log_w - network(x).squeeze(-1)).detach()
        score = q.log_prob(z)
        wanted = flat((standardised(signal, m, square - m**2) * score).mean(0).mean(), outcomes)
        error = ((log_w - network(x).squeeze(-1) - m) ** 2).mean()
        descent = torch.autograd.grad(error, list(network.parameters()))
        expected = [p.detach() - 0.05 * g for p, g in zip(network.parameters(), descent, strict=True)]

        found = learning_step(estimator, model, x, Rng(1, step), state, groups, optimizer).gradients
        mine = torch.cat([g.flatten() for n, g in found.items() if n.startswith("encoder")])
        assert torch.allclose(mine, wanted, atol=1e-12)
        assert all(torch.allclose(p, e, atol=1e-12) for p, e in zip(network.parameters(), expected, strict=True))
        decay = 0.5 if step else 0.0
        m = decay * m + (1 - decay) * float(signal.mean())
        square = decay * square + (1 - decay) * float((signal**2).mean())
        assert float(state.tracked["signal"].value) == pytest.approx(m)
        assert float(state.tracked["square"].value) == pytest.approx(square)
    assert square - m**2 > 1  # the last of the steps were divided by something


def test_a_default_without_a_type_is_said_to_be_none() -> None:
    with pytest.raises(
        ValueError, match="Untyped sets K = 8 without a type, which changes no default: write K: int = 8"
    ):

        @register
        @dataclass(frozen=True)
        class Untyped(Weighted):
            K = 8
            facts = Facts("untyped", family="test")

            def coefficients(self, log_w: Tensor) -> Coefficients:
                return Coefficients(torch.ones_like(log_w))


def test_the_baseline_tells_data_apart() -> None:
    outcomes, estimator = binary(1), parse("nvil")
    state = settled(estimator, outcomes.model, outcomes.x, 0)
    means = (outcomes.probabilities() * outcomes.log_weights()[0]).sum(0).detach()  # the ELBO of each data point
    baseline = state.learned["baseline"](outcomes.x)[:, 0].detach() + state.tracked["signal"].value
    assert (means - means.mean()).norm() > 1
    assert (baseline - means).norm() < 0.5 * (means - means.mean()).norm()
    problem = Problem(outcomes.model, outcomes.x)
    noise = {
        word: measure(problem, parse(word), replicates=2048, dtype=torch.float64).metrics("inference")["variance"].value
        for word in ("nvil", "moving-average", "reinforce")
    }
    v = float(state.tracked["square"].value - state.tracked["signal"].value ** 2)
    assert noise["nvil"] * max(1, v) < 0.8 * noise["moving-average"] < 0.8 * noise["reinforce"]


def test_an_image_is_read_like_its_pixels() -> None:
    class Images(VAE):
        def guide(self, x: Tensor) -> Independent:
            return super().guide(x.flatten(-2))

        def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
            return super().log_joint(x.flatten(-2), z)

    outcomes = binary(1)
    images = Images(outcomes.model.architecture).double()
    images.load_state_dict(outcomes.model.state_dict())
    flat_x, x = outcomes.x, outcomes.x.unflatten(-1, (2, 2))
    assert same(draw("nvil:K=3", images, x), draw("nvil:K=3", outcomes.model, flat_x))
    found = [
        measure(Problem(m, of), parse("nvil:K=2"), replicates=16) for m, of in ((images, x), (outcomes.model, flat_x))
    ]
    assert all(np.allclose(found[0].variance[n], v, rtol=1e-4) for n, v in found[1].variance.items())
    assert found[0].engine == "rows"


# Words.


def test_words_are_read_as_they_are_printed() -> None:
    for word in (
        "dreg:K=64",
        "sgvb-a",
        "rloo:K=2",
        "nvi:K=4,levels=4,resample=systematic,path=learned",
        "moving-average:decay=0.5",
        "rws-dreg:K=2",
        "vr:K=4,alpha=-1.0",
        "ciwae:K=8,beta=0.25",
        "tvo:K=8,partitions=5,beta1=0.1",
        "nvil:decay=0.5",
        "concrete:K=2,tau=0.1",
        "disarm:K=4",
        "rebar:tau=1.0",
    ):
        assert str(parse(word)) == word
    assert {type(parse(w)) for w in ("iwae", "dreg", "vimco", "vr", "ciwae")} == {IWAE, DReG, VIMCO, VR, CIWAE}
    assert {type(parse(w)) for w in ("iwae-stl", "iwae-score", "nvil")} == {IWAESTL, IWAEScore, NVIL}
    assert {type(parse(w)) for w in ("rws", "rws-dreg", "tvo")} == {RWS, RWSDReG, TVO}
    assert {type(parse(w)) for w in ("sgvb-a", "stl", "rloo", "reinforce")} == {SGVBA, STL, RLOO, Reinforce}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("drag", "unknown estimator 'drag'; did you mean 'dreg'?"),
        ("dreg:k=3", "dreg has no option 'k'"),
        ("dreg:K=three", "K of dreg should be a whole number, not 'three'"),
        ("dreg:K", "should read key=value"),
        ("dreg:K=0", "dreg needs K >= 1, not K=0"),
        ("dreg:K=2,K=3", "given twice"),
        ("nvi:levels=1", "nvi needs levels >= 2"),
        ("nvi:path=lerned", "path of nvi should be one of linear, learned, not 'lerned'"),
        ("moving-average:decay=1", "moving-average needs 0 <= decay < 1"),
        ("vr:alpha=inf", "vr needs a finite alpha, not alpha=inf"),
        ("vr:alpha=nan", "vr needs a finite alpha, not alpha=nan"),
        ("ciwae:beta=1.5", "ciwae needs 0 <= beta <= 1, not beta=1.5"),
        ("ciwae:beta=nan", "ciwae needs 0 <= beta <= 1, not beta=nan"),
        ("tvo:partitions=0", "tvo needs partitions >= 1, not partitions=0"),
        ("tvo:beta1=1", "tvo needs 0 < beta1 < 1, not beta1=1.0"),
        ("tvo:beta1=0", "tvo needs 0 < beta1 < 1, not beta1=0.0"),
        ("tvo:K=1", "tvo needs K >= 2, not K=1"),
        ("nvil:decay=1", "nvil needs 0 <= decay < 1, not decay=1.0"),
        ("disarm:K=1", "disarm needs K >= 2, not K=1"),
        ("disarm:K=3", "disarm needs an even K, since its particles come in pairs, not K=3"),
        ("concrete:tau=0", "concrete needs a finite tau > 0, not tau=0.0"),
        ("rebar:tau=nan", "rebar needs a finite tau > 0, not tau=nan"),
        ("relax:tau=inf", "relax needs a finite tau > 0, not tau=inf"),
    ],
)
def test_wrong_words_are_answered_in_a_sentence(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        parse(word)


@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("name", sorted(catalogue()))
def test_the_printed_word_stands_for_the_same_estimator(name: str, K: int) -> None:
    if catalogue()[name].facts.least_particles <= K:
        estimator = parse(f"{name}:K={K}")
        assert parse(str(estimator)) == estimator
        assert f"K={K}" in str(estimator) or K == 1


@pytest.mark.parametrize(
    ("word", "ascended"),
    [
        ("stl:K=8", "elbo"), ("iwae:K=8", "iwelbo:K=8"), ("iwae:K=1", "elbo"), ("vr:alpha=0", "iwelbo:K=8"), ("vr:alpha=1", "elbo"),
        ("vr:K=1", "elbo"), ("vr:alpha=0.5", "renyi bound:K=8,alpha=0.5"), ("ciwae:beta=0", "iwelbo:K=8"), ("ciwae:beta=1", "elbo"),
        ("tvo:partitions=1", "elbo"), ("tvo", "tvo:K=8,partitions=2,beta1=0.025"),
    ],
)  # fmt: skip
def test_estimators_of_one_objective_say_so(word: str, ascended: str) -> None:
    assert parse(word).ascends("generative") == ascended


def test_the_inclusive_divergence_is_one_objective_at_every_k() -> None:
    assert parse("rws:K=8").ascends("inference") == parse("rws:K=64").ascends("inference") == "inclusive KL"


@pytest.mark.usefixtures("forgotten")
def test_settings_in_a_word_have_the_types_of_their_fields() -> None:
    @register
    @dataclass(frozen=True)
    class Typed(Weighted):
        order: Literal[1, 2] = 1
        lags: int | None = None
        shape: tuple[int, ...] = ()
        facts = Facts("typed", family="f", objective="elbo")

        def coefficients(self, log_w: Tensor) -> Coefficients:
            return Coefficients(log_w)

    assert parse("typed:order=2,lags=5") == Typed(order=2, lags=5)
    assert parse("typed:lags=None") == Typed()
    for word, said in (
        ("typed:order=3", "order of typed should be one of 1, 2, not '3'"),
        ("typed:lags=five", "lags of typed should be a whole number, not 'five'"),
        ("typed:shape=3", "shape of typed cannot be given in a word, only in Python"),
    ):
        with pytest.raises(ValueError, match=said):
            parse(word)


@pytest.mark.usefixtures("forgotten")
def test_an_estimator_of_the_catalogue_is_batched_as_a_plugin_too(tmp_path: Path) -> None:
    """What our own code may do, a copy of it may: nothing rests on where a file lies."""
    code = Path(sys.modules[NVIL.__module__].__file__).read_text(encoding="utf-8")
    imports = code[code.index("from __future__") : code.index("@register")]
    own = inspect.getsource(NVIL).replace("class NVIL", "class Mine").replace('Facts("nvil"', 'Facts("mine"')
    start = "" if own.startswith("@register") else "@register\n@dataclass(frozen=True)\n"
    (tmp_path / "mine.py").write_text(imports + start + own, encoding="utf-8")
    load_plugin(tmp_path / "mine.py")
    problem = Problem(scrambled(VAE(Architecture(data=5, hidden=(4,), latent=(3,)))).float(), torch.ones(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, ours = (measure(problem, word, replicates=16, settle=3) for word in ("mine:K=2", "nvil:K=2"))
    assert mine.engine == "rows"
    assert mine.metrics("inference")["variance"].value == ours.metrics("inference")["variance"].value

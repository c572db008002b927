"""Relaxed latents by themselves, and what the harness makes of estimators of discrete ones."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from engine import IMAGES, binary
from oracles import Enumerated, Outcomes, Scattered, Uniforms, derivative, elbo, off, scrambled
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, OneHotCategorical, Uniform

from gradiometer.bench.gradients import estimated, trainable
from gradiometer.bench.measurement import measure
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.named import fresh
from gradiometer.bench.problems import Problem
from gradiometer.bench.training import Recipe, ascent, initial_state, learning_step, settled, train
from gradiometer.estimators.base import State, Surrogate
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse
from gradiometer.estimators.relaxed import Concrete

EXACT, BIASED = 1e-9, 1e-2
X = IMAGES


def relaxed_objective(model: nn.Module, x: Tensor, u: Tensor, weight: Tensor, tau: float) -> dict[str, Tensor]:
    """The gradient of the mean signal at relaxed latents, written out: the nodes stay, all else moves."""
    q = model.guide(x).base_dist
    if isinstance(q, OneHotCategorical):
        s = ((q.probs.log() - (-u.log()).log()) / tau).exp()
        s = s / s.sum(-1, keepdim=True)
        log_q = (s * q.probs.log()).sum((-1, -2))
    else:
        p = q.probs
        odds = (p / (1 - p) * (1 - u) / u) ** (1 / tau)
        s = odds / (1 + odds)
        log_q = (s * p.log() + (1 - s) * (1 - p).log()).sum(-1)
    value = (model.log_joint(x, s) - log_q).mean(0)
    return derivative(
        (weight * value).sum(0).mean(), {g: list(ps.values()) for g, ps in trainable(model, State()).items()}
    )


class OneHot(Outcomes):
    """Some uniforms for every class of one-hot latents."""

    def __init__(self, model: nn.Module, x: Tensor, K: int) -> None:
        super().__init__(model, x, K)
        generator = torch.Generator().manual_seed(0)
        self.u = torch.rand(K, 50, len(x), *model.guide(x).event_shape, generator=generator).double()
        self.weight = torch.full((50, len(x)), 1 / 50).double()

    source, probabilities = Uniforms.source, Uniforms.probabilities


@pytest.mark.parametrize("tau", [0.3, 1.5])
@pytest.mark.parametrize("K", [1, 2])
def test_concrete_is_the_gradient_of_its_own_mean(K: int, tau: float) -> None:
    categorical = scrambled(VAE(Architecture(data=4, hidden=(3,), latent=(2,), kind="categorical", classes=3)), 5, 1.2)
    for outcomes in (Uniforms(binary(1), X, K, 12), Scattered(binary(2), X, K, 0), OneHot(categorical, X, K)):
        weight = outcomes.probabilities()
        wanted = relaxed_objective(outcomes.model, X, outcomes.u, weight, tau)
        assert max(off(outcomes.expected(Concrete(K=K, tau=tau), State()), wanted).values()) < EXACT
        others = [Concrete(K=K, tau=1.5 * tau), *(WrongSignal(K=K, tau=tau, of=of) for of in WRONG_SIGNALS.values())]
        for other in others:
            assert off(outcomes.expected(other, State()), {"inference": wanted["inference"]})["inference"] > BIASED


@dataclass(frozen=True)
class WrongSignal(Concrete):
    """Evaluates another log q, of the guide and the relaxed latents."""

    of: Callable[[Independent, Tensor], Tensor] = None  # type: ignore[assignment]

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        zeros = torch.zeros_like(q.mean)
        u = rng.sample(Independent(Uniform(zeros, zeros + 1), len(q.event_shape)), self.K)
        logits = q.base_dist.logits
        if isinstance(q.base_dist, Bernoulli):
            s = ((logits - u.logit()) / self.tau).sigmoid()
        else:
            s = ((logits - (-u.log()).log()) / self.tau).softmax(-1)
        return Surrogate({"inference": (model.log_joint(x, s) - self.of(q, s)).mean(0)})


WRONG_SIGNALS = {
    "of latents that do not move": lambda q, s: q.log_prob(s.detach()),
    "of the nearest latents": lambda q, s: q.log_prob(s.round()),
    "held, as if its score had mean zero": lambda q, s: held(q).log_prob(s),
}


def held(q: Independent) -> Independent:
    return Independent(type(q.base_dist)(logits=q.base_dist.logits.detach(), validate_args=False), 1)


def test_the_bias_of_concrete_shows_and_shrinks_with_the_temperature() -> None:
    outcomes = Uniforms(binary(1), X, 1, 300)
    wanted = Enumerated(outcomes.model, X, 1).exact(elbo)
    for group in ("generative", "inference"):
        # The inference gradient's bias changes its sign on the way.
        temperatures = (2.0, 1.0, 0.5, 0.2, 0.1, 0.02)
        found = {tau: off(outcomes.expected(Concrete(tau=tau), State()), wanted)[group] for tau in temperatures}
        assert found[2.0] > found[1.0] > found[0.2] > found[0.1] > found[0.02]
        assert found[0.5] > BIASED > found[0.02]
        assert group in Concrete.facts.biased


def test_relaxed_latents_have_no_bound_to_show() -> None:
    found = measure(Problem(binary(2).float(), X.float()), parse("concrete:K=2"), replicates=64)
    assert found.engine == "rows"
    assert set(found.values()) == {"evaluations"}
    assert found.values()["evaluations"].value == 2
    # Two particles, each at a latent and at its relaxation; and once more to learn the control variate.
    assert measure(Problem(binary(2).float(), X.float()), parse("rebar:K=2"), replicates=64).evaluations == 4


# In the harness.


@pytest.mark.parametrize("word", ["rebar:K=2", "relax", "nvil"])
def test_what_is_learned_is_trained_and_not_measured(word: str) -> None:
    model, x = (
        fresh("digits-vae-bernoulli", 0)[0],
        (torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) < 0.4).float(),
    )
    estimator = parse(word)
    m = measure(Problem(model, x), estimator, replicates=32, engine="rows")
    assert set(m.groups) == {"generative", "inference"}
    assert {row["group"] for row in m.rows() if "group" in row} == {"generative", "inference"}
    assert all(v.value > 0 for g in m.groups for name, v in m.metrics(g).items() if name == "variance")
    state = initial_state(estimator, model, x, 0)
    (group,) = state.learned
    groups = trainable(model, state)
    assert set(groups) == {"generative", "inference", group}
    assert set(estimated(estimator, state, groups)) == {"generative", "inference"}
    before = {name: p.detach().clone() for members in groups.values() for name, p in members.items()}
    optimizer = torch.optim.Adam([p for members in groups.values() for p in members.values()], 1e-3)
    for step in range(3):
        learning_step(estimator, model, x, Rng(0, step, block=1), state, groups, optimizer)
    moved = {name: float((p - before[name]).abs().max().detach()) for of in groups.values() for name, p in of.items()}
    assert min(moved.values()) > 0
    assert max(moved.values()) < 0.01


@pytest.mark.parametrize("word", ["rebar", "relax", "nvil"])
def test_a_frozen_guide_has_nothing_to_learn_for(word: str) -> None:
    model, x, estimator = binary(2).float(), X.float(), parse(word)
    model.encoder.requires_grad_(False)
    state = settled(estimator, model, x, 0)
    found = ascent(estimator, model, x, Rng(0, 0), state, trainable(model, state)).gradients
    assert all(bool(gradient.any()) for name, gradient in found.items() if name.startswith("decoder"))
    assert measure(Problem(model, x), estimator, replicates=8).groups.keys() == {"generative"}


def test_what_an_objective_names_is_measured() -> None:
    model, x = VAE(Architecture(data=4, hidden=(3,), latent=(2,))), X.float()
    nvi = parse("nvi:K=2,levels=3,path=learned")
    assert set(measure(Problem(model, x), nvi, replicates=8).groups) == {"generative", "inference", "kernels", "path"}


@pytest.mark.parametrize("word", ["nvil:K=2", "concrete", "disarm", "rebar", "relax"])
def test_a_model_trains(word: str) -> None:
    model, data = fresh("digits-vae-bernoulli", 0)
    x = data.batch(torch.arange(200), torch.Generator().manual_seed(1))

    def value() -> float:
        with torch.no_grad():
            q = model.guide(x)
            z = Rng(0, 0, "value").sample(q, 20)
            return float((model.log_joint(x, z) - q.log_prob(z)).mean())

    before = value()
    for _ in train(model, parse(word), data, Recipe(word, steps=150, learning_rate=1e-2)):
        pass
    assert value() > before + 1

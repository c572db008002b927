"""Antithetic and relaxed estimators against the enumerated gradient of the ELBO; their uniforms are integrated out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from engine import IMAGES, binary, memory
from oracles import Enumerated, Outcomes, Scattered, Uniforms, elbo, off, scrambled
from torch import Tensor, nn
from torch.distributions import Independent, Uniform

from gradiometer.bench.gradients import one, trainable
from gradiometer.bench.measurement import measure
from gradiometer.bench.models.toys import BernoulliToy, Expectation
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.problems import Problem
from gradiometer.bench.training import initial_state, settled
from gradiometer.estimators import relaxed
from gradiometer.estimators.antithetic import DisARM
from gradiometer.estimators.base import Estimator, Facts, State, Surrogate
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse
from gradiometer.estimators.relaxed import REBAR, RELAX, conditional

EXACT = 1e-9
INTEGRATED = 1e-4  # what quadrature leaves at the nodes below
BIASED = 1e-2
X = IMAGES
CONTROLLED = ["rebar", "relax"]


def exact(outcomes: Outcomes) -> dict[str, Tensor]:
    return Enumerated(outcomes.model, outcomes.x, 1).exact(elbo)


def controls(estimator: Estimator, model: nn.Module, x: Tensor, kind: str) -> State:
    """A control variate as it starts, at random parameters, or as it is after it has learned."""
    match kind:
        case "fresh":
            return initial_state(estimator, model, x, 0)
        case "random":
            return memory(estimator, model, x)
    return settled(estimator, model, x, 0)


# Antithetic pairs.


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("units", [1, 2])
def test_disarm_by_its_pieces(units: int, K: int) -> None:
    outcomes = Uniforms(binary(units), X, K // 2)
    found = outcomes.expected(parse(f"disarm:K={K}"), State())
    assert max(off(found, exact(outcomes)).values()) < EXACT
    assert set(found) == {"generative", "inference"}


@dataclass(frozen=True)
class Pairs(Estimator):
    """Whatever gradient by the logits is made of f(b) - f(b~), the pair, its uniforms, and p."""

    K: int = 2
    of: Callable[..., Tensor] = None  # type: ignore[assignment]
    flipped: Callable[[Tensor, Tensor], Tensor] = lambda u, p: 1 - u < p
    facts = Facts("pairs", family="test", needs=("bernoulli",))

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        p = q.mean.detach()
        u = rng.sample(Independent(Uniform(torch.zeros_like(p), torch.ones_like(p)), 1), 1)
        b, other = (u < p).double(), self.flipped(u, p).double()
        f, f_other = ((model.log_joint(x, z) - q.log_prob(z)).detach().unsqueeze(-1) for z in (b, other))
        g = self.of(f - f_other, b, other, u, p)
        return Surrogate({"inference": (g * q.base_dist.logits).sum((0, -1))})


PAIRS = {
    "disarm": lambda f, b, o, u, p: f / 2 * (-1) ** o * (b != o) * torch.sigmoid(p.logit().abs()),
    "arm": lambda f, b, o, u, p: f * (0.5 - u),
    "without the indicator": lambda f, b, o, u, p: f / 2 * (-1) ** o * torch.sigmoid(p.logit().abs()),
}
WRONG_PAIRS = {
    "where the pair agrees": lambda f, b, o, u, p: f / 2 * (-1) ** o * (b == o) * torch.sigmoid(p.logit().abs()),
    "arm's sign": lambda f, b, o, u, p: f * (u - 0.5),
    "the sign of the first": lambda f, b, o, u, p: f / 2 * (-1) ** b * (b != o) * torch.sigmoid(p.logit().abs()),
    "p for the larger of p and 1 - p": lambda f, b, o, u, p: f / 2 * (b - o) * p,
    "twice": lambda f, b, o, u, p: f * (b - o) * torch.sigmoid(p.logit().abs()),
    "the score of the first": lambda f, b, o, u, p: f * (b - p),
}


def test_pairs_that_are_right_and_pairs_that_are_not() -> None:
    outcomes = Uniforms(binary(2), X, 1)
    wanted = {"inference": exact(outcomes)["inference"]}
    for name, of in PAIRS.items():
        assert off(outcomes.expected(Pairs(of=of), State()), wanted)["inference"] < EXACT, name
    for name, of in WRONG_PAIRS.items():
        assert off(outcomes.expected(Pairs(of=of), State()), wanted)["inference"] > BIASED, name
    same = Pairs(
        of=PAIRS["disarm"], flipped=lambda u, p: u > p
    )  # certainly different, but not of the guide's distribution
    assert off(outcomes.expected(same, State()), wanted)["inference"] > BIASED


def test_the_pair_is_the_draw_of_others_and_its_mirror_image() -> None:
    model, seen = binary(2), []

    class Seen(VAE):
        def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
            seen.append(z)
            return super().log_joint(x, z)

    model.__class__ = Seen
    for word in ("rloo:K=3", "disarm:K=6", "rebar:K=3"):
        parse(word).surrogate(model, X, Rng(3), controls(parse(word), model, X, "fresh"))
    rloo, disarm, soft, rebar = seen
    assert torch.equal(disarm[:3], rloo)
    assert torch.equal(rebar, rloo)
    assert torch.equal((soft > 0.5).double(), rloo)
    p = model.guide(X).mean
    u = Rng(3).sample(Independent(Uniform(torch.zeros_like(p), torch.ones_like(p)), 1), 3)
    assert torch.equal(disarm[3:], (u > 1 - p).double())


@pytest.mark.parametrize("logit", [0.5, -1.3])
def test_the_variance_of_disarm_on_one_bernoulli(logit: float) -> None:
    toy = scrambled(BernoulliToy(p0=0.3))
    with torch.no_grad():
        toy.encoder.weight.fill_(logit)
    p, D, one_by_one = 1 / (1 + math.exp(-logit)), 0.49 - 0.09, torch.ones(1, 1).double()
    m = min(p, 1 - p)
    wanted = D**2 * m * (1 - m) ** 2 * (0.5 - m)
    mean, variance = moments(DisARM(), Uniforms(toy, one_by_one, 1), State())
    assert float(mean) == pytest.approx(p * (1 - p) * D)
    assert float(variance) == pytest.approx(wanted)
    found = measure(Problem(toy, one_by_one), DisARM(), replicates=20_000, dtype=torch.float64)
    measured = found.metrics("inference")["variance"]
    assert found.engine == "rows"
    assert abs(measured.value - wanted) < 5 * measured.stderr
    assert measured.stderr < 0.05 * wanted


def moments(estimator: Estimator, outcomes: Outcomes, state: State) -> tuple[Tensor, Tensor]:
    g, probability = outcomes.by_logits(estimator, state)
    mean = (probability * g).sum(0)
    return mean, (probability * (g - mean) ** 2).sum(0)


def test_disarm_has_no_noise_at_the_exact_posterior() -> None:
    class Constant(BernoulliToy):
        def __init__(self) -> None:
            Expectation.__init__(self, lambda b: 0 * b + 1.7, [0.4, -1.1])

    model, x = Constant().double(), torch.ones(1, 1).double()
    for r in range(20):
        found = {
            w: one(parse(w), model, x, Rng(0, r), State(), trainable(model, State())) for w in ("disarm", "reinforce")
        }
        assert float(found["disarm"].gradients["encoder.weight"].abs().max()) < 1e-15
        assert float(found["reinforce"].gradients["encoder.weight"].abs().max()) > 0.1
    assert DisARM.facts.noiseless


# The conditional noise.


def test_noise_given_the_latent() -> None:
    """z is logistic about the logit, so F(z - logit) is uniform: given b = 1 between 1 - p and 1, given b = 0 below."""
    logits = torch.linspace(-6, 6, 25).double().unsqueeze(1).requires_grad_()
    v, p = torch.linspace(0.001, 0.999, 40).double(), logits.sigmoid()
    for b in (0.0, 1.0):
        z = conditional(logits, torch.full_like(p, b), v.expand(25, -1))
        below = 1 - v * p if b else (1 - p) * (1 - v)
        assert torch.allclose((z - logits).sigmoid(), below, atol=1e-12)
        assert ((z > 0) == bool(b)).all()
        (slope,) = torch.autograd.grad(z.sum(), logits)
        step = 1e-6
        ends = [conditional(logits + h, torch.full_like(p, b), v.expand(25, -1)).sum(1) for h in (step, -step)]
        assert torch.allclose(slope[:, 0], (ends[0] - ends[1]) / (2 * step), atol=1e-6)
        assert (slope > 0).all()
        assert (slope < 40).all()  # of z itself it is 1 for each of the 40


@pytest.mark.parametrize("word", ["disarm:K=4", "concrete:K=3", "rebar:K=3", "relax:K=3"])
@pytest.mark.parametrize("logit", [-40.0, -100.0, 17.0, 40.0, 200.0])
def test_latents_that_are_all_but_certain(word: str, logit: float) -> None:
    model = VAE(Architecture(data=4, hidden=(), latent=(3,), kind="bernoulli"))
    nn.init.constant_(model.encoder.net[0].bias, logit)
    estimator, x = parse(word), X.float()
    for state in (initial_state(estimator, model, x, 0), settled(estimator, model, x, 0)):
        found = one(estimator, model, x, Rng(0), state, trainable(model, state)).gradients
        assert all(g.isfinite().all() for g in found.values())
        assert all(p.isfinite().all() for module in state.learned.values() for p in module.parameters())


# Control variates of the relaxed sample.


@pytest.mark.parametrize("kind", ["fresh", "random", "trained"])
@pytest.mark.parametrize(("units", "K", "nodes"), [(1, 1, 40), (2, 1, 30), (1, 2, 40)])
@pytest.mark.parametrize("word", CONTROLLED)
def test_controlled_estimators_by_quadrature(word: str, units: int, K: int, nodes: int, kind: str) -> None:
    outcomes = Uniforms(binary(units), X, K, nodes)
    estimator = parse(f"{word}:K={K}")
    state = controls(estimator, outcomes.model, X, kind)
    found = outcomes.expected(estimator, state)
    assert max(off(found, exact(outcomes)).values()) < INTEGRATED
    assert set(found) == {"generative", "inference"}
    control = state.learned["control"]
    moved = [10 * float(control.log_tau.detach()) - math.log(0.5)]
    moved += [10 * float(control.eta.detach()) - 1] if word == "rebar" else [float(control.r[2].weight.detach().norm())]
    assert all((abs(by) < 1e-6) if kind == "fresh" else (abs(by) > 0.02) for by in moved)


def largest_t(estimator: Estimator, state: State, model: nn.Module) -> float:
    runs = [Scattered(model, X, estimator.K, seed).expected(estimator, state)["inference"] for seed in range(12)]
    found = torch.stack(runs)
    wanted = Enumerated(model, X, 1).exact(elbo)["inference"]
    return float(((found.mean(0) - wanted) / (found.std(0) / math.sqrt(12))).abs().max())


@pytest.mark.parametrize("word", CONTROLLED)
def test_controlled_estimators_with_two_particles_of_two_latents(word: str) -> None:
    model, estimator = binary(2), parse(f"{word}:K=2")
    state = controls(estimator, model, X, "random")
    assert largest_t(estimator, state, model) < 6  # of 23 coordinates, with 11 degrees of freedom
    wrong = type("Wrong", (type(estimator),), {"_draw": halved(estimator._draw)})(K=2)
    assert largest_t(wrong, state, model) > 12


def halved(draw: Callable) -> Callable:
    """A control whose value is halved and whose gradient is not."""

    def made(self, *arguments):
        b, c, log_p = draw(*arguments)
        return b, c - c.detach() / 2, log_p

    return made


class WrongSign(REBAR):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        b, c, log_p = self._draw(model, x, rng, state, q)
        signal = log_p - q.log_prob(b)
        return Surrogate({"inference": ((signal + c).detach() * q.log_prob(b) + c).mean(0)})


class NotCorrected(REBAR):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        b, c, log_p = self._draw(model, x, rng, state, q)
        signal = log_p - q.log_prob(b)
        return Surrogate({"inference": ((signal - c).detach() * q.log_prob(b)).mean(0)})


WRONG_CONDITIONALS = {
    "not conditional": lambda logits, b, v: logits - v.logit(),
    "detached": lambda logits, b, v: conditional(logits, b, v).detach(),
    "of the other latent": lambda logits, b, v: conditional(logits, 1 - b, v),
    "of the other logit": lambda logits, b, v: conditional(-logits, b, v),
    "not reflected": lambda logits, b, v: conditional(logits, torch.ones_like(b), v),
}


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("planted", [*WRONG_CONDITIONALS, WrongSign(), NotCorrected()], ids=str)
def test_wrong_controls_are_biased(planted: str | Estimator, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = Uniforms(binary(2), X, 1, 20)
    wanted = {"inference": exact(outcomes)["inference"]}
    estimator = REBAR() if isinstance(planted, str) else planted
    state = controls(REBAR(), outcomes.model, X, kind)
    assert off(outcomes.expected(REBAR(), state), wanted)["inference"] < BIASED / 10
    if isinstance(planted, str):
        monkeypatch.setattr(relaxed, "conditional", WRONG_CONDITIONALS[planted])
    assert off(outcomes.expected(estimator, state), wanted)["inference"] > BIASED


# What the controls learn.


def second_moment(estimator: Estimator, outcomes: Outcomes, state: State) -> Tensor:
    g, probability = outcomes.by_logits(estimator, state)
    return (probability * g.square()).sum()


def learnt(estimator: Estimator, outcomes: Outcomes, state: State) -> list[Tensor]:
    """The mean direction in which the control is trained."""
    probability = outcomes.probabilities()
    x = outcomes.x.expand(len(probability), *outcomes.x.shape)
    term = estimator.surrogate(outcomes.model, x, outcomes.source(), state).learn()["control"]
    assert term.shape == probability.shape
    return list(torch.autograd.grad((probability * term).sum(), list(state.learned["control"].parameters())))


def slopes(estimator: Estimator, outcomes: Outcomes, state: State, step: float = 1e-5) -> list[float]:
    """Central differences of the second moment, by the first element of each parameter of the control."""
    found = []
    for parameter in state.learned["control"].parameters():
        ends = []
        for sign in (1, -1):
            moved = parameter.data.clone()
            parameter.data.view(-1)[0] += sign * step
            ends.append(float(second_moment(estimator, outcomes, state)))
            parameter.data = moved
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


class DetachedByValue(REBAR):
    """The signal's control is a number to the second derivative."""

    def _learn(self, logits: Tensor, b: Tensor, f: Tensor, c: Tensor):
        (path,) = torch.autograd.grad(c.mean(0).sum(), logits, create_graph=True)
        signal = (f - c).detach()
        return {"control": -((signal.unsqueeze(-1) * (b - logits.sigmoid())).mean(0) + path).square().sum(-1)}


@pytest.mark.parametrize(
    ("word", "units", "K", "nodes"),
    [("rebar", 2, 1, 12), ("relax", 2, 1, 12), ("rebar", 1, 2, 12), ("relax", 1, 2, 12)],
)
def test_controls_descend_the_variance(word: str, units: int, K: int, nodes: int) -> None:
    outcomes, estimator = Uniforms(binary(units), X[:1], K, nodes), parse(f"{word}:K={K}")
    state = controls(estimator, outcomes.model, outcomes.x, "random")
    found = [float(g.flatten()[0]) for g in learnt(estimator, outcomes, state)]
    wanted = [-slope for slope in slopes(estimator, outcomes, state)]
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert min(map(abs, wanted)) > 1e-4
    if word == "rebar":
        planted = learnt(DetachedByValue(K=K), outcomes, state)
        assert [float(g) for g in planted] != pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("word", CONTROLLED)
def test_learning_leaves_less_variance_than_there_was_and_than_reinforce_has(word: str, units: int) -> None:
    outcomes, estimator = Uniforms(binary(units), X[:1], 1, 24), parse(word)
    model, x = outcomes.model, outcomes.x
    before, after = (second_moment(estimator, outcomes, controls(estimator, model, x, k)) for k in ("fresh", "trained"))
    assert after < 0.97 * before
    plain = float(moments(parse("reinforce"), Enumerated(model, x, 1), State())[1].sum())
    noise = float(moments(estimator, outcomes, controls(estimator, model, x, "trained"))[1].sum())
    assert noise < 0.5 * plain


class TrainsItsControl(REBAR):
    """Hands out its main term for the control, too."""

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        made = super().surrogate(model, x, rng, state)
        return replace(made, terms={**made.terms, "control": made.terms["inference"]})


def test_the_estimate_moves_no_control() -> None:
    model = binary(2)
    for estimator, moves in ((REBAR(), False), (RELAX(), False), (TrainsItsControl(), True)):
        state = controls(estimator, model, X, "random")
        found = one(estimator, model, X, Rng(0), state, trainable(model, state)).gradients
        assert any(float(g.abs().max()) > 0 for n, g in found.items() if n.startswith("control")) == moves

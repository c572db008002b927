"""Nested variational inference against divergences integrated on a grid (the check of Zimmermann et al. 2021's gradients)."""

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import Quadrature, derivative, off, scrambled
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import relu, softplus

from gradiometer.bench.measurement import measure
from gradiometer.bench.problems import Problem
from gradiometer.estimators import nested
from gradiometer.estimators.base import State
from gradiometer.estimators.nested import NVI
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

X = torch.tensor([[0.8]]).double()


class Curved(nn.Module):
    """``z ~ N(0, 1)``, ``x|z ~ N(a z + b z^2 + c, 0.8^2)``, and an amortised Gaussian guide: nothing is symmetric."""

    groups = {"generative": ("decoder",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 2), nn.Linear(2, 1)
        self.double()
        with torch.no_grad():
            self.encoder.weight.copy_(torch.tensor([[0.5], [-0.1]]))
            self.encoder.bias.copy_(torch.tensor([0.2, 0.4]))
            self.decoder.weight.copy_(torch.tensor([[0.9, 0.3]]))
            self.decoder.bias.fill_(-0.2)

    def guide(self, x: Tensor) -> Independent:
        mean, raw = self.encoder(x).chunk(2, -1)
        return Independent(Normal(mean, softplus(raw)), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        mean = self.decoder(torch.cat([z, z**2], -1))
        return (-0.5 * z**2 - 0.5 * ((x - mean) / 0.8) ** 2 - math.log(2 * math.pi * 0.8)).sum(-1)


def memory(estimator: NVI, model: nn.Module, x: Tensor, seed: int = 4, far: float = 1.0) -> State:
    """Kernels and path away from where they start."""
    torch.manual_seed(seed)
    state = estimator.init_state(model, x)
    for pair in state.learned["kernels"]:
        for kernel in pair.values():
            kernel.double()
            kernel.head.weight.data.add_(far * 0.15 * torch.randn_like(kernel.head.weight))
            kernel.head.bias.data.add_(far * 0.4 * torch.randn_like(kernel.head.bias))
    if "path" in state.learned:
        state.learned["path"].double()
        state.learned["path"].increments.weight.data.copy_(torch.linspace(0.4, -0.5, estimator.levels - 1).unsqueeze(1))
    return state


def density(kernel: nn.Module, to: Tensor, given: Tensor, mean: Tensor, stddev: Tensor) -> Tensor:
    """The log density of a kernel in one dimension, written out."""
    u = (given - mean) / stddev
    features = torch.stack([u, mean.expand_as(u), stddev.log().expand_as(u)], -1)
    hidden = relu(features @ kernel.body.weight.T + kernel.body.bias)
    shift, width = (hidden @ kernel.head.weight.T + kernel.head.bias).unbind(-1)
    center = mean + stddev * (u / 2 + shift)
    scale = stddev * math.sqrt(3) / 2 * torch.log1p(width.exp() * (math.e - 1))  # one at width 0
    return -0.5 * ((to - center) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


# Two levels: the incoming particles are the guide's own, so every expectation is exact.


@pytest.mark.parametrize("K", [1, 2])
def test_two_levels_are_exact_in_every_group(K: int) -> None:
    model, estimator = Curved(), NVI(K=K, levels=2)
    outcomes = Quadrature(model, X, K, nodes=40 if K == 1 else 12, moves=1)
    state = memory(estimator, model, X)
    outcomes.groups |= {"kernels": list(state.learned["kernels"].parameters())}

    q0 = model.guide(X)
    mean, stddev = q0.mean[0, 0].detach(), q0.stddev[0, 0].detach()
    pair = state.learned["kernels"][0]
    z = outcomes.draws()[..., 0]
    start = z.detach()
    with torch.no_grad():  # where the second noise takes the particles
        forward = pair["proposal"](start.unsqueeze(-1), mean.view(1, 1), stddev.view(1, 1))
    moved = forward.mean[..., 0] + forward.stddev[..., 0] * outcomes.noise[1][..., 0]
    slope = center_and_scale(pair["proposal"], start, mean, stddev)
    moved = slope[0] + slope[1] * outcomes.noise[1][..., 0]  # the same, with the kernel's graph
    assert torch.allclose(moved, forward.mean[..., 0] + forward.stddev[..., 0] * outcomes.noise[1][..., 0])
    log_p = model.log_joint(X, moved.unsqueeze(-1))
    log_q0 = -0.5 * ((start - mean) / stddev) ** 2 - stddev.log() - 0.5 * math.log(2 * math.pi)
    log_v = (
        log_p
        + density(pair["reversal"], start, moved, mean, stddev)
        - log_q0
        - density(pair["proposal"], moved, start, mean, stddev)
    )
    weight = outcomes.probabilities()
    elbo = (weight * outcomes.log_weights().mean(0)).sum()
    wanted = {
        "generative": derivative((weight * (log_v.logsumexp(0) - math.log(K))).sum(), outcomes.groups)["generative"],
        "inference": derivative(elbo, outcomes.groups)["inference"],
        "kernels": derivative((weight * log_v.mean(0)).sum(), outcomes.groups)["kernels"],
    }
    found = outcomes.expected(estimator, state)
    assert max(off(found, wanted).values()) < 1e-10
    assert estimator.facts.biased == ()

    # What the check refuses: the score of the proposal kept twice, the reversal left out.
    assert off(outcomes.expected(Unreversed(K=K), state), wanted)["kernels"] > 1e-2
    assert off(outcomes.expected(NotStuck(K=K), state), wanted)["kernels"] > 1e-2
    if K == 2:
        mean_weights = derivative((weight * log_v.mean(0)).sum(), outcomes.groups)["generative"]
        assert off(found, wanted | {"generative": mean_weights})["generative"] > 1e-2


def center_and_scale(kernel: nn.Module, given: Tensor, mean: Tensor, stddev: Tensor) -> tuple[Tensor, Tensor]:
    u = (given - mean) / stddev
    features = torch.stack([u, mean.expand_as(u), stddev.log().expand_as(u)], -1)
    shift, width = (
        relu(features @ kernel.body.weight.T + kernel.body.bias) @ kernel.head.weight.T + kernel.head.bias
    ).unbind(-1)
    return mean + stddev * (u / 2 + shift), stddev * math.sqrt(3) / 2 * softplus(width + math.log(math.e - 1))


@dataclass(frozen=True)
class Unreversed(NVI):
    """Forgets the reverse kernel."""

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state):
        return super()._terms(W_in, W_out, log_v, t, 0 * r, a, stuck, state)


@dataclass(frozen=True)
class NotStuck(NVI):
    """Takes the guide's part of the pathwise derivative with the wrong sign."""

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state):
        return super()._terms(W_in, W_out, log_v, t, r, a, -stuck, state)


# Three levels: weighted particles that represent the measure before, against a grid.

GRID = torch.linspace(-8, 8, 801, dtype=torch.float64)


def levels_on_a_grid(model: Curved, state: State) -> dict[str, Tensor]:
    """Ascent gradients of minus both divergences ``KL(F_k || B_k)``, and of the normaliser of the middle target."""
    q0 = model.guide(X)
    mean, stddev = q0.mean[0, 0].detach(), q0.stddev[0, 0].detach()
    with torch.no_grad():
        log_p = model.log_joint(X, GRID.view(-1, 1, 1))[:, 0]
        log_q0 = -0.5 * ((GRID - mean) / stddev) ** 2 - stddev.log() - 0.5 * math.log(2 * math.pi)
    path, kernels = state.learned["path"].increments.weight, state.learned["kernels"]
    beta = path[:, 0].exp()[0] / path[:, 0].exp().sum()
    targets = [log_q0, (1 - beta) * log_q0 + beta * log_p, log_p]
    cell = GRID[1] - GRID[0]
    normalisers = [(target.exp().sum() * cell).log() for target in targets]
    total = torch.zeros(()).double()
    for k in (1, 2):
        before, after = GRID.unsqueeze(1), GRID.unsqueeze(0)
        log_F = targets[k - 1].unsqueeze(1) + density(
            kernels[k - 1]["proposal"], after, before.expand(-1, len(GRID)), mean, stddev
        )
        log_B = targets[k].unsqueeze(0) + density(
            kernels[k - 1]["reversal"], before, after.expand(len(GRID), -1), mean, stddev
        )
        log_F, log_B = log_F - normalisers[k - 1], log_B - normalisers[k]
        assert float(log_F.exp().sum().detach() * cell**2) == pytest.approx(1, abs=1e-9)
        total = total - (log_F.exp() * (log_F - log_B)).sum() * cell**2
    groups = {"kernels": heads(state), "path": [path]}
    return derivative(total, groups) | {"log Z": derivative(normalisers[1], {"path": [path]})["path"]}


def heads(state: State) -> list[nn.Parameter]:
    """The kernels' last layers: what lies below has a step in its gradient, which a grid cannot integrate."""
    return [p for pair in state.learned["kernels"] for kernel in pair.values() for p in kernel.head.parameters()]


def samples(estimator: NVI, state: State, replicates: int) -> dict[str, Tensor]:
    """Gradients of the learned groups, one row per replicate."""
    model = Curved()
    groups = {"kernels": heads(state), "path": list(state.learned["path"].parameters())}
    rows: dict[str, list[Tensor]] = {group: [] for group in groups}
    for r in range(replicates):
        total = {group: torch.zeros(sum(p.numel() for p in members)).double() for group, members in groups.items()}
        for surrogate in estimator.surrogate(model, X, Rng(1, r, block=1), state):
            for group, term in surrogate.terms.items():
                if group in groups and term.requires_grad:
                    total[group] += derivative(term.mean(), {group: groups[group]})[group]
        for group, gradient in total.items():
            rows[group].append(gradient)
    return {group: torch.stack(each) for group, each in rows.items()}


def largest_t(rows: Tensor, wanted: Tensor) -> float:
    error = rows.std(0) / math.sqrt(len(rows))
    moving = error > 0.01 * error.max()  # hidden units that only rare particles switch on have no t-distribution
    return float(((rows.mean(0) - wanted).abs() / error)[moving].max())


SETTINGS = {"K": 20_000, "levels": 3, "path": "learned"}
REPLICATES = 40


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    return levels_on_a_grid(Curved(), memory(NVI(**SETTINGS), Curved(), X, far=0.6))


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["none", "systematic"])
def test_kernels_and_path_of_three_levels(resample: str, exact: dict[str, Tensor]) -> None:
    estimator = NVI(**SETTINGS, resample=resample)
    rows = samples(estimator, memory(estimator, Curved(), X, far=0.6), REPLICATES)
    assert largest_t(rows["kernels"], exact["kernels"]) < 5
    assert largest_t(rows["path"], exact["path"]) < 5
    relative = (rows["kernels"].mean(0) - exact["kernels"]).norm() / exact["kernels"].norm()
    assert float(relative) < 0.02
    assert set(estimator.facts.biased) >= {"kernels", "path"}  # at few particles


@dataclass(frozen=True)
class IncomingKept(NVI):
    """Keeps the direct derivative of the incoming target, which adds that of a log normaliser."""

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state):
        terms = super()._terms(W_in, W_out, log_v, t, r, a, stuck, state)
        return terms | {"path": terms["path"] - (W_in * a).sum(0)}


@dataclass(frozen=True)
class NoNormaliser(NVI):
    """Drops the derivative of the target's own log normaliser."""

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state):
        terms = super()._terms(W_in, W_out, log_v, t, r, a, stuck, state)
        return terms | {"path": terms["path"] + (W_out * t).sum(0)}


@dataclass(frozen=True)
class EqualWeights(NVI):
    """Takes the sampler's own marginal for the measure before."""

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state):
        return super()._terms(torch.full_like(W_in, 1 / self.K), W_out, log_v, t, r, a, stuck, state)


@dataclass(frozen=True)
class Uncentred(NVI):
    """Leaves the expected log weight out of the coefficient of the incoming target."""

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state):
        terms = super()._terms(W_in, W_out, log_v, t, r, a, stuck, state)
        return terms | {"path": terms["path"] + (W_in * (W_in * log_v).sum(0) * a).sum(0)}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [IncomingKept, NoNormaliser, EqualWeights, Uncentred])
def test_wrong_paths_and_measures_are_refused(wrong: type[NVI], exact: dict[str, Tensor]) -> None:
    estimator = wrong(**SETTINGS)
    rows = samples(estimator, memory(estimator, Curved(), X, far=0.6), 15)
    group = "kernels" if wrong is EqualWeights else "path"
    assert largest_t(rows[group], exact[group]) > 8
    if (
        wrong is IncomingKept
    ):  # by exactly the gradient of the log normaliser (NVI's own is that of the divergence alone)
        assert largest_t(rows["path"], exact["path"] - exact["log Z"]) < 5


# Weights.


class Conjugate(nn.Module):
    """``z ~ N(0, I)``, ``x|z ~ N(z, I)``, so ``x ~ N(0, 2 I)``; the guide is the posterior at `off_by` zero."""

    groups = {"generative": (), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self, off_by: float) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2, bias=False).double()
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(2) / 2 + off_by)

    def guide(self, x: Tensor) -> Independent:
        mean = self.encoder(x)
        return Independent(Normal(mean, torch.full_like(mean, math.sqrt(0.5))), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + (x - z) ** 2 + 2 * math.log(2 * math.pi)).sum(-1)


Y = torch.tensor([[0.9, -0.5], [0.1, 0.6]]).double()
EVIDENCE = (-(Y**2) / 4 - 0.5 * math.log(4 * math.pi)).sum(-1)


def last_weights(estimator: NVI, model: nn.Module, state: State, replicates: int) -> Tensor:
    *_, last = estimator.surrogate(model, Y.expand(replicates, 2, 2), Rng(2, range(replicates)), state)
    return last.log_w.detach()  # [K, R, B]


@pytest.mark.parametrize("resample", ["none", "systematic"])
@pytest.mark.parametrize("levels", [2, 4])
def test_the_mean_weight_is_the_evidence(levels: int, resample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = NVI(K=6, levels=levels, resample=resample, path="learned")
    model = Conjugate(off_by=0.2)
    state = memory(estimator, model, Y, far=0.3)  # further away, weights have no variance to speak of errors with

    def t() -> float:
        ratio = (last_weights(estimator, model, state, 4000) - EVIDENCE).exp().mean(0)  # [R, B]
        return float(((ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(len(ratio)))).abs().max())

    assert t() < 5
    if resample == "systematic" and levels > 2:
        monkeypatch.setattr(nested, "log_mean_exp", lambda log_w: log_w.mean(0))
        assert t() > 8  # resampled weights that are not the mean weight


@pytest.mark.parametrize(
    "word", ["nvi:K=3,levels=2", "nvi:K=3,levels=4", "nvi:K=3,levels=4,resample=systematic,path=learned"]
)
def test_perfect_kernels_have_no_noise_in_their_weights(word: str) -> None:
    estimator, model = parse(word), Conjugate(off_by=0.0)
    state = estimator.init_state(model, Y)  # fresh kernels leave the guide, which is the posterior, invariant
    for module in state.learned.values():
        module.double()
    log_w = last_weights(estimator, model, state, 5)
    assert torch.allclose(log_w, EVIDENCE.expand_as(log_w), atol=1e-6)
    assert float((last_weights(estimator, model, memory(estimator, model, Y), 5) - EVIDENCE).abs().max()) > 0.1


def test_at_the_optimum_proposals_are_noiseless_and_reversals_are_not() -> None:
    estimator, model = NVI(K=3, levels=3), Conjugate(off_by=0.0)
    state = estimator.init_state(model, Y)
    state.learned["kernels"].double()
    largest = {"proposal": 0.0, "reversal": 0.0}
    for surrogate in estimator.surrogate(model, Y, Rng(0), state):
        for pair in state.learned["kernels"]:
            for side in largest:
                found = derivative(
                    surrogate.terms.get("kernels", torch.zeros(1)).mean(), {side: [pair[side].head.bias]}
                )
                largest[side] = max(largest[side], float(found[side].abs().max()))
    assert largest["proposal"] < 1e-6
    assert largest["reversal"] > 1e-2


def test_resampling_is_systematic() -> None:
    K = 5
    log_w = torch.tensor([0.1, 2.0, -30.0, 0.4, 1.0]).double()[:, None].repeat(1, 400)
    u = (torch.arange(400) + 0.5).double() / 400  # all uniforms there are
    z = torch.arange(K).double()[:, None, None].expand(-1, 400, 1)
    picked, value, weight = nested._resampled(u, log_w, z, z[..., 0])[:3]
    counts = torch.stack([(picked[..., 0] == k).sum(0) for k in range(K)])  # [K, 400]
    share = log_w[:, 0].softmax(0) * K
    assert torch.allclose(counts.double().mean(1), share, atol=0.01)  # unbiased
    assert ((counts.double() - share.unsqueeze(1)).abs() < 1).all()  # and never off by one
    assert torch.equal(value, picked[..., 0])
    assert weight.shape == log_w.shape


def test_paths_run_in_order_from_the_guide_to_the_posterior() -> None:
    like = torch.zeros(2, 3).double()
    straight = NVI(levels=5).betas(State(), like)
    assert torch.allclose(straight, torch.tensor([0, 0.25, 0.5, 0.75, 1]).double().expand(2, 3, 5))
    for seed in range(5):
        torch.manual_seed(seed)
        path = nested.Path(5).double()
        fresh = NVI(levels=5, path="learned").betas(State(learned={"path": path}), like)
        assert torch.allclose(fresh, straight)
        path.increments.weight.data.normal_(0, 3)
        betas = NVI(levels=5, path="learned").betas(State(learned={"path": path}), like)[0, 0]
        share = path.increments.weight[:, 0].exp() / path.increments.weight.exp().sum()
        assert betas[0] == 0
        assert float(betas[-1].detach()) == pytest.approx(1)
        assert (betas.diff() > 0).all()
        assert torch.allclose(betas.diff(), share)


# What the harness sees.


def test_only_the_last_weights_train_the_model_and_only_the_first_draws_the_guide() -> None:
    estimator = NVI(K=2, levels=4, path="learned")
    state = memory(estimator, Curved(), X)
    keys = [set(s.terms) for s in estimator.surrogate(Curved(), X, Rng(0), state)]
    assert keys == [{"inference"}, {"kernels", "path"}, {"kernels", "path"}, {"kernels", "path", "generative"}]


def test_the_guide_sticks_the_landing_draw_by_draw() -> None:
    model = scrambled(Curved(), seed=3, scale=0.4)
    estimator = NVI(K=3, levels=3)
    first = next(iter(estimator.surrogate(model, X, Rng(0, 5), memory(estimator, model, X)))).terms["inference"].mean()
    stl = parse("stl:K=3").surrogate(model, X, Rng(0, 5), State()).terms["inference"].mean()
    groups = {"inference": list(model.encoder.parameters())}
    assert torch.allclose(derivative(first, groups)["inference"], derivative(stl, groups)["inference"], atol=1e-13)


def test_measured_it_costs_a_joint_per_level_and_shows_all_groups() -> None:
    m = measure(Problem(Curved(), X), parse("nvi:K=4,levels=3,path=learned"), replicates=32)
    assert m.evaluations == 12
    assert set(m.groups) == {"generative", "inference", "kernels", "path"}
    assert m.engine == "rows"
    assert all(m.metrics(group)["variance"].value > 0 for group in m.groups)


@pytest.mark.parametrize(
    ("word", "biased"),
    [
        ("nvi:levels=2", ()),
        ("nvi:levels=3", ("kernels",)),
        ("nvi:levels=3,path=learned", ("kernels", "path")),
        ("nvi:levels=3,resample=systematic", ("generative", "kernels")),
        ("nvi:levels=3,resample=systematic,path=learned", ("generative", "kernels", "path")),
    ],
)
def test_what_it_says_of_its_bias(word: str, biased: tuple[str, ...]) -> None:
    facts = parse(word).facts
    assert facts.biased == biased
    assert ("path" in facts.named) == ("path=learned" in word)


@pytest.mark.parametrize("levels", [2, 3])
def test_without_resampling_the_model_ascends_the_bound_of_the_last_weights(levels: int) -> None:
    """Intermediate targets cancel in the product of the weights: draw by draw, it is the gradient of their log mean."""
    estimator, model = NVI(K=4, levels=levels), Curved()
    state = memory(estimator, model, X)
    *_, last = estimator.surrogate(model, X, Rng(0), state)
    found = derivative(last.terms["generative"].mean(), {"g": list(model.decoder.parameters())})["g"]
    step = 1e-5
    wanted = []
    for parameter in model.decoder.parameters():
        for i in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * step
                *_, moved = estimator.surrogate(model, X, Rng(0), state)  # kernels do not look at the model
                values.append(moved.log_w.exp().mean(0).log().mean())
                with torch.no_grad():
                    parameter.view(-1)[i] -= sign * step
            wanted.append((values[0] - values[1]) / (2 * step))
    assert torch.allclose(found, torch.stack(wanted), rtol=1e-6, atol=1e-8)

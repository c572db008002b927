"""Models against densities written out with scipy, and against what a density must be."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import scrambled
from scipy import stats
from scipy.special import expit, log_softmax
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from gradiometer.bench.models.layers import Chain
from gradiometer.bench.models.protocol import LatentVariableModel, offers, parameters_of
from gradiometer.bench.models.toys import BernoulliToy, FunctionToy, GaussianToy
from gradiometer.bench.models.vae import PRESETS, VAE, Architecture
from gradiometer.estimators.noise import Rng

C = 3  # classes
KINDS = ["gaussian", "bernoulli", "categorical"]
LATENTS = [(2,), (2, 3), (2, 1, 2)]


def vae(kind: str = "gaussian", latent: tuple[int, ...] = (2,), **options) -> VAE:
    architecture = Architecture(data=4, hidden=(3,), latent=latent, kind=kind, between=(2,), classes=C, **options)
    model = scrambled(VAE(architecture, mean=torch.tensor([0.1, 0.4, 0.6, 0.9])), seed=3, scale=0.7)
    assert isinstance(model, VAE)
    return model


def data(B: int = 5) -> Tensor:
    return (torch.rand(B, 4, generator=torch.Generator().manual_seed(0)) < 0.5).double()


def draws(model: VAE, K: int = 6) -> Tensor:
    return Rng(0).sample(model.guide(data()), K).detach()


# By hand: numpy networks and scipy densities.


def through(net: nn.Sequential, h: np.ndarray, activation=np.tanh) -> np.ndarray:
    for layer in net:
        linear = isinstance(layer, nn.Linear)
        h = h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy() if linear else activation(h)
    return h


def log_density(kind: str, output: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Of `value` under the factorised distribution that a network's `output` stands for; summed over units."""
    if kind == "gaussian":
        mean, raw = np.split(output, 2, -1)
        return stats.norm.logpdf(value, mean, np.log1p(np.exp(raw + 0.54)) + 1e-4).sum(-1)
    if kind == "bernoulli":
        return stats.bernoulli.logpmf(value, expit(output)).sum(-1)
    logits = output.reshape(*output.shape[:-1], -1, C)
    return (value * log_softmax(logits, -1)).sum((-2, -1))


def prior_density(kind: str, z: np.ndarray) -> np.ndarray:
    if kind == "gaussian":
        return stats.norm.logpdf(z).sum(-1)
    return np.full(z.shape[:2], -z.shape[2] * math.log(2 if kind == "bernoulli" else C))


def layered(model: VAE, z: np.ndarray) -> list[np.ndarray]:
    edges = np.cumsum(model.architecture.latent)[:-1]
    return np.split(z, edges, axis=2)


def flat(z: np.ndarray) -> np.ndarray:
    return z.reshape(*z.shape[:2], -1)


def joint_by_hand(model: VAE, x: np.ndarray, z: np.ndarray, activation=np.tanh) -> np.ndarray:
    kind, layers = model.architecture.kind, layered(model, z)
    total = log_density(model.architecture.likelihood, through(model.decoder, flat(layers[0]), activation), x)
    total = total + prior_density(kind, layers[-1])
    for descent, below, above in zip(model.descents, layers, layers[1:], strict=False):
        total = total + log_density(kind, through(descent.net, flat(above), activation), below)
    return total


def guide_by_hand(model: VAE, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    kind, layers = model.architecture.kind, layered(model, z)
    total = log_density(kind, through(model.encoder.net, x - np.array([0.1, 0.4, 0.6, 0.9])), layers[0])
    for ascent, below, above in zip(model.ascents, layers, layers[1:], strict=False):
        total = total + log_density(kind, through(ascent.net, flat(below)), above)
    return total


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("latent", LATENTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_those_written_out_by_hand(kind: str, latent: tuple[int, ...], likelihood: str) -> None:
    model, x = vae(kind, latent, likelihood=likelihood), data()
    z = draws(model)
    assert z.shape == (6, 5, sum(latent), *([C] if kind == "categorical" else []))
    with torch.no_grad():
        log_p, log_q = model.log_joint(x, z), model.guide(x).log_prob(z)
    np.testing.assert_allclose(log_p, joint_by_hand(model, x.numpy(), z.numpy()), rtol=1e-5)
    np.testing.assert_allclose(log_q, guide_by_hand(model, x.numpy(), z.numpy()), rtol=1e-5)
    if len(latent) == 2 and kind != "gaussian":  # the layers the other way round are another density
        wrong = np.roll(z.numpy(), 1, axis=2)
        assert np.abs(joint_by_hand(model, x.numpy(), wrong) - log_p.numpy()).max() > 0.1


@pytest.mark.parametrize(
    ("activation", "by_hand"),
    [
        ("relu", lambda h: np.maximum(h, 0)),
        ("leaky-relu", lambda h: np.where(h > 0, h, 0.3 * h)),
        ("linear", lambda h: h),
        ("tanh", np.tanh),
    ],
)
def test_activations(activation: str, by_hand) -> None:
    model = vae(activation=activation)
    z = draws(model)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.log_joint(data(), z), joint_by_hand(model, data().numpy(), z.numpy(), by_hand), rtol=1e-6
        )


@pytest.mark.parametrize("latent", LATENTS, ids=str)
@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_probabilities_of_a_finite_model_add_up_to_one(kind: str, latent: tuple[int, ...]) -> None:
    model = vae(kind, latent)
    choices = np.eye(C) if kind == "categorical" else [0.0, 1.0]
    z = torch.tensor(np.array(list(itertools.product(choices, repeat=sum(latent))))).double().unsqueeze(1)  # [S, 1, D]
    pixels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()
    with torch.no_grad():
        of_guide = model.guide(data()).log_prob(z).exp().sum(0)
        of_joint = sum(float(model.log_joint(x.unsqueeze(0), z).exp().sum()) for x in pixels)
    assert torch.allclose(of_guide, torch.ones(5).double())
    assert of_joint == pytest.approx(1)


def test_a_gaussian_model_integrates_to_one() -> None:
    model = vae("gaussian", (1,))
    z = torch.linspace(-12, 12, 4001).double().view(-1, 1, 1)
    pixels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()
    with torch.no_grad():
        assert float(model.log_joint(pixels, z).exp().sum()) * 24 / 4000 == pytest.approx(1)
        assert (model.guide(data()).log_prob(z).exp().sum(0) * 24 / 4000).numpy() == pytest.approx(np.ones(5))


def test_the_encoder_sees_centred_data_and_the_decoder_starts_at_the_mean() -> None:
    mean = torch.tensor([0.1, 0.4, 0.0, 1.0])
    fresh = VAE(Architecture(data=4, hidden=(3,), latent=(2,)), mean)
    assert torch.allclose(fresh.decoder[-1].bias, mean.clamp(0.001, 0.999).logit())
    gaussian = VAE(Architecture(data=4, hidden=(3,), latent=(2,), likelihood="gaussian"), mean)
    assert torch.allclose(gaussian.decoder[-1].bias[:4], mean.clamp(0.001, 0.999))
    plain = VAE(Architecture(data=4, hidden=(3,), latent=(2,), centred=False), mean)
    with torch.no_grad():
        assert torch.equal(plain.guide(mean).mean, plain.encoder(mean).mean)
        assert torch.equal(fresh.guide(mean).mean, fresh.encoder(torch.zeros(4)).mean)


def test_a_fresh_gaussian_head_has_unit_width() -> None:
    model = VAE(Architecture(data=4, hidden=(), latent=(2,)))
    with torch.no_grad():
        model.encoder.net[0].bias.zero_()
        assert model.guide(torch.full((1, 4), 0.5)).stddev.numpy() == pytest.approx(1, abs=2e-3)


# The joint distribution of several layers.


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_expands_by_repeating_itself(kind: str) -> None:
    q = vae(kind, (2, 3)).guide(data())
    assert isinstance(q, Chain)
    z = Rng(0).sample(q, 4)
    wide = q.expand((7, 5))
    assert wide.batch_shape == (7, 5)
    assert wide.event_shape == q.event_shape
    assert wide.has_rsample == (kind == "gaussian")
    with torch.no_grad():
        assert torch.allclose(wide.log_prob(z.unsqueeze(1).expand(-1, 7, *z.shape[1:])), q.log_prob(z).unsqueeze(1))


def test_a_chain_is_the_product_of_its_conditionals() -> None:
    first = Independent(Normal(torch.zeros(5, 2).double(), 1.5), 1)
    q = Chain(first, [lambda z: Independent(Normal(2 * z[..., :1] - 1, 0.5), 1)], [2, 1])
    z = Rng(0).sample(q, 3).numpy()
    wanted = stats.norm.logpdf(z[..., :2], 0, 1.5).sum(-1) + stats.norm.logpdf(z[..., 2], 2 * z[..., 0] - 1, 0.5)
    np.testing.assert_allclose(q.log_prob(torch.tensor(z)), wanted)


def test_kl_is_what_sampling_says() -> None:
    model, x = vae(), data()
    q = model.guide(x)
    z = Rng(0).sample(q, 200_000)
    with torch.no_grad():
        sampled = q.log_prob(z) - model.prior(q).log_prob(z)
        t = (sampled.mean(0) - model.kl(q)) / (sampled.std(0) / math.sqrt(len(z)))
        assert float(t.abs().max()) < 5
        m, s = q.mean.numpy(), q.stddev.numpy()
        np.testing.assert_allclose(model.kl(q), (0.5 * (m**2 + s**2 - 1) - np.log(s)).sum(-1))
        backwards = torch.distributions.kl_divergence(model.prior(q), q)
        assert float(((sampled.mean(0) - backwards) / (sampled.std(0) / math.sqrt(len(z)))).abs().max()) > 5


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_kl_of_discrete_latents_by_enumeration(kind: str) -> None:
    model, x = vae(kind), data()
    q = model.guide(x)
    choices = np.eye(C) if kind == "categorical" else [0.0, 1.0]
    z = torch.tensor(np.array(list(itertools.product(choices, repeat=2)))).double().unsqueeze(1)
    with torch.no_grad():
        log_q = q.log_prob(z)
        wanted = (log_q.exp() * (log_q - model.prior(q).log_prob(z))).sum(0)
        assert torch.allclose(model.kl(q), wanted)
        assert torch.allclose(model.prior(q).log_prob(z)[0], torch.tensor(-2 * math.log(len(choices))).double())


def test_likelihood_and_prior_make_the_joint() -> None:
    for kind in KINDS:
        model, x = vae(kind), data()
        z = draws(model)
        with torch.no_grad():
            parts = model.likelihood(z).log_prob(x) + model.prior(model.guide(x)).log_prob(z)
            assert torch.allclose(parts, model.log_joint(x, z))
    with pytest.raises(NotImplementedError, match="use log_joint"):
        vae("gaussian", (2, 3)).prior(vae("gaussian", (2, 3)).guide(data()))


# Groups.


@pytest.mark.parametrize("latent", LATENTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_cover_every_parameter_once(kind: str, latent: tuple[int, ...]) -> None:
    model = vae(kind, latent)
    groups = parameters_of(model)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    with torch.no_grad():
        log_p = model.log_joint(data(), draws(model))
    assert log_p.isfinite().all()
    joint = torch.autograd.grad(model.log_joint(data(), draws(model)).sum(), list(groups["generative"].values()))
    guide = torch.autograd.grad(model.guide(data()).log_prob(draws(model)).sum(), list(groups["inference"].values()))
    assert all(float(g.abs().max()) > 0 for g in (*joint, *guide))
    assert isinstance(model, LatentVariableModel)


def test_overlapping_missing_and_tied_parameters_are_refused() -> None:
    class Broken(nn.Module):
        def __init__(self, groups: dict[str, tuple[str, ...]], tie: bool = False) -> None:
            super().__init__()
            self.groups, self.encoder, self.decoder = groups, nn.Linear(2, 2), nn.Linear(2, 2)
            if tie:
                self.decoder.weight = self.encoder.weight

    whole = {"generative": ("decoder",), "inference": ("encoder",)}
    assert set(parameters_of(Broken(whole))) == {"generative", "inference"}
    with pytest.raises(ValueError, match=r"'encoder\.weight' of Broken is in groups generative and inference"):
        parameters_of(Broken({"generative": ("decoder", "encoder"), "inference": ("encoder",)}))
    with pytest.raises(ValueError, match=r"'decoder\.weight' of Broken is in no group"):
        parameters_of(Broken({"generative": ("dec",), "inference": ("encoder",)}))
    with pytest.raises(ValueError, match="ties parameters"):
        parameters_of(Broken(whole, tie=True))


def test_capabilities() -> None:
    common = {"likelihood", "prior"}
    assert offers(vae(), data()) == {*common, "kl", "rsample", "gaussian"}
    assert offers(vae("bernoulli"), data()) == {*common, "kl", "bernoulli", "discrete", "relaxed"}
    assert offers(vae("gaussian", (2, 3)), data()) == {"likelihood", "rsample"}
    assert "rsample" in offers(FunctionToy(), torch.ones(1, 1))
    assert "rsample" not in offers(BernoulliToy(), torch.ones(1, 1))
    assert offers(vae().double(), data().float()) == offers(vae().float(), data())  # a measurement brings them together


# Sizes the literature uses.


def sizes(net: nn.Sequential) -> list[int]:
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def test_presets_have_the_sizes_of_the_papers() -> None:
    one, two = VAE(PRESETS["burda-1"]), VAE(PRESETS["burda-2"])
    assert sizes(one.encoder.net) == [784, 200, 200, 100]  # mean and width of 50
    assert sizes(one.decoder) == [50, 200, 200, 784]
    assert sizes(two.encoder.net) == [784, 200, 200, 200]
    assert sizes(two.ascents[0].net) == [100, 100, 100, 100]
    assert sizes(two.descents[0].net) == [50, 100, 100, 200]
    assert sizes(two.decoder) == [100, 200, 200, 784]
    linear, nonlinear = VAE(PRESETS["disarm-linear"]), VAE(PRESETS["disarm-nonlinear"])
    assert sizes(linear.encoder.net) == [784, 200]
    assert sizes(linear.decoder) == [200, 784]
    assert sizes(nonlinear.encoder.net) == [784, 200, 200, 200]
    assert {type(layer) for layer in nonlinear.decoder} == {nn.Linear, nn.LeakyReLU}
    small = VAE(PRESETS["digits"])
    assert (sizes(small.encoder.net), sizes(small.decoder)) == ([64, 32, 16], [8, 32, 64])
    assert sum(p.numel() for p in one.parameters()) == 425_284


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run(name: str) -> None:
    architecture = PRESETS[name]
    model = VAE(architecture)
    x = torch.rand(2, architecture.data).round()
    with torch.no_grad():
        q = model.guide(x)
        z = Rng(0).sample(q, 3)
        assert model.log_joint(x, z).shape == q.log_prob(z).shape == (3, 2)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"kind": "poisson"}, "kind of a VAE should be one of gaussian, bernoulli, categorical, not 'poisson'"),
        ({"likelihood": "categorical"}, "likelihood of a VAE"),
        ({"activation": "gelu"}, "activation of a VAE should be one of tanh, relu, leaky-relu, linear, not 'gelu'"),
        ({"latent": ()}, "stochastic layer"),
        ({"hidden": (0,)}, "sizes of a VAE are positive"),
    ],
)
def test_wrong_architectures_are_answered_in_a_sentence(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Architecture(data=4, **wrong)


# Toys.


def test_gaussian_toy_is_the_one_of_the_paper() -> None:
    toy = scrambled(GaussianToy(3), seed=1)
    x, z = torch.randn(4, 3).double(), torch.randn(6, 4, 3).double()
    mu, A, b = (p.detach().numpy() for p in (toy.mu.weight[:, 0], toy.encoder.weight, toy.encoder.bias))
    with torch.no_grad():
        log_p, q = toy.log_joint(x, z), toy.guide(x)
        np.testing.assert_allclose(
            log_p, (stats.norm.logpdf(z, mu) + stats.norm.logpdf(x.numpy(), z.numpy())).sum(-1), rtol=1e-10
        )
        wanted = stats.norm.logpdf(z.numpy(), x.numpy() @ A.T + b, math.sqrt(2 / 3)).sum(-1)
        np.testing.assert_allclose(q.log_prob(z), wanted, rtol=1e-6)
        m = q.mean.numpy() - mu
        np.testing.assert_allclose(toy.kl(q), 0.5 * (m**2 + 2 / 3 - 1 - math.log(2 / 3)).sum(-1), rtol=1e-6)


def test_gaussian_toy_at_its_optimum_has_no_gradient_and_off_it_the_distance_asked_for() -> None:
    toy = GaussianToy(3).double()
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    toy.place(x, 0.0, torch.Generator())
    m = toy.guide(x).mean
    elbo = (-0.5 * (x - m) ** 2 - 0.5 * (m - toy.mu.weight[:, 0]) ** 2).sum(-1).mean()  # up to a constant
    assert all(float(g.abs().max()) < 1e-7 for g in torch.autograd.grad(elbo, list(toy.parameters())))
    optimum = {name: p.detach().clone() for name, p in toy.named_parameters()}
    toy.place(x, 0.3, torch.Generator().manual_seed(1))
    assert all(float((p - optimum[name]).norm().detach()) == pytest.approx(0.3) for name, p in toy.named_parameters())


def test_toys_have_their_function_for_log_weight() -> None:
    toys = {
        "bernoulli": (BernoulliToy(0.499, 0.5), lambda z: (z - 0.499) ** 2),
        "quadratic": (FunctionToy("quadratic", 0.5, 1.0), lambda z: (z - 0.5) ** 2),
        "exponential": (FunctionToy("exponential", 0.5, 1.0), lambda z: np.exp(-0.5 * z**2)),
        "cosine": (FunctionToy("cosine", 5.0, 1.0), lambda z: np.cos(5 * z)),
    }
    for toy, f in toys.values():
        toy.double()
        x = torch.ones(1, 1).double()
        q = toy.guide(x)
        z = Rng(0).sample(q, 7)
        with torch.no_grad():
            np.testing.assert_allclose((toy.log_joint(x, z) - q.log_prob(z))[:, 0], f(z.numpy())[:, 0, 0], atol=1e-12)

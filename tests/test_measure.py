"""The engine: batched replicates against the slow twin, chunks, shards, and what it refuses."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracles import Enumerated, bound, elbo, scrambled
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

from gradiometer.bench import products
from gradiometer.bench.batched import Batch, rows, together
from gradiometer.bench.folding import Failure
from gradiometer.bench.gradients import Draw, one, trainable
from gradiometer.bench.measurement import Measurement, measure, measure_all
from gradiometer.bench.models.toys import BernoulliToy, Expectation, FunctionToy, GaussianToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.moments import shards
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.bench.replicates import Plan
from gradiometer.bench.tape import NotRows
from gradiometer.bench.training import initial_state, settled
from gradiometer.estimators.base import Coefficients, Estimator, Facts, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

WORDS = (
    "sgvb-a", "sgvb-a:K=3", "sgvb-b:K=2", "stl:K=2", "reinforce:K=2", "moving-average:K=2", "rloo:K=3", "iwae:K=3", "dreg:K=3",
    "vimco:K=3", "rws:K=3", "rws-dreg:K=3", "vr:K=3", "vr:K=3,alpha=-1.5", "ciwae:K=3", "tvo:K=3", "tvo:K=3,partitions=5",
    "nvi:K=3", "nvi:K=3,levels=3,resample=systematic,path=learned",
)  # fmt: skip
KINDS = {
    "gaussian": Architecture(data=5, hidden=(4,), latent=(3,)),
    "bernoulli": Architecture(data=5, hidden=(4, 3), latent=(3,), kind="bernoulli", activation="leaky-relu"),
    "categorical": Architecture(data=5, hidden=(4,), latent=(2,), kind="categorical", classes=3),
    "gaussian likelihood": Architecture(data=5, hidden=(4,), latent=(2,), likelihood="gaussian", activation="relu"),
    "linear": Architecture(data=5, hidden=(), latent=(3,), kind="bernoulli"),
    "two layers": Architecture(data=5, hidden=(4,), latent=(3, 2), between=(3,)),
    "three binary layers": Architecture(data=5, hidden=(4,), latent=(3, 2, 2), between=(3,), kind="bernoulli"),
    "two categorical layers": Architecture(
        data=5, hidden=(4,), latent=(2, 3), between=(4,), kind="categorical", classes=3
    ),
}


def vae(kind: str = "gaussian") -> nn.Module:
    return scrambled(VAE(KINDS[kind]), seed=1, scale=0.4)


def data(B: int, D: int = 5) -> Tensor:
    return (torch.rand(B, D, generator=torch.Generator().manual_seed(2)) < 0.4).double()


def memory(estimator: Estimator, model: nn.Module, x: Tensor) -> State:
    """Memory that is not what it was at birth, without hundreds of steps."""
    torch.manual_seed(3)
    state = estimator.init_state(model, x)
    for average in state.tracked.values():
        average.update(torch.tensor(-1.3, dtype=x.dtype))
    for module in state.learned.values():
        module.to(x.dtype)
        for parameter in module.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return state


def twins(estimator: Estimator, model: nn.Module, x: Tensor, replicates: range) -> tuple[Draw, list[Draw]]:
    """The same replicates as one batch, and one at a time."""
    state = memory(estimator, model, x)
    parameters = trainable(model, state)
    batched = rows(estimator, model, x, Rng(7, replicates), state, parameters)
    return batched, [one(estimator, model, x, Rng(7, r), state, parameters) for r in replicates]


def apart(batched: Draw, singles: list[Draw]) -> float:
    """The largest difference between a batch of replicates and its twins, relative to the tensor's largest gradient."""
    if any(len(g) != len(singles) for g in batched.gradients.values()):
        return float("inf")
    worst = 0.0
    for name, batch in batched.gradients.items():
        alone = torch.stack([single.gradients[name] for single in singles])
        scale = float(alone.abs().max()) or 1.0
        worst = max(worst, float((batch - alone).abs().max()) / scale)
    log_w = torch.stack([single.log_w for single in singles], 1)
    return max(worst, float(((batched.log_w - log_w) / log_w.abs().max()).abs().max()))


def pairs() -> list:
    return [pytest.param(word, kind, id=f"{word}-{kind}") for kind in KINDS for word in WORDS]


@pytest.mark.parametrize(("word", "kind"), pairs())
def test_every_replicate_of_a_batch_is_the_replicate_alone(word: str, kind: str) -> None:
    estimator, model = parse(word), vae(kind)
    if reason_to_skip(Problem(model, data(3)), estimator) is not None:
        return  # that it is a reason, and which, is tested below
    batched, singles = twins(estimator, model, data(3), range(14, 19))  # two blocks of noise
    assert apart(batched, singles) < 1e-10
    assert any(float(g.abs().max()) > 0 for g in batched.gradients.values())


@pytest.mark.parametrize("word", WORDS)
def test_single_precision_costs_rounding_only(word: str) -> None:
    model, x = vae().float(), data(3).float()
    batched, singles = twins(parse(word), model, x, range(5))
    assert apart(batched, singles) < 2e-5


@pytest.mark.parametrize("word", ["sgvb-b:K=3", "rloo:K=3", "dreg:K=3", "rws:K=3", "nvi:K=3"])
@pytest.mark.parametrize("kind", ["gaussian", "two layers"])
def test_layers_that_are_made_fast_cost_rounding_only(word: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"gaussian": {"latent": (20,)}, "two layers": {"latent": (20, 40), "between": (60,)}}[kind]
    model = scrambled(VAE(Architecture(data=300, hidden=(200,), **sizes)), seed=1, scale=0.05).float()
    if reason_to_skip(Problem(model, data(3, 300)), parse(word)) is not None:
        return
    fast, true = [], products._onednn

    def spy(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fast.append((bias is not None, inputs.numel() * weight.shape[0]))
        return true(inputs, weight, bias)

    products._has_onednn(torch.float32, "cpu")
    monkeypatch.setattr(products, "_onednn", spy)
    batched, singles = twins(parse(word), model, data(3, 300).float(), range(5))
    if products._has_onednn(torch.float32, "cpu"):
        assert {forward for forward, _ in fast} == {True, False}  # there, and back
        assert min(size for _, size in fast) >= products.SMALL
    assert apart(batched, singles) < 2e-5
    name = "decoder.2.weight"
    rounded = batched.gradients | {name: batched.gradients[name].bfloat16().float()}
    assert apart(Draw(rounded, batched.log_w), singles) > 1e-4


@pytest.mark.parametrize(("R", "B", "K"), [(3, 3, 2), (3, 2, 3), (3, 3, 3), (1, 1, 1), (4, 1, 4), (1, 3, 2), (5, 1, 1)])
@pytest.mark.parametrize("word", ["sgvb-b", "iwae", "rws", "nvi"])
def test_equal_numbers_of_replicates_particles_and_data_confuse_nothing(word: str, R: int, B: int, K: int) -> None:
    batched, singles = twins(parse(f"{word}:K={K}"), vae(), data(B), range(20, 20 + R))
    assert apart(batched, singles) < 1e-10


@pytest.mark.parametrize("word", ["sgvb-a:K=2", "sgvb-b", "reinforce", "rloo", "iwae", "dreg", "rws"])
@pytest.mark.parametrize("toy", ["gaussian", "function", "bernoulli"])
def test_toys_are_measured_in_batches_too(word: str, toy: str) -> None:
    model = {"gaussian": lambda: GaussianToy(3), "function": FunctionToy, "bernoulli": BernoulliToy}[toy]().double()
    x = data(4, 3) if toy == "gaussian" else torch.ones(1, 1).double()
    estimator = parse(word)
    if reason_to_skip(Problem(model, x), estimator) is None:
        assert apart(*twins(estimator, model, x, range(6))) < 1e-10


# The comparison itself: planted mistakes that it must see.


def test_a_changed_noise_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Rng._noise

    def changed(self: Rng, *arguments) -> Tensor:
        noise = true(self, *arguments).clone()
        if isinstance(self.replicates, range) and self.stream == "measure":
            noise[0, 2, 1, 0] += 0.01
        return noise

    monkeypatch.setattr(Rng, "_noise", changed)
    assert apart(*twins(parse("dreg:K=3"), vae(), data(3), range(5))) > 1e-6


def test_a_scaled_layer_is_seen() -> None:
    batched, singles = twins(parse("dreg:K=3"), vae(), data(3), range(5))
    for name in batched.gradients:
        scaled = {n: g * (1.001 if n == name else 1) for n, g in batched.gradients.items()}
        assert apart(Draw(scaled, batched.log_w), singles) > 1e-6


def test_dropped_and_exchanged_replicates_are_seen() -> None:
    batched, singles = twins(parse("dreg:K=3"), vae(), data(3), range(5))
    assert apart(batched, singles[:-1]) > 1e-6
    assert apart(batched, [singles[i] for i in (0, 2, 1, 3, 4)]) > 1e-6


# The measurement.


def moments(**options) -> dict[str, np.ndarray]:
    model, word = options.pop("model", None) or vae(), options.pop("word", "dreg:K=3")
    given = {"replicates": 40, "seed": 5, "dtype": torch.float64, "engine": "rows"} | options
    m = measure(Problem(model, options.pop("x", data(3))), parse(word), **{k: v for k, v in given.items() if k != "x"})
    return {f"{kind} {name}": a for kind, of in (("mean", m.mean), ("variance", m.variance)) for name, a in of.items()}


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float) -> bool:
    return all(np.abs(first[name] - second[name]).max() <= tolerance * np.abs(first[name]).max() for name in first)


@pytest.mark.parametrize("word", ["sgvb-b:K=2", "rloo:K=3", "dreg:K=3"])
def test_rows_and_loop_leave_the_same_moments(word: str) -> None:
    assert equal(moments(word=word), moments(word=word, engine="loop"), 1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 40, 100])
def test_the_chunk_size_changes_rounding_only(chunk: int) -> None:
    assert equal(moments(chunk=chunk), moments(chunk=16), 1e-10)


def test_the_same_request_gives_the_same_bits() -> None:
    for engine in ("rows", "loop"):
        first, second = (moments(chunk=8, engine=engine, dtype=torch.float32) for _ in range(2))
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_numbers() -> None:
    assert not equal(moments(), moments(seed=6), 1e-3)


def test_moments_are_those_of_the_replicates() -> None:
    model, x, estimator = vae(), data(3), parse("rloo:K=3")
    parameters = trainable(model, State())
    alone = [one(estimator, model, x, Rng(5, r), State(), parameters).gradients for r in range(40)]
    found = moments(word="rloo:K=3", model=model)
    for name in alone[0]:
        each = torch.stack([g[name] for g in alone]).numpy()
        np.testing.assert_allclose(found[f"mean {name}"], each.mean(0), atol=1e-12)
        np.testing.assert_allclose(found[f"variance {name}"], each.var(0, ddof=1), atol=1e-12)
        np.testing.assert_array_less(1e-9, np.abs(found[f"variance {name}"] - each.var(0, ddof=0)).max())  # n - 1 it is


def test_the_problem_is_not_changed() -> None:
    model = vae()
    before = {name: p.clone() for name, p in model.named_parameters()}
    measure(Problem(model, data(3)), parse("moving-average"), replicates=4)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_a_large_mean_does_not_swallow_a_small_variance() -> None:
    # The gradient by mu is 1e4 + z, the mean ten thousand standard deviations.
    model = HighSignal()
    runs = {
        (dtype, engine): moments(
            model=model, word="stl", x=torch.ones(1, 1), replicates=2048, dtype=dtype, engine=engine
        )["variance encoder.weight"][0, 0]
        for dtype in (torch.float32, torch.float64)
        for engine in ("rows", "loop")
    }
    exact = runs[torch.float64, "loop"]
    assert exact == pytest.approx(1.0, abs=5 * (2 / 2047) ** 0.5)
    assert all(value == pytest.approx(exact, rel=2e-3) for value in runs.values())
    # The control: raw moments in single precision lose it all.
    g = 1e4 + torch.randn(2048, generator=torch.Generator().manual_seed(0))
    assert abs(float((g**2).mean() - g.mean() ** 2) - 1) > 0.5


class HighSignal(FunctionToy):
    def __init__(self) -> None:
        Expectation.__init__(self, lambda z: 1e4 * z + z**2 / 2, [0.3, 1.0])


@pytest.mark.parametrize("R", [4, 5, 7, 31, 32, 100, 511, 512, 513, 1000, 1024, 4099])
def test_shards_cover_the_replicates_once(R: int) -> None:
    parts = shards(R)
    assert [r for part in parts for r in part] == list(range(R))
    assert len(parts) >= 2
    assert min(map(len, parts)) >= 1
    assert max(map(len, parts)) <= 2 * min(map(len, parts)) + 1


def test_too_few_replicates_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 replicates, not 3"):
        measure(Problem(vae(), data(2)), parse("stl"), replicates=3)


# What the fast path does not know.


class Shifted(nn.Module):
    """A Gaussian model whose prior mean is a bare parameter."""

    groups = {"generative": ("mu",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.encoder = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Linear(2, 2)

    def guide(self, x: Tensor) -> Independent:
        mean = self.encoder(x)
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * ((z - self.mu) ** 2 + (x - z) ** 2).sum(-1)


@pytest.mark.parametrize("word", ["stl:K=2", "rloo:K=2", "dreg:K=3"])
def test_a_bare_parameter_is_measured_in_batches(word: str) -> None:
    model = Shifted().double()
    assert apart(*twins(parse(word), model, data(3, 2), range(5))) < 1e-10
    m = measure(Problem(model, data(3, 2)), parse(word), replicates=8)
    assert m.engine == "rows"
    assert np.abs(m.mean["mu"]).max() > 0


class Normalized(Shifted):
    """Holds a layer whose gradients are not made from its calls."""

    groups = {"generative": ("norm",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.norm, self.encoder = nn.LayerNorm(2), nn.Linear(2, 2)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (self.norm(z) ** 2 + (x - z) ** 2).sum(-1)


def test_an_unknown_layer_is_measured_by_the_loop_with_one_warning() -> None:
    problem = Problem(Normalized(), data(3, 2).float())
    with pytest.warns(UserWarning, match=r"one replicate at a time: parameter 'norm\.weight' .* LayerNorm") as caught:
        m = measure(problem, parse("stl:K=2"), replicates=8)
    assert len(caught) == 1
    assert m.engine == "loop"
    assert np.abs(m.mean["norm.weight"]).max() > 0
    with pytest.raises(NotRows, match="LayerNorm"):
        measure(problem, parse("stl:K=2"), replicates=8, engine="rows")


class InPlace(Shifted):
    """Overwrites what its layers gave."""

    groups = {"generative": ("decoder",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.encoder = nn.Sequential(nn.Linear(20, width), nn.ReLU(inplace=True), nn.Linear(width, 4))
        self.decoder = nn.Sequential(nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, 20))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return Independent(Bernoulli(logits=self.decoder(z)), 1).log_prob(x) - 0.5 * z.square().sum(-1)


@pytest.mark.parametrize("width", [10, 100])
def test_layers_that_are_overwritten_are_measured_by_the_loop(width: int) -> None:
    with pytest.warns(UserWarning, match="one replicate at a time"):
        m = measure(Problem(InPlace(width), data(3, 20).float()), parse("iwae:K=2"), replicates=8)
    assert m.engine == "loop"
    assert np.abs(m.mean["encoder.0.weight"]).max() > 0


class Convolutional(nn.Module):
    """Images of 4 x 4 pixels, convolutions both ways, and latents that index a table of embeddings on top of them."""

    groups = {"generative": ("table", "up", "scale"), "inference": ("down", "head")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.down, self.head = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Linear(12, 4)
        self.up = nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1)
        self.table = nn.Embedding(2, 8)
        self.scale = nn.Parameter(torch.tensor([0.3]))

    def guide(self, x: Tensor) -> Independent:
        h = self.down(x.reshape(-1, 1, 4, 4)).tanh()
        return Independent(Bernoulli(logits=self.head(h.reshape(*x.shape[:-1], 12)), validate_args=False), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        images = self.table(z.long()).sum(-2)  # [K, *batch, 8]
        images = images.reshape(-1, 2, 2, 2)
        logits = self.up(images).reshape(*z.shape[:-1], 16) * self.scale.exp()
        return Independent(Bernoulli(logits=logits, validate_args=False), 1).log_prob(x) + 0.1 * z.sum(-1)


@pytest.mark.parametrize("word", ["reinforce:K=2", "rloo:K=3", "vimco:K=3", "rws:K=1"])
def test_convolutions_and_embeddings_are_measured_in_batches(word: str) -> None:
    model, x = scrambled(Convolutional(), seed=3), data(3, 16)
    assert apart(*twins(parse(word), model, x, range(14, 19))) < 1e-10
    assert measure(Problem(model, x), parse(word), replicates=8).engine == "rows"


class Unaware(GaussianToy):
    """Calls its prior without a replicate axis: rows cannot be told apart."""

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        mean = self.mu(torch.ones(1).to(x))
        return Independent(Normal(mean, torch.ones_like(mean)), 1).log_prob(z) + self.likelihood(z).log_prob(x)


def test_a_layer_without_a_replicate_axis_is_measured_by_the_loop() -> None:
    with pytest.warns(UserWarning, match="no replicate axis"):
        m = measure(Problem(Unaware(2), data(3, 2).float()), parse("stl"), replicates=8)
    assert m.engine == "loop"


class PerPixel(Shifted):
    """A layer that is called on every pixel, so that its rows have an axis more than replicates and data."""

    groups = {"generative": ("context",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self, pixels: int) -> None:
        nn.Module.__init__(self)
        self.context, self.encoder = nn.Linear(1, 1), nn.Linear(pixels, pixels)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + (self.context(x.unsqueeze(-1)).squeeze(-1) - z) ** 2).sum(-1)


AXES = [
    (5, 3, 2, 2), (5, 2, 3, 2), (5, 2, 1, 2), (4, 4, 2, 4), (4, 4, 1, 4), (4, 4, 4, 2), (3, 4, 4, 4), (2, 2, 3, 2),
    (2, 2, 2, 2), (4, 4, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize(("R", "B", "K", "pixels"), AXES)
def test_a_layer_with_an_axis_of_its_own_is_measured_in_batches(R: int, B: int, K: int, pixels: int) -> None:
    model, x = scrambled(PerPixel(pixels), seed=3), data(B, pixels)
    assert apart(*twins(parse(f"nvi:K={K}"), model, x, range(20, 20 + R))) < 1e-10
    for word in ("iwae", "reinforce"):
        estimator = parse(f"{word}:K={K}")
        assert apart(*twins(estimator, model, x, range(20, 20 + R))) < 1e-10
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            m = measure(Problem(model, x), estimator, replicates=2 * R + 3, chunk=R, dtype=torch.float64)
        assert m.engine == "rows"
        assert np.abs(m.mean["context.weight"]).max() > 0
        loop = measure(Problem(model, x), estimator, replicates=2 * R + 3, engine="loop", dtype=torch.float64)
        assert equal(m.variance, loop.variance, 1e-10)


def columns(signal: Tensor) -> Coefficients:
    return Coefficients(generative=torch.full_like(signal, 1 / len(signal)), score=signal / len(signal))


@dataclass(frozen=True)
class OverEverything(Weighted):
    """Centres its signal over particles, data and, in a batch, replicates."""

    K: int = 3
    facts = Facts("over-everything", family="test")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return columns(log_w - log_w.mean())


@dataclass(frozen=True)
class OverTheSecondAxis(Weighted):
    """Centres its signal over the axis that is the batch alone, and the replicates in a batch."""

    K: int = 3
    facts = Facts("over-the-second-axis", family="test")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return columns(log_w - log_w.mean(1, keepdim=True))


@dataclass(frozen=True)
class FromTheNeighbour(Weighted):
    """Takes its baseline from the replicate beside it."""

    K: int = 3
    facts = Facts("from-the-neighbour", family="test")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return columns(log_w - log_w.roll(1, dims=-2) if log_w.dim() == 3 else log_w)


@pytest.mark.parametrize("mixing", [OverEverything(), OverTheSecondAxis(), FromTheNeighbour()], ids=str)
def test_an_estimator_that_mixes_replicates_is_found_out(mixing: Weighted) -> None:
    with pytest.warns(UserWarning, match="one replicate at a time: batched, its gradient of") as caught:
        m = measure(Problem(vae(), data(3)), mixing, replicates=8)
    assert m.engine == "loop"
    assert len(caught) == 1


def test_an_honest_estimator_is_batched_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(Problem(vae(), data(3)), parse("rloo:K=3"), replicates=8).engine == "rows"


def test_an_estimator_that_says_so_is_measured_by_the_loop() -> None:
    @dataclass(frozen=True)
    class Declared(OverEverything):
        facts = Facts("declared", family="test", couples_data=True)

    assert measure(Problem(vae(), data(3)), Declared(), replicates=8).engine == "loop"


def test_a_gradient_that_is_not_a_number_is_a_failure() -> None:
    model = Expectation.__new__(FunctionToy)
    Expectation.__init__(model, lambda z: z.sqrt(), [0.5, 1.0])
    for engine in ("rows", "loop"):
        with pytest.raises(Failure, match=r"gradient of 'encoder\.weight' is not finite"):
            measure(Problem(model, torch.ones(1, 1)), parse("stl"), replicates=16, engine=engine)


def test_what_a_problem_lacks_is_a_sentence() -> None:
    reasons = {
        ("dreg", "bernoulli"): "dreg needs a reparameterisable guide; try rloo or vimco",
        ("sgvb-b", "two layers"): "sgvb-b needs a divergence from prior to guide in closed form; try sgvb-a or stl",
        ("nvi", "two layers"): "nvi needs a guide of independent Gaussians; try iwae or vimco",
    }
    for (word, kind), reason in reasons.items():
        problem = Problem(vae(kind), data(2))
        assert reason_to_skip(problem, parse(word)) == reason
        with pytest.raises(ValueError, match=reason.split(";")[0]):
            measure(problem, parse(word), replicates=4)
    runs = [word for word in WORDS if reason_to_skip(Problem(vae("bernoulli"), data(2)), parse(word)) is None]
    assert runs == [
        "reinforce:K=2", "moving-average:K=2", "rloo:K=3", "vimco:K=3", "rws:K=3", "tvo:K=3", "tvo:K=3,partitions=5"
    ]  # fmt: skip
    assert all(reason_to_skip(Problem(vae(), data(2)), parse(word)) is None for word in WORDS)


# Several estimators from the same particles.

SAME_K = [word for word in WORDS if together([parse("iwae:K=3"), parse(word)])]
SAME_K.append("vr:K=3,alpha=0.001")  # nearly iwae


def off(found: Measurement, wanted: Measurement) -> float:
    """The largest difference of moments, relative to the largest second moment of the parameter; of metrics, relative to each."""
    worst = 0.0
    for name, variance in wanted.variance.items():
        mean = wanted.mean[name]
        scale = (variance + mean**2).max() or 1.0
        worst = max(worst, np.abs(found.variance[name] - variance).max() / scale)
        worst = max(worst, np.abs(found.mean[name] - mean).max() / np.sqrt(scale))
    for group in wanted.groups:
        metrics = found.metrics(group)
        pairs = [(metrics[name].value, value.value) for name, value in wanted.metrics(group).items()]
        worst = max(worst, max(abs(a - b) / (abs(b) or 1.0) for a, b in pairs))
    return float(worst)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_estimators_in_company_are_what_they_are_alone(dtype: torch.dtype, tolerance: float, drawn: list[int]) -> None:
    problem, options = Problem(vae(), data(3)), {"replicates": 96, "seed": 5, "dtype": dtype, "chunk": 32}
    company = measure_all(problem, [parse(word) for word in SAME_K], **options)
    assert drawn == [2, 32, 32, 32]  # a probe, and one pass for all
    assert [str(m.estimator) for m in company] == SAME_K
    for m in company:
        alone = measure(problem, m.estimator, **options)
        assert m.engine == alone.engine == "rows"
        assert off(m, alone) < tolerance
        assert {name: v.value for name, v in m.values().items()} == {
            name: v.value for name, v in alone.values().items()
        }
    assert off(company[SAME_K.index("iwae:K=3")], company[SAME_K.index("dreg:K=3")]) > 1e-3


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The replicates of each batch that is drawn from here on."""
    true, sizes = Batch.draw, []

    def draw(self: Batch, rng: Rng) -> object:
        sizes.append(len(rng.replicates))
        return true(self, rng)

    monkeypatch.setattr(Batch, "draw", draw)
    return sizes


def test_what_goes_together_and_what_does_not_is_measured_in_one_call() -> None:
    words = ["iwae:K=3", "sgvb-b:K=3", "dreg:K=3", "dreg:K=2", "iwae:K=3"]
    found = measure_all(Problem(vae(), data(3)), [parse(w) for w in words], replicates=16, dtype=torch.float64)
    assert [str(m.estimator) for m in found] == words
    for m in found:
        assert off(m, measure(m.problem, m.estimator, replicates=16, dtype=torch.float64)) < 1e-12


@dataclass(frozen=True)
class Clipped(Weighted):
    """No weight is larger than the bound."""

    K: int = 3
    bound: float = 1.0
    facts = Facts("clipped", family="test", objective="iwelbo", needs=("rsample",))

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0).clamp(max=self.bound)
        return Coefficients(generative=w, pathwise=w, score=-w)


def largest_weights(model: nn.Module, x: Tensor, seed: int) -> list[float]:
    """Of each of three chunks of 16 replicates."""
    parameters = trainable(model, State())
    log_w = [one(Clipped(), model, x, Rng(seed, r), State(), parameters).log_w for r in range(48)]
    return [float(torch.stack(log_w[start : start + 16], 1).softmax(0).max()) for start in (0, 16, 32)]


@pytest.mark.parametrize("quiet", [0, 2])
def test_columns_that_are_equal_in_some_replicates_only(quiet: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vae(), data(3)
    seed = next(seed for seed in range(100) if np.argmin(largest_weights(model, x, seed)) == quiet)
    bound = sum(sorted(largest_weights(model, x, seed))[:2]) / 2  # two of the three chunks have a weight above it
    true, separated = Plan.apart, []
    monkeypatch.setattr(Plan, "apart", lambda plan: separated.append(plan) or true(plan))
    options = {"replicates": 48, "seed": seed, "dtype": torch.float64, "chunk": 16}
    company = measure_all(Problem(model, x), [Clipped(), Clipped(bound=bound)], **options)
    assert len(separated) == 1
    for m in company:
        assert m.engine == "rows"
        assert off(m, measure(Problem(model, x), m.estimator, **options)) < 1e-12
    assert off(*company) > 1e-6


# Squared norms in the place of second moments.


@pytest.mark.parametrize("word", ["iwae:K=3", "rloo:K=3", "sgvb-b:K=2"])
def test_ghost_norms_give_the_metrics_that_need_no_coordinates(word: str) -> None:
    problem, options = Problem(vae(), data(3)), {"replicates": 96, "seed": 5, "dtype": torch.float64}
    full, ghost = (measure(problem, parse(word), engine=engine, **options) for engine in ("rows", "ghost"))
    auto = measure(problem, parse(word), only=("variance",), **options)
    assert [full.engine, ghost.engine, auto.engine] == ["rows", "ghost", "ghost"]
    assert measure(problem, parse(word), only=("variance", "snr"), **options).engine == "rows"
    for group in full.groups:
        wanted = full.metrics(group)
        for found in (ghost.metrics(group), auto.metrics(group)):
            assert set(found) == {"gradient_norm", "variance", "directional_snr", "cosine"}
            for name, value in found.items():
                for kind in ("value", "stderr", "low", "high"):
                    assert getattr(value, kind) == pytest.approx(getattr(wanted[name], kind), rel=1e-8)
        assert {"snr", "snr_floor", "snr_corrected"} < set(wanted)
    assert not {"snr", "snr_floor", "snr_corrected"} & {row["metric"] for row in ghost.rows()}


class SteadyDecoder(Shifted):
    """A decoder whose inputs, and so whose gradients, hardly change."""

    groups = {"generative": ("decoder",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.decoder, self.encoder = nn.Linear(2, 1, bias=False), nn.Linear(2, 2)

    def guide(self, x: Tensor) -> Independent:
        mean = 3 + self.encoder(x)
        return Independent(Normal(mean, torch.full_like(mean, 1e-3)), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return self.decoder(z).squeeze(-1) - 0.5 * z.square().sum(-1)


def test_a_steady_gradient_is_not_measured_by_its_squared_norms() -> None:
    problem = Problem(scrambled(SteadyDecoder(), seed=3), data(3, 2))
    options = {"replicates": 256, "only": ("variance",)}
    exact = measure(problem, parse("stl:K=2"), dtype=torch.float64, engine="rows", **options)
    m = measure(problem, parse("stl:K=2"), **options)
    assert m.engine == "rows"
    assert equal(m.variance, exact.variance, 2e-3)
    assert measure(problem, parse("stl:K=2"), dtype=torch.float64, **options).engine == "ghost"  # has the digits
    with pytest.raises(Failure, match="squared norms do not tell its variance: measure with another --engine"):
        measure(problem, parse("stl:K=2"), engine="ghost", **options)


def test_digits_that_are_not_there_tell_no_directional_snr() -> None:
    exact, found = (
        measure(Problem(HighSignal(), torch.ones(1, 1)), parse("stl"), replicates=2048, dtype=dtype, engine="rows")
        for dtype in (torch.float64, torch.float32)
    )
    for name, value in exact.metrics("inference").items():
        # |g|^2 - (g.u)^2 of a gradient that is ten thousand times its noise is nothing but rounding in single precision.
        wanted = math.nan if name == "directional_snr" else pytest.approx(value.value, rel=0.01)
        assert found.metrics("inference")[name].value == wanted or math.isnan(wanted), name
    assert math.isnan(found.metrics("inference")["directional_snr"].value)


# As many replicates as a precision takes.


def half_widths(m: Measurement) -> list[float]:
    values = [m.metrics(group)["variance"] for group in m.groups]
    return [(v.high - v.low) / 2 / v.value for v in values]


def test_a_precision_is_reached_by_more_replicates() -> None:
    problem, iwae = Problem(vae(), data(3)), parse("iwae:K=3")
    short = measure(problem, iwae, replicates=64)
    assert short.precision_met is None
    assert max(half_widths(short)) > 0.2
    m = measure(problem, iwae, replicates=64, precision=0.2)
    assert m.precision_met is True
    assert m.replicates > 64
    assert max(half_widths(m)) <= 0.2
    assert {row["precision_met"] for row in m.rows()} == {True}
    assert {measure(problem, iwae, replicates=64, precision=0.2, chunk=c).replicates for c in (1, 7, 64)} == {
        m.replicates
    }
    together = measure(problem, iwae, replicates=m.replicates)
    assert equal(m.mean, together.mean, 1e-5)
    assert equal(m.variance, together.variance, 1e-5)
    assert not equal(m.variance, short.variance, 1e-3)
    satisfied = measure(problem, iwae, replicates=64, precision=0.9)
    assert (satisfied.replicates, satisfied.precision_met) == (64, True)


def test_a_budget_is_not_overdrawn() -> None:
    for budget in (64, 65, 100, 200):
        m = measure(Problem(vae(), data(3)), parse("iwae:K=3"), replicates=64, precision=0.01, budget=budget)
        assert m.precision_met is False
        assert budget - 32 <= m.replicates <= budget
        assert max(half_widths(m)) > 0.01


def test_a_budget_smaller_than_the_replicates_adds_none() -> None:
    m = measure(Problem(vae(), data(3)), parse("iwae:K=3"), replicates=64, precision=0.01, budget=32)
    assert (m.replicates, m.precision_met) == (64, False)


def test_each_estimator_takes_the_replicates_it_needs() -> None:
    estimators = [parse(word) for word in ("dreg:K=3", "vr:K=3,alpha=-1.5", "iwae:K=3")]
    company = measure_all(Problem(vae(), data(3)), estimators, replicates=64, precision=0.15, dtype=torch.float64)
    assert len({m.replicates for m in company}) > 1
    for m in company:
        alone = measure(m.problem, m.estimator, replicates=64, precision=0.15, dtype=torch.float64)
        assert alone.replicates == m.replicates
        assert off(m, alone) < 1e-12


# As much memory as there is.


@pytest.mark.parametrize("most", [1, 10, 40])
def test_a_batch_too_large_for_the_memory_is_halved(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, options = Problem(vae(), data(3)), {"replicates": 96, "seed": 5, "dtype": torch.float64, "chunk": 64}
    wanted, true = measure(problem, parse("dreg:K=3"), **options), Batch.draw
    sizes = []

    def draw(self: Batch, rng: Rng) -> object:
        sizes.append(len(rng.replicates))
        if len(sizes) > 1 and sizes[-1] > most:  # the first is the probe
            raise torch.OutOfMemoryError("planted")
        return true(self, rng)

    monkeypatch.setattr(Batch, "draw", draw)
    m = measure(problem, parse("dreg:K=3"), **options)
    assert (m.engine, m.chunk) == ("rows", 2 ** (most.bit_length() - 1))
    assert f"more than {m.chunk} replicates" in m.note
    assert off(m, wanted) < 1e-12
    assert m.evaluations == wanted.evaluations == 3
    assert wanted.note == ""


def test_no_memory_for_one_replicate_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Batch.draw

    def draw(self: Batch, rng: Rng) -> object:
        if rng.replicates != range(2):
            raise torch.OutOfMemoryError("planted")
        return true(self, rng)

    monkeypatch.setattr(Batch, "draw", draw)
    with pytest.raises(Failure, match="memory ran out"):
        measure(Problem(vae(), data(3)), parse("dreg:K=3"), replicates=16, chunk=8)


def test_a_small_budget_of_memory_takes_smaller_batches_and_more_passes(drawn: list[int]) -> None:
    problem, estimators = Problem(vae(), data(3)), [parse(word) for word in SAME_K]
    options = {"replicates": 96, "seed": 5, "dtype": torch.float64}
    ample = measure_all(problem, estimators, **options)
    passes = drawn.count(96)
    drawn.clear()
    scarce = measure_all(problem, estimators, memory=200_000, **options)
    assert passes == 1
    assert max(m.chunk for m in scarce) < 96 <= min(m.chunk for m in ample)
    assert sum(drawn) >= 2 * 96
    for m, wanted in zip(scarce, ample, strict=True):
        assert off(m, wanted) < 1e-12
    least = measure(problem, parse("dreg:K=3"), memory=1, **options)
    assert least.chunk == 1
    assert off(least, ample[SAME_K.index("dreg:K=3")]) < 1e-12


# Several surrogates, and a control variate that learns.


@dataclass(frozen=True)
class Learned(Estimator):
    """REINFORCE with a learned constant baseline, given in three pieces, two of which share a group."""

    facts = Facts("learned", family="test")

    def init_state(self, model, x: Tensor) -> State:
        return State(learned={"control": nn.Linear(1, 1, bias=False)})

    def parts(self, model, x: Tensor, rng: Rng, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = model.guide(x)
        z = rng.sample(q, self.K)
        log_p, log_q = model.log_joint(x, z), q.log_prob(z)
        return (
            log_p,
            log_q,
            (log_p - log_q).detach(),
            state.learned["control"](torch.ones_like(log_q[0]).unsqueeze(-1)).squeeze(-1),
        )

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
        _, log_q, log_w, control = self.parts(model, x, rng, state)
        yield Surrogate({"inference": (log_w * log_q).mean(0)}, log_w)
        again = model.guide(x)  # a graph of its own: the first one is gone
        with torch.no_grad():
            z = Rng.sample(rng, again, self.K)  # fresh draws, for the part with zero mean
        yield Surrogate({"inference": -(control.detach() * again.log_prob(z)).mean(0)})
        yield Surrogate({"generative": model.log_joint(x, z).mean(0)})

    def learn(self, model, x: Tensor, rng: Rng, state: State) -> dict[str, Tensor]:
        *_, log_w, control = self.parts(model, x, rng, state)
        return {"control": -((log_w - control) ** 2).mean(0)}


def test_pieces_of_an_estimate_add_up_and_controls_learn() -> None:
    model = scrambled(VAE(Architecture(data=4, hidden=(3,), latent=(2,), kind="bernoulli")), seed=4, scale=1.5)
    x, estimator = data(2, 4), Learned(K=2)
    assert apart(*twins(estimator, model, x, range(6))) < 1e-10
    m = measure(Problem(model, x), estimator, replicates=4096, dtype=torch.float64)
    assert m.engine == "rows"
    wanted = Enumerated(model, x, 1).exact(elbo)
    for group in ("generative", "inference"):
        assert largest_t(m, group, wanted[group]) < 5
    assert largest_t(m, "inference", Enumerated(model, x, 2).exact(bound)["inference"]) > 5  # not another objective's


def largest_t(m, group: str, wanted: Tensor) -> float:
    mean = np.concatenate([m.mean[name].ravel() for name in m.groups[group]])
    error = np.concatenate([np.sqrt(m.variance[name] / m.replicates).ravel() for name in m.groups[group]])
    noisy = error > 0
    assert noisy.any()
    return float((np.abs(mean - wanted.numpy())[noisy] / error[noisy]).max())


def test_a_control_follows_its_own_terms_only() -> None:
    x, model = torch.ones(1, 1).double(), BernoulliToy().double()
    start = float(initial_state(Learned(K=4), model, x, 0).learned["control"].weight.detach())
    state = settled(Learned(K=4), model, x, 0)
    after = float(state.learned["control"].weight.detach())
    assert abs(after - 0.25) < max(abs(start - 0.25) - 0.2, 0.01)  # f is about 1/4 on both values, a step about 0.001
    draw = one(Learned(K=4), model, x, Rng(0), state, trainable(model, state))
    assert float(draw.gradients["control.weight"]) == 0  # in the estimate it is a number, not a parameter

"""The engine: batched replicates against the slow twin, chunks, shards, and what it refuses."""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine import KINDS, WORDS, Convolutional, HighSignal, Shifted, apart, data, equal, home, twins, vae
from oracles import Enumerated, bound, elbo, scrambled
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal, OneHotCategoricalStraightThrough

from gradiometer.bench import products
from gradiometer.bench.folding import Failure
from gradiometer.bench.gradients import Draw, one, trainable
from gradiometer.bench.measurement import measure, measure_all
from gradiometer.bench.models.toys import BernoulliToy, Expectation, FunctionToy, GaussianToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.moments import shards
from gradiometer.bench.outer import Outer
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.bench.tape import NotRows
from gradiometer.bench.training import initial_state, settled
from gradiometer.estimators.base import Coefficients, Estimator, Facts, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse


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
    model, x = home(word).float(), data(3).float()
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


@pytest.mark.parametrize(
    "word",
    [
        "sgvb-a:K=2",
        "sgvb-b",
        "reinforce",
        "rloo",
        "iwae",
        "dreg",
        "rws",
        "nvil",
        "concrete",
        "disarm",
        "rebar",
        "relax",
    ],
)
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


@pytest.mark.parametrize(
    "word", ["sgvb-b:K=2", "rloo:K=3", "dreg:K=3", "nvil:K=2", "concrete", "disarm", "rebar", "relax:K=2"]
)
def test_rows_and_loop_leave_the_same_moments(word: str) -> None:
    model = home(word)
    assert equal(moments(word=word, model=model), moments(word=word, model=model, engine="loop"), 1e-10)


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


@pytest.mark.parametrize("engine", ["rows", "ghost", "loop"])
@pytest.mark.parametrize("word", ["dreg:K=3", "iwae-stl:K=3"])
def test_what_a_direction_is_off_by_is_what_the_ratio_is_off_by(word: str, engine: str) -> None:
    """Against finite differences along the change that each shard of the first half makes to the direction."""
    model, x, estimator, R = vae(), data(3), parse(word), 64
    parameters = trainable(model, State())
    alone = [one(estimator, model, x, Rng(5, r), State(), parameters).gradients for r in range(R)]
    measured = measure(Problem(model, x), estimator, replicates=R, seed=5, dtype=torch.float64, engine=engine)
    parts = shards(R)
    half = len(parts) // 2
    for group, members in parameters.items():
        each = torch.stack([torch.cat([g[n].flatten() for n in members]) for g in alone]).numpy()
        first, second = each[: parts[half].start], each[parts[half].start :]
        mean = first.mean(0)
        u = mean / np.linalg.norm(mean)
        still = float(np.sign(second[0] @ u) / np.sqrt(second[0] @ second[0] - (second[0] @ u) ** 2))

        def ratio(u: np.ndarray, second: np.ndarray = second, still: float = still) -> float:
            along = second @ u
            return float(np.mean(np.abs(along) / np.sqrt((second**2).sum(1) - along**2) - still * along))

        assert len(measured.turns[group]) == half
        for part, turn in zip(parts, measured.turns[group], strict=False):
            off = np.delete(first, slice(part.start, part.stop), 0).mean(0) - mean
            du = (off - (off @ u) * u) / np.linalg.norm(mean)
            wanted = (ratio(u + 1e-4 * du) - ratio(u - 1e-4 * du)) / 2e-4
            assert turn == pytest.approx(wanted, rel=1e-5, abs=1e-9)


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


@pytest.mark.parametrize("R", [4, 5, 7, 31, 32, 100, 511, 512, 513, 1000, 1024, 4099])
def test_shards_cover_the_replicates_once(R: int) -> None:
    parts = shards(R)
    assert [r for part in parts for r in part] == list(range(R))
    assert len(parts) >= 2
    assert min(map(len, parts)) >= 1
    assert max(map(len, parts)) <= 2 * min(map(len, parts)) + 1


# What the fast path does not know.


@pytest.mark.parametrize("word", ["stl:K=2", "rloo:K=2", "dreg:K=3"])
def test_a_bare_parameter_is_measured_in_batches(word: str) -> None:
    model = Shifted().double()
    assert apart(*twins(parse(word), model, data(3, 2), range(5))) < 1e-10
    m = measure(Problem(model, data(3, 2)), parse(word), replicates=8)
    assert m.engine == "rows"
    assert np.abs(m.mean["mu"]).max() > 0


@pytest.mark.parametrize("needs", [(), ("rsample",)])
def test_a_score_is_taken_with_the_draw_held_however_it_is_made(needs: tuple[str, ...]) -> None:
    """A score column without a pathwise one, of an estimator that asks for draws that could be differentiated."""

    @dataclass(frozen=True)
    class Score(Weighted):
        K: int = 3
        facts = Facts("score", family="score-function", objective="elbo", needs=needs)

        def coefficients(self, log_w: Tensor) -> Coefficients:
            return Coefficients(generative=torch.full_like(log_w, 1 / self.K), score=log_w / self.K)

    problem = Problem(vae(), data(3))
    found, wanted = (measure(problem, e, replicates=16, dtype=torch.float64) for e in (Score(), parse("reinforce:K=3")))
    assert found.engine == "rows"
    assert equal(found.mean, wanted.mean, 1e-9)
    state = State()
    model, x = vae(), data(3)
    mine, theirs = (one(e, model, x, Rng(1), state, trainable(model, state)) for e in (Score(), parse("reinforce:K=3")))
    assert all(torch.allclose(mine.gradients[n], theirs.gradients[n], rtol=1e-9, atol=1e-12) for n in mine.gradients)


class Bent(Shifted):
    """Holds a layer whose gradients are not made from its calls."""

    groups = {"generative": ("bend",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.bend, self.encoder = nn.PReLU(), nn.Linear(2, 2)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (self.bend(z) ** 2 + (x - z) ** 2).sum(-1)


def test_an_unknown_layer_is_measured_by_the_loop_with_one_warning() -> None:
    problem = Problem(Bent(), data(3, 2).float())
    with pytest.warns(UserWarning, match=r"one replicate at a time: parameter 'bend\.weight' .* PReLU") as caught:
        m = measure(problem, parse("stl:K=2"), replicates=8)
    assert len(caught) == 1
    assert m.engine == "loop"
    assert np.abs(m.mean["bend.weight"]).max() > 0
    with pytest.raises(NotRows, match="PReLU"):
        measure(problem, parse("stl:K=2"), replicates=8, engine="rows")


class Rows(nn.Module):
    """A layer that knows one batch axis, on all rows there are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, *x.shape[-self.layer_axes :])).reshape(x.shape)

    @property
    def layer_axes(self) -> int:
        return 3 if isinstance(self.layer, nn.BatchNorm2d | nn.GroupNorm) else 1


class CalledTwice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(8),
    "layer, no bias": lambda: nn.LayerNorm(8, bias=False),
    "layer, nothing learned": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "layer, three axes": lambda: nn.Sequential(nn.Unflatten(-1, (2, 2, 2)), nn.LayerNorm((2, 2, 2)), nn.Flatten(-3)),
    "batch": lambda: Rows(nn.BatchNorm1d(8)),
    "batch of images": lambda: nn.Sequential(nn.Unflatten(-1, (2, 2, 2)), Rows(nn.BatchNorm2d(2)), nn.Flatten(-3)),
    "group": lambda: nn.Sequential(nn.Unflatten(-1, (4, 2, 1)), Rows(nn.GroupNorm(2, 4)), nn.Flatten(-3)),
    "twice": lambda: CalledTwice(nn.LayerNorm(8)),
}


class Normalized(Shifted):
    """Normalises what its layers gave, in the model and in the guide."""

    groups = {"generative": ("decoder",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        nn.Module.__init__(self)
        self.encoder = nn.Sequential(nn.Linear(2, 8), norm(), nn.Tanh(), nn.Linear(8, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 8), norm(), nn.Tanh(), nn.Linear(8, 2))
        scrambled(self, seed=4)
        for layer in self.modules():
            if getattr(layer, "running_mean", None) is not None:
                layer.running_mean.copy_(torch.linspace(-0.3, 0.2, layer.num_features))
                layer.running_var.copy_(torch.linspace(0.5, 2, layer.num_features))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + (x - self.decoder(z)) ** 2).sum(-1)


@pytest.mark.parametrize("word", ["sgvb-a:K=2", "rloo:K=3", "iwae:K=1", "dreg:K=3", "nvil:K=2"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_measured_in_batches(norm: str, word: str) -> None:
    model, x = Normalized(NORMS[norm]).double().eval(), data(3, 2)
    batched, singles = twins(parse(word), model, x, range(14, 19))
    assert apart(batched, singles) < 1e-10
    assert all(g.abs().max() > 1e-3 for g in batched.gradients.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(Problem(model, x), parse(word), replicates=8, settle=3).engine == "rows"


def test_norms_by_the_statistics_of_a_batch_are_measured_by_the_loop() -> None:
    model = Normalized(lambda: Rows(nn.BatchNorm1d(8, track_running_stats=False)))
    with pytest.warns(UserWarning, match=r"one replicate at a time: .* BatchNorm1d"):
        assert measure(Problem(model, data(3, 2).float()), parse("stl:K=2"), replicates=8).engine == "loop"


class InPlace(Shifted):
    """Overwrites what its layers gave."""

    groups = {"generative": ("decoder",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.encoder = nn.Sequential(nn.Linear(20, width), nn.ReLU(inplace=True), nn.Linear(width, 4))
        self.decoder = nn.Sequential(nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, 20))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return Independent(Bernoulli(logits=self.decoder(z)), 1).log_prob(x) - 0.5 * z.square().sum(-1)


@pytest.mark.parametrize("word", ["iwae:K=2", "rloo:K=2", "sgvb-a", "nvil:K=2"])
@pytest.mark.parametrize("width", [10, 100])
def test_layers_that_are_overwritten_are_measured_in_batches(width: int, word: str) -> None:
    model, x = scrambled(InPlace(width), seed=3, scale=0.1), data(3, 20)
    assert apart(*twins(parse(word), model, x, range(14, 19))) < 1e-10
    problem = Problem(model.float(), x.float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, other = (measure(problem, parse(word), replicates=8, chunk=chunk, settle=3) for chunk in (8, 3))
    assert found.engine == "rows"
    assert np.abs(found.mean["encoder.0.weight"]).max() > 0
    assert equal(found.mean, other.mean, 1e-5)


@pytest.mark.parametrize("word", ["reinforce:K=2", "rloo:K=3", "vimco:K=3", "rws:K=1", "nvil:K=2", "disarm"])
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


class Flattened(PerPixel):
    """Flattens pixels, too, so that nothing tells which row is whose."""

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + (self.context(x.reshape(-1, 1)).reshape(x.shape) - z) ** 2).sum(-1)


def test_an_engine_that_is_asked_for_is_checked_like_any_other() -> None:
    problem = Problem(Flattened(3).double(), data(4, 3))
    with pytest.warns(UserWarning, match="one replicate at a time: batched, its gradient of"):
        assert measure(problem, parse("iwae:K=3"), replicates=8, dtype=torch.float64).engine == "loop"
    with pytest.raises(NotRows, match="iwae:K=3 cannot be measured in batches: batched, its gradient of"):
        measure(problem, parse("iwae:K=3"), replicates=8, dtype=torch.float64, engine="rows")


def test_an_estimator_that_says_so_is_measured_by_the_loop() -> None:
    @dataclass(frozen=True)
    class Declared(OverEverything):
        facts = Facts("declared", family="test", couples_data=True)

    assert measure(Problem(vae(), data(3)), Declared(), replicates=8).engine == "loop"
    with pytest.raises(NotRows, match="it says that its replicates are not rows"):
        measure(Problem(vae(), data(3)), Declared(), replicates=8, engine="rows")


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
        ("disarm", "gaussian"): "disarm needs one layer of independent Bernoulli latents; try rloo or vimco",
        ("rebar", "categorical"): "rebar needs one layer of independent Bernoulli latents; try rloo or vimco",
        ("relax", "three binary layers"): "relax needs one layer of independent Bernoulli latents; try rloo or vimco",
        (
            "concrete",
            "gaussian",
        ): "concrete needs one layer of independent Bernoulli or one-hot latents; try sgvb-a or rloo",
    }
    for (word, kind), reason in reasons.items():
        problem = Problem(vae(kind), data(2))
        assert reason_to_skip(problem, parse(word)) == reason
        with pytest.raises(ValueError, match=reason.split(";")[0]):
            measure(problem, parse(word), replicates=4)
    runs = {k: [w for w in WORDS if reason_to_skip(Problem(vae(k), data(2)), parse(w)) is None] for k in KINDS}
    scores = [
        "reinforce:K=2", "moving-average:K=2", "rloo:K=3", "vimco:K=3", "rws:K=3", "tvo:K=3", "tvo:K=3,partitions=5",
        "iwae-score:K=3", "nvil:K=3",
    ]  # fmt: skip
    binary = ["concrete:K=2", "disarm:K=4", "rebar:K=2", "relax:K=3"]
    assert runs["bernoulli"] == runs["linear"] == scores + binary
    assert runs["categorical"] == [*scores, "concrete:K=2"]
    assert runs["three binary layers"] == runs["two categorical layers"] == scores
    assert runs["gaussian"] == [word for word in WORDS if word not in binary]


def test_a_joint_that_holds_at_the_latents_values_only_is_not_relaxed() -> None:
    problem = Problem(Convolutional(), data(2, 16).float())  # its latents are indices
    assert reason_to_skip(problem, parse("disarm")) is None
    wanted = "needs a joint that makes sense between the values of its latents; try rloo or disarm"
    for word in ("concrete", "rebar", "relax"):
        assert reason_to_skip(problem, parse(word)) == f"{word} {wanted}"


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
        yield Surrogate(
            {"inference": (log_w * log_q).mean(0)},
            log_w,
            learn=lambda: {"control": -((log_w - control) ** 2).mean(0)},
        )
        again = model.guide(x)  # a graph of its own: the first one is gone
        with torch.no_grad():
            z = Rng.sample(rng, again, self.K)  # fresh draws, for the part with zero mean
        yield Surrogate({"inference": -(control.detach() * again.log_prob(z)).mean(0)})
        yield Surrogate({"generative": model.log_joint(x, z).mean(0)})


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


@dataclass(frozen=True)
class ParticleByParticle(Estimator):
    """The gradient of the ELBO, a surrogate for each particle, or for each but some."""

    missing: int = 0
    facts = Facts("particle-by-particle", family="test", needs=("rsample",))

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
        for _ in range(self.K - self.missing):
            q = model.guide(x)
            z = rng.rsample(q, 1)
            log_w = model.log_joint(x, z) - q.log_prob(z)
            yield Surrogate(dict.fromkeys(("generative", "inference"), log_w.mean(0)), log_w.detach())


@pytest.mark.parametrize("engine", ["rows", "loop"])
def test_log_weights_of_all_surrogates_are_those_of_k_particles(engine: str) -> None:
    problem = Problem(vae(), data(3))
    found, wanted = (
        dict(measure(problem, e, replicates=2048, engine=engine, dtype=torch.float64).values())
        for e in (ParticleByParticle(K=4), parse("sgvb-a:K=4"))
    )
    for name in ("elbo", "iwelbo", "ess"):
        assert abs(found[name].value - wanted[name].value) < 4 * math.hypot(found[name].stderr, wanted[name].stderr)
    with pytest.raises(ValueError, match="gives log weights of 3 particles, and K is 4"):
        measure(problem, ParticleByParticle(K=4, missing=1), replicates=16, engine=engine)


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


# What strangers' models do. Each is measured by the loop, or in batches, but never wrongly and never not at all.


class Stranger(nn.Module):
    """A Gaussian model of 4 pixels and 2 latents, with networks that a stranger puts in."""

    groups = {"generative": ("decoder",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.decoder = decoder or nn.Linear(2, 4)

    def guide(self, x: Tensor) -> Independent:
        mean = self.encoder(x)
        return Independent(Normal(mean, torch.full_like(mean, 0.5), validate_args=False), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return Independent(Normal(self.decoder(z), 1.0, validate_args=False), 1).log_prob(x) - 0.5 * z.square().sum(-1)


class EmbeddingFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(2, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x.long()).flatten(-2))


class Upwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(1, 1, 2), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(x.reshape(-1, 1, 2, 2)).reshape(*x.shape[:-1], 9))


class Branching(nn.Module):
    """Another layer from some size of the batch on, which two and three replicates do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(2, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.first(z) if z.numel() < 40 else self.second(self.first(z)[..., :2])


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(input=z)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(2, 2), nn.Linear(2, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.layer(self.layer(z).tanh()))


class SingleByItsCode(Branching):
    """Of single precision, and mixes rows."""

    def forward(self, z: Tensor) -> Tensor:
        return self.first(z.float() - z.float().mean())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Stranger(EmbeddingFirst()), "a Embedding in the guide has no inputs that all replicates share"),
        (lambda: Stranger(Upwards()), "a ConvTranspose2d in the guide has no inputs that all replicates share"),
        (lambda: Stranger(decoder=Branching()), "the calls of its layers change with the data"),
        (lambda: Stranger(decoder=SingleByItsCode()), "differs by"),
        (lambda: Stranger(decoder=nn.utils.spectral_norm(nn.Linear(2, 4))), "belongs to a layer of type Linear"),
    ],
)
def test_a_strangers_model_is_measured_by_the_loop_and_told_why(model, reason: str) -> None:
    torch.manual_seed(0)
    problem = Problem(model(), data(3, 4).float())
    with pytest.warns(UserWarning, match=f"one replicate at a time: .*({reason})"):
        m = measure(problem, parse("iwae:K=2"), replicates=16)
    assert m.engine == "loop"
    assert equal(m.variance, measure(problem, parse("iwae:K=2"), replicates=16, engine="loop").variance, 1e-6)


class Elsewhere(Stranger):
    """What two replicates in one batch may not show: it is rare, or small."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        found = super().log_joint(x, z)
        if self.kind == "branch" and z.mean() > 0:
            return 2 * found
        if self.kind == "prior":
            return found - 1e-7 * self.decoder.weight.square().sum()
        if self.kind == "expert":
            return found + torch.where(z[..., 0] > 5, nn.functional.linear(z, self.decoder.weight).sum(-1), 0.0)
        if self.kind == "dropout":
            return nn.functional.dropout(found, training=True)
        if self.kind == "shy":
            hook = self.decoder.register_forward_pre_hook(lambda layer, given: self.looked_at(layer))
            super().log_joint(x, z)
            hook.remove()
        return found

    def looked_at(self, layer: nn.Module) -> None:
        if not layer.weight.requires_grad:
            raise RuntimeError("do not look")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("branch", r"it takes the value of a tensor in Python \(test_measure.py, line \d+\)"),
        ("prior", "parameter 'decoder.weight' is used outside of its layer's calls"),
        ("expert", "parameter 'decoder.weight' is used outside of its layer's calls"),
        ("dropout", "it draws noise of its own"),
        ("shy", "watched as it is made, there is a RuntimeError: do not look"),
    ],
)
@pytest.mark.parametrize("word", ["iwae:K=2", "sgvb-a", "rloo:K=2"])
def test_what_two_replicates_do_not_show_is_seen_while_one_is_made(word: str, kind: str, reason: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(Problem(Elsewhere("none"), data(3, 4).float()), parse(word), replicates=16)
    problem, state = Problem(Elsewhere(kind), data(3, 4).float()), torch.random.get_rng_state()
    with pytest.warns(UserWarning, match=f"one replicate at a time: {reason}"):
        assert measure(problem, parse(word), replicates=16).engine == "loop"
    assert kind == "dropout" or torch.equal(torch.random.get_rng_state(), state)


class Straight(OneHotCategoricalStraightThrough):
    pass


class Further(Normal):
    """Whose draws are three further than a normal's."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return super().rsample(sample_shape) + 3

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value - 3)


def test_a_subclass_of_a_distribution_draws_in_its_own_way() -> None:
    q = Independent(Further(torch.zeros(64, 3, 2), torch.ones(64, 3, 2)), 1)
    assert abs(float(Rng(0, range(64)).rsample(q, 5).mean()) - 3) < 0.2
    logits = torch.zeros(64, 3, 2, 4, requires_grad=True)
    z = Rng(0, range(64)).rsample(Independent(Straight(logits=logits), 1))
    (slope,) = torch.autograd.grad((z * torch.arange(4.0)).sum(), logits)
    assert slope.abs().max() > 0


class OfShape(Stranger):
    """A joint of another shape, which would be broadcast."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        found = super().log_joint(x, z)  # [K, *batch]
        return found.sum(-1) if self.kind == "summed" else found.unsqueeze(-1)


@pytest.mark.parametrize("kind", ["summed", "one more"])
@pytest.mark.parametrize(("word", "B"), [("sgvb-a", 3), ("iwae:K=3", 3), ("sgvb-a", 1), ("rloo:K=3", 3)])
def test_a_joint_of_another_shape_is_refused(word: str, B: int, kind: str) -> None:
    with pytest.raises(ValueError, match=r"log_joint\(x, z\) has shape .*: K and the batch shape of the guide"):
        measure(Problem(OfShape(kind), data(B, 4).float()), parse(word), replicates=16)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            {"generative": ("decoder.bias",), "inference": ("encoder",), "prior": ("decoder.weight",)},
            "no term for the group 'prior'",
        ),
        ({"decoder": ("decoder",), "encoder": ("encoder",)}, "a term for the group 'generative'; the model has decoder, encoder"),
    ],
)  # fmt: skip
def test_groups_that_no_term_names_are_refused(groups: dict, said: str, engine: str) -> None:
    model = Stranger()
    model.groups = groups
    with pytest.raises(ValueError, match=said):
        measure(Problem(model, data(3, 4).float()), parse("iwae:K=2"), replicates=16, engine=engine)


def misshapen(kind: str) -> Estimator:
    """An estimator whose terms or columns are of another shape, or name no group."""

    @dataclass(frozen=True)
    class Misshapen(Weighted):
        facts = Facts("misshapen", family="test", needs=("rsample",) if kind != "needless" else ())

        def coefficients(self, log_w: Tensor) -> Coefficients:
            a = torch.full_like(log_w, 1 / self.K)
            return Coefficients(a[0] if kind == "column" else a, pathwise=a)

        def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
            made = super().surrogate(model, x, rng, state)
            term = made.terms["inference"]
            if kind == "term":
                return Surrogate({**made.terms, "inference": term.sum()}, made.log_w)
            if kind == "name":
                return Surrogate({"generative": made.terms["generative"], "inferrence": term}, made.log_w)
            return made

    return Misshapen(K=4)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("term", r"the term of misshapen:K=4 for the group 'inference' has shape \(\), not \(3,\)"),
        ("name", "a term for the group 'inferrence'; the model has generative, inference"),
        ("column", r"the column 'generative' has shape \(3,\), not \(4, 3\)"),
        ("needless", "misshapen:K=4 has a pathwise column but draws without a gradient: add 'rsample'"),
    ],
)
def test_an_estimator_of_another_shape_is_refused(kind: str, said: str, engine: str) -> None:
    with pytest.raises(ValueError, match=said):
        measure(Problem(Stranger(), data(3, 4).float()), misshapen(kind), replicates=16, engine=engine)


def test_a_problem_leaves_its_model_alone() -> None:
    model = Stranger(decoder=nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))).train()
    problem = Problem(model, data(3, 4).float())
    assert model.training
    assert not problem.model.training
    assert problem.model is not model


@pytest.mark.parametrize("word", ["iwae:K=3", "rloo:K=3", "sgvb-a"])
def test_layers_called_by_keyword_or_frozen_or_twice_are_batched(word: str) -> None:
    torch.manual_seed(0)
    frozen = Stranger(decoder=nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)))
    frozen.decoder[0].weight.requires_grad_(False)
    for model in (Stranger(decoder=Keyword()), frozen, Stranger(decoder=Twice())):
        problem = Problem(model.double(), data(3, 4))
        found, wanted = (
            measure(problem, parse(word), replicates=16, dtype=torch.float64, engine=engine)
            for engine in ("auto", "loop")
        )
        assert found.engine == "rows"
        assert found.variance.keys() == wanted.variance.keys()
        assert equal(found.variance, wanted.variance, 1e-10)


class Scaled(Stranger):
    """Whose gradients are of any size; `mixed`, a replicate's depends on the others in its batch."""

    def __init__(self, scale: float, mixed: bool = False) -> None:
        super().__init__()
        self.scale, self.mixed = scale, mixed

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        found = self.scale * super().log_joint(x, z)
        return found * (1 + z.detach().mean()) if self.mixed else found


@pytest.mark.parametrize("engine", ["rows", "ghost"])
@pytest.mark.parametrize(("scale", "said"), [(1e20, "large"), (1e-22, "small"), (1e-30, "small")])
def test_squares_that_are_no_numbers_of_their_precision_are_told(scale: float, said: str, engine: str) -> None:
    asked = {"replicates": 64, "engine": engine}
    with pytest.raises(Failure, match=f"too {said} for its precision: measure in float64"):
        measure(Problem(Scaled(scale), data(3, 4).float()), parse("sgvb-a"), **asked)
    assert measure(Problem(Scaled(scale), data(3, 4)), parse("sgvb-a"), dtype=torch.float64, **asked).engine == engine


@pytest.mark.parametrize("engine", ["rows", "ghost"])
@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_squares_of_sums_may_be_larger_than_squares(scale: float, engine: str) -> None:
    torch.manual_seed(0)
    problem, asked = (
        Problem(Scaled(scale), data(3, 4).float()),
        {"replicates": 1000, "only": ["variance", "gradient_norm"]},
    )
    found, wanted = (
        measure(problem, parse("iwae:K=2"), dtype=dtype, engine=engine, **asked)
        for dtype in (torch.float32, torch.float64)
    )
    for metric, value in wanted.metrics("generative").items():
        assert found.metrics("generative")[metric].value == pytest.approx(value.value, rel=1e-4), metric


@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1])
def test_gradients_of_any_size_are_held_against_the_slow_twin(scale: float) -> None:
    torch.manual_seed(0)
    problem = Problem(Scaled(scale, mixed=True), data(3, 4).float())
    with pytest.warns(UserWarning, match="differs by"):
        assert measure(problem, parse("iwae:K=2"), replicates=16).engine == "loop"


class Images(nn.Module):
    """A convolution over 64 places, and a linear layer."""

    groups = {"generative": ("lift", "spread"), "inference": ("mean",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.spread, self.mean = nn.Linear(2, 64), nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, 2)

    def guide(self, x: Tensor) -> Independent:
        mean = self.mean(x)
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        seen = self.lift(z).tanh().reshape(-1, 1, 8, 8)
        off = x - self.spread(seen).reshape(*z.shape[:-1], 64)
        return -0.5 * off.square().sum(-1) - 0.5 * z.square().sum(-1)


def test_inner_products_of_the_places_of_a_convolution_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost more than the gradients whose norms they give."""
    rows = []
    made = Outer.squared_norms
    monkeypatch.setattr(Outer, "squared_norms", lambda self: (rows.append(self.rows), made(self))[1])
    torch.manual_seed(0)
    problem = Problem(Images(), data(2, 64).float())
    found = measure(problem, parse("iwae:K=2"), replicates=64, only=["variance"])
    assert found.engine == "ghost"
    assert set(rows) == {4}
    wanted = measure(problem, parse("iwae:K=2"), replicates=64, only=["variance"], engine="loop")
    for group in ("generative", "inference"):
        assert found.metrics(group)["variance"].value == pytest.approx(
            wanted.metrics(group)["variance"].value, rel=1e-4
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ("snr_corected",)}, "unknown metric 'snr_corected'; did you mean 'snr_corrected'"),
        ({"only": ("snr",), "engine": "ghost"}, "squared norms do not tell snr"),
        ({"only": "snr"}, "metrics are a list, ['snr'], not one word"),
        ({"precision": 0.0}, "between 0 and 1 (0.05 for 5 %), not 0.0"),
        ({"precision": 5.0}, "between 0 and 1 (0.05 for 5 %), not 5.0"),
        ({"precision": "5%"}, "between 0 and 1 (0.05 for 5 %), not '5%'"),
        ({"replicates": 3}, "replicates should be a whole number of at least 4, not 3"),
        ({"replicates": 64.0}, "replicates should be a whole number of at least 4, not 64.0"),
        ({"seed": "0"}, "seed should be a whole number, not '0'"),
        ({"chunk": 0}, "chunk should be a whole number of at least 1, not 0"),
        ({"settle": -1}, "settle should be a whole number of at least 0, not -1"),
        ({"memory": "2GB"}, "memory should be a whole number of at least 1, not '2GB'"),
        ({"device": "gpu"}, "this machine has no device 'gpu'"),
        ({"device": "meta"}, "this machine has no device 'meta'"),
        ({"dtype": "float64"}, "dtype should be torch.float32 or torch.float64, not 'float64'"),
        ({"dtype": torch.float16}, "dtype should be torch.float32 or torch.float64, not torch.float16"),
        ({"engine": "row"}, "unknown engine 'row'; did you mean 'rows'"),
    ],
)
def test_a_request_without_sense_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        measure(Problem(vae(), data(3)), parse("iwae:K=2"), **{"replicates": 16} | options)


def test_what_is_measured_is_a_problem_and_estimators() -> None:
    problem = Problem(vae(), data(3))
    for asked, said in (
        (lambda: measure("gaussian-toy", "stl"), "of type str: named_problem('gaussian-toy') makes one"),
        (lambda: measure(vae(), "stl"), "a problem is a Problem(model, x), not of type VAE"),
        (lambda: measure_all(problem, "stl"), "estimators are a list, ['stl'], not one word"),
        (
            lambda: measure(problem, type(parse("stl"))),
            "an estimator is a word, as in 'dreg:K=8', or one that is built",
        ),
        (lambda: Problem(vae(), data(0)), "at least one data point, not of shape (0, 5)"),
        (lambda: Problem(vae(), torch.tensor(1.0)), "at least one data point, not of shape ()"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            asked()

"""Noise depends on the seed, the stream, the replicate and the ordinal of the draw, and on nothing else."""

import math

import pytest
import torch
from oracles import scrambled
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gamma,
    Geometric,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Uniform,
)

from gradiometer.bench.models.layers import Chain, factorized
from gradiometer.estimators.noise import BLOCK, Rng

B, D = 3, 2


def parameters(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


LINK, TWO = scrambled(nn.Linear(D, 4)), scrambled(nn.Linear(D, 3))


def families(batch: int = B) -> dict[str, Distribution]:
    """Every family the estimators meet, with batch shape ``(batch,)``."""
    loc, width = parameters(batch, D), parameters(batch, D).exp()
    gaussian = Independent(Normal(loc, width), 1)
    return {
        "normal": gaussian,
        "bernoulli": Independent(Bernoulli(logits=loc), 1),
        "categorical": Independent(OneHotCategorical(logits=parameters(batch, D, 3)), 1),
        "chain": Chain(gaussian, [lambda z: factorized("gaussian", LINK(z))], [D, 2]),
        "binary chain": Chain(
            Independent(Bernoulli(logits=loc), 1), [lambda z: factorized("bernoulli", TWO(z))], [D, 3]
        ),
        "gamma": Independent(Gamma(width, width + 1), 1),
        "beta": Independent(Beta(width, width + 1), 1),
        "laplace": Independent(Laplace(loc, width), 1),
        "uniform": Independent(Uniform(loc, loc + width), 1),
        "scalar gamma": Gamma(width[:, 0], width[:, 1]),
        "scalar normal": Normal(loc[:, 0], width[:, 1]),
    }


FAMILIES = list(families())


def agree(family: str, row: Tensor, single: Tensor) -> bool:
    """Bit by bit, except where a network stands between two layers: its rows depend on how many there are, by rounding."""
    return torch.allclose(row, single, rtol=1e-13, atol=1e-13) if family == "chain" else torch.equal(row, single)


def alone(q: Distribution, K: int | None, replicate: int, draws: int = 2, seed: int = 0) -> list[Tensor]:
    rng = Rng(seed, replicate)
    return [rng.sample(q, K) for _ in range(draws)]


def batched(q: Distribution, K: int | None, replicates: range, draws: int = 2) -> list[Tensor]:
    rng = Rng(0, replicates)
    expanded = q.expand((len(replicates), *q.batch_shape))
    return [rng.sample(expanded, K) for _ in range(draws)]


@pytest.mark.parametrize(
    "replicates", [range(1), range(4), range(5, 8), range(14, 19), range(16, 32), range(30, 50), range(7, 8)], ids=str
)
@pytest.mark.parametrize("K", [None, 1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_r_is_replicate_r(family: str, K: int | None, replicates: range) -> None:
    q = families()[family]
    rows = batched(q, K, replicates)
    for i, replicate in enumerate(replicates):
        for row, single in zip(rows, alone(q, K, replicate), strict=True):
            assert agree(family, row.select(0 if K is None else 1, i), single)


@pytest.mark.parametrize(
    ("R", "batch", "K"), [(3, 3, 3), (3, 3, 2), (2, 3, 2), (3, 1, 3), (1, 1, 1), (16, 16, 16), (1, 4, 1)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_sizes_confuse_no_axes(family: str, R: int, batch: int, K: int) -> None:
    q = families(batch)[family]
    rows = batched(q, K, range(9, 9 + R))[1]
    assert rows.shape == (K, R, batch, *q.event_shape)
    for i in range(R):
        assert agree(family, rows[:, i], alone(q, K, 9 + i)[1])


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
def test_any_chunking_gives_the_same_rows(chunk: int) -> None:
    q = families()["normal"]
    whole = batched(q, 2, range(40))[1]
    parts = [batched(q, 2, range(start, min(start + chunk, 40)))[1] for start in range(0, 40, chunk)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_the_comparison_can_fail() -> None:
    """The trap: replicates put in front of the noise, where they pass for the batch when R = B."""
    q = families()["normal"]
    rows, single = batched(q, 2, range(3))[0], alone(q, 2, 1, draws=1)[0]
    assert torch.equal(rows[:, 1], single)
    assert not torch.equal(rows[:, 2], single)
    assert not torch.equal(rows[:, :, 1], single)


def test_a_draw_without_particles_of_a_batch_with_them() -> None:
    """Kernels and dreams have batch shape (K, R, B); the replicate axis is the last but one."""
    wide = Independent(Normal(parameters(2, 4, 3, D), 1.0), 1)
    rows = Rng(0, range(4)).rsample(wide)
    single = Rng(0, 2).rsample(Independent(Normal(parameters(2, 4, 3, D)[:, 2], 1.0), 1))
    assert torch.equal(rows[:, 2], single)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_plain_noise_has_the_batch_shape(kind: str) -> None:
    q = families()["normal"]
    rows = getattr(Rng(0, range(14, 20)), kind)(like=q.expand((6, B)))
    assert rows.shape == (6, B)
    assert rows.dtype == torch.float64
    assert all(torch.equal(rows[i], getattr(Rng(0, 14 + i), kind)(like=q)) for i in range(6))


def standard(dtype: torch.dtype) -> Distribution:
    return Independent(Normal(torch.zeros(50, D, dtype=dtype), torch.ones(50, D, dtype=dtype)), 1)


@pytest.mark.parametrize("family", ["normal", "bernoulli", "categorical", "uniform"])
def test_every_precision_sees_the_same_noise(family: str) -> None:
    def draw(dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(50, D, 3, dtype=dtype)
        match family:
            case "normal":
                return Rng(0).rsample(standard(dtype), 4)
            case "bernoulli":
                return Rng(0).sample(Independent(Bernoulli(logits=zeros), 2), 4)
            case "categorical":
                return Rng(0).sample(Independent(OneHotCategorical(logits=zeros), 1), 4)
        return Rng(0).uniform(like=standard(dtype))

    double, single = draw(torch.float64), draw(torch.float32)
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert torch.equal(double.float(), single)


def test_what_noise_depends_on() -> None:
    q = standard(torch.float32)
    first = Rng(0, 3).sample(q, 2)
    rng = Rng(0, 3)
    assert torch.equal(rng.sample(q, 2), first)
    different = {
        "ordinal": rng.sample(q, 2),
        "seed": Rng(1, 3).sample(q, 2),
        "replicate": Rng(0, 4).sample(q, 2),
        "replicate of another block": Rng(0, 3 + BLOCK).sample(q, 2),
        "stream": Rng(0, 3, "train").sample(q, 2),
    }
    seen = [first, *different.values()]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            correlation = float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
            assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_the_global_generator_neither_matters_nor_moves() -> None:
    for family, q in families().items():
        torch.manual_seed(1)
        first = Rng(0, 2).sample(q, 3)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        torch.rand(5)
        assert torch.equal(Rng(0, 2).sample(q, 3), first), family
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state), family


def test_estimators_that_ask_for_the_same_draws_get_them() -> None:
    for family, q in families().items():
        sampled = Rng(0, range(3)).sample(q.expand((3, B)), 4)
        assert not sampled.requires_grad
        if q.has_rsample:
            assert torch.equal(Rng(0, range(3)).rsample(q.expand((3, B)), 4), sampled), family
    # Earlier draws of other shapes and families leave the ordinal where it is.
    q = families()["normal"]
    first, second = Rng(0), Rng(0)
    first.uniform(like=q), second.sample(families()["categorical"], 7)
    assert torch.equal(first.sample(q, 2), second.sample(q, 2))


def test_a_loop_that_holds_blocks_draws_the_same() -> None:
    held: dict = {}
    for family in ("normal", "gamma", "chain"):
        q = families()[family]
        for replicate in (0, 1, 2, 15, 16, 17, 3):
            rng = Rng(0, replicate, held=held)
            found = [rng.sample(q, 2), rng.sample(q, 3), rng.uniform(like=q), rng.normal(like=q)]
            fresh = Rng(0, replicate)
            wanted = [fresh.sample(q, 2), fresh.sample(q, 3), fresh.uniform(like=q), fresh.normal(like=q)]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_holding_does_not_take_one_kind_of_noise_for_another() -> None:
    held: dict = {}
    q = standard(torch.float32)
    normal = Rng(0, 0, held=held).normal(like=q)
    uniform = Rng(0, 1, held=held).uniform(like=q)
    assert normal.min() < 0 < uniform.min()
    assert torch.equal(uniform, Rng(0, 1).uniform(like=q))


@pytest.mark.parametrize("family", ["normal", "bernoulli", "categorical", "gamma", "chain"])
def test_a_distribution_without_a_replicate_axis_is_refused(family: str) -> None:
    q = families()[family]  # batch shape (3,), asked for four replicates
    with pytest.raises(
        ValueError, match=r"no replicate axis of 4: expand the distribution to the guide's batch shape \(R, B\)"
    ):
        Rng(0, range(4)).sample(q)
    with pytest.raises(ValueError, match="no replicate axis of 4"):
        Rng(0, range(4)).sample(q.expand((5, B)), 2)


def test_a_discrete_distribution_is_not_reparameterised() -> None:
    with pytest.raises(
        NotImplementedError, match=r"Independent cannot be reparameterised: draw with sample\(\)|Bernoulli cannot"
    ):
        Rng(0).rsample(families()["bernoulli"])


@pytest.mark.parametrize("family", ["normal", "chain", "gamma", "beta", "laplace"])
def test_reparameterised_draws_carry_the_gradient(family: str) -> None:
    loc = parameters(4, B, D).requires_grad_()
    q = {
        "normal": lambda: Independent(Normal(loc, 1.0), 1),
        "chain": lambda: Chain(Independent(Normal(loc, 1.0), 1), [lambda z: factorized("gaussian", LINK(z))], [D, 2]),
        "gamma": lambda: Independent(Gamma(loc.exp(), 1 + 0 * loc), 1),
        "beta": lambda: Independent(Beta(loc.exp(), 1 + 0 * loc), 1),
        "laplace": lambda: Independent(Laplace(loc, 1 + 0 * loc), 1),
    }[family]()
    z = Rng(0, range(4)).rsample(q, 2)
    (gradient,) = torch.autograd.grad(z[:, 1].sum(), loc)
    assert (gradient[1] != 0).all()
    assert (gradient[[0, 2, 3]] == 0).all()
    assert not Rng(0, range(4)).sample(q, 2).requires_grad


# The distributions themselves, at five standard errors.

N = 40_000


def moments(q: Distribution) -> tuple[Tensor, Tensor]:
    z = Rng(4, range(N // 1000)).sample(q.expand((N // 1000, *q.batch_shape)), 1000).flatten(0, 1)  # [N, B, ...]
    return z, (z.mean(0) - q.mean) / (q.variance / N).sqrt()


@pytest.mark.parametrize(
    "family", ["normal", "bernoulli", "categorical", "gamma", "beta", "laplace", "uniform", "scalar gamma"]
)
def test_draws_have_the_right_mean_and_spread(family: str) -> None:
    q = families()[family]
    z, t = moments(q)
    assert float(t.abs().max()) < 5
    fourth = ((z - q.mean) ** 4).mean(0)
    spread = (z.var(0) - q.variance) / ((fourth - q.variance**2).clamp(min=1e-12) / N).sqrt()
    assert float(spread.abs().max()) < 5
    shifted = (z.mean(0) + 0.05 * q.stddev - q.mean) / (q.variance / N).sqrt()
    assert float(shifted.abs().max()) > 5  # the check sees a twentieth of a standard deviation


def test_uniforms_are_uniform_and_never_on_the_edge() -> None:
    q = Independent(Normal(torch.zeros(N, 1), 1.0), 1)
    u = Rng(0).uniform(like=q).sort().values
    assert float(u[0]) > 0
    assert float(u[-1]) < 1
    steps = (u - torch.linspace(0, 1, N)).abs().max()  # Kolmogorov-Smirnov
    assert float(steps) * math.sqrt(N) < 2.2
    assert float((u**1.05 - torch.linspace(0, 1, N)).abs().max()) * math.sqrt(N) > 2.2


@pytest.mark.parametrize("replicates", [3, range(14, 19)], ids=str)
def test_uniforms_of_latents_are_those_that_draw_them(replicates: int | range) -> None:
    """Antithetic and relaxed estimators start from the uniforms, and see the latents that any other estimator sees."""
    rows = () if isinstance(replicates, int) else (len(replicates),)
    p = parameters(*rows, B, D).sigmoid()
    u = Rng(0, replicates).sample(Independent(Uniform(torch.zeros_like(p), torch.ones_like(p)), 1), 4)
    assert u.shape == (4, *rows, B, D)
    assert torch.equal((u < p).double(), Rng(0, replicates).sample(Independent(Bernoulli(p), 1), 4))
    assert not torch.equal((u > 1 - p).double(), Rng(0, replicates).sample(Independent(Bernoulli(p), 1), 4))
    logits = parameters(*rows, B, D, 3)
    u = Rng(0, replicates).sample(Independent(Uniform(torch.zeros_like(logits), torch.ones_like(logits)), 2), 4)
    one_hot = Rng(0, replicates).sample(Independent(OneHotCategorical(logits=logits), 1), 4)
    assert torch.equal((logits - (-u.log()).log()).argmax(-1), one_hot.argmax(-1))


def test_the_edges_of_a_uniform_distribution_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "uniform_", lambda rows, generator: rows.zero_())  # one draw in 2^24
    for dtype in (torch.float32, torch.float64):
        u = Rng(0).sample(Uniform(torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)))
        assert u.dtype == dtype
        assert (u > 0).all()
        assert u.log().isfinite().all()


@torch.no_grad()
def test_layers_of_a_chain_are_drawn_one_from_the_other() -> None:
    q = families()["chain"]
    z = Rng(0).sample(q, N)
    first, second = z.split([D, 2], -1)
    link = factorized("gaussian", LINK(first))
    u = (second - link.mean) / link.stddev
    assert float((u.mean(0) * math.sqrt(N)).abs().max()) < 5
    assert float(((u**2).mean(0) - 1).abs().max()) * math.sqrt(N / 2) < 5
    unlinked = factorized("gaussian", LINK(first.roll(1, 0)))
    wrong = (second - unlinked.mean) / unlinked.stddev
    assert float(((wrong**2).mean(0) - 1).abs().max()) * math.sqrt(N / 2) > 5


class Stubborn(LogNormal):
    """A family that is not rebuilt from its arguments."""

    def __init__(self, loc: Tensor, scale: Tensor, secret: int, validate_args: bool | None = None) -> None:
        super().__init__(loc, scale, validate_args)

    def expand(self, batch_shape, _instance=None) -> "Stubborn":
        return Stubborn(self.loc.expand(batch_shape), self.scale.expand(batch_shape), 0)


def test_a_family_that_cannot_be_cut_into_rows_is_named() -> None:
    q = Stubborn(parameters(4, B), parameters(4, B).exp(), 0)
    with pytest.raises(NotImplementedError, match="replicates of Stubborn cannot be drawn one by one"):
        Rng(0, range(4)).sample(q)


def test_families_with_several_names_for_one_parameter_are_cut_into_rows() -> None:
    q = {
        "multivariate": MultivariateNormal(parameters(4, B, D), scale_tril=torch.eye(D).double().expand(4, B, D, D)),
        "lognormal": LogNormal(parameters(4, B), parameters(4, B).exp()),
        "categorical": Categorical(logits=parameters(4, B, 5)),
        "geometric": Geometric(logits=parameters(4, B)),
    }
    cut = {
        "multivariate": MultivariateNormal(parameters(4, B, D)[2], torch.eye(D).double().expand(B, D, D)),
        "lognormal": LogNormal(parameters(4, B)[2], parameters(4, B).exp()[2]),
        "categorical": Categorical(logits=parameters(4, B, 5)[2]),
        "geometric": Geometric(logits=parameters(4, B)[2]),
    }
    _ = q["categorical"].probs, q["multivariate"].covariance_matrix  # computed once, and remembered by torch
    for name in q:
        assert torch.allclose(Rng(0, range(4)).sample(q[name], 3)[:, 2], Rng(0, 2).sample(cut[name], 3)), name

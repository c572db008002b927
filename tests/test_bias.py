"""Bias: differences on the same noise, against exact answers, and what is compared with what."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engine import data, vae
from oracles import Quadrature, bound, scrambled
from torch import Tensor

from gradiometer.bench import metrics
from gradiometer.bench.batched import Batch, dense, together
from gradiometer.bench.bias import Difference, DifferenceOfWeights, apart, comparisons, difference, joined
from gradiometer.bench.gradients import one, trainable
from gradiometer.bench.measured import Measurement
from gradiometer.bench.measurement import measure, measure_all
from gradiometer.bench.models.toys import GaussianToy
from gradiometer.bench.problems import Problem
from gradiometer.bench.training import settled
from gradiometer.estimators.base import Coefficients, Estimator, Facts, State, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

BOTH = ("generative", "inference")


@dataclass(frozen=True)
class Tempered(Weighted):
    """Flattened weights: the gradient of no bound, and no unbiased one of the K-sample bound."""

    K: int = 2
    temperature: float = 2.0
    facts = Facts("tempered", family="test", objective="iwelbo", biased=BOTH, needs=("rsample",))

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = (log_w / self.temperature).softmax(0)
        return Coefficients(generative=w, pathwise=w, score=-w)


def toy() -> tuple[GaussianToy, Tensor]:
    """One latent, somewhere without symmetry."""
    return scrambled(GaussianToy(1), seed=3), torch.tensor([[0.3], [-1.1], [0.8]]).double()


# The difference is one of gradients on the same noise.

PAIRS = [
    ("dreg:K=3", "iwae:K=3"),
    ("vimco:K=3", "iwae:K=3"),  # one of them samples, and the other reparameterises
    ("reinforce:K=2", "rloo:K=2"),
    ("moving-average:K=2", "sgvb-a:K=2"),
    ("sgvb-b:K=2", "sgvb-a:K=2"),
    ("nvi:K=3", "sgvb-a:K=3"),
    ("sgvb-a:K=3", "nvi:K=3,levels=3"),
    ("nvil:K=2", "nvi:K=2"),
    ("iwae:K=3", "iwae:K=2"),
]
pairs = pytest.mark.parametrize(("word", "other"), PAIRS)


def memory(estimator: Estimator, model: torch.nn.Module, x: Tensor) -> State:
    torch.manual_seed(3)
    state = estimator.init_state(model, x)
    for average in state.tracked.values():
        average.update(torch.tensor(2.0, dtype=x.dtype))
    for module in state.learned.values():
        module.to(x.dtype)
        for parameter in module.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return state


@pairs
def test_it_is_one_gradient_less_the_other(word: str, other: str) -> None:
    a, b, model, x = parse(word), parse(other), vae(), data(3)
    states, parameters = [memory(e, model, x) for e in (a, b)], trainable(model, State())
    made, state = difference(a, b), joined(*states)
    assert str(made) == f"{a} - {b}"
    assert isinstance(made, DifferenceOfWeights) == together([a, b])
    batch = Batch([made], model, x, [state], parameters).draw(Rng(7, range(14, 19)))
    for r in range(5):
        first, second = (
            one(e, model, x, Rng(7, 14 + r), s, parameters).gradients for e, s in zip((a, b), states, strict=True)
        )
        alone = one(made, model, x, Rng(7, 14 + r), state, parameters).gradients
        row = dense(batch, 0, parameters, slice(r, r + 1)).gradients
        scale = max(float(g.abs().max()) for g in [*first.values(), *second.values()])
        for name, gradient in first.items():
            torch.testing.assert_close(alone[name], gradient - second[name], rtol=0, atol=1e-12 * scale)
            torch.testing.assert_close(row[name][0], gradient - second[name], rtol=0, atol=1e-10 * scale)


def test_what_is_not_by_columns_can_be_by_surrogates_too() -> None:
    a, b, model, x = parse("dreg:K=3"), parse("iwae:K=3"), vae(), data(3)
    found = [
        one(d, model, x, Rng(7, 2), State(), trainable(model, State())).gradients
        for d in (Difference(a, b), difference(a, b))
    ]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-12)


def test_memories_are_kept_apart() -> None:
    model, x = vae(), data(2)
    states = [memory(parse(word), model, x) for word in ("moving-average", "nvil:K=2")]
    states[0].tracked["signal"].update(torch.tensor(9.0))
    found = apart(joined(*states))
    for state, wanted in zip(found, states, strict=True):
        assert state.tracked == wanted.tracked
        assert state.learned == wanted.learned
    assert {n for s in found for n in s.learned}
    held = difference(parse("moving-average"), parse("nvil:K=2")).init_state(model, x)
    assert [len(s.tracked) + len(s.learned) for s in apart(held)] == [len(s.tracked) + len(s.learned) for s in states]


@pytest.mark.parametrize(
    ("word", "other"), [("moving-average:K=2", "sgvb-a:K=2"), ("iwae-stl:K=3", "iwae:K=3"), ("nvil:K=2", "rloo:K=2")]
)
def test_measured_it_is_the_difference_of_the_two_measurements(word: str, other: str) -> None:
    """Each settled by itself, over the same replicates."""
    problem, options = Problem(vae(), data(3)), {"replicates": 96, "seed": 5, "dtype": torch.float64}
    m = measure(problem, parse(word), reference=parse(other), **options)
    alone = [measure(problem, parse(w), **options) for w in (word, other)]
    assert set(m.compared) == set(BOTH)
    for of in m.compared.values():
        for name, moments in of.difference.items():
            wanted = alone[0].mean[name] - alone[1].mean[name]
            scale = np.abs(alone[0].mean[name]).max()
            np.testing.assert_allclose(moments.pooled.mean, wanted, rtol=0, atol=1e-10 * scale)
            np.testing.assert_allclose(of.trusted[name].pooled.mean, alone[1].mean[name], rtol=0, atol=1e-10 * scale)


# Against the exact bias.


def exact_bias(estimator: Weighted) -> dict[str, float]:
    """Norms of the bias, by quadrature."""
    model, x = toy()
    outcomes = Quadrature(model, x, estimator.K)
    expected, wanted = outcomes.expected(estimator, State()), outcomes.exact(bound)
    return {group: float((expected[group] - wanted[group]).norm()) for group in wanted}


def measured(estimator: Estimator, **options: object) -> Measurement:
    model, x = toy()
    given = {"replicates": 8192, "dtype": torch.float64} | options
    return measure(Problem(model, x), estimator, **given)  # type: ignore[arg-type]


def test_a_bias_is_found_and_is_what_quadrature_says() -> None:
    exact, found = exact_bias(Tempered()), measured(Tempered())
    for group in BOTH:
        m = found.metrics(group)
        assert exact[group] > 0.02
        assert m["bias"].low > 0
        assert abs(m["bias"].value - exact[group]) < 4 * m["bias"].stderr < 0.2 * exact[group]
        assert abs(m["bias_squared"].value - exact[group] ** 2) < 4 * m["bias_squared"].stderr
        norm = float(Quadrature(*toy(), 2).exact(bound)[group].norm())
        assert abs(m["relative_bias"].value - exact[group] / norm) < 4 * m["relative_bias"].stderr
        assert m["mse"].value == pytest.approx(m["variance"].value + m["bias_squared"].value, rel=1e-12)


def test_intervals_of_a_bias_cover_it() -> None:
    exact, inside = exact_bias(Tempered()), []
    for seed in range(150):
        found = measured(Tempered(), replicates=256, seed=seed)
        inside += [[m.low <= exact[g] <= m.high for g in BOTH for m in [found.metrics(g)["bias"]]]]
    assert (np.mean(inside, axis=0) > 0.9).all()


@pytest.mark.parametrize("word", ["vimco:K=2", "dreg:K=2", "iwae-score:K=2"])
def test_what_is_unbiased_shows_none(word: str) -> None:
    found = measured(parse(word), reference=parse("iwae:K=2"))
    for group in BOTH:
        bias = found.metrics(group)["bias"]
        assert bias.low == 0
        assert bias.value < 0.2
    assert (
        measured(parse("iwae:K=2"), reference=parse("dreg:K=2")).metrics("generative")["bias"].high == 0
    )  # one column


def test_on_other_noise_a_difference_is_far_noisier() -> None:
    """The control: the same bias from two independent measurements."""
    nearly = Tempered(temperature=1.05)
    paired = measured(nearly, replicates=1024)
    other = measured(parse("iwae:K=2"), replicates=1024, seed=1)
    for group in BOTH:
        noise = sum(m.variance[name].sum() for m in (paired, other) for name in paired.groups[group])
        difference = paired.compared[group].difference
        assert sum(difference[name].sums.variance for name in paired.groups[group]) < 0.01 * noise


def test_the_error_of_the_mean_squared_error_is_paired() -> None:
    """Its shards are those of the variance and of the bias together."""
    found = measured(Tempered(), replicates=512)
    m = found.metrics("inference")
    without = [a + b for a, b in zip(m["variance"].jackknife, m["bias_squared"].jackknife, strict=True)]
    assert m["mse"].jackknife == pytest.approx(without)
    assert metrics.METRICS["mse"].scale == "log"


# What is compared with what.


def words(estimator: Estimator, reference: str = "", model: torch.nn.Module | None = None) -> dict[str, str]:
    problem = Problem(model or vae(), data(2))
    found = comparisons(problem, estimator, parse(reference) if reference else None)
    return {group: str(c.reference) for c in found for group in c.groups}


@dataclass(frozen=True)
class Wrong(Weighted):
    K: int = 3
    facts = Facts("wrong", family="test", objective="elbo", biased=("inference",))

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=torch.full_like(log_w, 1 / self.K), score=log_w)


def test_the_trusted_estimator_follows_from_objective_guide_and_particles() -> None:
    assert words(Tempered(3)) == {"generative": "iwae:K=3", "inference": "iwae:K=3"}
    assert words(Tempered(3), model=vae("bernoulli")) == {"generative": "vimco:K=3", "inference": "vimco:K=3"}
    assert words(Tempered(1)) == {"generative": "sgvb-a", "inference": "sgvb-a"}
    assert words(Tempered(1), model=vae("bernoulli")) == {"generative": "rloo:K=8", "inference": "rloo:K=8"}
    assert words(Wrong()) == {"inference": "sgvb-a:K=3"}
    assert words(Wrong(K=9), model=vae("bernoulli")) == {"inference": "rloo:K=9"}
    assert words(Wrong(K=1), model=vae("bernoulli")) == {"inference": "rloo:K=8"}


@pytest.mark.parametrize("word", ["iwae:K=3", "rws:K=3", "tvo:K=3", "nvi:K=3", "nvi:K=3,levels=3,resample=systematic"])
def test_without_a_trusted_estimator_or_a_declared_bias_there_is_no_comparison(word: str) -> None:
    assert words(parse(word)) == {}


def test_a_reference_is_compared_with_in_groups_of_the_same_objective() -> None:
    assert words(parse("dreg:K=3"), "iwae:K=3") == {"generative": "iwae:K=3", "inference": "iwae:K=3"}
    assert words(parse("rws:K=3"), "iwae:K=3") == {"generative": "iwae:K=3"}
    assert words(parse("iwae:K=3"), "iwae-stl:K=3") == {"generative": "iwae-stl:K=3"}  # biased in the other
    assert words(parse("dreg:K=3"), "iwae:K=2") == {}  # another bound
    assert words(parse("dreg:K=3"), "dreg:K=3") == {}
    assert words(parse("rloo:K=3"), "sgvb-a:K=2") == {"generative": "sgvb-a:K=2", "inference": "sgvb-a:K=2"}
    assert words(parse("vr:alpha=0.5"), "vr:alpha=0.2") == {}
    assert words(parse("nvi:K=3"), "iwae:K=3") == {}  # the bound of kernels of its own
    assert words(parse("nvi:K=3"), "sgvb-a:K=3") == {"inference": "sgvb-a:K=3"}


def test_rows_say_what_they_were_compared_with() -> None:
    rows = measured(Tempered(), replicates=32).rows(tensors=True)
    of = [row for row in rows if row["metric"] in metrics.BIAS]
    assert {(row["group"], row["metric"]) for row in of} == {(g, m) for g in BOTH for m in metrics.BIAS}
    assert {row["reference"] for row in of} == {"iwae:K=2"}
    assert any(row.get("tensor") == "encoder.bias" for row in of)
    assert not [row for row in measured(parse("iwae:K=2"), replicates=32).rows() if row["metric"] in metrics.BIAS]


def test_no_pass_is_made_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    true, drawn = Batch.draw, []
    monkeypatch.setattr(Batch, "draw", lambda self, rng: drawn.append(len(rng.replicates)) or true(self, rng))
    problem, options = Problem(vae(), data(2)), {"replicates": 32, "dtype": torch.float64, "chunk": 32}

    def passes(*estimators: Estimator, **more: object) -> int:
        drawn.clear()
        measure_all(problem, estimators, **options, **more)  # type: ignore[arg-type]
        return drawn.count(32)

    assert passes(parse("iwae:K=3"), parse("dreg:K=3")) == 1
    assert passes(parse("iwae:K=3"), Tempered(3)) == 2
    assert passes(Tempered(3), Tempered(3, 1.5), parse("iwae-stl:K=3")) == 2
    assert passes(Tempered(3), only=["variance", "snr"]) == 1
    assert passes(Tempered(3), only=["bias"]) == 2


def test_of_a_precision_the_comparison_has_the_same_replicates() -> None:
    m = measured(Tempered(), replicates=64, precision=0.15)
    assert m.replicates > 64
    for group, of in m.compared.items():
        for name in m.groups[group]:
            assert of.difference[name].pooled.n == of.trusted[name].pooled.n == m.replicates
            own = [s.n for s in m.moments[name].without]
            assert [s.n for s in of.difference[name].without] == own
    assert math.isfinite(m.metrics("inference")["mse"].stderr)


def test_the_memory_a_reference_is_given_is_its_own() -> None:
    """Settled by itself: alone, and as a part of a difference, it is the same."""
    model, x = vae(), data(2)
    state = settled(parse("moving-average"), model, x, 0)
    m = measure(
        Problem(model, x), parse("sgvb-a"), reference=parse("moving-average"), replicates=16, dtype=torch.float64
    )
    again = measure(Problem(model, x), parse("moving-average"), replicates=16, dtype=torch.float64)
    assert float(state.tracked["signal"].value) != 0
    for name, mean in again.mean.items():
        np.testing.assert_allclose(
            m.compared["inference"].trusted[name].pooled.mean, mean, rtol=0, atol=1e-12 + 1e-9 * np.abs(mean).max()
        )

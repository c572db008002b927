"""Several estimators from one pass, squared norms, and what precision and memory ask for."""

import math
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engine import WORDS, HighSignal, Shifted, data, equal, vae
from oracles import scrambled
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from gradiometer.bench.batched import Batch, together
from gradiometer.bench.decomposition import decompose
from gradiometer.bench.folding import Failure
from gradiometer.bench.gradients import one, trainable
from gradiometer.bench.measurement import Measurement, measure, measure_all
from gradiometer.bench.problems import Problem
from gradiometer.bench.replicates import Plan, chunk_size
from gradiometer.bench.tape import Pass
from gradiometer.estimators.base import Coefficients, Facts, State, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

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
    assert drawn == 2 * [2, 32, 32, 32]  # a probe, and one pass for all; and again for the bias of what is biased
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
            assert set(found) == {"gradient_norm", "variance", "directional_snr", "cosine", "pareto_k"}
            for name, value in found.items():
                for kind in ("value", "stderr", "low", "high"):
                    assert getattr(value, kind) == pytest.approx(getattr(wanted[name], kind), rel=1e-8, nan_ok=True)
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
    assert passes == 2  # one for all, and one for the bias of what is biased
    assert max(m.chunk for m in scarce) < 96 <= min(m.chunk for m in ample)
    assert sum(drawn) >= 2 * 96
    for m, wanted in zip(scarce, ample, strict=True):
        assert off(m, wanted) < 1e-12
    least = measure(problem, parse("dreg:K=3"), memory=1, **options)
    assert least.chunk == 1
    assert off(least, ample[SAME_K.index("dreg:K=3")]) < 1e-12


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_pass_is_forgotten_before_the_next_is_made(decomposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[weakref.ref[object]] = []
    draw = Batch.draw

    def watched(batch: Batch, rng: Rng) -> Pass:
        assert not any(block() is not None for block in known)
        made = draw(batch, rng)
        if len(rng.replicates) == 8:  # not a probe of two
            known.extend(weakref.ref(block) for block in made.blocks.values())
        return made

    monkeypatch.setattr(Batch, "draw", watched)
    options = {"replicates": 64, "seed": 5, "chunk": 8}
    if decomposed:
        problem = Problem(vae(), data(3), minibatch=lambda generator: torch.rand(3, 5, generator=generator).round())
        decompose(problem, [parse("iwae:K=3")], minibatches=4, **options)
    else:
        measure(Problem(vae(), data(3)), parse("iwae:K=3"), **options)
    assert len(known) > 8


@pytest.mark.parametrize(
    ("fitting", "most", "chunk"),
    [(0.3, 9, 1), (1.2, 9, 1), (1.8, 9, 2), (1.8, 1, 1), (14.1, 99, 16), (14.1, 14, 8), (71, 99, 64), (9, 0, 1)],
)
def test_a_chunk_is_about_what_fits_and_divides_blocks_of_noise(fitting: float, most: int, chunk: int) -> None:
    assert chunk_size(fitting, most) == chunk


def test_the_finer_shards_of_a_precision_are_part_of_the_memory() -> None:
    problem, options = Problem(vae(), data(3)), {"replicates": 96, "dtype": torch.float64, "memory": 200_000}
    coarse, fine = (measure(problem, parse("dreg:K=3"), **options, **more) for more in ({}, {"precision": 0.9}))
    held = (
        2 * 8 * 16 * sum(p.numel() for p in problem.model.parameters())
    )  # of sixteen shards; precisely, four times as many
    assert fine.chunk < coarse.chunk
    assert abs(coarse.chunk / fine.chunk / ((200_000 - held) / (200_000 - 4 * held)) - 1) < 0.2

"""Heavy tails are found and said, light ones left alone, and a precision is met by about as many replicates as it takes."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from gradiometer.bench import metrics, tails
from gradiometer.bench.measurement import measure
from gradiometer.bench.models.toys import FunctionToy, GaussianToy
from gradiometer.bench.problems import Problem
from gradiometer.estimators.base import Estimator, Facts, State, Surrogate
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

Array = np.ndarray


def squares(g: Array) -> Array:
    """Squared distances to the mean, by hand."""
    return ((g - g.mean(0)) ** 2).sum(1)


def test_distances_follow_from_projections() -> None:
    g = np.random.default_rng(0).normal(3, 1, (400, 5))
    mean = g.mean(0)
    u = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(tails.distances(g @ u, (g**2).sum(1)), squares(g), rtol=1e-10)


@pytest.mark.parametrize("k", [-0.3, 0.1, 0.25, 0.5, 1.0])
def test_the_shape_is_that_of_the_tail(k: float) -> None:
    """Of exact Pareto tails, within its own error."""
    found = []
    for seed in range(60):
        norms = 5 + stats.genpareto(k).rvs(2000, random_state=seed)
        found.append(tails.pareto_k(norms**2))
    size = math.ceil(3 * math.sqrt(2000))
    drawn = (size * k + 5) / (size + 10)  # to 1/2, as by ten observations
    assert np.mean([v.value for v in found]) == pytest.approx(drawn, abs=0.06)
    assert np.std([v.value for v in found]) == pytest.approx(found[0].stderr, rel=0.5)
    assert found[0].stderr == pytest.approx((1 + found[0].value) / math.sqrt(size), rel=1e-9)


def test_the_fit_is_the_published_one() -> None:
    """Against a direct transcription of Zhang & Stephens (2009), whose shape has the other sign."""
    x = np.sort(stats.genpareto(0.4).rvs(100, random_state=3))
    n, m = len(x), 20 + math.isqrt(len(x))
    theta = 1 / x[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])

    def shape(t: float) -> float:
        return -np.log(1 - t * x).mean()

    logs = np.array([n * (math.log(t / shape(t)) + shape(t) - 1) for t in theta])
    weights = 1 / np.exp(logs[None, :] - logs[:, None]).sum(1)
    published = -shape(float((theta * weights).sum()))
    assert (tails._shape(x) * (n + 10) - 5) / n == pytest.approx(published, abs=2e-3)  # of a finer grid


def test_what_has_no_tail_has_no_shape() -> None:
    assert math.isnan(tails.pareto_k(np.ones(500)).value)
    assert math.isnan(tails.pareto_k(np.arange(10.0)).value)
    assert tails.verdict(np.ones(500)) == "light"
    assert tails.verdict(np.zeros(500)) == "light"
    assert tails.verdict(np.arange(10.0)) == ""


def flagged(draw, trials: int = 200, seed: int = 0) -> float:
    generator = np.random.default_rng(seed)
    return float(np.mean([tails.verdict(squares(draw(generator))) == "heavy" for _ in range(trials)]))


@pytest.mark.parametrize(
    ("draw", "most"),
    [
        (lambda g: g.normal(0, 1, (256, 10)), 0.15),
        (lambda g: g.normal(0, 1, (512, 10)), 0.05),
        (lambda g: g.normal(0, 1, (512, 1)), 0.05),
        (lambda g: g.uniform(-1, 1, (256, 1)), 0.05),
        (lambda g: g.laplace(0, 1, (512, 10)), 0.15),
        (lambda g: g.normal(0, 1, (1024, 10)) ** 2, 0.1),
        (lambda g: (g.random((256, 1)) < 0.3) * 1.0, 0.0),
    ],
)
def test_light_tails_are_left_alone(draw, most: float) -> None:
    assert flagged(draw) <= most


@pytest.mark.parametrize(
    ("draw", "least"),
    [
        (lambda g: g.standard_t(3, (256, 1)), 0.7),
        (lambda g: g.standard_t(3, (2048, 10)), 0.85),
        (lambda g: g.standard_t(4, (256, 1)) * np.ones(10), 0.5),
        (lambda g: np.exp(g.normal(0, 1, (256, 1))), 0.85),
        (lambda g: g.normal(0, 1, (256, 10)) * np.where(g.random((256, 1)) < 0.02, 10, 1), 0.85),
    ],
)
def test_heavy_tails_are_found(draw, least: float) -> None:
    assert flagged(draw) >= least


def test_a_wrong_interval_is_seldom_silent() -> None:
    """What the flag is for; the control is one that is never raised."""
    from test_statistics import value_of

    generator, missed, silent, trials = np.random.default_rng(1), 0, 0, 600
    for trial in range(trials):
        freedom = 3 + trial % 3
        g = generator.standard_t(freedom, (256, 2))
        value = value_of(g, "variance")
        miss = not value.low <= 2 * freedom / (freedom - 2) <= value.high
        missed += miss
        silent += miss and tails.verdict(squares(g[128:])) == "light"
    assert missed / trials > 0.08
    assert silent / trials < 0.06


# In a measurement.


@dataclass(frozen=True)
class Scaled(Estimator):
    """The pathwise gradient, times a factor that is heavy-tailed in its own draw."""

    power: float = 0.0
    facts = Facts("scaled", family="test", needs=("rsample",))

    def surrogate(self, model: object, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)  # type: ignore[attr-defined]
        z = rng.rsample(q, 1)
        factor = rng.uniform(q) ** -self.power
        bound = (model.log_joint(x, z) - q.log_prob(z)).mean(0) * factor  # type: ignore[attr-defined]
        return Surrogate({"generative": bound, "inference": bound})


@pytest.mark.parametrize("engine", ["rows", "loop"])
def test_rows_say_how_heavy_the_tails_are(engine: str) -> None:
    problem = Problem(GaussianToy(3), torch.ones(1, 3))
    for power, verdict in ((0.0, "light"), (0.45, "heavy")):
        m = measure(problem, Scaled(power=power), replicates=512, engine=engine)  # type: ignore[arg-type]
        rows = [row for row in m.rows(tensors=True) if row.get("group") == "inference"]
        of = {row["metric"]: row.get("tails", "") for row in rows if not row.get("tensor")}
        assert m.tails("inference") == verdict
        assert {of[name] for name in metrics.OF_VARIANCE if name in of} == {verdict}
        assert of["cosine"] == of["gradient_norm"] == ""
        assert {row.get("tails", "") for row in rows if row.get("tensor")} == {""}  # of single tensors nothing is known
        k = m.metrics("inference")["pareto_k"]
        assert k.low < k.value < k.high
        assert (k.value > tails.SHAPE) == (verdict == "heavy")


def test_few_coordinates_are_projected_in_every_replicate_of_the_second_half() -> None:
    small = measure(Problem(FunctionToy(), torch.ones(1, 1)), parse("stl"), replicates=2048)
    assert sum(len(along) for along, _ in small.projections["inference"]) == 1024
    large = measure(Problem(GaussianToy(70), torch.ones(1, 70)), parse("stl"), replicates=2048)
    assert sum(len(along) for along, _ in large.projections["inference"]) == 256


# Precision.


def test_a_precision_takes_about_as_many_replicates_as_it_must() -> None:
    """The need is that of the true standard error, from many measurements; the controls are counts far from it."""
    problem, estimator, options = (
        Problem(FunctionToy("cosine", k=2.0), torch.ones(1, 1)),
        parse("stl"),
        {"dtype": torch.float64},
    )
    logs = [
        math.log(
            measure(problem, estimator, replicates=512, seed=1000 + s, **options).metrics("inference")["variance"].value
        )
        for s in range(100)
    ]
    need = 512 * (np.std(logs) * 1.96 / math.log1p(0.1)) ** 2
    truth = math.exp(np.mean(logs))
    spent, inside = [], 0
    for seed in range(40):
        m = measure(problem, estimator, replicates=64, seed=seed, precision=0.1, **options)
        value = m.metrics("inference")["variance"]
        assert m.precision_met
        assert value.high - value.value <= 0.1 * value.value * (1 + 1e-9)
        spent.append(m.replicates / need)
        inside += value.low <= truth <= value.high
    assert need > 3 * 64
    assert 0.8 < np.median(spent) < 1.5
    assert np.quantile(spent, 0.9) < 1.8
    assert inside >= 33


def test_the_shards_of_as_many_replicates_are_the_same_however_they_were_reached() -> None:
    problem = Problem(GaussianToy(2), torch.ones(3, 2))
    by_steps = [
        measure(problem, parse("stl"), replicates=64, seed=s, precision=p)
        for s, p in ((0, 0.1), (0, 0.09), (1, 0.1), (2, 0.1), (3, 0.1))
    ]
    counts: dict[int, set[tuple[float, ...]]] = {}
    for m in by_steps:
        name = next(iter(m.moments))
        assert len(m.moments[name].without) == 32
        counts.setdefault(m.replicates, set()).add(tuple(s.n for s in m.moments[name].without))
    assert all(len(of) == 1 for of in counts.values())


def test_tails_are_not_told_from_projections_on_anothers_direction() -> None:
    problem = Problem(GaussianToy(3), torch.zeros(4, 3))
    own = measure(problem, parse("iwae:K=4"), replicates=256)
    beside = measure(problem, parse("iwae:K=4"), replicates=256, reference=parse("sgvb-a"))
    assert own.tails("inference") != ""
    assert beside.tails("inference") == ""
    assert math.isnan(beside.metrics("inference")["pareto_k"].value)

"""Error bars that hold what they promise, and metrics on vectors whose answers are known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from gradiometer.bench import metrics
from gradiometer.bench.accumulators import accumulator
from gradiometer.bench.measurement import measure
from gradiometer.bench.metrics import (
    METRICS,
    Sums,
    cosine,
    directional_snr,
    gradient_norm,
    snr,
    snr_corrected,
    snr_floor,
    variance,
)
from gradiometer.bench.models.toys import FunctionToy, GaussianToy
from gradiometer.bench.moments import Moments, shards
from gradiometer.bench.problems import Problem
from gradiometer.bench.statistics import Value, exact, jackknife, ratio, student
from gradiometer.estimators.registry import parse

Array = np.ndarray


def moments_of(g: Array) -> Moments:
    """Of replicates ``[R, P]``, through the accumulator, in the shards a measurement would make."""
    bounds = shards(len(g))
    folded = accumulator(torch.tensor(g[:16]), len(bounds), [(None, None)])
    for number, shard in enumerate(bounds):
        folded.fold(number, torch.tensor(g[shard.start : shard.stop]))
    return folded.moments()


def value_of(g: Array, name: str) -> Value:
    moments, metric = moments_of(g), METRICS[name]
    return jackknife(metric.of(moments.sums), [metric.of(w) for w in moments.without], positive=metric.positive)


# The jackknife.


def test_of_a_mean_it_is_the_textbook_standard_error() -> None:
    shard_means = np.random.default_rng(0).normal(2, 3, 16)
    without = [np.delete(shard_means, i).mean() for i in range(16)]
    found = jackknife(shard_means.mean(), without, positive=False)
    error = shard_means.std(ddof=1) / 4
    assert found.stderr == pytest.approx(error)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 15, shard_means.mean(), error))
    assert found.stderr != pytest.approx(shard_means.std(ddof=0) / 4)
    assert found.jackknife == pytest.approx(without)


def test_of_a_positive_quantity_the_interval_is_on_the_log_scale() -> None:
    found = jackknife(3.0, [2.7, 3.1, 3.2, 3.0], positive=True)
    logs = np.log([2.7, 3.1, 3.2, 3.0])
    spread = math.sqrt(3 / 4 * ((logs - logs.mean()) ** 2).sum())
    assert found.stderr == pytest.approx(3 * spread)
    assert found.low == pytest.approx(3 * math.exp(-student(3) * spread))
    assert found.low * found.high == pytest.approx(9)
    assert jackknife(1.0, [1e-9, 1e9, 1.0, 1.0], positive=True).low >= 0


def test_student_is_the_table() -> None:
    assert student(15) == pytest.approx(2.1314, abs=1e-4)
    assert student(1) == pytest.approx(12.706, abs=1e-3)


def test_what_has_no_error_bar_says_so() -> None:
    assert exact(3.0) == Value(3.0, 0.0, 3.0, 3.0)
    assert math.isnan(jackknife(1.0, [1.0], positive=False).stderr)
    assert math.isnan(jackknife(1.0, [1.0, math.nan], positive=False).stderr)
    assert math.isnan(jackknife(math.nan, [1.0, 2.0], positive=True).low)
    still = jackknife(2.0, [2.0, 2.0, 2.0], positive=True)
    assert (still.stderr, still.low, still.high) == (0.0, 2.0, 2.0)


def coverage(draw, name: str, truth: float, trials: int = 600) -> float:
    generator = np.random.default_rng(7)
    found = [value_of(draw(generator), name) for _ in range(trials)]
    return float(np.mean([v.low <= truth <= v.high for v in found]))


LIGHT = {
    "normal": (lambda g: g.normal(3, 2, (256, 2)), 8.0),
    "uniform": (lambda g: g.uniform(0, 6, (256, 2)), 6.0),
    "few replicates": (lambda g: g.normal(3, 2, (64, 2)), 8.0),
    "of many sizes": (lambda g: g.normal(0, [1.0, 3.0], (256, 2)), 10.0),
}


@pytest.mark.parametrize("name", LIGHT)
def test_intervals_of_a_variance_cover_it(name: str) -> None:
    draw, truth = LIGHT[name]
    found = coverage(draw, "variance", truth)
    assert 0.92 < found < 0.98
    assert coverage(draw, "variance", 1.3 * truth, trials=150) < 0.9  # and not whatever else


def test_intervals_of_a_signal_to_noise_ratio_cover_it() -> None:
    # Far above its floor, where |mean| is the mean.
    assert 0.92 < coverage(lambda g: g.normal([4.0, 2.0], 2.0, (256, 2)), "snr", 1.5) < 0.98


def test_intervals_of_a_norm_cover_it() -> None:
    assert 0.92 < coverage(lambda g: g.normal([3.0, 4.0], 2.0, (256, 2)), "gradient_norm", 5.0) < 0.98


def test_heavy_tails_are_where_the_promise_ends() -> None:
    """A known limit, kept in view: the interval of a variance is too short where fourth moments barely exist."""
    found = coverage(lambda g: g.standard_t(4.5, (256, 1)), "variance", 4.5 / 2.5, trials=300)
    assert 0.6 < found < 0.95


# Ratios.


def test_a_ratio_is_paired() -> None:
    generator = np.random.default_rng(1)
    common = generator.normal(0, 1, (256, 3)) * np.exp(generator.normal(0, 0.5, (256, 1)))
    numerator, denominator = 2 * common + generator.normal(0, 0.1, (256, 3)), common
    a, b = value_of(numerator, "variance"), value_of(denominator, "variance")
    paired = ratio(a, b)
    apart = math.hypot(a.stderr / a.value, b.stderr / b.value) * paired.value
    assert paired.value == pytest.approx(a.value / b.value)
    assert paired.low < 4.0025 < paired.high  # 2^2 and 0.1^2, over a variance of e^(1/2) for which nearly 4
    assert paired.stderr < 0.2 * apart
    shuffled = Value(b.value, b.stderr, b.low, b.high, b.jackknife[::-1])
    assert ratio(a, shuffled).stderr > 3 * paired.stderr
    itself = ratio(a, a)
    assert (itself.value, itself.stderr) == (1.0, 0.0)


def test_ratios_of_unlike_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="16 shards cannot be paired with 8"):
        ratio(Value(1.0, jackknife=(1.0,) * 16), Value(1.0, jackknife=(1.0,) * 8))


def test_intervals_of_a_ratio_cover_it() -> None:
    generator, inside = np.random.default_rng(3), 0
    for _ in range(300):
        common, own = generator.normal(0, 1, (256, 2)), generator.normal(0, 1, (256, 2))
        a, b = value_of(common + own, "variance"), value_of(common, "variance")
        paired = ratio(a, b)
        inside += paired.low <= 2 <= paired.high
    assert 0.92 < inside / 300 < 0.98


# Signal-to-noise ratios and their floor.


def pooled(mean: Array, var: Array, n: int) -> Sums:
    m, v = np.asarray(mean, float), np.asarray(var, float)
    ratio = np.abs(m[v > 0]) / np.sqrt(v[v > 0])
    return Sums(n, float(m @ m), float(v.sum()), len(ratio), float(ratio.sum()), float(ratio @ ratio))


def test_of_known_moments() -> None:
    g = pooled([3.0, -4.0, 0.0], [1.0, 4.0, 0.0], 100)
    assert variance(g) == 5
    assert snr(g) == pytest.approx((3 + 2) / 2)  # the coordinate without noise is left out
    assert gradient_norm(g) == pytest.approx(math.sqrt(25 - 5 / 100))
    assert snr_corrected(g) == pytest.approx(math.sqrt((9 + 4) / 2 * 97 / 99 - 0.01))
    assert snr_floor(g) == pytest.approx(0.0797885, abs=1e-6)
    assert gradient_norm(pooled([0.1], [9.0], 4)) == 0
    assert math.isnan(snr(pooled([1.0], [0.0], 9)))


@pytest.mark.parametrize("R", [64, 1024])
def test_a_zero_mean_shows_the_floor_and_nothing_once_it_is_removed(R: int) -> None:
    P = 4000
    g = moments_of(np.random.default_rng(2).normal(0, np.linspace(0.1, 9, P), (R, P))).sums
    floor = math.sqrt(2 / (math.pi * R))
    error = math.sqrt((1 - 2 / math.pi) / R / P)  # of the mean of P half-normals
    shown = stats.t(R - 1).expect(np.abs, lb=-50, ub=50) / math.sqrt(R)  # variances are estimates too
    assert abs(snr(g) - shown) < 5 * error
    assert shown == pytest.approx(floor, rel=2 / R)
    squared = g.squared_signal / P * (R - 3) / (R - 1) - 1 / R
    assert abs(squared) < 5 * math.sqrt(2 / P) / R * (1 + 10 / R)
    assert snr_corrected(g) < 0.4 * floor


def test_few_replicates_do_not_move_the_floor() -> None:
    g = np.random.default_rng(2).normal(0, 1, (8, 200_000))
    squared = g.mean(0) ** 2 / g.var(0, ddof=1)
    error = squared.std() / math.sqrt(squared.size)
    assert abs(squared.mean() * 5 / 7 - 1 / 8) < 5 * error
    assert abs(squared.mean() - 1 / 8) > 5 * error  # without the factor
    assert snr_corrected(pooled(g.mean(0), g.var(0, ddof=1), 8)) < 0.05


def test_the_corrected_ratio_is_right_near_the_floor() -> None:
    truth, R = 0.05, 256  # the floor is as large
    g = moments_of(np.random.default_rng(5).normal(truth, 1, (R, 5000))).sums
    assert snr_corrected(g) == pytest.approx(truth, rel=0.05)
    assert snr(g) > 1.3 * truth


def test_measured_at_an_optimum_the_ratio_is_its_floor() -> None:
    # At mu = k and sigma held, the gradient by mu of the quadratic has mean zero: z - k.
    m = measure(Problem(FunctionToy("quadratic", k=1.0, mu=1.0), torch.ones(1, 1)), parse("stl"), replicates=1024)
    mean, var = m.mean["encoder.weight"][0, 0], m.variance["encoder.weight"][0, 0]
    assert abs(mean) < 5 * math.sqrt(var / 1024)
    assert m.metrics("inference")["snr_floor"].value == pytest.approx(math.sqrt(2 / math.pi / 1024))


# Directions.


def test_directional_ratio_and_cosine_of_known_vectors() -> None:
    u, v = np.array([0.6, 0.8, 0.0]), np.array([0.8, -0.6, 0.0])
    g = np.array([2 * u + 0.5 * v, 3 * u - 1.0 * v, -1 * u + 2.0 * v])
    along, squared = g @ u, (g**2).sum(1)
    assert directional_snr(along, squared) == pytest.approx((4 + 3 + 0.5) / 3)
    wanted = np.mean([2 / math.sqrt(4.25), 3 / math.sqrt(10), -1 / math.sqrt(5)])
    assert cosine(along, squared) == pytest.approx(wanted)
    assert math.isnan(directional_snr(np.array([1.0]), np.array([1.0])))
    assert cosine(np.array([1.0]), np.array([1.0])) == 1
    assert math.isnan(cosine(np.array([0.0]), np.array([0.0])))


def test_measured_directions_are_those_of_the_replicates() -> None:
    """Against all replicates held in memory: the direction from the first half, the ratio over the second."""
    toy, x = GaussianToy(3).double(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for i, p in enumerate(toy.parameters()):
            p.copy_(torch.linspace(-0.5, 0.9 + i, p.numel(), dtype=torch.float64).view_as(p))
    m = measure(Problem(toy, x), parse("stl"), replicates=128, dtype=torch.float64)
    g = replicates_by_hand(toy, x, 128)
    u = g[:64].mean(0) / np.linalg.norm(g[:64].mean(0))
    along, squared = g[64:] @ u, (g[64:] ** 2).sum(1)
    found = m.metrics("inference")
    assert found["cosine"].value == pytest.approx((along / np.sqrt(squared)).mean(), rel=1e-9)
    across = np.sqrt(squared - along**2)
    assert found["directional_snr"].value == pytest.approx((np.abs(along) / across).mean(), rel=1e-9)
    assert found["variance"].value == pytest.approx(g.var(0, ddof=1).sum(), rel=1e-9)
    whole = g.mean(0) / np.linalg.norm(g.mean(0))
    assert found["cosine"].value != pytest.approx((g @ whole / np.linalg.norm(g, axis=1)).mean(), rel=1e-6)


def replicates_by_hand(toy: GaussianToy, x: torch.Tensor, R: int) -> Array:
    """STL's inference gradient: with z = m + s e, the pathwise derivative of log p - log q is (x - z) + (mu - z) + e / s."""
    from gradiometer.estimators.noise import Rng

    A, b, mu = (p.detach().numpy() for p in (toy.encoder.weight, toy.encoder.bias, toy.mu.weight[:, 0]))
    m, s, rows = x.numpy() @ A.T + b, math.sqrt(2 / 3), []
    for r in range(R):
        e = (Rng(0, r).sample(toy.guide(x), 1)[0].numpy() - m) / s
        by_m = (x.numpy() - m - s * e) + (mu - m - s * e) + e / s
        rows.append(np.concatenate([(by_m.T @ x.numpy() / len(x)).ravel(), by_m.mean(0)]))
    return np.array(rows)


def test_a_reference_gives_the_direction() -> None:
    toy, x = GaussianToy(3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    problem = Problem(toy, x)
    trusted = measure(problem, parse("iwae:K=4"), replicates=256, reference=parse("dreg:K=4")).metrics("inference")[
        "cosine"
    ]
    own = measure(problem, parse("iwae:K=4"), replicates=256).metrics("inference")["cosine"]
    assert trusted.value == pytest.approx(own.value, abs=5 * max(own.stderr, 0.01))
    assert -1 <= trusted.low < trusted.value < trusted.high <= 1


# The catalogue of quantities.


def test_every_metric_is_defined_once_and_says_what_it_is() -> None:
    assert {name for name in METRICS} == {m.name for m in METRICS.values()}
    for metric in METRICS.values():
        assert metric.label
        assert metric.unit
        assert metric.doc
        assert metric.reduction
        assert metric.better in ("lower", "higher", "")
    assert set(metrics.GRADIENT) == {"gradient_norm", "variance", "snr", "snr_floor", "snr_corrected"}


def test_error_bars_shrink_as_the_root_of_the_replicates() -> None:
    generator = np.random.default_rng(9)
    errors = [
        np.mean([value_of(generator.normal(0, 1, (R, 20)), "variance").stderr for _ in range(20)]) for R in (256, 4096)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)

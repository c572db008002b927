"""Error bars: the delete-one-shard jackknife, on the scale that suits the quantity; and ranks that the data can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
SHARDS = 16  # of replicates, each left out once
ROUNDING = 1e-4  # of a value made in single precision, by another order of its sums
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """A number with its standard error, its 95 % interval, and the leave-one-shard-out values they come from."""

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    jackknife: tuple[float, ...] = ()


def exact(value: float) -> Value:
    """A number without error."""
    return Value(value, 0.0, value, value)


def jackknife(value: float, without: Sequence[float], *, positive: bool, biased: bool = False) -> Value:
    """The error of a statistic from its values without each of S shards (Quenouille 1956; Tukey 1958).

    Args:
        value: over all shards.
        without: over all shards but one, S of them.
        positive: make the interval for the logarithm, which keeps it positive and is right for ratios and variances.
        biased: add the jackknife estimate of the statistic's bias to its error, in quadrature.

    Returns:
        `value` itself, not the bias-corrected one, with an interval from Student's t with S - 1 degrees of freedom.
    """
    leave_out = np.asarray(without, float)
    kept = tuple(float(v) for v in leave_out)
    if not _has_error(value, leave_out):
        return Value(value, jackknife=kept)
    if positive and value > 0 and (leave_out > 0).all():
        logs = np.log(leave_out)
        spread = math.hypot(_spread(logs), _bias(math.log(value), logs) if biased else 0.0)
        factor = math.exp(min(student(len(kept) - 1) * spread, 700.0))
        return Value(value, value * spread, value / factor, value * factor, kept)
    spread = math.hypot(_spread(leave_out), _bias(value, leave_out) if biased else 0.0)
    half = student(len(kept) - 1) * spread
    return Value(value, spread, value - half, value + half, kept)


def square(value: float, without: Sequence[float], noise: float) -> Value:
    """The error of a signed estimate of a squared norm, ``|mean|^2 - noise``, where `noise` is what the mean's own adds to it.

    Such an estimate has variance ``4 lambda (truth + noise / 2)``, lambda the variance of the mean along itself, so that the
    error at zero is not the error far from it. The jackknife sees ``4 lambda |mean|^2``, twice the variance at zero and too
    little where the mean happens to be small. It gives lambda, and the interval holds the truths that lie within t of *their
    own* errors (as Wilson 1927 does for a proportion).

    Args:
        value: over all shards.
        without: over all shards but one, S of them.
        noise: what was subtracted from the square of the mean.

    Returns:
        `value`, which may be negative. `low` may be, too: then it may be that the truth is zero. `high` is never below that of a
        `value` of zero, so no interval is empty.
    """
    leave_out = np.asarray(without, float)
    kept = tuple(float(v) for v in leave_out)
    if not (_has_error(value, leave_out) and math.isfinite(noise)):
        return Value(value, jackknife=kept)
    raw = value + noise
    slope = _spread(leave_out) ** 2 / raw if raw > 0 else 0.0  # 4 lambda
    q = slope * student(len(kept) - 1) ** 2
    low, high = (
        at + q / 2 + sign * math.sqrt(max(0.0, q * (at + noise / 2 + q / 4)))
        for sign, at in ((-1, value), (1, max(value, 0.0)))
    )
    return Value(value, math.sqrt(slope * (max(value, 0.0) + noise / 2)), low, high, kept)


def root(of: Value) -> Value:
    """The square root of a `square`, which is zero where that is negative; its error is that of its interval."""
    kept = tuple(math.sqrt(max(v, 0.0)) for v in of.jackknife)
    value, low, high = (math.sqrt(max(v, 0.0)) if math.isfinite(v) else math.nan for v in (of.value, of.low, of.high))
    stderr = (high - low) / (2 * student(len(kept) - 1)) if math.isfinite(high) else math.nan
    return Value(value, stderr, low, high, kept)


def ratio(value: Value, baseline: Value) -> Value:
    """The ratio of two positive statistics; paired, if their shards are of the same replicates of the same noise.

    Raises:
        ValueError: the two have different numbers of shards, so they cannot be paired.
    """
    if len(value.jackknife) != len(baseline.jackknife):
        raise ValueError(f"{len(value.jackknife)} shards cannot be paired with {len(baseline.jackknife)}")
    with np.errstate(divide="ignore", invalid="ignore"):  # a root may be zero without a shard: no error, then
        without = np.divide(value.jackknife, baseline.jackknife)
        return jackknife(float(np.divide(value.value, baseline.value)), without.tolist(), positive=True)


def chi_square(variance: Array, n: float) -> tuple[Array, Array]:
    """The 95 % interval of the variance of each of some *normal* quantities, from their unbiased estimates over n replicates.

    It holds for nothing but the normal: of Laplace's distribution it covers 73 %.
    """
    from scipy.special import chdtri

    tail = (1 - LEVEL) / 2
    scaled = np.asarray(variance, float) * (n - 1)
    return scaled / chdtri(n - 1, tail), scaled / chdtri(n - 1, 1 - tail)


def ranking(values: Mapping[str, Value], better: Literal["lower", "higher"]) -> dict[str, tuple[int, int]]:
    """The first and the last rank of each of some positive values that the data leave possible, best first.

    Two are told apart if the logarithm of their ratio is not zero by Student's t over the shards, paired where they have as
    many (the caller sees to it that these are of the same noise), after Holm's correction over all pairs (Holm 1979): of
    values that are all equal, any are told apart with a probability of at most 5 % (from some 256 replicates on). What is worse
    than k others for sure ranks k + 1 at best. Values that are no positive numbers have no rank.

    Raises:
        ValueError: neither direction is better.

    Example:
        >>> of = lambda *shards: jackknife(sum(shards) / 4, shards, positive=True)
        >>> found = ranking({"a": of(9, 9.1, 9, 9.1), "b": of(3, 3.1, 3.1, 3), "c": of(9.1, 9, 9, 9.1)}, "lower")
        >>> found == {"b": (1, 1), "a": (2, 3), "c": (2, 3)}
        True
    """
    if better not in ("lower", "higher"):
        raise ValueError(f"there is no ranking where neither direction is better, only lower or higher, not {better!r}")
    ranked = sorted((name for name, v in values.items() if 0 < v.value < math.inf), key=lambda name: values[name].value)
    ranked = ranked if better == "lower" else ranked[::-1]
    n = len(ranked)
    upper = [(i, j) for i in range(n) for j in range(i + 1, n)]
    p = np.array([_p_equal(values[ranked[i]], values[ranked[j]]) for i, j in upper])
    ahead, behind = np.zeros((2, n), int)
    for order, at in enumerate(np.argsort(p, kind="stable")):
        if not p[at] * (len(p) - order) <= 1 - LEVEL:  # Holm: the first that is not small enough ends it
            break
        i, j = upper[at]
        behind[i] += 1
        ahead[j] += 1
    return {name: (1 + int(ahead[i]), n - int(behind[i])) for i, name in enumerate(ranked)}


def _p_equal(a: Value, b: Value) -> float:
    """The probability of so large a ratio between two positive statistics, were they equal."""
    from scipy.special import ndtr, stdtr

    distance = abs(math.log(a.value / b.value))
    shards = len(a.jackknife)
    if shards == len(b.jackknife) >= 2 and min(*a.jackknife, *b.jackknife) > 0:
        spread = _spread(np.log(a.jackknife) - np.log(b.jackknife))
    else:
        spread, shards = math.hypot(a.stderr / a.value, b.stderr / b.value), 0
    if math.isnan(spread) or distance <= ROUNDING:  # without an error nothing is known; what is the same, is equal
        return 1.0
    t = distance / spread if spread > 0 else math.inf
    return float(2 * (stdtr(shards - 1, -t) if shards else ndtr(-t)))


def student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def normal() -> float:
    """The two-sided 95 % point of the normal."""
    from scipy.special import ndtri

    return float(ndtri((1 + LEVEL) / 2))


def _spread(leave_out: Array) -> float:
    shards = len(leave_out)
    return math.sqrt((shards - 1) / shards * ((leave_out - leave_out.mean()) ** 2).sum())


def _bias(value: float, leave_out: Array) -> float:
    """Quenouille's estimate of a statistic's bias, which falls with the replicates: too large if positive."""
    return (len(leave_out) - 1) * float(leave_out.mean() - value)


def _has_error(value: float, leave_out: Array) -> bool:
    return len(leave_out) >= 2 and bool(np.isfinite(leave_out).all()) and math.isfinite(value)

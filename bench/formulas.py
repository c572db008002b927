"""The formulas of what is measured, in NumPy: of sums over coordinates, and of projections.

The docstrings are the definitions that reports print. ``mean`` and ``var`` are each coordinate's over ``n`` replicates; sums
and means run over the coordinates of a parameter group.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Sums over coordinates of the moments of a gradient, each coordinate's over ``n`` replicates.

    Attributes:
        n: replicates.
        squared_mean: of ``mean^2``.
        variance: of ``var``.
        noisy: how many coordinates have ``var > 0``; the next two are over these.
        signal: of ``|mean| / sqrt(var)``.
        squared_signal: of ``mean^2 / var``.
    """

    n: float
    squared_mean: float
    variance: float
    noisy: float
    signal: float
    squared_signal: float

    def __add__(self, other: Sums) -> Sums:
        """Of both sets of coordinates."""
        return Sums(self.n, *(a + b for a, b in zip(astuple(self)[1:], astuple(other)[1:], strict=True)))


@dataclass(frozen=True)
class Square:
    """An estimate of a square, which may be negative, and the `noise` that was subtracted to make it unbiased."""

    value: float
    noise: float

    @property
    def root(self) -> float:
        """The root, zero where the square is negative."""
        return math.sqrt(max(0.0, self.value))


def squared_norm(g: Sums) -> Square:
    return Square(g.squared_mean - g.variance / g.n, g.variance / g.n)


def squared_ratio(g: Sums) -> Square:
    if not g.noisy or g.n <= 3:
        return Square(math.nan, math.nan)
    return Square(g.squared_signal / g.noisy * (g.n - 3) / (g.n - 1) - 1 / g.n, 1 / g.n)


def gradient_norm(g: Sums) -> float:
    """Euclidean norm of the mean gradient, ``sqrt(max(0, sum mean^2 - sum var / n))``: the noise of the mean is taken out."""
    return squared_norm(g).root


def variance(g: Sums) -> float:
    """Trace of the covariance of one gradient, ``sum var``: Monte-Carlo variance of the estimator alone."""
    return g.variance


def snr(g: Sums) -> float:
    """Signal-to-noise ratio, ``mean over coordinates of |mean| / sqrt(var)``; coordinates without noise are left out.

    A gradient of mean zero still shows ``sqrt(2 / (pi n))``, its floor (Rainforth et al. 2018, with the floor told). Few replicates
    make it too large; its interval is widened by the jackknife's estimate of that.
    """
    return g.signal / g.noisy if g.noisy else math.nan


def snr_floor(g: Sums) -> float:
    """What `snr` shows of a gradient whose mean is exactly zero: ``sqrt(2 / pi) / sqrt(n)``. A value near it is noise."""
    return math.sqrt(2 / (math.pi * g.n))


def snr_corrected(g: Sums) -> float:
    """Root mean square over coordinates of the signal-to-noise ratio with its floor taken out.

    ``sqrt(max(0, c mean over coordinates of mean^2 / var - 1 / n))``, ``c = (n - 3) / (n - 1)``: of normal gradients
    the square is unbiased before it is cut at zero; skewness leaves it a bias of order ``1 / n``.
    """
    return squared_ratio(g).root


LOUD = 2  # the mean's norm over the noise along it, above which the shape of that noise hardly affects the ratio
KNOWN = 10  # times its noise the square of a mean must be, for its direction to be known
SURE = 100  # and for the noise along it


def directional_snr(along: Array, squared: Array, mean: Sums | None = None, turn: float = 0.0) -> float:
    """Signal along the mean gradient's direction against everything across it, ``mean of |g.u| / |g - (g.u) u|``.

    ``u`` is the reference direction of `cosine`, and the ratio is averaged over replicates of the second half
    (Rainforth et al. 2018). Where ``u`` is the estimator's own mean over the first half, its noise makes ``g.u`` too small:
    ``g.u - mean(g.u) + norm of the mean`` takes its place, and what it leaves of the mean across ``u`` is taken out. There is an
    interval where the norm is at least twice the noise along ``u`` and its square ten times the noise of the mean that gives
    ``u``, or a hundred times; what that noise does to the ratio is in its error, to first order. With fewer than three
    coordinates the ratio has no mean: its tails are too heavy.
    """
    across = squared - along**2
    if not (across > 0).all():
        return math.nan
    if mean is not None:
        square = squared_norm(mean)
        own = 2 * square.noise  # of the direction: it is from half of the replicates
        left = own * square.root**2 / (square.root**2 + own) if own > 0 else 0.0  # of the mean's square, across
        along = along - along.mean() + square.root
        across = across * max(1 - left / float(across.mean()), 0.5)
    return float((np.abs(along) / np.sqrt(across)).mean()) + turn


def slopes(along: Array, squared: Array) -> tuple[Array, Array]:
    """What each replicate adds to the derivative of `directional_snr` by ``u``, as multiples of its gradient.

    Of the signal alone, whose mean over replicates is the norm's and does not turn with ``u``; and of both, signal and noise.
    A direction that is off by ``du``, for lack of a shard, gives a ratio that is off by ``turn = (slope, du)``.
    """
    with np.errstate(all="ignore"):
        across = squared - along**2
        signal = np.sign(along) / np.sqrt(across)
        return signal, signal + np.abs(along) * along / across**1.5


def has_direction(along: Array, mean: Sums) -> bool:
    """Whether the noise along a mean's own direction is known well enough for an interval of `directional_snr`."""
    square, own = squared_norm(mean), 2 * squared_norm(mean).noise  # of half of the replicates
    loud = square.root > LOUD * float(along.std())
    return square.value > (KNOWN if loud else SURE) * own


def cosine(along: Array, squared: Array) -> float:
    """Cosine between a single gradient and the reference direction, averaged over replicates.

    The reference is the estimator's own mean over the first half of the replicates, or a trusted estimator's where one is named.
    """
    norm = np.sqrt(squared)
    if not (norm > 0).all():
        return math.nan
    return float((along / norm).mean())


def bias_squared(difference: Sums) -> float:
    """Squared Euclidean norm of the bias, ``sum mean(d)^2 - sum var(d) / n``; unbiased, so that it may come out negative.

    ``d`` is the difference to the gradient of an unbiased estimator of the same objective, on the same noise.
    """
    return squared_norm(difference).value


def bias(difference: Sums) -> float:
    """Euclidean norm of the bias, ``sqrt(max(0, bias_squared))``: how far the mean gradient is from that of the objective."""
    return squared_norm(difference).root


def squared_relative_bias(difference: Sums, reference: Sums) -> Square:
    of, size = squared_norm(difference), squared_norm(reference).value
    return Square(of.value / size, of.noise / size) if size > 0 else Square(math.nan, math.nan)


def relative_bias(difference: Sums, reference: Sums) -> float:
    """Norm of the bias relative to that of the objective's gradient, as the reference's mean gives it: ``bias / gradient_norm``.

    It has no interval where the interval of that norm reaches below half of it.
    """
    square = squared_relative_bias(difference, reference)
    return square.value if math.isnan(square.value) else square.root


def mse(g: Sums, difference: Sums) -> float:
    """Mean squared error of one gradient, ``variance + bias_squared``: the expected squared distance to that of the objective."""
    return variance(g) + bias_squared(difference)

"""Every quantity we report, defined once: formula, unit, direction, version. No torch here, so that reports need none.

All gradients are ascent on an objective, of the mean over the minibatch, at fixed parameters and a fixed minibatch. ``mean``
and ``var`` are each coordinate's over ``n`` replicates; sums and means run over the coordinates of a parameter group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from types import MappingProxyType

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


def gradient_norm(g: Sums) -> float:
    """Euclidean norm of the mean gradient, ``sqrt(max(0, sum mean^2 - sum var / n))``: the noise of the mean is taken out."""
    return math.sqrt(max(0.0, g.squared_mean - g.variance / g.n))


def variance(g: Sums) -> float:
    """Trace of the covariance of one gradient, ``sum var``: Monte-Carlo variance of the estimator alone."""
    return g.variance


def snr(g: Sums) -> float:
    """Signal-to-noise ratio, ``mean over coordinates of |mean| / sqrt(var)``; coordinates without noise are left out.

    A gradient of mean zero still shows ``sqrt(2 / (pi n))``, its floor (Rainforth et al. 2018, with the floor told).
    """
    return g.signal / g.noisy if g.noisy else math.nan


def snr_floor(g: Sums) -> float:
    """What `snr` shows of a gradient whose mean is exactly zero: ``sqrt(2 / pi) / sqrt(n)``. A value near it is noise."""
    return math.sqrt(2 / (math.pi * g.n))


def snr_corrected(g: Sums) -> float:
    """Root mean square over coordinates of the signal-to-noise ratio with its floor taken out.

    ``sqrt(max(0, c mean over coordinates of mean^2 / var - 1 / n))``, ``c = (n - 3) / (n - 1)``: the square is unbiased
    before it is cut at zero.
    """
    if not g.noisy or g.n <= 3:
        return math.nan
    squared = g.squared_signal / g.noisy * (g.n - 3) / (g.n - 1)
    return math.sqrt(max(0.0, squared - 1 / g.n))


def directional_snr(along: Array, squared: Array) -> float:
    """Signal along the mean gradient's direction against everything across it, ``mean of |g.u| / |g - (g.u) u|``.

    ``u`` is the reference direction of `cosine`, and the ratio is averaged over replicates of the second half
    (Rainforth et al. 2018).
    """
    across = np.sqrt(np.maximum(squared - along**2, 0.0))
    if not (across > 0).all():
        return math.nan
    return float((np.abs(along) / across).mean())


def cosine(along: Array, squared: Array) -> float:
    """Cosine between a single gradient and the reference direction, averaged over replicates.

    The reference is the estimator's own mean over the first half of the replicates, or a trusted estimator's where one is named.
    """
    norm = np.sqrt(squared)
    if not (norm > 0).all():
        return math.nan
    return float((along / norm).mean())


@dataclass(frozen=True)
class Metric:
    """A quantity and how to read it.

    Attributes:
        name: as rows spell it.
        label: as axes spell it.
        unit: of the value.
        better: "lower", "higher" or "" where neither is better.
        reduction: how coordinates, replicates or data become one number.
        doc: the definition.
        positive: intervals are made on the log scale.
        version: raised when the definition changes.
        of: the function of the moments, where it is one.
    """

    name: str
    label: str
    unit: str
    better: str
    reduction: str
    doc: str
    positive: bool = False
    version: int = 1
    of: Callable[..., float] | None = field(default=None, compare=False)


def _of(
    function: Callable[..., float], label: str, unit: str, better: str, reduction: str, positive: bool = True
) -> Metric:
    doc = " ".join((function.__doc__ or "").split())
    return Metric(function.__name__, label, unit, better, reduction, doc, positive, of=function)


_MOMENTS = (
    _of(gradient_norm, "norm of the mean gradient", "nats / parameter", "", "Euclidean norm", positive=False),
    _of(variance, "gradient variance", "(nats / parameter)^2", "lower", "trace"),
    _of(snr, "signal-to-noise ratio", "1", "higher", "mean over coordinates"),
    _of(snr_floor, "floor of the signal-to-noise ratio", "1", "", "exact", positive=False),
    _of(
        snr_corrected, "signal-to-noise ratio, floor removed", "1", "higher", "root mean square over coordinates", False
    ),
)
_PROJECTIONS = (
    _of(directional_snr, "directional signal-to-noise ratio", "1", "higher", "mean over replicates"),
    _of(cosine, "cosine to the reference gradient", "1", "higher", "mean over replicates", positive=False),
)
_VALUES = (
    Metric(
        "objective",
        "objective",
        "nats",
        "higher",
        "mean over replicates",
        "The bound the generative gradient ascends, on the measured minibatch.",
    ),
    Metric(
        "elbo",
        "ELBO",
        "nats",
        "higher",
        "mean over replicates",
        "Evidence lower bound, ``E log w``, on the measured minibatch.",
    ),
    Metric(
        "iwelbo",
        "K-sample bound",
        "nats",
        "higher",
        "mean over replicates",
        "``E log mean_k w_k`` with the estimator's own K, on the measured minibatch.",
    ),
    Metric(
        "ess",
        "effective sample size",
        "particles",
        "higher",
        "mean over replicates",
        "``(sum w)^2 / sum w^2`` of the K weights of a data point, 1 to K; after the last resampling where there is one.",
    ),
    Metric(
        "active_units",
        "active units",
        "units",
        "",
        "count",
        "Latents whose posterior mean varies over data: ``Var_x E_q[z] > 0.01`` (Burda et al. 2016).",
    ),
)
_COSTS = (
    Metric(
        "evaluations",
        "evaluations",
        "per datum and gradient",
        "lower",
        "exact",
        "Evaluations of the joint density per data point and gradient, counted.",
    ),
    Metric(
        "seconds_per_gradient",
        "time per gradient",
        "s",
        "lower",
        "median",
        "Wall-clock time of one gradient as a training step takes it: surrogate, backward, no optimiser.",
        True,
    ),
    Metric(
        "peak_memory",
        "peak memory",
        "MiB",
        "lower",
        "exact",
        "Most memory held at once by tensors that one gradient allocates, model and data excluded.",
    ),
    Metric(
        "gradients_per_second",
        "gradients per second",
        "1/s",
        "higher",
        "median",
        "The inverse of seconds_per_gradient.",
        True,
    ),
    Metric(
        "particles_per_second",
        "particles per second",
        "1/s",
        "higher",
        "median",
        "Evaluations of the joint per second of gradient computation.",
        True,
    ),
    Metric(
        "flops_per_second",
        "arithmetic throughput",
        "1/s",
        "higher",
        "median",
        "Floating-point operations of matrix products per second; against the machine's peak, its utilisation.",
        True,
    ),
    Metric(
        "variance_seconds",
        "variance x time",
        "(nats / parameter)^2 s",
        "lower",
        "product",
        "Variance times seconds per gradient: what a fixed time budget buys; halving it halves the time to a given error.",
        True,
    ),
    Metric(
        "variance_evaluations",
        "variance x evaluations",
        "(nats / parameter)^2",
        "lower",
        "product",
        "Variance times evaluations of the joint per datum: cost without the machine.",
        True,
    ),
)
_TRAINING = (
    Metric(
        "test_elbo", "ELBO on test data", "nats", "higher", "mean over data", "ELBO on held-out data along training."
    ),
    Metric(
        "test_iwelbo",
        "64-sample bound on test data",
        "nats",
        "higher",
        "mean over data",
        "K-sample bound with K = 64 on held-out data along training.",
    ),
)
GRADIENT = MappingProxyType({m.name: m for m in _MOMENTS})
OF_COORDINATES = (
    "snr",
    "snr_floor",
    "snr_corrected",
)  # these need the variance of every coordinate, not the trace alone
PROJECTION = MappingProxyType({m.name: m for m in _PROJECTIONS})
COST = MappingProxyType({m.name: m for m in _COSTS})
METRICS = MappingProxyType({m.name: m for m in (*_VALUES, *_MOMENTS, *_PROJECTIONS, *_COSTS, *_TRAINING)})

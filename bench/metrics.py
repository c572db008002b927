"""Every quantity we report, defined once: formula, unit, direction, version. No torch here, so that reports need none.

All gradients are ascent on an objective, of the mean over the minibatch, at fixed parameters and a fixed minibatch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from gradiometer.bench import formulas
from gradiometer.bench.formulas import Square

Scale = Literal["linear", "log", "biased log", "square", "root"]


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
        scale: what the interval is made on: "log" for a positive quantity, "biased log" for one whose interval is widened by the
            jackknife's estimate of its bias; "square" for an estimate of a square that may be negative, and "root" for its root,
            which is cut at zero.
        version: raised when the definition changes.
        of: the function of the moments, where it is one.
        square: the function that gives the `Square`, on the scales that need it.
    """

    name: str
    label: str
    unit: str
    better: str
    reduction: str
    doc: str
    scale: Scale = "linear"
    version: int = 1
    of: Callable[..., float] | None = field(default=None, compare=False)
    square: Callable[..., Square] | None = field(default=None, compare=False)

    @property
    def positive(self) -> bool:
        """Whether intervals are made on the log scale."""
        return self.scale in ("log", "biased log")


def _of(
    function: Callable[..., float],
    label: str,
    unit: str,
    better: str,
    reduction: str,
    scale: Scale = "log",
    *,
    square: Callable[..., Square] | None = None,
    version: int = 1,
) -> Metric:
    doc = " ".join((function.__doc__ or "").split())
    return Metric(function.__name__, label, unit, better, reduction, doc, scale, version, of=function, square=square)


_NORM, _SQUARE = "nats / parameter", "(nats / parameter)^2"
_MOMENTS = (
    _of(
        formulas.gradient_norm,
        "norm of the mean gradient",
        _NORM,
        "",
        "Euclidean norm",
        "root",
        square=formulas.squared_norm,
        version=2,
    ),
    _of(formulas.variance, "gradient variance", _SQUARE, "lower", "trace"),
    _of(formulas.snr, "signal-to-noise ratio", "1", "higher", "mean over coordinates", "biased log"),
    _of(formulas.snr_floor, "floor of the signal-to-noise ratio", "1", "", "exact", "linear"),
    _of(
        formulas.snr_corrected,
        "signal-to-noise ratio, floor removed",
        "1",
        "higher",
        "root mean square over coordinates",
        "root",
        square=formulas.squared_ratio,
        version=2,
    ),
)
_PROJECTIONS = (
    _of(
        formulas.directional_snr, "directional signal-to-noise ratio", "1", "higher", "mean over replicates", version=2
    ),
    _of(formulas.cosine, "cosine to the reference gradient", "1", "higher", "mean over replicates", "linear"),
)
_BIAS = (
    _of(
        formulas.bias_squared,
        "squared bias",
        _SQUARE,
        "lower",
        "squared Euclidean norm",
        "square",
        square=formulas.squared_norm,
    ),
    _of(formulas.bias, "bias", _NORM, "lower", "Euclidean norm", "root", square=formulas.squared_norm),
    _of(
        formulas.relative_bias,
        "bias relative to the gradient",
        "1",
        "lower",
        "ratio of Euclidean norms",
        "root",
        square=formulas.squared_relative_bias,
    ),
    _of(formulas.mse, "mean squared error", _SQUARE, "lower", "trace and squared Euclidean norm"),
)
_TAILS = (
    Metric(
        "pareto_k",
        "tail shape of the gradient",
        "1",
        "lower",
        "largest fifth of replicates, or fewer",
        "Shape k of a generalised Pareto distribution fitted to the largest distances ``|g - mean|`` of single gradients (Zhang & "
        "Stephens 2009): moments of an order below 1 / k exist. Below 1/2 there is a variance, below 1/4 its error bar holds. "
        "Not told where a reference gives the direction.",
    ),
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
        "Evidence lower bound, ``E log w``, on the measured minibatch; of nvi the mean logarithm of its last weights.",
    ),
    Metric(
        "iwelbo",
        "K-sample bound",
        "nats",
        "higher",
        "mean over replicates",
        "``E log mean_k w_k`` with the estimator's own K, on the measured minibatch; of nvi with its last weights, of disarm with "
        "its antithetic pairs.",
    ),
    Metric(
        "ess",
        "effective sample size",
        "particles",
        "higher",
        "mean over replicates",
        "``(sum w)^2 / sum w^2`` of the K weights of a data point, 1 to K; after the last resampling where there is one. Of "
        "particles as they are drawn: disarm's come in antithetic pairs.",
    ),
    Metric(
        "active_units",
        "active units",
        "units",
        "",
        "count",
        "Latents whose posterior mean varies over data: ``Var_x E_q[z] > 0.01`` (Burda et al. 2016). Of several classes, that "
        "of one is enough.",
        version=2,  # the noise of means that are averages over draws is taken out, and classes are not counted one by one
    ),
)
_COSTS = (
    Metric(
        "evaluations",
        "evaluations",
        "per datum and gradient",
        "lower",
        "exact",
        "Evaluations of the joint density per data point and gradient, counted, with those that control variates learn by.",
        version=2,
    ),
    Metric(
        "seconds_per_gradient",
        "time per gradient",
        "s",
        "lower",
        "median",
        "Wall-clock time of one gradient as a training step takes it, with what control variates learn by, without an optimiser.",
        "log",
        version=2,
    ),
    Metric(
        "peak_memory",
        "peak memory",
        "MiB",
        "lower",
        "exact",
        "Most memory held at once by tensors that one gradient allocates, model and data excluded.",
        version=2,
    ),
    Metric(
        "gradients_per_second",
        "gradients per second",
        "1/s",
        "higher",
        "median",
        "The inverse of seconds_per_gradient.",
        "log",
        version=2,
    ),
    Metric(
        "particles_per_second",
        "particles per second",
        "1/s",
        "higher",
        "median",
        "Evaluations of the joint per second of gradient computation.",
        "log",
        version=2,
    ),
    Metric(
        "flops_per_second",
        "arithmetic throughput",
        "1/s",
        "higher",
        "median",
        "Floating-point operations of matrix products per second; against the machine's peak, its utilisation.",
        "log",
        version=2,
    ),
    Metric(
        "variance_seconds",
        "variance x time",
        "(nats / parameter)^2 s",
        "lower",
        "product",
        "Variance times seconds per gradient: what a fixed time budget buys; halving it halves the time to a given error.",
        "log",
        version=2,
    ),
    Metric(
        "variance_evaluations",
        "variance x evaluations",
        "(nats / parameter)^2",
        "lower",
        "product",
        "Variance times evaluations of the joint per datum: cost without the machine.",
        "log",
        version=2,
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
OF_VARIANCE = ("variance", "snr", "snr_corrected", "directional_snr", "mse")  # their intervals need light tails
PROJECTION = MappingProxyType({m.name: m for m in _PROJECTIONS})
BIAS = MappingProxyType({m.name: m for m in _BIAS})
COST = MappingProxyType({m.name: m for m in _COSTS})
METRICS = MappingProxyType(
    {m.name: m for m in (*_VALUES, *_MOMENTS, *_PROJECTIONS, *_TAILS, *_BIAS, *_COSTS, *_TRAINING)}
)

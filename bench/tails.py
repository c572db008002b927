"""Heavy tails: whether the error bar of a variance can be trusted, from the distances of single gradients to their mean.

A variance has an error bar if fourth moments exist, and an honest one if no single replicate decides it. Neither can be told of a
tail that no replicate has seen: of a gradient that is a hundred times larger in one of a thousand draws, 64 draws say nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradiometer.bench.statistics import Value, normal

Array = NDArray[np.float64]
Tails = Literal["light", "heavy", ""]
SHAPE = 0.25  # of a Pareto tail, above which there are no fourth moments
SHARE = 0.3  # of the squared error of a variance, that one replicate may make
FEWEST = 5  # exceedances that a shape is fitted to


def distances(along: Array, squared: Array) -> Array:
    """Squared distances of gradients to their mean, from inner products with its direction and squared norms."""
    mean = along.mean()
    return np.maximum(squared - 2 * mean * along + mean**2, 0.0)


def verdict(distance: Array) -> Tails:
    """ "heavy" if the interval of the variance is not to be trusted, "" if there are too few gradients to say.

    By simulation (`results/statistics/coverage.md`) with 95 % intervals of the variance, 256 replicates or more.
    """
    if len(distance) < 4 * FEWEST:
        return ""
    return "heavy" if pareto_k(distance).value > SHAPE or share(distance) > SHARE else "light"


def share(distance: Array) -> float:
    """The part of the squared error of a variance, the mean of the squared distances, that the worst replicate makes."""
    deviation = (distance - distance.mean()) ** 2
    return float(deviation.max() / total) if (total := deviation.sum()) > 0 else 0.0


def pareto_k(distance: Array) -> Value:
    """The shape of a generalised Pareto distribution fitted to the largest distances; moments of an order below 1 / k exist.

    Args:
        distance: squared distances to the mean, of independent gradients.

    Returns:
        The posterior mean of Zhang & Stephens (2009) with the prior and the tail size of Vehtari et al. (2024), and its
        asymptotic error.
    """
    norms = np.sort(np.sqrt(distance))
    size = min(len(norms) // 5, math.ceil(3 * math.sqrt(len(norms))))
    exceeding = norms[-size:] - norms[-size - 1] if size >= FEWEST else np.zeros(0)
    exceeding = exceeding[exceeding > 1e-12 * norms[-1]] if size else exceeding
    if len(exceeding) < FEWEST:  # or all of the largest are the same: no tail
        return Value(math.nan)
    k = _shape(exceeding)
    error = (1 + max(k, -0.5)) / math.sqrt(len(exceeding))
    half = normal() * error
    return Value(k, error, k - half, k + half)


def _shape(x: Array) -> float:
    """Of exceedances in ascending order: the mean over a grid of scales weighted by the profile
    likelihood (Zhang & Stephens 2009), then shrunk towards 1/2 with the weight of ten observations (Vehtari et al. 2024)."""
    n = len(x)
    m = 30 + math.isqrt(n)
    scales = 1 / x[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])
    shapes = np.log1p(-scales[:, None] * x).mean(1)
    likelihood = n * (np.log(-scales / shapes) - shapes - 1)
    weights = np.exp(likelihood - likelihood.max())
    scale = float((scales * weights).sum() / weights.sum())
    return float((n * np.log1p(-scale * x).mean() + 5) / (n + 10))

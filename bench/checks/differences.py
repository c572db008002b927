"""How far a mean gradient is from what it should be, beside the smallest distance that would have been seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from gradiometer.bench.checks.expectations import Effort, Gradients
from gradiometer.bench.checks.worlds import World
from gradiometer.estimators.base import Estimator


@dataclass(frozen=True)
class Difference:
    """Found and wanted gradients of one group: where they differ most, by how much, and from where on that would be seen."""

    tensor: str
    off: float
    detectable: float

    @property
    def shows(self) -> bool:
        return not self.off <= self.detectable


def at(estimator: Estimator, K: int) -> Estimator | None:
    """The estimator with K particles, if it can have so many."""
    try:
        return replace(estimator, K=K)
    except ValueError:
        return None


def difference(samples: Gradients, wanted: Gradients, world: World, exact: bool, effort: Effort) -> Difference:
    """The largest error of a tensor's coordinates, relative to the tensor's largest, beside what could be seen.

    Args:
        samples, wanted: by parameter ``[S, *shape]``, of independent randomisations; S is 1 if `exact`, or if `wanted` is.
    """
    largest = max(float(g.mean(0).abs().max()) for g in wanted.values())
    coordinates = sum(g[0].numel() for g in wanted.values())
    worst = Difference("", 0.0, world.accuracy)
    for name, sample in samples.items():
        error = sample - wanted[name]  # [S, *shape]
        scale = max(float(wanted[name].mean(0).abs().max()), 1e-3 * largest, 1e-12)
        if exact:
            found = Difference(name, float(error.abs().max()) / scale, world.accuracy)
        else:
            found = statistical(name, error.reshape(len(error), -1), scale, coordinates, effort)
        if not found.off / found.detectable <= worst.off / worst.detectable:
            worst = found
    return worst


def statistical(name: str, error: Tensor, scale: float, coordinates: int, effort: Effort) -> Difference:
    """Of independent randomisations ``[S, P]``: the coordinate with the largest t, every one of them allowed for."""
    from scipy.special import stdtrit

    threshold = float(stdtrit(len(error) - 1, 1 - effort.alpha / coordinates / 2))
    mean, stderr = error.mean(0), error.std(0) / math.sqrt(len(error))
    limit = (threshold * stderr).clamp(min=1e-9 * scale)
    place = int((mean.abs() / limit).nan_to_num(math.inf).argmax())
    return Difference(name, float(mean[place].abs()) / scale, float(limit[place]) / scale)

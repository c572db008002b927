"""Raw moments of a gradient over replicates, in shards, without ever holding replicates x parameters.

The replicates fall into contiguous shards. Per shard and coordinate we keep the sum of deviations from a pilot (the first
replicates' mean) and of their squares: deviations are as small as the noise, so nothing cancels, however large the mean.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradiometer.bench.outer import Outer
from gradiometer.estimators.noise import BLOCK

SHARDS = 16
Array = NDArray[np.float64]


def shards(replicates: int) -> list[range]:
    """Contiguous ranges of nearly equal size, whole blocks of noise where there are enough of them.

    Raises:
        ValueError: fewer than 4 replicates.
    """
    if replicates < 4:
        raise ValueError(f"an error bar needs at least 4 replicates, not {replicates}")
    number = min(SHARDS, max(4, replicates // 2))  # 4, so that each half of them has one to leave out
    unit = BLOCK if replicates >= 2 * BLOCK * number else 1
    edges = [round(i * replicates / number / unit) * unit for i in range(number)] + [replicates]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Moments:
    """Moments of one block of coordinates (a group's, or one tensor's).

    Attributes:
        count: replicates per shard, ``[S]``.
        pilot: what deviations are taken from, ``[P]``.
        first: per shard, the sum of deviations, ``[S, P]``.
        second: per shard, the sum of squared deviations, ``[S, P]``.
    """

    count: Array
    pilot: Array
    first: NDArray[np.floating]
    second: NDArray[np.floating]

    def pooled(self, without: int | None = None) -> Pooled:
        """The moments over all shards, or over all but one."""
        n, first, second = self._totals
        if without is not None:
            n, first, second = n - self.count[without], first - self.first[without], second - self.second[without]
        variance = np.maximum(second - first**2 / n, 0.0) / (n - 1)
        return Pooled(int(n), self.pilot + first / n, variance)

    @cached_property
    def _totals(self) -> tuple[float, Array, Array]:
        return float(self.count.sum()), self.first.sum(0, dtype=np.float64), self.second.sum(0, dtype=np.float64)

    @staticmethod
    def joined(parts: list[Moments]) -> Moments:
        """The moments of several blocks of coordinates side by side."""
        return Moments(
            parts[0].count,
            np.concatenate([part.pilot for part in parts]),
            np.concatenate([part.first for part in parts], axis=1),
            np.concatenate([part.second for part in parts], axis=1),
        )


@dataclass(frozen=True)
class Pooled:
    """Mean and unbiased variance of each coordinate over ``n`` replicates, ``[P]``, float64."""

    n: int
    mean: Array
    variance: Array


class Accumulator:
    """Folds chunks of replicate gradients of one parameter into shard moments."""

    def __init__(self, shape: torch.Size, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.count = np.zeros(number)
        self.pilot: Tensor | None = None
        self.first = torch.zeros(number, *shape, dtype=dtype, device=device)
        self.second = torch.zeros(number, *shape, dtype=dtype, device=device)

    def fold(self, shard: int, gradients: Tensor | Outer) -> None:
        """Add the replicates ``[r, *shape]`` to `shard`."""
        self.count[shard] += len(gradients)
        if isinstance(gradients, Outer):
            if self.pilot is None:
                self.pilot = gradients[:BLOCK].mean()
            first, second = gradients.deviations(self.pilot)
            self.first[shard] += first
            self.second[shard] += second
            return
        if self.pilot is None:
            self.pilot = gradients[:BLOCK].mean(0)
        deviations = gradients - self.pilot
        if len(gradients) == 1:
            self.first[shard].add_(deviations[0])
            self.second[shard].addcmul_(deviations[0], deviations[0])
        else:
            self.first[shard] += deviations.sum(0)
            self.second[shard] += deviations.square_().sum(0)

    def finite(self, shard: int) -> bool:
        """Whether every gradient folded into `shard` was finite: a sum of squares forgets no NaN."""
        return bool(self.second[shard].sum().isfinite())

    def mean(self, upto: int) -> Tensor:
        """The mean over the shards before `upto`, in the parameter's shape."""
        assert self.pilot is not None
        return self.pilot + self.first[:upto].sum(0) / self.count[:upto].sum()

    def moments(self) -> Moments:
        assert self.pilot is not None
        rows = len(self.count)
        return Moments(
            self.count,
            self.pilot.detach().double().reshape(-1).cpu().numpy(),
            self.first.reshape(rows, -1).cpu().numpy(),
            self.second.reshape(rows, -1).cpu().numpy(),
        )

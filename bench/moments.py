"""Raw moments of a gradient over replicates, in shards, without ever holding replicates x parameters.

The replicates fall into contiguous shards, each with its own sums: leaving one out at a time gives the error bars.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradiometer.bench.formulas import Sums
from gradiometer.bench.statistics import SHARDS
from gradiometer.estimators.noise import BLOCK

FINE = 2**16  # coordinates of a gradient up to which finer shards are four times as many; beyond, twice
TILE = 2**16  # elements of a temporary that stays in a cache near the processor
GPU_TILE = 2**24  # on a graphics processor, where a call costs more than what it computes
Array = NDArray[np.float64]
Parts = Tensor | Sequence[Tensor]
Tile = tuple[Parts, Parts, Tensor | None]
"""Of some coordinates, per shard the sums of deviations and of their squares; the pilot, if there is one."""
Made = tuple[Tensor, Tensor, list[tuple[float, ...]]]
"""Sums of deviations and of squares over all shards; by what is left out, the fields of `Sums` but n, but for their scales."""


def number_of(replicates: int, finer: int | None = None) -> int:
    """How many shards: `SHARDS`; of few replicates fewer, but 4, so that each half of them has one to leave out.

    Args:
        finer: coordinates of a gradient, for four times as many shards if these are few, else twice.
    """
    times = 1 if finer is None else 4 if finer <= FINE else 2
    return min(times * SHARDS, max(4, replicates // 2))


def shards(replicates: int, number: int | None = None) -> list[range]:
    """Contiguous ranges of nearly equal size, whole blocks of noise where there are enough of them; a given `number`, or `SHARDS`.

    Raises:
        ValueError: fewer than 4 replicates.
    """
    if replicates < 4:
        raise ValueError(f"an error bar needs at least 4 replicates, not {replicates}")
    number = number or number_of(replicates)
    unit = BLOCK if replicates >= 2 * BLOCK * number else 1
    edges = [round(i * replicates / number / unit) * unit for i in range(number)] + [replicates]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Pooled:
    """Mean and unbiased variance of each coordinate over ``n`` replicates, computed in float64 on access.

    Attributes:
        shape: the parameter's.
        first, second: sums of deviations and of their squares.
        pilot: what deviations are taken from; zero if None.
        inputs: if given, every gradient is the outer product of a vector, whose sums these are, with the same inputs.
    """

    n: float
    shape: Sequence[int]
    first: Tensor
    second: Tensor
    pilot: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def mean(self) -> Array:
        mean = self.first.double() / self.n
        return self._of(mean if self.pilot is None else mean + self.pilot, self.inputs)

    @property
    def variance(self) -> Array:
        squares = self.second - self.first.double() ** 2 / self.n
        return self._of(
            squares.clamp_(min=0) / (self.n - 1), None if self.inputs is None else self.inputs.double() ** 2
        )

    def _of(self, values: Tensor, inputs: Tensor | None) -> Array:
        whole = values if inputs is None else torch.outer(values, inputs.double())
        found: Array = whole.reshape(self.shape).numpy()
        return found


@dataclass(frozen=True)
class Moments:
    """What is kept of a parameter's gradient: the coordinates' moments, and sums over coordinates with and without each shard."""

    pooled: Pooled
    sums: Sums
    without: tuple[Sums, ...]

    def times(self, inputs: Tensor, shape: Sequence[int]) -> Moments:
        """Of gradients that are outer products: these vectors with the same inputs every time."""
        size, seen = float(inputs.double().square().sum()), int(inputs.count_nonzero())
        total, *without = (
            Sums(
                of.n,
                size * of.squared_mean,
                size * of.variance,
                *(seen * n for n in (of.noisy, of.signal, of.squared_signal)),
            )
            for of in (self.sums, *self.without)
        )
        return Moments(replace(self.pooled, shape=shape, inputs=inputs.cpu().clone()), total, tuple(without))


def left_by(count: Array) -> list[float]:
    """How many replicates there are, and how many without each shard."""
    return [float(count.sum()), *(count.sum() - count).tolist()]


def summary(tiles: Iterable[Tile], count: Array, shape: Sequence[int]) -> Moments:
    """Of coordinates that come a few at a time: from all shards, and without each in turn."""
    left = left_by(count)
    pooled: list[list[Tensor]] = [[], [], []]
    sums = []
    for first, second, pilot in tiles:
        few = len(first) * first[0].numel() <= tile_of(first[0])
        total, squares, rows = (_of_few if few else _of_many)(first, second, pilot, left)
        for kept, of in zip(pooled, (total, squares, pilot), strict=True):
            kept += [] if of is None else [of.flatten()]
        sums.append(rows)
    of_all = Pooled(left[0], shape, *(torch.cat(parts).cpu() for parts in pooled if parts))
    scales = [(1 / n**2, 1 / (n - 1), 1, math.sqrt(n - 1) / n, (n - 1) / n**2) for n in left]
    return moments_of(of_all, np.sum(sums, axis=0) * np.array(scales), left)


def _of_few(first: Parts, second: Parts, pilot: Tensor | None, left: Sequence[float]) -> Made:
    """All together and without each shard, at once."""
    nothing, n = torch.zeros_like(first[0]), first[0].new_tensor(left).unsqueeze(1)
    means, variances = (torch.stack([nothing, *parts]).flatten(1) for parts in (first, second))
    total, squares = means.sum(0), variances.sum(0)
    torch.sub(total, means, out=means)  # times n, and variances times n - 1
    products = (means / n).mul_(means)  # in this order: squares of sums overflow where squares of gradients do not
    torch.sub(squares, variances, out=variances).sub_(products)
    if pilot is not None:
        means.addcmul_(n, pilot.flatten())
    return total, squares, _sums(means, variances, torch.empty_like(means))


def _of_many(first: Parts, second: Parts, pilot: Tensor | None, left: Sequence[float]) -> Made:
    """All together and without each shard, one after the other, so that what is made of them stays in a cache."""
    total, squares = total_of(first), total_of(second)
    mean, variance, ratio = total.new_empty(3, *total.shape)
    nothing, rows = total.new_zeros(()), []
    for f, s, n in zip([nothing, *first], [nothing, *second], left, strict=True):
        torch.sub(total, f, out=mean)
        torch.sub(squares, s, out=variance).addcmul_(mean, mean, value=-1 / n)
        if pilot is not None:
            mean.add_(pilot, alpha=n)
        rows += _sums(*(of.view(1, -1) for of in (mean, variance, ratio)))
    return total, squares, rows


def tile_of(values: Tensor) -> int:
    """Elements of a temporary that is made at once where the values are."""
    return TILE if values.device.type == "cpu" else GPU_TILE


def total_of(parts: Parts) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _sums(mean: Tensor, variance: Tensor, ratio: Tensor) -> list[tuple[float, ...]]:
    """The fields of `Sums` but n, but for their scales, of each row; `ratio` is a place for ratios, and variances may change."""
    noisy, ratio = [mean.shape[1]] * len(mean), torch.rsqrt(variance, out=ratio).mul_(mean)
    if not all(map(math.isfinite, squared_ratio := _squared_norms(ratio))):  # no variance, no ratio
        noise = variance.clamp_(min=0).rsqrt().nan_to_num_(posinf=0.0)
        noisy, ratio = torch.count_nonzero(noise, 1).tolist(), noise.mul_(mean)
        squared_ratio = _squared_norms(ratio)
    sums = (_squared_norms(mean), variance.sum(1).tolist(), noisy, ratio.abs_().sum(1).tolist(), squared_ratio)
    return list(zip(*sums, strict=True))


def _squared_norms(rows: Tensor) -> list[float]:
    norms: list[float] = torch.linalg.vector_norm(rows, dim=1).tolist()
    if not all(map(math.isfinite, norms)):  # squares of what is summed over replicates may overflow
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).tolist()
    return [norm**2 for norm in norms]


def moments_of(pooled: Pooled, sums: Array, left: Sequence[float]) -> Moments:
    """From the fields of `Sums`, n `left` of all shards and without each, and the others ``[1 + S, 5]``."""
    total, *without = (Sums(n, *of) for n, of in zip(left, sums.tolist(), strict=True))
    return Moments(pooled, total, tuple(without))


def zero(shape: torch.Size, count: Array) -> Moments:
    """Of a parameter whose gradient is always zero."""
    left, zeros = left_by(count), torch.zeros(()).expand(shape)
    return moments_of(Pooled(left[0], shape, zeros, zeros), np.zeros((len(left), 5)), left)

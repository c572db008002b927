"""Raw moments of a gradient over replicates, in shards, without ever holding replicates x parameters.

The replicates fall into contiguous shards, each with its own sums: leaving one out at a time gives the error bars.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradiometer.bench.formulas import Sums
from gradiometer.estimators.noise import BLOCK

SHARDS = 16
TILE = 2**16  # elements of a temporary that stays in the cache nearest the processor
Array = NDArray[np.float64]


def number_of(replicates: int, times: int = 1) -> int:
    """How many shards: so many times `SHARDS`; of few replicates fewer, but 4, so that each half of them has one to leave out."""
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
    """Mean and unbiased variance of each coordinate over ``n`` replicates, float64."""

    n: float
    mean: Array
    variance: Array


@dataclass(frozen=True)
class Moments:
    """What is kept of a parameter's gradient: the coordinates' moments, and sums over coordinates with and without each shard."""

    pooled: Pooled
    sums: Sums
    without: tuple[Sums, ...]


@dataclass(frozen=True)
class Summary:
    """Of some coordinates: mean and variance, and the fields of `Sums` but n, over all shards and without each, ``[5, 1 + S]``."""

    mean: Array
    variance: Array
    sums: Array


def summary(first: Sequence[Tensor], second: Sequence[Tensor], pilot: Tensor | None, count: Array) -> Summary:
    n = float(count.sum())
    total, squares = total_of(first), total_of(second)
    rows = [_sums(total.clone(), squares.clone(), pilot, n)]
    a, v = torch.empty_like(total), torch.empty_like(total)
    for f, s, taken in zip(first, second, count, strict=True):
        rows.append(_sums(torch.sub(total, f, out=a), torch.sub(squares, s, out=v), pilot, n - float(taken)))
    mean = total.double().div_(n)
    variance = squares.double().addcmul_(mean, mean, value=-n).clamp_(min=0).div_(n - 1)
    if pilot is not None:
        mean += pilot
    return Summary(mean.cpu().numpy(), variance.cpu().numpy(), np.array(rows).T)


def total_of(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _sums(first: Tensor, second: Tensor, pilot: Tensor | None, n: float) -> list[float]:
    """The fields of `Sums` but n, from sums of deviations and of their squares, which it uses up."""
    variance = second.addcmul_(first, first, value=-1 / n)  # times n - 1
    mean = first if pilot is None else first.add_(pilot, alpha=n)  # times n
    noisy, ratio = len(variance), variance.rsqrt().mul_(mean)
    if not math.isfinite(squared_ratio := float(torch.dot(ratio, ratio))):  # no variance, no ratio
        noise = variance.clamp_(min=0).rsqrt().nan_to_num_(posinf=0.0)
        noisy, ratio = int(torch.count_nonzero(noise)), noise.mul_(mean)
        squared_ratio = float(torch.dot(ratio, ratio))
    scales = (1 / n**2, 1 / (n - 1), 1, math.sqrt(n - 1) / n, (n - 1) / n**2)
    sums = (float(torch.dot(mean, mean)), float(variance.sum()), noisy, float(ratio.abs_().sum()), squared_ratio)
    return [value * scale for value, scale in zip(sums, scales, strict=True)]


def from_sums(mean: Array, variance: Array, sums: Array, count: Array, shape: Sequence[int]) -> Moments:
    n = float(count.sum())
    total, *without = (Sums(left, *of) for left, of in zip([n, *(n - count)], sums.T.tolist(), strict=True))
    return Moments(Pooled(n, mean.reshape(shape), variance.reshape(shape)), total, tuple(without))


def zero(shape: torch.Size, count: Array) -> Moments:
    """Of a parameter whose gradient is always zero."""
    return from_sums(np.zeros(shape), np.zeros(shape), np.zeros((5, 1 + len(count))), count, shape)

"""Error bars: the delete-one-shard jackknife, on the log scale for quantities that are positive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


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


def jackknife(value: float, without: Sequence[float], *, positive: bool) -> Value:
    """The error of a statistic from its values without each of S shards (Quenouille 1956; Tukey 1958).

    Args:
        value: over all shards.
        without: over all shards but one, S of them.
        positive: make the interval for the logarithm, which keeps it positive and is right for ratios and variances.

    Returns:
        `value` itself, not the bias-corrected one, with an interval from Student's t with S - 1 degrees of freedom.
    """
    leave_out = np.asarray(without, float)
    shards = len(leave_out)
    kept = tuple(float(v) for v in leave_out)
    if shards < 2 or not (np.isfinite(leave_out).all() and math.isfinite(value)):
        return Value(value, jackknife=kept)
    if positive and value > 0 and (leave_out > 0).all():
        logs = np.log(leave_out)
        spread = math.sqrt((shards - 1) / shards * ((logs - logs.mean()) ** 2).sum())
        factor = math.exp(min(student(shards - 1) * spread, 700.0))
        return Value(value, value * spread, value / factor, value * factor, kept)
    spread = math.sqrt((shards - 1) / shards * ((leave_out - leave_out.mean()) ** 2).sum())
    half = student(shards - 1) * spread
    return Value(value, spread, value - half, value + half, kept)


def ratio(value: Value, baseline: Value) -> Value:
    """The ratio of two positive statistics; paired, if their shards are of the same replicates of the same noise.

    Raises:
        ValueError: the two have different numbers of shards, so they cannot be paired.
    """
    if len(value.jackknife) != len(baseline.jackknife):
        raise ValueError(f"{len(value.jackknife)} shards cannot be paired with {len(baseline.jackknife)}")
    without = [a / b for a, b in zip(value.jackknife, baseline.jackknife, strict=True)]
    return jackknife(value.value / baseline.value, without, positive=True)


def student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))

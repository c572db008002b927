"""Is the mean of these gradients zero? A sequential test: suspects are named on earlier replicates, and tried on fresh ones.

At each look the fresh replicates are as many as all before them. Suspects are single coordinates, the direction in which each
block (a tensor, a group, everything) seems biased, each block's scale, and random projections. They are few and named before the
data that try them are seen, so Bonferroni's bound over suspects and looks costs little, and their thresholds are those of a t
statistic in its centre rather than far in its tail. Whatever the correlations between coordinates, the rate of false alarms is at
most `alpha`, if the mean of the first replicates is about normal; it may be more where rare events, that hardly any replicate
contains, decide the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradiometer.bench.checks.claims import Broken

Array = NDArray[np.float64]
Source = Callable[[range], Array]  # replicates -> their errors [n, P]: a gradient less what its mean should be
SUSPECTS = 8  # single coordinates that are tried at a look
PROJECTIONS = 8
ROUNDING = 1e-11  # of the largest gradient: what two ways to the same number may differ by in double precision
POWER = 2.33  # the normal quantile of 0.99, to which detectable sizes are stated


@dataclass(frozen=True)
class Schedule:
    """Looks after ``first * 2^i`` replicates, and the rate of false alarms over all of them."""

    first: int
    looks: int
    alpha: float

    @property
    def most(self) -> int:
        return self.first * 2**self.looks


@dataclass(frozen=True)
class Suspect:
    """A direction in which the mean may not be zero; `sided` if its sign was named, too."""

    kind: str  # coordinate, block, scale, projection
    where: str
    direction: Array  # [P], or [1] of one coordinate
    columns: slice
    sided: bool


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Attributes:
        kind, where: of the suspect that was found biased; empty if none was.
        size: of its bias: in standard deviations of one gradient, or of a scale relative to the gradient.
        t: its statistic; threshold: what that had to exceed.
        replicates: how many it took.
        coordinate: the smallest bias of one coordinate that would be found (with probability 0.99), in its standard deviations.
        scale: by block, the smallest relative error of its scale that would be.
    """

    kind: str
    where: str
    size: float
    t: float
    threshold: float
    replicates: int
    coordinate: float
    scale: Mapping[str, float]

    @property
    def found(self) -> bool:
        return bool(self.kind)


@dataclass
class _Past:
    """Sums over all replicates so far."""

    n: int
    first: Array
    second: Array

    def mean(self) -> Array:
        return self.first / self.n

    def variance(self) -> Array:
        found = self.second / self.n - self.mean() ** 2
        return np.where(found > 1e-20 * np.maximum(self.second / self.n, 1e-300), found, 0.0)


def trial(source: Source, blocks: Mapping[str, slice], towards: Array, schedule: Schedule, seed: int = 0) -> Verdict:
    """Test whether the errors that `source` gives have mean zero.

    Args:
        blocks: the coordinates of each tensor and group.
        towards: the gradient that errors are of ``[P]``, for errors of scale.
        schedule: when to look, and how many false alarms to allow.
        seed: of the random projections.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(4096, 50))
        >>> verdict = trial(lambda r: noise[r.start : r.stop], {"all": slice(0, 50)}, np.ones(50), Schedule(256, 4, 0.01))
        >>> verdict.found, round(verdict.coordinate, 2)
        (False, 0.13)
    """
    generator = np.random.default_rng(seed)
    source = _without_rounding(source, ROUNDING * float(np.abs(towards).max(initial=0.0)))
    errors = source(range(schedule.first))
    past = _Past(len(errors), errors.sum(0), (errors**2).sum(0))
    verdict = None
    for look in range(schedule.looks):
        suspects = list(_suspects(past, blocks, towards, generator))
        fresh = source(range(past.n, 2 * past.n))
        threshold = _threshold(schedule, suspects)
        verdict = _try(suspects, fresh, threshold, past)
        if verdict.found or look == schedule.looks - 1:
            break
        past = _Past(2 * past.n, past.first + fresh.sum(0), past.second + (fresh**2).sum(0))
    assert verdict is not None
    return verdict


def _without_rounding(source: Source, least: float) -> Source:
    def rounded(replicates: range) -> Array:
        errors = source(replicates)
        if not np.isfinite(errors).all():
            row = int(np.flatnonzero(~np.isfinite(errors).all(1))[0])
            raise Broken(f"a gradient is not finite, that of replicate {replicates.start + row}")
        return np.where(np.abs(errors) > least, errors, 0.0)

    return rounded


def _suspects(
    past: _Past, blocks: Mapping[str, slice], towards: Array, generator: np.random.Generator
) -> Iterator[Suspect]:
    mean, variance = past.mean(), past.variance()
    noisy = variance > 0
    std = np.sqrt(variance)
    t = np.divide(np.abs(mean), std, out=np.where(mean == 0, 0.0, np.inf), where=noisy)
    for i in np.argsort(t)[::-1][:SUSPECTS]:
        if t[i] > 0:
            sign = np.array([math.copysign(1.0, mean[i])])
            yield Suspect("coordinate", _block_of(blocks, int(i)), sign, slice(int(i), int(i) + 1), True)
    weight = np.divide(1.0, variance, out=np.zeros_like(variance), where=noisy)
    for name, columns in blocks.items():
        if (learned := (mean * weight)[columns]).any():
            yield Suspect("block", name, learned, columns, True)
        if (scale := towards[columns]).any():
            yield Suspect("scale", name, scale / (scale @ scale), columns, False)
    inverse = np.sqrt(weight)
    for number in range(PROJECTIONS):
        signs = generator.choice([-1.0, 1.0], len(mean))
        yield Suspect("projection", f"random projection {number + 1}", signs * inverse, slice(None), False)


def _block_of(blocks: Mapping[str, slice], coordinate: int) -> str:
    """The smallest block that holds a coordinate, and its place there."""
    holding = [(c.stop - c.start, name, c.start) for name, c in blocks.items() if c.start <= coordinate < c.stop]
    _, name, start = min(holding, default=(0, "", 0))
    return f"{name}[{coordinate - start}]"


def _threshold(schedule: Schedule, suspects: list[Suspect]) -> Callable[[int, bool], float]:
    """Of the t statistic of n replicates; every suspect of every look gets the same part of alpha."""
    from scipy.special import stdtrit

    each = schedule.alpha / schedule.looks / max(1, len(suspects))
    return lambda n, sided: float(stdtrit(n - 1, 1 - (each if sided else each / 2)))


def _try(suspects: list[Suspect], fresh: Array, threshold: Callable[[int, bool], float], past: _Past) -> Verdict:
    n = len(fresh)
    worst: tuple[float, Suspect, float, float] | None = None
    scale: dict[str, float] = {}
    for suspect in suspects:
        y = fresh[:, suspect.columns] @ suspect.direction
        mean, std, t = statistic(y)
        if std == 0 and past.variance()[suspect.columns].any():
            continue  # rare events that did not happen: nothing can be said
        limit = threshold(n, suspect.sided)
        if suspect.kind == "scale":
            scale[suspect.where] = (limit + POWER) * std / math.sqrt(n)
        excess = (t if suspect.sided else abs(t)) / limit
        if excess > 1 and (worst is None or excess > worst[0]):
            worst = (excess, suspect, mean if suspect.kind == "scale" else mean / std if std else math.inf, t)
    coordinate = (threshold(n, True) + POWER) / math.sqrt(n)
    if worst is None:
        return Verdict("", "", 0.0, 0.0, threshold(n, True), past.n + n, coordinate, scale)
    _, suspect, size, t = worst
    return Verdict(suspect.kind, suspect.where, size, t, threshold(n, suspect.sided), past.n + n, coordinate, scale)


def statistic(y: Array) -> tuple[float, float, float]:
    """Mean, standard deviation and t statistic of a sample: Student's or Johnson's (1978), whichever is nearer to zero.

    Johnson's makes up for skewness, and errs on the other side where tails are heavy and symmetric.
    """
    n, mean = len(y), float(y.mean())
    centred = y - mean
    variance = float((centred**2).sum() / (n - 1))
    if variance <= 1e-24 * max(mean**2, 1e-300):  # no noise: any error is seen at once
        return mean, 0.0, math.copysign(math.inf, mean) if abs(mean) > 1e-12 else 0.0
    third, std = float((centred**3).mean()), math.sqrt(variance)
    shifted = mean + third / (6 * variance * n) + third * mean**2 / (3 * variance**2)
    plain, johnson = (of * math.sqrt(n) / std for of in (mean, shifted))
    return mean, std, 0.0 if plain * johnson < 0 else min(plain, johnson, key=abs)

"""One-way analysis of variance: the variance within minibatches, and the excess variance between their means."""

from __future__ import annotations

import numpy as np

from gradiometer.bench.moments import Array, shards
from gradiometer.bench.statistics import SHARDS, Value, jackknife


class OneWay:
    """A one-way analysis of variance of one parameter's gradient, with and without each shard of the minibatches.

    Args:
        minibatches: how many there are, in at most `SHARDS` shards.
        coordinates: of the parameter.
    """

    def __init__(self, minibatches: int, coordinates: int) -> None:
        parts = shards(minibatches, min(SHARDS, minibatches))
        self._shard = [number for number, part in enumerate(parts) for _ in part]
        self._count = np.array([len(part) for part in parts])
        self._pilot: Array | None = None
        self._sums = np.zeros((len(parts), coordinates))  # of deviations from the first minibatch's: nothing cancels
        self._squares, self._within = np.zeros((2, len(parts)))

    def add(self, number: int, mean: Array, variance: float) -> None:
        """Add a minibatch: its mean gradient ``[P]``, and the trace of its replicates' covariance."""
        if self._pilot is None:
            self._pilot = mean.copy()
        deviation, shard = mean - self._pilot, self._shard[number]
        self._sums[shard] += deviation
        self._squares[shard] += deviation @ deviation
        self._within[shard] += variance

    def traces(self) -> Array:
        """Within minibatches, and between their means; of all, and without each shard; ``[2, 1 + S]``."""
        total = self._sums.sum(0)
        n = self._count.sum() - np.concatenate([[0], self._count])
        squares = self._squares.sum() - np.concatenate([[0.0], self._squares])
        norms = np.array([total @ total, *(float(np.square(total - part).sum()) for part in self._sums)])
        within = (self._within.sum() - np.concatenate([[0.0], self._within])) / n
        return np.stack([within, np.maximum(squares - norms / n, 0) / (n - 1)])


def parts_of(traces: Array, replicates: int) -> dict[str, Value]:
    """The estimator's part, the minibatch's and both, unbiased: the second may come out negative, and is reported as it is."""
    within, between = traces
    minibatch = between - within / replicates
    found = {"estimator": within, "minibatch": minibatch, "both": within + minibatch}
    return {name: jackknife(float(of[0]), of[1:].tolist(), positive=name != "minibatch") for name, of in found.items()}

"""Folds passes, as they come, into what a measurement keeps: shard moments, projections, and scalars per replicate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gradiometer.bench.accumulators import Accumulator, Piece, Projections, accumulator
from gradiometer.bench.directions import Directions, Kept
from gradiometer.bench.gradients import Parameters, coordinates
from gradiometer.bench.moments import Array, Moments, number_of, shards, zero
from gradiometer.bench.tape import NotRows, Part, Pass
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.noise import BLOCK
from gradiometer.estimators.weights import effective_sample_size, log_mean_exp

REMEDY = "measure in float64"


class Failure(RuntimeError):
    """A measurement that cannot give a number; the message is one sentence."""


class Folding:
    """Takes passes of any size and sorts their replicates into shards.

    Args:
        estimators: those of the passes, whose objectives are evaluated.
        parameters: of each of them, ``{group: {name: parameter}}``.
        replicates: how many there are at first; the second half of them is projected on directions from the first.
        traces: keep squared norms in the place of every coordinate's second moment.
        means: mean gradients by parameter, in the place of the estimators' own over the first half.
        finer: in more shards, whose errors are more precise.
    """

    def __init__(
        self,
        estimators: Sequence[Estimator],
        parameters: Sequence[Parameters],
        replicates: int,
        *,
        traces: bool = False,
        means: Mapping[str, Tensor] | None = None,
        finer: bool = False,
    ) -> None:
        self.estimators, self.parameters, self.traces, self.means = list(estimators), list(parameters), traces, means
        self.replicates = 0
        self.number = number_of(replicates, max(map(coordinates, parameters)) if finer else None)
        self.sums: dict[str, Accumulator] = {}
        self.parts: list[dict[str, Part]] = []
        self._directions: Directions | None = None
        self._shards: list[tuple[range, int]] = []
        self._scalars = [Kept() for _ in estimators]
        self._finished: dict[tuple[object, ...], Moments] = {}
        self.extend(replicates)

    @property
    def half(self) -> int:
        """The first shard of the second half."""
        return self.number // 2

    def extend(self, replicates: int) -> range:
        """Expect more replicates, spread over the shards; returns which."""
        start = self.replicates
        self._shards += [
            (range(start + part.start, start + part.stop), number)
            for number, part in enumerate(shards(replicates, self.number))
        ]
        self.replicates += replicates
        return range(start, self.replicates)

    def add(self, made: Pass, replicates: range) -> None:
        """Fold the gradients of a range of replicates.

        Raises:
            NotRows: estimators that shared a column of weights no longer do, or terms come and go between replicates.
        """
        if not self.sums:
            self._begin(made)
        if made.parts != self.parts:
            raise NotRows("what its gradients are made of changes between replicates")
        self._finished.clear()
        if made.log_w is not None:
            self._observe(made.log_w, replicates.start)
        early: dict[str, Projections] = {}
        projected: list[Piece] = []
        for second_half, found in groupby(self._pieces(replicates), lambda piece: piece.shard >= self.half):
            pieces, towards = list(found), {}
            if second_half:
                self._directions = self._directions or self._first_half()
                pieces, towards = [self._directions.wanted(piece) for piece in pieces], self._directions.towards
                projected += pieces
            for name, block in made.blocks.items():
                early[name] = self.sums[name].fold(block, pieces, towards.get(name)) or early.get(name, {})
        if self._directions is not None:
            self._directions.add(made, early, projected, replicates, self.replicates)

    def _first_half(self) -> Directions:
        """What the replicates from here on are projected on."""
        begun = {number: self._shards[number][0] for number in range(self.half, self.number)}
        return Directions(self.sums, self.parts, self.parameters, begun, self.means)

    def moments(self, estimator: int) -> dict[str, Moments]:
        """By parameter.

        Raises:
            Failure: a gradient was not finite, or its squares are no numbers of its precision.
            Cancelled: traces were wanted, and the noise is too small to be told from squared norms.
        """
        count = next(iter(self.sums.values())).count
        found = {}
        for members in self.parameters[estimator].values():
            for name, p in members.items():
                part = self.parts[estimator].get(name)
                key = (None, 0, p.shape) if part is None else (part.block, part.columns.start, p.shape)
                if key not in self._finished:
                    self._finished[key] = zero(p.shape, count) if part is None else self._of_part(name, part)
                found[name] = self._finished[key]
        if _vanishing(found):
            raise Failure(
                f"squares of the gradient of {self.estimators[estimator]} are too small for its precision: {REMEDY}"
            )
        return found

    def _of_part(self, name: str, part: Part) -> Moments:
        found = self.sums[part.block].moments(part.columns, part.shape)
        if not np.isfinite(found.sums.variance):
            number = self.sums[part.block].first_not_finite(part.columns)
            if number is None:
                raise Failure(f"squares of the gradient of {name!r} are too large for its precision: {REMEDY}")
            shard = next(shard for shard, of in self._shards if of == number)
            raise Failure(
                f"the gradient of {name!r} is not finite in a replicate between {shard.start} and {shard.stop - 1}"
            )
        return found

    def samples(self, estimator: int) -> dict[str, list[Array]]:
        """Per scalar and shard, its value in each replicate."""
        return {
            name: [
                np.concatenate([values[shard.start : shard.stop] for shard, of in self._shards if of == number])
                for number in range(self.number)
            ]
            for name, values in self._scalars[estimator].fetched().items()
        }

    @property
    def directions(self) -> Directions:
        """What the second half was projected on, once it has come."""
        assert self._directions is not None
        return self._directions

    def _begin(self, made: Pass) -> None:
        self.parts = made.parts
        self.sums = accumulators(made, BLOCK, self.number, traces=self.traces)

    def _observe(self, log_w: Tensor, start: int) -> None:
        """Keep what the log weights ``[K, r, B]`` say of each replicate from `start` on."""
        shared = {"elbo": log_w.mean(0), "iwelbo": log_mean_exp(log_w), "ess": effective_sample_size(log_w)}  # [r, B]
        means = {name: values.mean(-1) for name, values in shared.items()}
        for e, estimator in enumerate(self.estimators):
            for name, values in ({"objective": estimator.objective(log_w).mean(-1)} | means).items():
                self._scalars[e].put(name, slice(start, start + len(values)), values, self.replicates)

    def _pieces(self, replicates: range) -> Iterator[Piece]:
        for shard, number in self._shards:
            start, stop = max(shard.start, replicates.start), min(shard.stop, replicates.stop)
            if start < stop:
                yield Piece(number, slice(start - replicates.start, stop - replicates.start))


def accumulators(made: Pass, few: int, shards: int, *, traces: bool) -> dict[str, Accumulator]:
    """One for each block of a pass, as its first `few` replicates suggest."""
    found = {}
    for name, block in made.blocks.items():
        parts = [part for of in made.parts for part in of.values() if part.block == name]
        slices = dict.fromkeys((part.columns.start, part.columns.stop) for part in parts)
        found[name] = accumulator(block[:few], shards, slices, traces=traces)
    return found


def _vanishing(moments: Mapping[str, Moments]) -> bool:
    """Whether there is a gradient whose squares have lost digits, or all of them, since they are so small."""
    squares = sum(of.sums.squared_mean + of.sums.variance for of in moments.values())
    least = min((torch.finfo(of.pooled.first.dtype).tiny for of in moments.values()), default=0)
    few = squares < least * sum(math.prod(of.pooled.shape) for of in moments.values())
    return few and any(bool(of.pooled.mean.any()) for of in moments.values())

"""Folds draws, as they come, into what a measurement keeps: shard moments, projections, and scalars per replicate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradiometer.bench.gradients import Draw
from gradiometer.bench.moments import Accumulator, Array
from gradiometer.bench.outer import Outer
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.weights import effective_sample_size, log_mean_exp

PROJECTED = 32  # replicates per shard of the second half that are projected, or an eighth of them if that is more
Directions = Mapping[str, Mapping[str, Tensor]]
"""Unit vectors: ``{group: {name: [*shape]}}``, float64."""


class Failure(RuntimeError):
    """A measurement that cannot give a number; the message is one sentence."""


class Folding:
    """Takes draws in any chunks and sorts their replicates into shards.

    Args:
        estimator: whose objective is evaluated.
        parameters: ``{group: {name: parameter}}``.
        shards: contiguous ranges of replicates.
    """

    def __init__(
        self, estimator: Estimator, parameters: Mapping[str, Mapping[str, nn.Parameter]], shards: Sequence[range]
    ) -> None:
        self.estimator, self.shards = estimator, list(shards)
        self.groups = {group: tuple(members) for group, members in parameters.items()}
        self.sums = {
            name: Accumulator(p.shape, len(shards), p.dtype, p.device)
            for members in parameters.values()
            for name, p in members.items()
        }
        self.directions: Directions | None = None
        self._scalars: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in shards]
        self._projected = [0] * len(shards)

    @property
    def half(self) -> int:
        """The first shard of the second half, whose replicates are projected on directions from the first."""
        return len(self.shards) // 2

    def add(self, draw: Draw, replicates: range) -> None:
        """Fold the draw of a range of replicates.

        Raises:
            Failure: a gradient is not finite.
        """
        for number, rows in self._pieces(replicates):
            gradients = {name: gradient[rows] for name, gradient in draw.gradients.items()}
            for name, gradient in gradients.items():
                self.sums[name].fold(number, gradient)
            kept = self._scalars[number]
            if draw.log_w is not None:
                for name, values in per_replicate(self.estimator, draw.log_w[:, rows]).items():
                    kept[name].append(values)
            left = max(PROJECTED, len(self.shards[number]) // 8) - self._projected[number]
            if number >= self.half and left > 0:
                assert self.directions is not None
                for name, values in projected(gradients, self.groups, self.directions, left).items():
                    kept[name].append(values)
                self._projected[number] += min(left, rows.stop - rows.start)
            if replicates.stop >= self.shards[number].stop:
                self._must_be_finite(number)

    def mean_directions(self) -> Directions:
        """The directions of the groups' mean gradients over the first half."""
        means = {name: accumulator.mean(self.half) for name, accumulator in self.sums.items()}
        return {group: direction({name: means[name] for name in members}) for group, members in self.groups.items()}

    def samples(self) -> dict[str, list[Array]]:
        """Per scalar and shard, its value in each replicate."""
        names = [name for name in self._scalars[0] if " " not in name]
        return {name: [self._values(number, name) for number in range(len(self.shards))] for name in names}

    def projections(self) -> dict[str, list[tuple[Array, Array]]]:
        """Per group and shard of the second half, inner product with the direction and squared norm of each replicate."""
        return {
            group: [self._projection(group, n) for n in range(self.half, len(self.shards))] for group in self.groups
        }

    def _projection(self, group: str, number: int) -> tuple[Array, Array]:
        return self._values(number, f"along {group}"), self._values(number, f"squared {group}")

    def _values(self, number: int, name: str) -> Array:
        return torch.cat(self._scalars[number][name]).double().cpu().numpy()

    def _pieces(self, replicates: range) -> Iterator[tuple[int, slice]]:
        number = bisect_right([shard.start for shard in self.shards], replicates.start) - 1
        start = replicates.start
        while start < replicates.stop:
            stop = min(self.shards[number].stop, replicates.stop)
            yield number, slice(start - replicates.start, stop - replicates.start)
            number, start = number + 1, stop

    def _must_be_finite(self, number: int) -> None:
        for name, accumulator in self.sums.items():
            if not accumulator.finite(number):
                shard = self.shards[number]
                raise Failure(
                    f"the gradient of {name!r} is not finite in a replicate between {shard.start} and {shard.stop - 1}"
                )


def direction(mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The unit vector along a gradient given by its tensors; zeros stay zeros."""
    norm = math.sqrt(sum(float(m.double().square().sum()) for m in mean.values()))
    return {name: m.double() / norm if norm > 0 else m.double() for name, m in mean.items()}


def per_replicate(estimator: Estimator, log_w: Tensor | None) -> dict[str, Tensor]:
    """Per replicate, means over the minibatch, ``[r]``, from ``log_w [K, r, B]``."""
    if log_w is None:
        return {}
    values = {
        "objective": estimator.objective(log_w),
        "elbo": log_w.mean(0),
        "iwelbo": log_mean_exp(log_w),
        "ess": effective_sample_size(log_w),
    }
    return {name: value.mean(-1) for name, value in values.items()}


def projected(
    gradients: Mapping[str, Tensor | Outer], groups: Mapping[str, tuple[str, ...]], directions: Directions, first: int
) -> dict[str, Tensor]:
    """Inner products with the groups' directions, and squared norms, of the `first` replicates, ``[r]`` each."""
    found = {}
    for group, members in groups.items():
        pairs = [_projection(gradients[name][:first], directions[group][name]) for name in members]
        found[f"along {group}"] = torch.stack([along for along, _ in pairs]).sum(0)
        found[f"squared {group}"] = torch.stack([squared for _, squared in pairs]).sum(0)
    return found


def _projection(gradients: Tensor | Outer, direction: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(gradients, Outer):
        along, squared = gradients.projections(direction.to(gradients.inputs.dtype))
        return along.double(), squared.double()
    flat = gradients.flatten(1)
    return (flat @ direction.flatten().to(flat.dtype)).double(), flat.square().sum(1).double()

"""Folds passes, as they come, into what a measurement keeps: shard moments, projections, and scalars per replicate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gradiometer.bench import formulas
from gradiometer.bench.accumulators import Accumulator, Piece, Projections, accumulator
from gradiometer.bench.gradients import Parameters, coordinates
from gradiometer.bench.moments import Array, Moments, number_of, shards, zero
from gradiometer.bench.outer import Outer
from gradiometer.bench.tape import NotRows, Part, Pass
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.noise import BLOCK
from gradiometer.estimators.weights import effective_sample_size, log_mean_exp

PROJECTED = 32  # replicates per shard of the second half that are projected, or an eighth of them if that is more
PULLING = 64  # of the projected ones, how many estimate the derivative of a ratio by its direction, for its error
REMEDY = "measure in float64"
SMALL = 2**12  # coordinates of a gradient up to which all of the second half are: it costs next to nothing


class Failure(RuntimeError):
    """A measurement that cannot give a number; the message is one sentence."""


@dataclass
class Direction:
    """A mean gradient's, and how the directional signal-to-noise ratio hangs on it.

    Attributes:
        estimator, group: the first that has it; estimators that share columns share it.
        norm: of the mean gradient.
        pulled: by parameter, the sum of what some replicates add to the derivative of the ratio by the direction.
        pulls: how many replicates.
        signal: the derivative of the signal term at the first replicate. It is subtracted from all, because the mean of the signals
            is fixed to the norm and does not depend on the direction.
    """

    estimator: int
    group: str
    norm: float
    pulled: dict[str, Tensor] = field(default_factory=dict)
    pulls: int = 0
    signal: float = math.nan

    def pull(self, gradients: Mapping[str, Tensor | Outer], along: Array, squared: Array) -> None:
        """Add replicates, by their gradients and their projections on the direction."""
        signal, both = formulas.slopes(along, squared)
        if not self.pulls:
            self.signal = float(signal[0])
        weights = torch.from_numpy(both) - self.signal
        for name, of in gradients.items():
            if isinstance(of, Outer):
                pull = of.weighted(weights.to(of.cotangents)).total()
            else:
                pull = torch.tensordot(weights.to(of), of, 1)
            self.pulled[name] = self.pulled[name].add_(pull) if name in self.pulled else pull
        self.pulls += len(along)


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
        self._towards: dict[str, Tensor] = {}  # by block, unit vectors of each group
        self._directions: dict[object, Direction] = {}  # by `_key`
        self._begun = 0.0  # replicates that gave them
        self._shards: list[tuple[range, int]] = []
        # By replicate, and where they were computed: to fetch them as they come would have each pass wait for the one before.
        # Kept in pieces, they would lie scattered over a heap of passing things, and keep it from shrinking.
        self._scalars: list[dict[str, Tensor]] = [{} for _ in estimators]
        self._along: list[dict[str, Tensor]] = [{} for _ in estimators]  # by group
        self._squared: list[dict[str, Tensor]] = [{} for _ in estimators]
        self._projected = [0] * self.number
        self._to_project = [0] * self.number
        self._to_pull = [0] * self.number
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
        projected, pulling = [], []
        for second_half, found in groupby(self._pieces(replicates), lambda piece: piece.shard >= self.half):
            if second_half and not self._towards:
                self._project()
            pieces = [self._wanted(piece) for piece in found]
            for name, block in made.blocks.items():
                early[name] = self.sums[name].fold(block, pieces, self._towards.get(name)) or early.get(name, {})
            for piece in pieces:
                if piece.wanted:
                    start = piece.rows.start
                    projected.append(range(start, start + piece.wanted))
                    few = min(piece.wanted, self._to_pull[piece.shard])
                    self._to_pull[piece.shard] -= few
                    pulling += [slice(start, start + few)] if few else []
        if projected:
            self._keep(made, early, projected, replicates.start)
        for rows in pulling:
            self._pull({name: block[rows] for name, block in made.blocks.items()}, replicates.start + rows.start)

    def _wanted(self, piece: Piece) -> Piece:
        """With how many of its replicates are to be projected, which are counted."""
        wanted = min(len(piece), self._to_project[piece.shard])
        self._to_project[piece.shard] -= wanted
        self._projected[piece.shard] += wanted
        return replace(piece, wanted=wanted)

    def _project(self) -> None:
        """From here on, replicates are projected on the directions of mean gradients."""
        own = {block: accumulator.mean(self.half) for block, accumulator in self.sums.items()}
        self._towards = {block: torch.zeros_like(mean) for block, mean in own.items()}
        self._begun = float(next(iter(self.sums.values())).count[: self.half].sum())
        for e, parameters in enumerate(self.parameters):
            for group in parameters:
                parts = dict(self._of(e, group))
                if (key := _key(parts)) in self._directions:
                    continue
                places = {name: self._towards_of(part) for name, part in parts.items()}
                for name, part in parts.items():
                    if self.means is None:
                        places[name].copy_(own[part.block][..., part.columns])
                    elif name in self.means:
                        places[name].copy_(self.means[name].reshape(places[name].shape))
                self._directions[key] = Direction(e, group, _normalize(list(places.values())))
        small = sum(accumulator.shape.numel() for accumulator in self.sums.values()) <= SMALL
        left = self.replicates if small else PULLING
        for number in range(self.half, self.number):
            begun = len(self._shards[number][0])
            self._to_project[number] = begun if small else min(begun, max(PROJECTED, begun // 8))
            if self.means is None:  # a direction that is given has no error
                self._to_pull[number] = min(self._to_project[number], left)
                left -= self._to_pull[number]

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
            for name, values in _fetched(self._scalars[estimator]).items()
        }

    def projections(self, estimator: int) -> dict[str, list[tuple[Array, Array]]]:
        """Per group and shard of the second half, inner product with the direction and squared norm of each replicate."""
        begun = [(number, self._shards[number][0].start) for number in range(self.half, self.number)]
        of = [slice(start, start + self._projected[number]) for number, start in begun]
        along, squared = _fetched(self._along[estimator]), _fetched(self._squared[estimator])
        return {
            g: [(along[g][rows].copy(), squared[g][rows].copy()) for rows in of] for g in self.parameters[estimator]
        }

    def turns(self, estimator: int) -> dict[str, Array]:
        """Per group and shard of the first half, what `directional_snr` is off by, to first order, without it in the direction."""
        if self.means is not None:  # the direction is without error
            return {}
        return {group: self._turns(estimator, group) for group in self.parameters[estimator]}

    def _turns(self, estimator: int, group: str) -> Array:
        parts, count = dict(self._of(estimator, group)), next(iter(self.sums.values())).count[: self.half]
        of, n, inner = self._directions[_key(parts)], count.sum(), np.zeros(self.half)
        slope = {name: pulled / of.pulls for name, pulled in of.pulled.items()}
        onto = sum(float((slope[name] * self._towards_of(part)).sum()) for name, part in parts.items())
        for name, part in parts.items():
            across = slope[name].sub_(self._towards_of(part), alpha=onto)
            inner += self.sums[part.block].along(across, part.columns, self.half)
        with np.errstate(all="ignore"):  # a mean of zero has no direction
            off = ((inner.sum() - inner) / (n - count) - inner.sum() / n) / of.norm
        return off * math.sqrt(n / self._begun)  # the direction is that of the replicates there were at first

    def _towards_of(self, part: Part) -> Tensor:
        return self._towards[part.block][..., part.columns]

    def _begin(self, made: Pass) -> None:
        self.parts = made.parts
        self.sums = accumulators(made, BLOCK, self.number, traces=self.traces)

    def _of(self, estimator: int, group: str) -> list[tuple[str, Part]]:
        found = self.parts[estimator]
        return [(name, found[name]) for name in self.parameters[estimator][group] if name in found]

    def _observe(self, log_w: Tensor, start: int) -> None:
        """Keep what the log weights ``[K, r, B]`` say of each replicate from `start` on."""
        shared = {"elbo": log_w.mean(0), "iwelbo": log_mean_exp(log_w), "ess": effective_sample_size(log_w)}  # [r, B]
        means = {name: values.mean(-1) for name, values in shared.items()}
        for e, estimator in enumerate(self.estimators):
            for name, values in ({"objective": estimator.objective(log_w).mean(-1)} | means).items():
                self._put(self._scalars[e], name, slice(start, start + len(values)), values)

    def _keep(self, made: Pass, early: Mapping[str, Projections], rows: Sequence[range], start: int) -> None:
        """Keep the projections of some rows of a pass whose replicates begin at `start`, those made early or made now."""
        device = next(iter(self._towards.values())).device
        which = torch.cat([torch.arange(of.start, of.stop, device=device) for of in rows])
        nothing = (torch.zeros(len(which), device=device), torch.zeros(len(which), device=device))
        projections = {
            name: early[name] or self.sums[name].projections(block[which], self._towards[name])
            for name, block in made.blocks.items()
        }
        for e, parameters in enumerate(self.parameters):
            for group in parameters:
                pairs = [
                    projections[part.block][part.columns.start, part.columns.stop] for _, part in self._of(e, group)
                ]
                least = 100 * torch.finfo(pairs[0][0].dtype if pairs else torch.float64).eps
                along, squared = (sum(values).double() for values in zip(*pairs or [nothing], strict=True))
                # What lies across the direction is not told by digits that are not there.
                steady = squared - along.square() < least * squared
                self._put(self._along[e], group, start + which, along)
                self._put(self._squared[e], group, start + which, torch.where(steady, along.square(), squared))

    def _pull(self, blocks: Mapping[str, Tensor | Outer], start: int) -> None:
        """Let some replicates from `start` on pull at each direction."""
        stop = start + len(next(iter(blocks.values())))
        for direction in self._directions.values():
            e, group = direction.estimator, direction.group
            gradients = {name: _columns(blocks[part.block], part.columns) for name, part in self._of(e, group)}
            along, squared = (of[e][group][start:stop].cpu().numpy() for of in (self._along, self._squared))
            direction.pull(gradients, along, squared)

    def _put(self, into: dict[str, Tensor], name: str, at: slice | Tensor, values: Tensor) -> None:
        kept = into.get(name)
        if kept is None or len(kept) < self.replicates:
            grown = values.new_empty(self.replicates, dtype=torch.float64)
            if kept is not None:
                grown[: len(kept)] = kept
            kept = into[name] = grown
        kept[at] = values.double()

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


def _fetched(values: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: of.cpu().numpy() for name, of in values.items()}


def _key(parts: Mapping[str, Part]) -> tuple[tuple[str, int | None], ...]:
    """What tells the gradient of a group from that of other groups, and of other estimators."""
    return tuple((part.block, part.columns.start) for part in parts.values())


def _columns(gradients: Tensor | Outer, which: slice) -> Tensor | Outer:
    return gradients.columns(which) if isinstance(gradients, Outer) else gradients[..., which]


def _vanishing(moments: Mapping[str, Moments]) -> bool:
    """Whether there is a gradient whose squares have lost digits, or all of them, since they are so small."""
    squares = sum(of.sums.squared_mean + of.sums.variance for of in moments.values())
    least = min((torch.finfo(of.pooled.first.dtype).tiny for of in moments.values()), default=0)
    few = squares < least * sum(math.prod(of.pooled.shape) for of in moments.values())
    return few and any(bool(of.pooled.mean.any()) for of in moments.values())


def _normalize(parts: Sequence[Tensor]) -> float:
    """Divide by the norm of all together, and return it; zeros stay zeros."""
    norm = sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts) ** 0.5
    for part in parts if norm > 0 else ():
        part.div_(norm)
    return norm

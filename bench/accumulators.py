"""Accumulators: each folds the gradients of one block of parameters into shard moments, the cheapest way that loses no digits.

Per shard and coordinate they keep the sum of deviations from a pilot (zero, or the first replicates' mean where that is large
against the noise) and of their squares: deviations are as small as the noise, so nothing cancels, however large the mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradiometer.bench.moments import Array, Moments, Pooled, Tile, left_by, moments_of, summary, tile_of, total_of
from gradiometer.bench.outer import CANCELLED, Beside, Outer, columns_of, pairs_of, twice
from gradiometer.bench.products import product

LARGE = 2**18  # elements of a gradient from which it is made in parts, so that it and its sums stay in a cache
FEW_COLUMNS = 8  # that a pilot has, for which single columns are taken from a gradient
PAIRED = 1024  # pairs of rows that are held at once
AGREED = 1e-3  # relative difference of second moments made in two ways, in every coordinate, if neither has cancelled
ENOUGH = 4  # replicates that show whether terms cancel
FEW, SHARED_FEW = 5, 32  # rows up to which sums over their pairs are cheaper than one gradient after the other
AT_ONCE = 2**20  # elements of small parameters' gradients that are made at once
GPU_AT_ONCE = 2**24  # of any parameter's, on a graphics processor
Block = Tensor | Outer | Beside
Slice = tuple[int | None, int | None]
"""Columns (last axis) of a block that are one parameter's, as a slice's start and stop."""
Projections = dict[Slice, tuple[Tensor, Tensor]]
"""Inner products with a direction and squared norms of replicates, ``[r]`` each, by columns."""


@dataclass(frozen=True)
class Piece:
    """Replicates of a pass that belong to one shard; the first `wanted` of them are projected."""

    shard: int
    rows: slice
    wanted: int = 0

    def __len__(self) -> int:
        length: int = self.rows.stop - self.rows.start
        return length


class Accumulator(ABC):
    """Folds chunks of replicate gradients of one block of parameters into shard moments."""

    def __init__(self, like: Tensor | Outer, shards: int, slices: Iterable[Slice]) -> None:
        self.shape = like.shape if isinstance(like, Outer) else like.shape[1:]
        self.count, self.slices = np.zeros(shards), tuple(slices)

    def fold(self, gradients: Block, pieces: Sequence[Piece], towards: Tensor | None = None) -> Projections:
        """Add the replicates ``[r, *shape]`` of adjacent pieces of a pass, each to its shard.

        Where they are multiplied out, those that are wanted are projected on the direction `towards` as they come by.
        """
        found = self._add(gradients, pieces, towards)
        for piece in pieces:
            self.count[piece.shard] += len(piece)
        return found

    @abstractmethod
    def _add(self, gradients: Block, pieces: Sequence[Piece], towards: Tensor | None) -> Projections: ...

    def projections(self, gradients: Tensor | Outer, towards: Tensor) -> Projections:
        """Of replicates that were not projected while they were added."""
        if isinstance(gradients, Outer):
            return {of: gradients.columns(slice(*of)).projections(towards[:, slice(*of)]) for of in self.slices}
        parts = {of: (gradients[:, slice(*of)], towards[slice(*of)]) for of in self.slices}
        return {of: ((part * onto).sum(1), part.square().sum(1)) for of, (part, onto) in parts.items()}

    @abstractmethod
    def mean(self, upto: int) -> Tensor:
        """The mean over the shards before `upto`, in the block's shape."""

    @abstractmethod
    def along(self, direction: Tensor, columns: slice, upto: int) -> Array:
        """Inner products of a direction in some columns with the sums of deviations in each shard before `upto`, ``[upto]``."""

    @abstractmethod
    def _tiles(self, columns: slice) -> Iterator[Tile]:
        """The coordinates of some columns in order, a few at a time."""

    def moments(self, columns: slice = slice(None), shape: torch.Size | None = None) -> Moments:
        """Of the block, or of some of its columns (last axis), in the parameter's shape."""
        return summary(self._tiles(columns), self.count, self.shape if shape is None else shape)

    def first_not_finite(self, columns: slice) -> int | None:
        """The first shard with a gradient that is not finite in these columns, if there is one: a sum forgets no NaN."""
        finite = np.array([[bool(f.isfinite().all()) for f in first] for first, _, _ in self._tiles(columns)]).all(0)
        return None if finite.all() else int(finite.argmin())


@dataclass(frozen=True)
class Pilot:
    """A gradient from which deviations are taken; `columns` are those where it is not zero, if they are few."""

    dense: Tensor
    columns: tuple[int, ...] | None = None

    @staticmethod
    def where_needed(gradients: Tensor, cancelled: Tensor) -> Pilot | None:
        """The mean gradient, in those columns alone (a bias, a saturated unit) that have a coordinate that cancels without."""
        if not cancelled.any():
            return None
        columns = cancelled.flatten(0, -2).any(0).nonzero().flatten().tolist() if cancelled.dim() > 1 else []
        if not 0 < len(columns) <= FEW_COLUMNS:
            return Pilot(gradients)
        return Pilot(
            torch.zeros_like(gradients).index_copy_(
                -1, torch.tensor(columns, device=gradients.device), gradients[..., columns]
            ),
            tuple(columns),
        )

    def taken_from(self, gradient: Tensor, units: slice) -> Tensor:
        """Deviations of a gradient ``[units, in]``, in its place."""
        if self.columns is None:
            return gradient.sub_(self.dense[units])
        for column in self.columns:
            gradient[:, column].sub_(self.dense[units, column])
        return gradient


class Coordinates(Accumulator):
    """Has the sums of every coordinate, shard by shard, about a pilot."""

    first: Tensor | list[Tensor]
    second: Tensor | list[Tensor]
    pilot: Pilot | None

    def mean(self, upto: int) -> Tensor:
        mean = total_of(self.first[:upto]).div_(self.count[:upto].sum())
        return mean if self.pilot is None else mean + self.pilot.dense

    def along(self, direction: Tensor, columns: slice, upto: int) -> Array:
        return _along(direction, [f[..., columns] for f in self.first[:upto]])

    def _tiles(self, columns: slice) -> Iterator[Tile]:
        """Of single shards, each in parts."""

        def cut(m: Tensor) -> Sequence[Tensor]:
            m, most = m.view(-1, self.shape[-1])[:, columns], tile_of(m)
            if m.numel() <= most:
                return [m]
            return m.flatten().split(most) if m.is_contiguous() else m.split(max(1, most // m.shape[1]))

        firsts, seconds = (list(zip(*map(cut, of), strict=True)) for of in (self.first, self.second))
        pilots = [None] * len(firsts) if self.pilot is None else cut(self.pilot.dense)
        yield from zip(firsts, seconds, pilots, strict=True)


class Dense(Coordinates):
    """Holds the sums of every coordinate; of factors, each gradient is multiplied out."""

    first: Tensor
    second: Tensor

    def __init__(self, like: Tensor | Outer, shards: int, slices: Iterable[Slice], pilot: Pilot | None = None) -> None:
        super().__init__(like, shards, slices)
        values = like.cotangents if isinstance(like, Outer) else like
        # At once, not as shards begin: they would lie scattered over a heap of passing things, and keep it from shrinking.
        self.first, self.second = (values.new_zeros(shards, *self.shape) for _ in range(2))
        self.pilot = pilot

    def _add(self, gradients: Block, pieces: Sequence[Piece], towards: Tensor | None) -> Projections:
        if isinstance(gradients, Outer):
            return _joined([self._multiplied(gradients[piece.rows], piece, towards) for piece in pieces])
        start = 0
        for part in gradients.parts if isinstance(gradients, Beside) else [gradients]:
            wide = part.shape.numel() if isinstance(part, Outer) else part[0].numel()
            at_once = [pieces] if sum(map(len, pieces)) * wide <= AT_ONCE else [[piece] for piece in pieces]
            for together in at_once:
                values = columns_of(part[slice(together[0].rows.start, together[-1].rows.stop)])
                deviations = values if self.pilot is None else values - self.pilot.dense[start : start + wide]
                first, second = (of[:, start : start + wide] for of in (self.first, self.second))
                if len(deviations) == 1:  # a loop's, for which no square is made
                    first[together[0].shard].add_(deviations[0])
                    second[together[0].shard].addcmul_(deviations[0], deviations[0])
                else:
                    add_rows(first, deviations, together)
                    add_rows(second, deviations.square(), together)
            start += wide
        return {}

    def _multiplied(self, gradients: Outer, piece: Piece, towards: Tensor | None) -> Projections:
        first, second = self.first[piece.shard], self.second[piece.shard]
        if towards is None or gradients.rows <= SHARED_FEW or not piece.wanted:
            add_multiplied(gradients, first, second, self.pilot)
            return {}
        columns = add_multiplied(gradients[: piece.wanted], first, second, self.pilot, towards)
        add_multiplied(gradients[piece.wanted :], first, second, self.pilot)
        along, squared = ({of: m[:, slice(*of)].sum(1) for of in self.slices} for m in columns)
        return {of: (along[of], squared[of]) for of in self.slices}

    def along(self, direction: Tensor, columns: slice, upto: int) -> Array:
        return _along(direction, self.first[:upto, ..., columns])

    def _tiles(self, columns: slice) -> Iterator[Tile]:
        first, second = self.first[..., columns], self.second[..., columns]
        if first.numel() > tile_of(first):
            yield from super()._tiles(columns)
        else:
            pilot = None if self.pilot is None else self.pilot.dense[..., columns]
            yield first.flatten(1), second.flatten(1), pilot


class Paired(Coordinates):
    """Of factors with few rows: second moments are sums over pairs of rows, made by one product for all replicates.

    Args:
        centre: factors of what deviations are taken from; nothing if None.
    """

    def __init__(self, like: Outer, shards: int, slices: Iterable[Slice], centre: Outer | None = None) -> None:
        super().__init__(like, shards, slices)
        self.first = [like.cotangents.new_empty(0)] * shards  # each takes the place of the first product made for it
        self.second = list(self.first)
        self.centre, self.pilot = centre, None if centre is None else Pilot(centre.dense()[0])

    def _add(self, gradients: Block, pieces: Sequence[Piece], towards: Tensor | None) -> Projections:
        assert isinstance(gradients, Outer)
        for piece in pieces:
            self._sum(piece.shard, gradients[piece.rows])
        return {}

    def _sum(self, shard: int, gradients: Outer) -> None:
        deviations = gradients if self.centre is None else minus(gradients, self.centre)
        step = max(1, PAIRED // (deviations.rows * (deviations.rows + 1) // 2))
        for start in range(0, len(deviations), step):
            part = deviations[start : start + step]
            fresh = self.count[shard] + start == 0
            for into, made in ((self.first, part.total()), (self.second, part.squared().total())):
                into[shard] = made if fresh else into[shard].add_(made)


class Shared(Accumulator):
    """Of factors whose inputs are the same for all replicates: the moments of the cotangents say it all.

    With deviations ``e [n, out]`` of the cotangents, second moments are quadratic forms of the inputs in ``sum_r e e^T``.
    """

    def __init__(self, like: Outer, shards: int, slices: Iterable[Slice]) -> None:
        super().__init__(like, shards, slices)
        like = like.flat()
        n, out = like.cotangents.shape[1:]
        self.inputs, self.pilot = like.inputs[0], steady_mean(like.cotangents)  # [n, in], [n, out]
        self.first = like.cotangents.new_zeros(shards, n, out)
        self.second = like.cotangents.new_zeros(shards, out, n, n)

    def _add(self, gradients: Block, pieces: Sequence[Piece], towards: Tensor | None) -> Projections:
        assert isinstance(gradients, Outer)
        span = slice(pieces[0].rows.start, pieces[-1].rows.stop)
        deviations = gradients.cotangents[span].flatten(1, -2) - self.pilot  # [r, n, out]
        add_rows(self.first, deviations, pieces)
        if len(self.inputs) == 1:
            add_rows(self.second[..., 0, 0], deviations.square().squeeze(1), pieces)
            return {}
        for piece in pieces:
            own = deviations[piece.rows.start - span.start : piece.rows.stop - span.start]
            rows = own.permute(2, 1, 0).contiguous()  # [out, n, r]
            torch.baddbmm(self.second[piece.shard], rows, rows.mT, out=self.second[piece.shard])
        return {}

    def mean(self, upto: int) -> Tensor:
        return product((self.first[:upto].sum(0) / self.count[:upto].sum() + self.pilot).T, self.inputs.T)

    def along(self, direction: Tensor, columns: slice, upto: int) -> Array:
        return _along(product(self.inputs[:, columns], direction), self.first[:upto])

    def _tiles(self, columns: slice) -> Iterator[Tile]:
        inputs, S = self.inputs[:, columns].T, len(self.first)  # [in, n]
        n, m = pairs_of(len(self.inputs), inputs.device)
        pairs, often = inputs[:, n] * inputs[:, m], twice(n, m).to(inputs)[:, 0]
        step = max(1, tile_of(inputs) // len(inputs))
        for start in range(0, self.shape[0], step):
            units = slice(start, start + step)
            first = product(self.first[..., units].mT.flatten(0, 1), inputs).view(S, -1)
            forms = self.second[:, units, n, m].flatten(0, 1) * often  # [S * t, pairs]
            second = product(forms, pairs).view(S, -1)
            yield first, second, product(self.pilot[:, units].T, inputs).flatten()

    def moments(self, columns: slice = slice(None), shape: torch.Size | None = None) -> Moments:
        if len(self.inputs) > 1:
            return super().moments(columns, shape)
        # Every gradient is one vector times the same inputs: the vector's moments, and how often each is seen.
        vectors = self.first[:, 0], self.second[..., 0, 0], self.pilot[0]
        return summary([vectors], self.count, self.pilot.shape[1:]).times(
            self.inputs[0, columns], self.shape if shape is None else shape
        )


class Traces(Accumulator):
    """Sums of the gradients and of their squared norms: no second moment of any coordinate is kept, nor any gradient made."""

    def __init__(self, like: Tensor | Outer, shards: int, slices: Iterable[Slice]) -> None:
        super().__init__(like, shards, slices)
        values = like.cotangents if isinstance(like, Outer) else like
        self.first = values.new_zeros(shards, *self.shape)
        self.squares = {of: values.new_zeros(shards, dtype=torch.float64) for of in self.slices}

    def _add(self, gradients: Block, pieces: Sequence[Piece], towards: Tensor | None) -> Projections:
        for piece in pieces:
            self._sum(piece.shard, gradients[piece.rows])
        return {}

    def _sum(self, shard: int, gradients: Tensor | Outer) -> None:
        self.first[shard] += gradients.total() if isinstance(gradients, Outer) else gradients.sum(0)
        for of, squares in self.squares.items():
            part = gradients.columns(slice(*of)) if isinstance(gradients, Outer) else gradients[..., slice(*of)]
            norms = part.squared_norms() if isinstance(part, Outer) else part.square().flatten(1).sum(1)
            squares[shard] += norms.sum(dtype=torch.float64)

    def mean(self, upto: int) -> Tensor:
        return self.first[:upto].sum(0) / self.count[:upto].sum()

    def along(self, direction: Tensor, columns: slice, upto: int) -> Array:
        return _along(direction, self.first[:upto, ..., columns])

    def _tiles(self, columns: slice) -> Iterator[Tile]:
        yield self.first[..., columns].flatten(1), self.squares[columns.start, columns.stop], None

    def moments(self, columns: slice = slice(None), shape: torch.Size | None = None) -> Moments:
        """Variances of coordinates are not known: nan.

        Raises:
            Cancelled: the mean is so large against the noise that squared norms do not tell it.
        """
        parts = [part[..., columns].flatten() for part in self.first]
        squares = self.squares[columns.start, columns.stop].tolist()
        total, n, rows = total_of(parts), float(self.count.sum()), []
        least = 1000 * torch.finfo(total.dtype).eps
        for without, second, left in (
            (total, sum(squares), n),
            *((total - f, sum(squares) - q, n - c) for f, q, c in zip(parts, squares, self.count, strict=True)),
        ):
            square = float(torch.linalg.vector_norm(without, dtype=torch.float64)) ** 2
            variance = max(second - square / left, 0.0) / (left - 1)  # in this order, nan stays nan
            if variance * left < least * second:
                raise Cancelled("the gradient is so steady that its squared norms do not tell its variance")
            rows.append([square / left**2, variance, math.nan, math.nan, math.nan])
        pooled = Pooled(n, self.shape if shape is None else shape, total.cpu(), torch.full_like(total, math.nan).cpu())
        return moments_of(pooled, np.array(rows), left_by(self.count))


def _along(direction: Tensor, vectors: Tensor | Sequence[Tensor]) -> Array:
    flat = direction.flatten()
    if isinstance(vectors, Tensor):
        return np.array((vectors.flatten(1) @ flat).tolist())
    return np.array([float(torch.dot(vector.flatten(), flat)) for vector in vectors])


def _joined(parts: Sequence[Projections]) -> Projections:
    """Of all the replicates; nothing if there are none."""
    found = [part for part in parts if part]
    return {
        of: (torch.cat([part[of][0] for part in found]), torch.cat([part[of][1] for part in found]))
        for of in (found[0] if found else ())
    }


def add_rows(sums: Tensor, values: Tensor, pieces: Sequence[Piece]) -> None:
    """Add the values ``[r, *n]`` of replicates to the sums ``[S, *n]`` of the shards that adjacent pieces belong to."""
    if len(pieces) > 1 and values.device.type == "cpu":  # elsewhere the order of this sum is left to chance
        shards = torch.repeat_interleave(
            *(torch.tensor(of, device="cpu") for of in ([p.shard for p in pieces], [len(p) for p in pieces]))
        )
        sums += torch.zeros_like(sums).index_add_(0, shards, values.contiguous())
    else:
        for piece, own in zip(pieces, values.split([len(piece) for piece in pieces]), strict=True):
            sums[piece.shard] += own.sum(0)


class Cancelled(Exception):
    """Squared norms have lost the digits that a variance needs."""


def accumulator(beginning: Tensor | Outer, shards: int, slices: Iterable[Slice], traces: bool = False) -> Accumulator:
    """The accumulator that is fast and precise for gradients of which the first replicates are given.

    With `traces`, squared norms stand for second moments, but where a replicate has so many rows (the places of a convolution)
    that their inner products cost more than its gradient.
    """
    if isinstance(beginning, Outer):
        if beginning.shared and beginning.rows <= SHARED_FEW:
            deviations = Outer(beginning.inputs, beginning.cotangents - steady_mean(beginning.cotangents))
            if beginning.rows == 1 or _pairs_agree(deviations):
                return Shared(beginning, shards, slices)
        elif traces and beginning.rows <= SHARED_FEW:
            return Traces(beginning, shards, slices)
        elif beginning.rows <= FEW and len(beginning) >= ENOUGH:
            first, second = beginning.total(), beginning.squared().total()
            if not _cancelled(first, second, len(beginning)).any():
                if beginning.rows == 1 or _pairs_agree(beginning):
                    return Paired(beginning, shards, slices)
            elif _pairs_agree(minus(beginning, centre := _centre(beginning))):
                return Paired(beginning, shards, slices, centre)
        first, second = beginning.cotangents.new_zeros(2, *beginning.shape)
        add_multiplied(beginning, first, second)
    else:
        first, second = beginning.sum(0), beginning.square().sum(0)
    mean = (first / len(beginning)).nan_to_num_(0, 0, 0)
    pilot = Pilot.where_needed(mean, _cancelled(first, second, len(beginning)))
    return Dense(beginning, shards, slices, pilot)


def minus(gradients: Outer, centre: Outer) -> Outer:
    """Gradients less one that is given by its factors: ``d a - c b = (d - c) a + c (a - b)``, small where the noise is."""
    gradients, left, right = gradients.flat(), centre.cotangents, centre.inputs
    e, f = gradients.cotangents - left, gradients.inputs - right
    return Outer(torch.cat([gradients.inputs, f], 1), torch.cat([e, left.expand_as(e)], 1))


def _centre(gradients: Outer) -> Outer:
    flat = gradients.flat()
    return Outer(steady_mean(flat.inputs)[None], steady_mean(flat.cotangents)[None])


def steady_mean(values: Tensor) -> Tensor:
    """The mean over replicates for a pilot: exact where all are the same, so that they stay without noise, and always a number."""
    return torch.where((values == values[:1]).all(0), values[0], values.mean(0)).nan_to_num_(0, 0, 0)


def _cancelled(first: Tensor, second: Tensor, n: int) -> Tensor:
    """Where a variance made from sums of gradients and of squares would have lost digits."""
    return torch.addcmul(second, first, first, value=-1 / n) < CANCELLED * second


def _pairs_agree(deviations: Outer) -> bool:
    """Whether second moments from pairs of rows have lost no digits to terms that cancel."""
    first, second = deviations.cotangents.new_zeros(2, *deviations.shape)
    add_multiplied(deviations, first, second)
    return not ((deviations.squared().total() - second).abs() > AGREED * second).any()


def add_multiplied(
    gradients: Outer, first: Tensor, second: Tensor, pilot: Pilot | None = None, towards: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add the sums over replicates of deviations from `pilot`, and of their squares, each gradient multiplied out.

    Returns:
        Down each column, the inner products with the direction `towards` and the squares of the gradients, ``[r, in]`` each.
    """
    add = _one_by_one if first.device.type == "cpu" else _many_at_once
    return add(gradients, first, second, pilot, towards)


def _one_by_one(
    gradients: Outer, first: Tensor, second: Tensor, pilot: Pilot | None, towards: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In tiles that stay in the cache."""
    tall, wide = gradients.shape
    step = -(-tall // -(-tall * wide // LARGE))
    along, squared = first.new_zeros(2, len(gradients) if towards is not None else 0, wide)
    for start in range(0, tall, step):
        units = slice(start, start + step)
        of_first, of_second = first[units], second[units]
        for r, gradient in enumerate(gradients.each(units)):
            if towards is not None:
                along[r] += (gradient * towards[units]).sum(0)
                squared[r] += gradient.square().sum(0)
            if pilot is not None:
                gradient = pilot.taken_from(gradient, units)
            of_first.add_(gradient)
            of_second.addcmul_(gradient, gradient)
    return along, squared


def _many_at_once(
    gradients: Outer, first: Tensor, second: Tensor, pilot: Pilot | None, towards: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For a graphics processor, where a call costs more than what it computes."""
    step = max(1, GPU_AT_ONCE // gradients.shape.numel())
    along, squared = first.new_zeros(2, len(gradients) if towards is not None else 0, gradients.shape[1])
    for start in range(0, len(gradients), step):
        replicates = slice(start, start + step)
        made = gradients[replicates].dense()
        if towards is not None:
            along[replicates], squared[replicates] = (made * towards).sum(1), made.square().sum(1)
        if pilot is not None:
            made -= pilot.dense
        first += made.sum(0)
        second += made.square_().sum(0)
    return along, squared

"""Mean gradients as directions: what later replicates are projected on, and how a ratio hangs on the direction itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gradiometer.bench import formulas
from gradiometer.bench.accumulators import Accumulator, Piece, Projections
from gradiometer.bench.gradients import Parameters
from gradiometer.bench.moments import Array
from gradiometer.bench.outer import Outer
from gradiometer.bench.tape import Part, Pass

PROJECTED = 32  # replicates per shard of the second half that are projected, or an eighth of them if that is more
PULLING = 64  # of the projected ones, how many estimate the derivative of a ratio by its direction, for its error
SMALL = 2**12  # coordinates of a gradient up to which all of the second half are: it costs next to nothing
Key = tuple[tuple[str, int | None], ...]
"""What tells the gradient of a group from that of other groups, and of other estimators: blocks and first columns."""


class Kept:
    """Values of each replicate by name, on the device that they were computed on.

    To fetch them as they come would have each pass wait for the one before. Kept in pieces, they would lie scattered over a heap of
    passing things, and keep it from shrinking.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def put(self, name: str, at: slice | Tensor, values: Tensor, replicates: int) -> None:
        """Of the replicates `at`, of which there will be so many in all."""
        kept = self._values.get(name)
        if kept is None or len(kept) < replicates:
            grown = values.new_empty(replicates, dtype=torch.float64)
            if kept is not None:
                grown[: len(kept)] = kept
            kept = self._values[name] = grown
        kept[at] = values.double()

    def of(self, name: str, rows: slice) -> Array:
        found: Array = self._values[name][rows].cpu().numpy()
        return found

    def fetched(self) -> dict[str, Array]:
        return {name: of.cpu().numpy() for name, of in self._values.items()}


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


class Directions:
    """The mean gradients of the first half of the shards, and the projections of the second half's replicates on them.

    Args:
        sums: of every block, over the first half.
        parts: of each estimator, where its gradients are found in the blocks.
        parameters: of each estimator, ``{group: {name: parameter}}``.
        begun: by shard of the second half, its first replicates.
        means: mean gradients by parameter, in the place of the estimators' own.

    Attributes:
        towards: by block, unit vectors of each group.
    """

    def __init__(
        self,
        sums: Mapping[str, Accumulator],
        parts: Sequence[Mapping[str, Part]],
        parameters: Sequence[Parameters],
        begun: Mapping[int, range],
        means: Mapping[str, Tensor] | None,
    ) -> None:
        self._sums, self._parts, self._parameters, self._begun = sums, parts, parameters, begun
        self._half, self._own = min(begun), means is None
        self._along, self._squared = ([Kept() for _ in parameters] for _ in range(2))  # by group
        self._projected = dict.fromkeys(begun, 0)
        self._of_replicates = self._count().sum()
        self.towards, self._directions = self._made(means)
        self._to_project, self._to_pull = self._planned()

    def _count(self) -> Array:
        """Replicates in each shard of the first half."""
        return next(iter(self._sums.values())).count[: self._half]

    def _made(self, means: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[Key, Direction]]:
        """Unit vectors by block, and what is known of each; estimators that share columns share it."""
        own = {block: accumulator.mean(self._half) for block, accumulator in self._sums.items()}
        towards = {block: torch.zeros_like(mean) for block, mean in own.items()}
        found: dict[Key, Direction] = {}
        for e, parameters in enumerate(self._parameters):
            for group in parameters:
                parts = self._of(e, group)
                if _key(parts) in found:
                    continue
                places = {name: towards[part.block][..., part.columns] for name, part in parts.items()}
                for name, part in parts.items():
                    if means is None:
                        places[name].copy_(own[part.block][..., part.columns])
                    elif name in means:
                        places[name].copy_(means[name].reshape(places[name].shape))
                found[_key(parts)] = Direction(e, group, _normalize(list(places.values())))
        return towards, found

    def _planned(self) -> tuple[dict[int, int], dict[int, int]]:
        """By shard, how many replicates are still to be projected, and how many of these to pull."""
        small = sum(accumulator.shape.numel() for accumulator in self._sums.values()) <= SMALL
        sizes = {number: len(begun) for number, begun in self._begun.items()}
        to_project = {n: size if small else min(size, max(PROJECTED, size // 8)) for n, size in sizes.items()}
        # A direction that is given has no error.
        left, to_pull = (sum(sizes.values()) if small else PULLING) if self._own else 0, {}
        for number, wanted in to_project.items():
            to_pull[number] = min(wanted, left)
            left -= to_pull[number]
        return to_project, to_pull

    def wanted(self, piece: Piece) -> Piece:
        """With how many of its replicates are to be projected, which are counted."""
        wanted = min(len(piece), self._to_project[piece.shard])
        self._to_project[piece.shard] -= wanted
        self._projected[piece.shard] += wanted
        return replace(piece, wanted=wanted)

    def add(
        self, made: Pass, early: Mapping[str, Projections], pieces: Sequence[Piece], at: range, replicates: int
    ) -> None:
        """Project what is wanted of the pieces of a pass.

        Args:
            early: projections that were made while gradients were folded.
            at: the replicates of the pass.
            replicates: how many there will be in all.
        """
        projected = [range(p.rows.start, p.rows.start + p.wanted) for p in pieces if p.wanted]
        if projected:
            self._keep(made, early, projected, at.start, replicates)
        for piece in pieces:
            if few := min(piece.wanted, self._to_pull[piece.shard]):
                self._to_pull[piece.shard] -= few
                rows = slice(piece.rows.start, piece.rows.start + few)
                self._pull({name: block[rows] for name, block in made.blocks.items()}, at.start + rows.start)

    def _keep(
        self, made: Pass, early: Mapping[str, Projections], rows: Sequence[range], start: int, replicates: int
    ) -> None:
        device = next(iter(self.towards.values())).device
        which = torch.cat([torch.arange(of.start, of.stop, device=device) for of in rows])
        nothing = (torch.zeros(len(which), device=device), torch.zeros(len(which), device=device))
        projections = {
            name: early[name] or self._sums[name].projections(block[which], self.towards[name])
            for name, block in made.blocks.items()
        }
        for e, parameters in enumerate(self._parameters):
            for group in parameters:
                pairs = [
                    projections[part.block][part.columns.start, part.columns.stop]
                    for part in self._of(e, group).values()
                ]
                least = 100 * torch.finfo(pairs[0][0].dtype if pairs else torch.float64).eps
                along, squared = (sum(values).double() for values in zip(*pairs or [nothing], strict=True))
                # What lies across the direction is not told by digits that are not there.
                steady = squared - along.square() < least * squared
                self._along[e].put(group, start + which, along, replicates)
                self._squared[e].put(group, start + which, torch.where(steady, along.square(), squared), replicates)

    def _pull(self, blocks: Mapping[str, Tensor | Outer], start: int) -> None:
        """Let some replicates from `start` on pull at each direction."""
        rows = slice(start, start + len(next(iter(blocks.values()))))
        for direction in self._directions.values():
            e, group = direction.estimator, direction.group
            gradients = {name: _columns(blocks[part.block], part.columns) for name, part in self._of(e, group).items()}
            direction.pull(gradients, *(of[e].of(group, rows) for of in (self._along, self._squared)))

    def projections(self, estimator: int) -> dict[str, list[tuple[Array, Array]]]:
        """Per group and shard of the second half, inner product with the direction and squared norm of each replicate."""
        of = [slice(begun.start, begun.start + self._projected[number]) for number, begun in self._begun.items()]
        along, squared = self._along[estimator].fetched(), self._squared[estimator].fetched()
        return {
            group: [(along[group][rows].copy(), squared[group][rows].copy()) for rows in of]
            for group in self._parameters[estimator]
        }

    def turns(self, estimator: int) -> dict[str, Array]:
        """Per group and shard of the first half, what `directional_snr` is off by, to first order, without it in the direction."""
        return {group: self._turns(estimator, group) for group in self._parameters[estimator]} if self._own else {}

    def _turns(self, estimator: int, group: str) -> Array:
        parts, count = self._of(estimator, group), self._count()
        of, n, inner = self._directions[_key(parts)], count.sum(), np.zeros(self._half)
        slope = {name: pulled / of.pulls for name, pulled in of.pulled.items()}
        units = {name: self.towards[part.block][..., part.columns] for name, part in parts.items()}
        onto = sum(float((slope[name] * unit).sum()) for name, unit in units.items())
        for name, part in parts.items():
            across = slope[name].sub_(units[name], alpha=onto)
            inner += self._sums[part.block].along(across, part.columns, self._half)
        with np.errstate(all="ignore"):  # a mean of zero has no direction
            off = ((inner.sum() - inner) / (n - count) - inner.sum() / n) / of.norm
        return off * math.sqrt(n / self._of_replicates)  # the direction is that of the replicates there were at first

    def _of(self, estimator: int, group: str) -> dict[str, Part]:
        found = self._parts[estimator]
        return {name: found[name] for name in self._parameters[estimator][group] if name in found}


def _key(parts: Mapping[str, Part]) -> Key:
    return tuple((part.block, part.columns.start) for part in parts.values())


def _columns(gradients: Tensor | Outer, which: slice) -> Tensor | Outer:
    return gradients.columns(which) if isinstance(gradients, Outer) else gradients[..., which]


def _normalize(parts: Sequence[Tensor]) -> float:
    """Divide by the norm of all together, and return it; zeros stay zeros."""
    norm = sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts) ** 0.5
    for part in parts if norm > 0 else ():
        part.div_(norm)
    return norm

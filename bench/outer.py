"""Gradients of a layer's weight for many replicates, kept as the factors of their outer products.

Replicate r's gradient is ``D_r^T A_r``, from the layer's inputs A and the gradients D of its outputs. Sums over replicates,
projections, norms and second moments all come from the factors; the ``[replicates, out, in]`` array is never made.

Gradients of several estimators that differ in the weights of the rows alone stand side by side, each with the inputs times
its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer.bench.products import multiplier, product

PRODUCTS = 2**20  # inner products of rows that are held at once
CANCELLED = 1e-2  # a sum smaller than this part of its terms has lost digits


@dataclass(frozen=True)
class Outer:
    """Gradients ``sum_n cotangents[r, n] (outer) inputs[r, n]`` of replicates r; shapes ``[r, *n, in]``, ``[r, *n, out]``.

    The terms of a sum are its rows, on one axis or several (particles and data may lie far apart in memory, and are brought
    together only where that is needed). Inputs ``[1, *n, in]`` are the same for all replicates, as a guide's are, which sees the
    data and no noise.
    """

    inputs: Tensor
    cotangents: Tensor

    def __len__(self) -> int:
        return self.cotangents.shape[0]

    def __getitem__(self, replicates: slice | Tensor) -> Outer:
        return Outer(self.inputs if self.shared else self.inputs[replicates], self.cotangents[replicates])

    def __add__(self, other: Outer) -> Outer:
        """The sum of two calls' gradients: their rows side by side."""
        rows = [g.inputs.flatten(1, -2).expand(len(self), -1, -1) for g in (self, other)]
        return Outer(torch.cat(rows, 1), torch.cat([g.cotangents.flatten(1, -2) for g in (self, other)], 1))

    @property
    def shape(self) -> torch.Size:
        """Of one replicate's gradient, ``[out, in]``."""
        return torch.Size((self.cotangents.shape[-1], self.inputs.shape[-1]))

    @property
    def rows(self) -> int:
        """The terms of one replicate's sum."""
        return math.prod(self.inputs.shape[1:-1])

    @property
    def shared(self) -> bool:
        """Whether all replicates have the same inputs."""
        return self.inputs.shape[0] == 1 < self.cotangents.shape[0]

    def flat(self) -> Outer:
        """The same with all rows on one axis."""
        return Outer(self.inputs.flatten(1, -2), self.cotangents.flatten(1, -2))

    def columns(self, which: slice) -> Outer:
        """Some columns of the gradients alone."""
        return Outer(self.inputs[..., which], self.cotangents)

    def weighted(self, weights: Tensor) -> Outer:
        """Each gradient times its weight ``[r]``."""
        return Outer(self.inputs, self.cotangents * weights.view(-1, *[1] * (self.cotangents.dim() - 1)))

    def dense(self) -> Tensor:
        """The gradients themselves, ``[r, out, in]``."""
        flat = self.flat()
        if self.rows == 1:
            return flat.cotangents.mT * flat.inputs
        return flat.cotangents.mT @ flat.inputs

    def each(self, units: slice = slice(None)) -> Iterator[Tensor]:
        """The gradients one after the other, or those of some outputs alone, ``[out, in]``; each overwrites the one before."""
        inputs, cotangents = self.inputs.flatten(1, -2).expand(len(self), -1, -1), self.cotangents[..., units]
        tall, n, wide = cotangents.shape[-1], self.rows, self.shape[1]
        place, multiply = cotangents.new_empty(tall, wide), multiplier(tall, n, wide, cotangents)
        if inputs.stride(-2) != wide:
            inputs = inputs.contiguous()
        for A, D in zip(inputs.mT.unbind(0), cotangents.unbind(0), strict=True):
            yield multiply(D.reshape(n, tall).T, A, place)

    def total(self) -> Tensor:
        """The sum over replicates, ``[out, in]``."""
        if self.shared:
            return product(self.cotangents.sum(0).flatten(0, -2).T, self.inputs[0].flatten(0, -2).T)
        return product(self.cotangents.flatten(0, -2).T, self.inputs.flatten(0, -2).T)

    def squared(self) -> Outer:
        """The elementwise squares of the gradients, as sums over pairs of rows: ``(sum_n d_n a_n)^2 = sum_nm d_n d_m a_n a_m``."""
        if self.rows == 1:
            return Outer(self.inputs.square(), self.cotangents.square())
        flat = self.flat()
        inputs, cotangents = (
            torch.cat([t[:, n : n + 1] * t[:, n:] for n in range(self.rows)], 1) for t in (flat.inputs, flat.cotangents)
        )
        return Outer(inputs, cotangents.mul_(twice(*pairs_of(self.rows, inputs.device)).to(inputs)))

    def projections(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products with a direction ``[out, in]`` and squared norms, each ``[r]``; no gradient is made."""
        onto = product(self.inputs.flatten(0, -2), direction).view(*self.inputs.shape[:-1], -1)
        along, squared = (onto * self.cotangents).flatten(1).sum(1), self._squared_norms()
        for r, gradient in self._again(squared):
            along[r], squared[r] = (gradient * direction).sum(), gradient.square().sum()
        return along, squared

    def squared_norms(self) -> Tensor:
        """Of each replicate's gradient, ``[r]``."""
        squared = self._squared_norms()
        for r, gradient in self._again(squared):
            squared[r] = gradient.square().sum()
        return squared

    def _squared_norms(self) -> Tensor:
        """From the inner products of the rows."""
        if self.rows == 1:
            return self.inputs.square().flatten(1).sum(1) * self.cotangents.square().flatten(1).sum(1)
        flat, each = self.flat(), max(1, PRODUCTS // self.rows**2)
        parts = [flat[start : start + each] for start in range(0, len(self), each)]
        return torch.cat([(p.inputs @ p.inputs.mT * (p.cotangents @ p.cotangents.mT)).sum((1, 2)) for p in parts])

    def _again(self, squared: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The gradients of those replicates whose rows cancel, so that inner products of rows have lost digits."""
        if self.rows > 1:
            own = (self.inputs.square().sum(-1) * self.cotangents.square().sum(-1)).flatten(1).sum(1)
            for r in (squared < CANCELLED * own).nonzero().flatten().tolist():
                yield r, self[r : r + 1].dense()[0]


@dataclass(frozen=True)
class Beside:
    """Gradients ``[r, *n, columns]`` of small parameters side by side: only those of the replicates that are asked for are made."""

    parts: Sequence[Tensor | Outer]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, replicates: slice | Tensor) -> Tensor:
        return torch.cat([columns_of(part[replicates]) for part in self.parts], 1)


def columns_of(gradients: Tensor | Outer) -> Tensor:
    """Gradients ``[r, *n, columns]`` as ``[r, P]``, the coordinates of each column together."""
    dense = gradients.dense() if isinstance(gradients, Outer) else gradients
    return dense if dense.dim() == 2 else dense.movedim(-1, 1).flatten(1)


def pairs_of(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The unordered pairs of rows, each row with itself included."""
    n, m = torch.triu_indices(rows, rows, device=device)
    return n, m


def twice(n: Tensor, m: Tensor) -> Tensor:
    """How often an unordered pair of rows occurs in a square: once for (n, n), else twice, ``[pairs, 1]``."""
    return 2.0 - (n == m).float().unsqueeze(-1)

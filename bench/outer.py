"""Gradients of a linear layer's weight for many replicates, kept as the factors of their outer products.

Replicate r's gradient is ``D_r^T A_r``, from the layer's inputs A and the gradients D of its outputs. Sums over replicates,
projections, norms and second moments all come from the factors; the ``[replicates, out, in]`` array is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CANCELLED = 1e-2  # a second moment smaller than this part of the terms it is made of has lost digits
TILE = 2**18  # elements of a temporary that still fits a cache


@dataclass(frozen=True)
class Outer:
    """Gradients ``sum_n cotangents[r, n] (outer) inputs[r, n]`` of replicates r; shapes ``[r, n, in]``, ``[r, n, out]``.

    Inputs ``[1, n, in]`` are the same for all replicates, as a guide's are, which sees the data and no noise.
    """

    inputs: Tensor
    cotangents: Tensor

    def __len__(self) -> int:
        return len(self.cotangents)

    def __getitem__(self, replicates: slice) -> Outer:
        return Outer(self.inputs if self.shared else self.inputs[replicates], self.cotangents[replicates])

    def __add__(self, other: Outer) -> Outer:
        """The sum of two calls' gradients: their rows side by side."""
        rows = [g.inputs.expand(len(self), -1, -1) for g in (self, other)]
        return Outer(torch.cat(rows, 1), torch.cat([self.cotangents, other.cotangents], 1))

    @property
    def shared(self) -> bool:
        """Whether all replicates have the same inputs."""
        return len(self.inputs) == 1

    def dense(self) -> Tensor:
        """The gradients themselves, ``[r, out, in]``."""
        return self.cotangents.mT @ self.inputs

    def mean(self) -> Tensor:
        """Over replicates, ``[out, in]``: one matrix product."""
        if self.shared:
            return self.cotangents.mean(0).T @ self.inputs[0]
        return self.cotangents.flatten(0, 1).T @ self.inputs.flatten(0, 1) / len(self)

    def projections(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products with a direction ``[out, in]`` and squared norms, each ``[r]``."""
        rows, (wide, tall) = self.inputs.shape[1], (self.inputs.shape[-1], self.cotangents.shape[-1])
        if rows * (wide + tall) <= wide * tall:
            along = (self.inputs @ direction.T * self.cotangents).sum((1, 2))
            return along, (self.inputs @ self.inputs.mT * (self.cotangents @ self.cotangents.mT)).sum((1, 2))
        flat, pairs = direction.flatten(), []
        for A, D in zip(self.inputs.expand(len(self), -1, -1), self.cotangents, strict=True):
            gradient = (D.T @ A).flatten()
            pairs.append(torch.stack([gradient @ flat, gradient @ gradient]))
        along, squared = torch.stack(pairs, 1)
        return along, squared

    def deviations(self, pilot: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over replicates of deviations from `pilot` and of their squares, ``[out, in]`` each."""
        rows, wide = self.inputs.shape[1:]
        if self.shared and rows * (wide + len(self)) < wide * len(self):
            return self._by_quadratic_forms(pilot)
        if rows == 1 and not self.shared:
            return self._by_squares(pilot)
        return self._one_by_one(pilot)

    def _one_by_one(self, pilot: Tensor) -> tuple[Tensor, Tensor]:
        first, second, deviation = torch.zeros_like(pilot), torch.zeros_like(pilot), torch.empty_like(pilot)
        for A, D in zip(self.inputs.expand(len(self), -1, -1), self.cotangents, strict=True):
            torch.addmm(pilot, D.T, A, beta=-1, out=deviation)
            first.add_(deviation)
            second.addcmul_(deviation, deviation)
        return first, second

    def _by_squares(self, pilot: Tensor) -> tuple[Tensor, Tensor]:
        """One row per replicate: squares of outer products are outer products of squares, so one product makes all.

        The pilot's part is then subtracted; where that cancels, the output unit is made again from its deviations.
        """
        A, D = self.inputs.flatten(0, 1), self.cotangents.flatten(0, 1)
        total, raw = D.T @ A, D.square().T @ A.square()
        first = total - len(self) * pilot
        second = raw - pilot * (total + first)
        self._mend(second, raw, pilot)
        return first, second

    def _by_quadratic_forms(self, pilot: Tensor) -> tuple[Tensor, Tensor]:
        """The same inputs for all replicates: ``sum_r (D_r^T A)^2`` needs only, per unit, ``sum_r D_r D_r^T``, n x n."""
        A, mean = self.inputs[0], self.cotangents.mean(0)  # [n, in], [n, out]
        centred = (self.cotangents - mean).permute(2, 1, 0)  # [out, n, r]
        forms = centred @ centred.mT  # [out, n, n]
        tile = max(1, TILE // A.numel())  # units at a time: all at once would hold [out, n, in]
        spread = torch.cat([(part @ A * A).sum(1) for part in forms.split(tile)])
        terms = forms.diagonal(dim1=1, dim2=2) @ A.square()
        off = mean.T @ A - pilot
        first, second = len(self) * off, spread + len(self) * off.square()
        self._mend(second, terms + len(self) * off.square(), pilot)
        return first, second

    def _mend(self, second: Tensor, terms: Tensor, pilot: Tensor) -> None:
        """Make those output units again, one replicate after the other, whose second moments have cancelled."""
        lost = (second < CANCELLED * terms).any(1).nonzero().flatten()
        if len(lost):
            second[lost] = Outer(self.inputs, self.cotangents[..., lost])._one_by_one(pilot[lost])[1]

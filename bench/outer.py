"""Gradients of a linear layer's weight for many replicates, kept as the factors of their outer products.

Replicate r's gradient is ``D_r^T A_r``, from the layer's inputs A and the gradients D of its outputs. A sum over replicates, a
projection, a norm and a second moment all come from the factors; the ``[replicates, out, in]`` array is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CANCELLED = 1e-2  # a second moment about the pilot smaller than this part of the raw one has lost digits


@dataclass(frozen=True)
class Outer:
    """Gradients ``sum_n cotangents[r, n] (outer) inputs[r, n]`` of replicates r; shapes ``[r, n, in]``, ``[r, n, out]``."""

    inputs: Tensor
    cotangents: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __add__(self, other: Outer) -> Outer:
        """The sum of two calls' gradients: their rows side by side."""
        return Outer(
            torch.cat([self.inputs, other.inputs], 1),
            torch.cat([self.cotangents, other.cotangents], 1),
        )

    def __getitem__(self, replicates: slice) -> Outer:
        return Outer(self.inputs[replicates], self.cotangents[replicates])

    def dense(self) -> Tensor:
        """The gradients themselves, ``[r, out, in]``."""
        return torch.bmm(self.cotangents.mT, self.inputs)

    def sum(self) -> Tensor:
        """Over replicates, ``[out, in]``: one matrix product."""
        return self.cotangents.flatten(0, 1).T @ self.inputs.flatten(0, 1)

    def projections(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products with a direction ``[out, in]`` and squared norms, each ``[r]``."""
        rows, (wide, tall) = self.inputs.shape[1], (self.inputs.shape[-1], self.cotangents.shape[-1])
        if rows * (wide + tall) <= wide * tall:
            along = torch.einsum("rno,rno->r", self.inputs @ direction.T, self.cotangents)
            grams = torch.bmm(self.inputs, self.inputs.mT), torch.bmm(self.cotangents, self.cotangents.mT)
            return along, torch.einsum("rnm,rnm->r", *grams)
        flat, pairs = direction.flatten(), []
        for A, D in zip(self.inputs, self.cotangents, strict=True):
            gradient = (D.T @ A).flatten()
            pairs.append(torch.stack([gradient @ flat, gradient @ gradient]))
        return tuple(torch.stack(pairs, 1))  # type: ignore[return-value]

    def deviations(self, pilot: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over replicates of deviations from `pilot` and of their squares, ``[out, in]`` each."""
        if self.inputs.shape[1] == 1:
            total = self.sum()
            return total - len(self) * pilot, self._second_of_single_rows(pilot, total)
        first, second, deviation = torch.zeros_like(pilot), torch.zeros_like(pilot), torch.empty_like(pilot)
        for A, D in zip(self.inputs, self.cotangents, strict=True):
            torch.addmm(pilot, D.T, A, beta=-1, out=deviation)
            first.add_(deviation)
            second.addcmul_(deviation, deviation)
        return first, second

    def _second_of_single_rows(self, pilot: Tensor, total: Tensor) -> Tensor:
        """One row per replicate: the squares of outer products are outer products of squares, so one product makes all.

        The pilot's part is then subtracted, and output units in which that has cancelled are made again the long way.
        """
        A, D = self.inputs.flatten(0, 1), self.cotangents.flatten(0, 1)
        raw = D.square().T @ A.square()
        second = raw - pilot * (2 * total - len(self) * pilot)
        lost = (second < CANCELLED * raw).any(1).nonzero().flatten()
        if len(lost):
            deviations = D[:, lost, None] * A[:, None, :] - pilot[lost]  # [r, lost, in]
            second[lost] = deviations.square_().sum(0)
        return second

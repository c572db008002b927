"""A data set in memory, and the Bernoulli draws that turn grey levels into bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradiometer.bench.data.entry import Binarization

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as rows of pixels, split three ways.

    Attributes:
        name: the data set that was loaded; for ``omniglot`` the one that was at hand, so that no table mixes the two.
        train, valid, test: ``[N, D]`` float32 in [0, 1]: grey levels, or bits where `binarization` is ``"static"``.
        shape: rows and columns of an image; ``D`` is their product, in row-major order.
        binarization: what `batch` returns. ``"dynamic"``: a fresh Bernoulli draw per visit; ``"static"``: always the
            same bits; ``"none"``: grey levels.
        checksum: sha256 over everything that decides the numbers: name, binarization, preparation, source files.
        summary: what the images are, in words.
    """

    name: str
    train: Tensor = field(repr=False)
    valid: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    shape: tuple[int, int]
    binarization: Binarization
    checksum: str
    summary: str = ""

    def batch(self, indices: Tensor, generator: torch.Generator, split: Split = "train") -> Tensor:
        """The images ``[B, D]`` at `indices` ``[B]`` of a split, binarised; the same bits for the same generator state.

        The generator is read where the binarization is dynamic, and left as it is otherwise.

        Example:
            >>> from gradiometer.bench.data import load
            >>> x = load("digits").batch(torch.arange(20), torch.Generator().manual_seed(0))
            >>> x.shape, x.unique().tolist()
            (torch.Size([20, 64]), [0.0, 1.0])
        """
        x = {"train": self.train, "valid": self.valid, "test": self.test}[split][indices]
        return binarize(x, generator) if self.binarization == "dynamic" else x

    def __str__(self) -> str:
        sizes = " / ".join(f"{len(split):,}" for split in (self.train, self.valid, self.test))
        side, other = self.shape
        return f"{self.name} ({sizes} images of {side}x{other}, binarization {self.binarization}): {self.summary}"


def binarize(x: Tensor, generator: torch.Generator) -> Tensor:
    """One Bernoulli draw per pixel: 0 or 1 in the shape, dtype and device of `x`, 1 with probability `x`.

    The draws are made on the generator's device and in float32, so that every device and dtype of `x` sees the same.

    Raises:
        ValueError: a value of `x` is not in [0, 1] (255 grey levels not yet divided, for instance).

    Example:
        >>> binarize(torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0))
        tensor([0., 1.])
    """
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("binarize wants probabilities: a pixel is not in [0, 1]")
    uniform = torch.rand(x.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return (uniform.to(x.device) < x).to(x.dtype)  # uniform is in [0, 1): 0 stays 0 and 1 stays 1

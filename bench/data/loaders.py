"""From verified files to `Dataset`."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

from gradiometer.bench.data.dataset import Dataset
from gradiometer.bench.data.entry import Binarization
from gradiometer.bench.data.files import Holding, locate, read
from gradiometer.bench.data.readers import READERS, fixed_bits
from gradiometer.bench.data.registry import candidates, nearest
from gradiometer.bench.errors import RequestError


def load(name: str, binarization: str | None = None) -> Dataset:
    """Load a data set, from `GRADIOMETER_DATA`, from the cache, or by downloading it; every file is verified.

    Args:
        name: one of `NAMES`. ``omniglot`` is Burda's 28x28 version where it is at hand, else the area average of the
            original drawings where they are, else Burda's by download; the result's name says which.
        binarization: ``"dynamic"``, ``"static"`` (one Bernoulli draw, always the same) or ``"none"``; None for the data
            set's own, which is static for ``binarized-mnist`` and dynamic for all others.

    Raises:
        RequestError: a name is unknown; a file is neither at hand nor to be had; or a file is not what it must be.

    Example:
        >>> digits = load("digits")
        >>> digits.train.shape, digits.shape, digits.binarization
        (torch.Size([1297, 64]), (8, 8), 'dynamic')
    """
    modes = candidates(name)[0].modes
    mode = modes[0] if binarization is None else binarization
    if mode not in modes:
        known = nearest(mode, modes) if len(modes) > 1 else f"; it is {modes[0]} already"
        raise RequestError(f"data set {name} has no binarization {mode!r}{known}")
    return _load(locate(name), mode)


@lru_cache(maxsize=2)  # the MNISTs take 220 MB each
def _load(holding: Holding, binarization: Binarization) -> Dataset:
    entry, source = holding.entry, holding.source
    splits = READERS[source.reader]([read(located) for located in holding.files])
    if binarization == "static" and entry.modes != ("static",):
        splits = fixed_bits(splits)
    train, valid, test = (torch.from_numpy(pixels) for pixels in splits)
    parts = (entry.name, binarization, str(entry.preparation), *source.identity)
    return Dataset(
        entry.name,
        train,
        valid,
        test,
        shape=entry.shape,
        binarization=binarization,
        checksum=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        summary=entry.summary,
    )

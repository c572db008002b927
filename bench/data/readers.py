"""From the bytes of verified files to pixels: one reader per kind of source, each ``(train, valid, test)``."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gradiometer.bench.errors import RequestError

Bytes = NDArray[np.uint8]
Pixels = NDArray[np.float32]  # [N, D] in [0, 1]
Splits = tuple[Pixels, Pixels, Pixels]
Reader = Callable[[Sequence[bytes]], Splits]


def read_digits(contents: Sequence[bytes]) -> Splits:
    """scikit-learn's digits; they come in order of writer, so they are shuffled before they are split."""
    (table,) = contents
    rows = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)[:, :-1]  # the last column is the label
    x = _pixels(rows[_shuffled(len(rows))], 16)
    return x[:1297], x[1297:1547], x[1547:]


def read_idx(contents: Sequence[bytes]) -> Splits:
    """MNIST and what has its format: the last 10,000 training images validate, as usual for VAEs."""
    train, test = (_pixels(parse_idx(gzip.decompress(content)), 255) for content in contents)
    return train[:-10_000], train[-10_000:], test


def read_packed(contents: Sequence[bytes]) -> Splits:
    """Eight pixels to a byte, the first in the highest bit."""
    (content,) = contents
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        train, valid, test = (_pixels(np.unpackbits(arrays[split], axis=1)) for split in ("train", "valid", "test"))
    return train, valid, test


def read_amat(contents: Sequence[bytes]) -> Splits:
    """Text: a row per image, ``0`` or ``1`` per pixel, one space between."""
    train, valid, test = (_pixels(np.frombuffer(text, np.uint8)[0::2].reshape(-1, 784) - 48) for text in contents)
    return train, valid, test


def read_chardata(contents: Sequence[bytes]) -> Splits:
    """Burda's Omniglot: a column per image, its pixels column by column; 1,345 training images validate."""
    from scipy.io import loadmat

    (content,) = contents
    arrays = loadmat(io.BytesIO(content), variable_names=["data", "testdata"])
    train, test = (_pixels(arrays[key].T.reshape(-1, 28, 28).transpose(0, 2, 1)) for key in ("data", "testdata"))
    return *_hold_out(train), test


def read_drawings(contents: Sequence[bytes]) -> Splits:
    """Area averages of the original drawings: drawers 16 to 20 of each character test, 1,345 of the others validate."""
    parts = []
    for content in contents:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts.append(area_average(~arrays["images"]))  # True is paper
    x = np.concatenate(parts)  # [characters, drawers, 28, 28]
    return *_hold_out(_pixels(x[:, :15].reshape(-1, 784), 255)), _pixels(x[:, 15:].reshape(-1, 784), 255)


def parse_idx(content: bytes) -> Bytes:
    """The array of an IDX file: two zero bytes, type code 8 (bytes), the number of axes, the axes, the data."""
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise RequestError(f"not an IDX file of unsigned bytes: it begins with {content[:4].hex(' ') or 'nothing'}")
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    if len(content) - start != math.prod(shape):
        raise RequestError(
            f"an IDX file of shape {shape} should hold {math.prod(shape):,} bytes, not {len(content) - start:,}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def area_average(ink: NDArray[np.bool_]) -> Bytes:
    """Shrink drawings ``[..., 105, 105]`` to ``[..., 28, 28]`` grey levels: 255 times the share of ink, rounded."""
    weights = np.zeros((28, 105), np.float32)
    for q in range(420):  # 420 = 28 * 15 = 105 * 4: the finest grid that both fit
        weights[q // 15, q // 4] += 1
    flat = ink.reshape(-1, 105, 105)
    grey = np.empty((len(flat), 28, 28), np.uint8)
    for start in range(0, len(flat), 1000):  # in pieces: all drawings are 1.4 GB as floats
        # Floats for the speed of BLAS; exact, since every sum is a whole number of at most 225.
        sums = weights @ flat[start : start + 1000].astype(np.float32) @ weights.T
        grey[start : start + 1000] = (sums.astype(np.int32) * 255 + 112) // 225
    return grey.reshape(*ink.shape[:-2], 28, 28)


def fixed_bits(splits: Splits) -> Splits:
    """One Bernoulli draw per pixel, the same ones for ever."""
    draws = _frozen()

    def bits(x: Pixels) -> Pixels:
        # Row by row: the same stream as at once, without a second copy in double precision.
        return np.stack([draws.random_sample(row.shape) < row for row in x]).astype(np.float32)

    train, valid, test = splits
    return bits(train), bits(valid), bits(test)


def _frozen() -> np.random.RandomState:
    # RandomState, because NumPy promises its stream never to change; default_rng's may, and torch's may.
    return np.random.RandomState(0)


def _shuffled(count: int) -> NDArray[np.int64]:
    return _frozen().permutation(count)


def _hold_out(train: Pixels) -> tuple[Pixels, Pixels]:
    """The last 1,345 of the shuffled training images validate, as papers on Omniglot usually do."""
    order = _shuffled(len(train))
    return train[order[:-1345]], train[order[-1345:]]


def _pixels(images: NDArray[np.generic], levels: int = 1) -> Pixels:
    pixels = images.reshape(len(images), -1).astype(np.float32)
    pixels /= levels
    return pixels


READERS: dict[str, Reader] = {
    "digits": read_digits,
    "idx": read_idx,
    "packed": read_packed,
    "amat": read_amat,
    "chardata": read_chardata,
    "drawings": read_drawings,
}

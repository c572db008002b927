"""Many replicates of a gradient: which engine makes them, and in which chunks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradiometer.bench.batched import NotRows, factors, rows
from gradiometer.bench.gradients import Draw, one
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import BLOCK, Rng

CHUNK = 2**12  # rows of a batch; a row of the MNIST-sized VAE holds some 20 KiB of activations
LOOP_FROM = 800  # rows per replicate (B x K) from which a plain loop is as fast as batching replicates


def chunk_size(rows_each: int) -> int:
    """Replicates per batch: about `CHUNK` rows, so that memory does not grow with B, K or the number of replicates."""
    return max(min(CHUNK // rows_each, 1024) // BLOCK, 1) * BLOCK


def choose(estimator: Estimator, model: Any, x: Tensor, state: State, parameters: Any, seed: int) -> str:
    """The engine for a cell; "rows" only after its first replicate has been seen to equal the slow twin's."""
    if not estimator.facts.replicates_as_rows or estimator.facts.couples_data or len(x) * estimator.K >= LOOP_FROM:
        return "loop"
    try:
        batched = rows(estimator, model, x, Rng(seed, range(2), "measure", x.device), state, parameters)
    except NotRows as error:
        warnings.warn(f"{estimator} is measured one replicate at a time: {error}", stacklevel=2)
        return "loop"
    single = one(estimator, model, x, Rng(seed, 1, "measure", x.device), state, parameters)
    tolerance = math.sqrt(torch.finfo(x.dtype).eps)
    for name, gradient in single.gradients.items():
        off = (batched.gradients[name][1] - gradient).abs().max()
        if not off <= tolerance * max(1e-6, float(gradient.abs().max())) * 10:
            warnings.warn(
                f"{estimator} is measured one replicate at a time: batched, its gradient of {name!r} differs by {float(off):.2g}",
                stacklevel=2,
            )
            return "loop"
    return "rows"


def draws(
    engine: str,
    estimator: Estimator,
    model: Any,
    x: Tensor,
    seed: int,
    state: State,
    parameters: Any,
    wanted: range,
    size: int,
) -> Iterator[tuple[range, Draw]]:
    """The draws of the `wanted` replicates in order, `size` at a time, or one at a time by the loop."""
    if engine == "rows":
        for start in range(wanted.start, wanted.stop, size):
            replicates = range(start, min(start + size, wanted.stop))
            rng = Rng(seed, replicates, "measure", x.device)
            yield replicates, factors(estimator, model, x, rng, state, parameters)
        return
    held: dict[int, tuple[int, Tensor]] = {}
    for replicate in wanted:
        rng = Rng(seed, replicate, "measure", x.device, held=held)
        draw = one(estimator, model, x, rng, state, parameters)
        log_w = None if draw.log_w is None else draw.log_w.unsqueeze(1)  # [K, 1, B]
        yield range(replicate, replicate + 1), Draw({n: g.unsqueeze(0) for n, g in draw.gradients.items()}, log_w)


def active_units(model: Any, x: Tensor) -> int:
    """Latents whose posterior mean has a variance over the data `x` above 0.01 (Burda et al. 2016)."""
    like = next(model.parameters())
    with torch.no_grad():
        guide = model.guide(x.to(like))
        try:
            means = guide.mean
        except NotImplementedError:
            means = Rng(0, 0, "units", like.device, block=1).sample(guide, 64).mean(0)
    return int((means.var(0) > 0.01).sum())

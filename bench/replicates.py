"""Many replicates of a gradient: which engine makes them, in which chunks, and the scalars each one leaves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradiometer.bench.batched import NotRows, factors, rows
from gradiometer.bench.gradients import Draw, one
from gradiometer.bench.outer import Outer
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import BLOCK, Rng
from gradiometer.estimators.weights import effective_sample_size, log_mean_exp

LOOP_FROM = 800  # rows per replicate (B x K) from which a plain loop is as fast as batching replicates


class Failure(RuntimeError):
    """A measurement that cannot give a number; the message is one sentence."""


def chunk_size(parameters: int, rows_each: int) -> int:
    """Replicates per batch, so that neither their gradients (64 MiB) nor their activations grow with the problem."""
    fit = min(2**24 // parameters, 2**15 // rows_each, 1024)
    return max(fit // BLOCK, 1) * BLOCK


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
    shard: range,
    size: int,
) -> Iterator[Draw]:
    if engine == "rows":
        for start in range(shard.start, shard.stop, size):
            replicates = range(start, min(start + size, shard.stop))
            yield factors(estimator, model, x, Rng(seed, replicates, "measure", x.device), state, parameters)
        return
    held: dict[int, tuple[int, Tensor]] = {}
    for replicate in shard:
        draw = one(estimator, model, x, Rng(seed, replicate, "measure", x.device, held=held), state, parameters)
        log_w = None if draw.log_w is None else draw.log_w.unsqueeze(1)  # [K, 1, B]
        yield Draw({name: g.unsqueeze(0) for name, g in draw.gradients.items()}, log_w)


def per_replicate(estimator: Estimator, log_w: Tensor | None) -> dict[str, Tensor]:
    """Per replicate, means over the minibatch, ``[r]``, from ``log_w [K, r, B]``."""
    if log_w is None:
        return {}
    values = {
        "objective": estimator.objective(log_w),
        "elbo": log_w.mean(0),
        "iwelbo": log_mean_exp(log_w),
        "ess": effective_sample_size(log_w),
    }
    return {name: value.mean(-1) for name, value in values.items()}


def projected(
    draw: Draw, groups: Mapping[str, tuple[str, ...]], directions: Mapping[str, Mapping[str, Tensor]], first: int
) -> dict[str, Tensor]:
    """Inner products with the groups' directions, and squared norms, of the `first` replicates of a draw, ``[r]`` each."""
    found = {}
    for group, members in groups.items():
        pairs = [_projection(draw.gradients[name][:first], directions[group][name]) for name in members]
        found[f"along {group}"] = torch.stack([along for along, _ in pairs]).sum(0)
        found[f"squared {group}"] = torch.stack([squared for _, squared in pairs]).sum(0)
    return found


def _projection(gradients: Tensor | Outer, direction: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(gradients, Outer):
        along, squared = gradients.projections(direction.to(gradients.inputs.dtype))
        return along.double(), squared.double()
    flat = gradients.flatten(1)
    return (flat @ direction.flatten().to(flat.dtype)).double(), flat.square().sum(1).double()


def active_units(model: Any, x: Tensor) -> int:
    """Latents whose posterior mean has a variance over the data `x` above 0.01 (Burda et al. 2016)."""
    with torch.no_grad():
        guide = model.guide(x.to(next(model.parameters())))
        try:
            means = guide.mean
        except NotImplementedError:
            means = Rng(0, 0, "units", block=1).sample(guide, 64).mean(0)
    return int((means.var(0) > 0.01).sum())

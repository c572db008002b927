"""What a measurement is timed against: a plain pass, the loop a careful user writes, and BackPACK (Dangel et al. 2020).

All of them work on the K-sample bound. Handed the `noise` of a measurement, the loop and BackPACK give its moments.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from gradiometer.bench import Measurement, Problem
from gradiometer.bench.models.vae import PRESETS, VAE
from gradiometer.bench.training import finish
from gradiometer.estimators import Estimator, Rng, parse

FLOOR_ROWS = {"cpu": 8000}  # rows of a batch of the floor
GPU_FLOOR_ROWS = 2**17
SHORTEST = 0.25  # seconds that are timed at a time
TWELVE = (
    "sgvb-a", "stl", "reinforce", "rloo", "iwae", "dreg",
    "rws", "rws-dreg", "vimco", "vr:alpha=0.5", "ciwae:beta=0.5", "tvo",
)  # fmt: skip
HAS_BACKPACK = find_spec("backpack") is not None
Moments = tuple[list[Tensor], list[Tensor]]
"""Sums over replicates of each parameter's gradient, and of its square."""


def problem(preset: str, batch: int, device: str = "cpu") -> Problem:
    """A fresh VAE and a minibatch of coin flips, the same in every process and on every device."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VAE(PRESETS[preset])
    x = torch.bernoulli(torch.full((batch, model.architecture.data), 0.3))
    return Problem(model.to(device), x.to(device))


def named(word: str, K: int) -> Estimator:
    """An estimator with so many particles."""
    return parse(f"{word}{',' if ':' in word else ':'}K={K}")


def medians(methods: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each method; before the rounds, one call of each is not timed, since oneDNN compiles for new shapes."""
    for method in methods.values():
        method()
    taken = [{name: seconds(method, device) for name, method in methods.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in taken) for name in methods}


def seconds(method: Callable[[], object], device: str = "cpu") -> float:
    """CPU seconds of one call, or on another device the time until it is done; a short one is called again, for the mean."""

    def now() -> float:
        finish(torch.device(device))
        return time.process_time() if device == "cpu" else time.perf_counter()

    began, calls = now(), 0
    while not calls or now() - began < SHORTEST:
        method()
        calls += 1
    return (now() - began) / calls


def log_weights(model: VAE, x: Tensor, particles: tuple[int, ...], noise: Tensor | None = None) -> Tensor:
    """``log p(x, z) - log q(z|x)`` ``[*particles, B]`` of pathwise draws, as a user writes it."""
    q = model.guide(x)
    z = q.rsample(torch.Size(particles)) if noise is None else q.mean + q.stddev * noise
    return model.log_joint(x, z) - q.log_prob(z)


def floor(of: Problem, K: int, replicates: int) -> None:
    """Forward and backward of all rows, in big batches; no moments."""
    each = max(1, FLOOR_ROWS.get(of.x.device.type, GPU_FLOOR_ROWS) // (len(of.x) * K))
    for start in range(0, replicates, each):
        many = of.x.repeat(min(each, replicates - start), 1)
        torch.autograd.grad(log_weights(of.model, many, (K,)).logsumexp(0).mean(), list(of.model.parameters()))


def loop(of: Problem, K: int, replicates: int, noise: Tensor | None = None) -> Moments:
    """One replicate at a time; noise is ``[R, K, B, D]``."""
    parameters = list(of.model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for r in range(replicates):
        log_w = log_weights(of.model, of.x, (K,), None if noise is None else noise[r])
        gradients = torch.autograd.grad(log_w.logsumexp(0).mean(), parameters)
        torch._foreach_add_(first, gradients)
        torch._foreach_addcmul_(second, gradients, gradients)
    return first, second


def extended(of: Problem) -> Problem:
    """A copy whose networks BackPACK follows."""
    model = copy.deepcopy(of.model)
    for network in (model.encoder.net, model.decoder):
        import_module("backpack").extend(network)
    return Problem(model, of.x)


def by_backpack(of: Problem, replicates: int, each: int, noise: Tensor | None = None) -> Moments:
    """Of `extended` networks, B = K = 1: `each` replicates at a time are rows of a batch; noise is ``[R, 1, 1, D]``.

    The first moments gather in the parameters' own gradients.
    """
    follow, squares = import_module("backpack").backpack, import_module("backpack.extensions").SumGradSquared()
    parameters: list[Any] = list(of.model.parameters())
    second = [torch.zeros_like(p) for p in parameters]
    of.model.zero_grad()
    for start in range(0, replicates, each):
        rows = of.x.expand(min(each, replicates - start), -1)
        drawn = None if noise is None else noise[start : start + each, 0, 0]
        with follow(squares), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook")  # that the data have no gradient is as it should be
            log_weights(of.model, rows, (), drawn).sum().backward()
        torch._foreach_add_(second, [p.sum_grad_squared for p in parameters])
    return [p.grad for p in parameters], second


def noise_of_measure(of: Problem, K: int, replicates: int) -> Tensor:
    """The noise that a measurement with seed 0 sees, ``[R, K, B, D]``."""
    device = of.x.device
    zeros = torch.zeros(replicates, len(of.x), sum(of.model.units), device=device)
    q = Independent(Normal(zeros, torch.ones_like(zeros)), 1)
    return Rng(0, range(replicates), device=device).sample(q, K).movedim(1, 0)


def disagreement(measured: Measurement, moments: Moments) -> float:
    """The largest difference of moments from those of a measurement with the same noise, relative to each parameter's largest."""
    found, n = [], measured.replicates
    for (name, _), first, second in zip(measured.problem.model.named_parameters(), *moments, strict=True):
        mean, variance = torch.as_tensor(measured.mean[name]), torch.as_tensor(measured.variance[name])
        for sums, ours in ((first, n * mean), (second, (n - 1) * variance + n * mean**2)):
            found.append(float((sums.cpu() - ours).abs().max() / ours.abs().max()))
    return max(found)

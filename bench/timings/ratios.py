"""How far a measurement is from the floor: `python bench/timings/ratios.py [ESTIMATOR] [ROUNDS]` prints one table.

Every method is timed in the same process, interleaved, in CPU seconds on one thread; medians over rounds. The *floor* is a plain
forward and backward pass of the same rows in big batches; the *loop* is what a careful user writes: one replicate at a time,
`autograd.grad` and `_foreach` accumulation of sums and squares. A measurement is timed whole: set-up, chunks, projections, moments.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradiometer.bench import Problem, measure
from gradiometer.bench.machine import describe
from gradiometer.bench.models.vae import PRESETS, VAE
from gradiometer.estimators import parse

CASES = ((1, 1, 1000), (1, 8, 1000), (20, 1, 1000), (20, 8, 1000), (100, 1, 100), (20, 64, 1000))
FLOOR_ROWS = 8000  # rows of a batch of the floor


def bound(model: VAE, x: Tensor, K: int) -> Tensor:
    """The K-sample bound as a user writes it, for the floor and the loop."""
    q = model.guide(x)
    z = q.rsample(torch.Size([K]))
    return (model.log_joint(x, z) - q.log_prob(z)).logsumexp(0).mean()


def floor(model: VAE, x: Tensor, K: int, replicates: int) -> None:
    """Forward and backward of all rows, in big batches."""
    each = max(1, FLOOR_ROWS // (len(x) * K))
    for start in range(0, replicates, each):
        many = x.repeat(min(each, replicates - start), 1)
        torch.autograd.grad(bound(model, many, K), list(model.parameters()))


def loop(model: VAE, x: Tensor, K: int, replicates: int) -> None:
    """One replicate at a time."""
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for _ in range(replicates):
        gradients = torch.autograd.grad(bound(model, x, K), parameters)
        torch._foreach_add_(first, gradients)
        torch._foreach_addcmul_(second, gradients, gradients)


def seconds(method: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    method()
    return time.process_time() - began


def main(word: str = "iwae", rounds: int = 5) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VAE(PRESETS["burda-1"])
    about = describe()
    print(f"{about['date']}, {about['machine']}, torch {about['torch']}, one thread; {word}, medians of {rounds}")
    print(f"{'B':>4}{'K':>4}{'R':>6}{'floor s':>10}{'x floor':>10}{'x faster than the loop':>24}")
    for B, K, replicates in CASES:
        x = torch.bernoulli(torch.full((B, 784), 0.3))
        problem, estimator = Problem(model, x), parse(f"{word}:K={K}")
        methods: dict[str, Callable[[], object]] = {
            "floor": partial(floor, model, x, K, replicates),
            "loop": partial(loop, model, x, K, replicates),
            "ours": partial(measure, problem, estimator, replicates=replicates),
        }
        taken = [{name: seconds(method) for name, method in methods.items()} for _ in range(rounds)]
        of = {name: statistics.median(one[name] for one in taken) for name in methods}
        faster, slower = of["loop"] / of["ours"], of["ours"] / of["floor"]
        print(f"{B:>4}{K:>4}{replicates:>6}{of['floor']:>10.3f}{slower:>10.2f}{faster:>24.2f}", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else "iwae", int(given[1]) if len(given) > 1 else 5)

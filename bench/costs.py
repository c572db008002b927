"""What one gradient costs as a training step takes it, with what control variates learn by: seconds, memory, evaluations."""

from __future__ import annotations

import copy
import statistics
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gradiometer.bench.arguments import estimators_for, must_make_sense
from gradiometer.bench.gradients import Counted, trainable
from gradiometer.bench.problems import Problem
from gradiometer.bench.statistics import Value, exact, normal
from gradiometer.bench.training import ascent, finish, initial_state
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.noise import Rng

ROUNDS = 16  # timed blocks
OUTER = 3  # of them on either side lie outside of the interval of the median


def cost(
    problem: Problem,
    estimator: Estimator | str,
    *,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 1,
    seconds: float = 0.5,
) -> dict[str, Value]:
    """Seconds, memory and evaluations of one gradient, and the throughputs that follow.

    Args:
        seconds: time to spend timing, after a warm-up.

    Raises:
        ValueError: the problem lacks what the estimator needs.
    """
    (estimator,) = estimators_for(problem, [estimator])
    must_make_sense(device=device, seed=seed, threads=threads)
    model, x = copy.deepcopy(problem.model).to(device), problem.x.to(device)
    state = initial_state(estimator, model, x, seed)
    parameters = trainable(model, state)
    counted = Counted(model)
    ascent(estimator, counted, x, Rng(seed, 0, "cost", device, block=1), state, parameters)
    evaluations = counted.evaluations / len(x)

    def step() -> None:
        ascent(estimator, model, x, Rng(seed, 0, "cost", device, block=1), state, parameters)

    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    # The timer waits for the current graphics processor.
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        times = _seconds(step, threads, seconds)
    per_gradient = _median(times)
    return {
        "evaluations": exact(evaluations),
        "seconds_per_gradient": per_gradient,
        "peak_memory": exact(peak_memory(step, x) / 2**20),
        "gradients_per_second": _median([1 / t for t in times]),
        "particles_per_second": _median([evaluations * len(x) / t for t in times]),
        "flops_per_second": _median([operations / t for t in times]),
    }


def _seconds(step: Any, threads: int, budget: float) -> list[float]:
    """Seconds per call in each of `ROUNDS` blocks; the timer synchronises a GPU and pins the threads."""
    from torch.utils.benchmark import Timer  # says on import that there is no GPU, where there is a compiler for one

    timer = Timer("step()", globals={"step": step}, num_threads=threads)
    once = max(timer.timeit(3).mean, 1e-6)  # a warm-up, too
    number = max(1, round(budget / ROUNDS / once))
    return [timer.timeit(number).mean for _ in range(ROUNDS)]


def _median(values: list[float]) -> Value:
    """The median, between the order statistics that hold it at 97.9 % for `ROUNDS` independent blocks, whatever they are like.

    They are nearly independent: a machine that is busy with something else for seconds moves all of them, which no interval holds.
    """
    ordered = sorted(values)
    low, high = ordered[OUTER], ordered[-1 - OUTER]
    return Value(statistics.median(values), (high - low) / (2 * normal()), low, high)


def peak_memory(step: Any, x: Tensor) -> int:
    """Most bytes held at once by tensors that `step` allocates."""
    if x.device.type == "cuda":
        finish(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        step()
        finish(x.device)
        return torch.cuda.max_memory_allocated(x.device) - before
    with _Held() as held:
        step()
    return held.peak


class _Held(TorchDispatchMode):
    """Follows the bytes of the storages that operations create, until they are freed.

    The profiler would tell the same, but it writes to standard error at every use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(a.untyped_storage()) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and id(storage) not in given:
                    self._known.add(storage)
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return made

    def _free(self, size: int) -> None:
        self.held -= size

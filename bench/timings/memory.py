"""Peak memory of one measurement, in a process of its own.

Standard input has a pickled problem, estimator, number of replicates and device; standard output gets the MiB above what was held
before, as tensors count it and, on the processor, as the operating system does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from gradiometer.bench import Problem, measure
from gradiometer.bench.costs import peak_memory
from gradiometer.estimators import Estimator

MIB = 2**20


def peaks(problem: Problem, estimator: Estimator, replicates: int, device: str) -> dict[str, float | None]:
    """By tensors, and by the process; the latter first, since following tensors takes memory of its own."""
    measure(problem, estimator, replicates=16, device=device)  # code is loaded and compiled, and nothing much is kept
    gc.collect()
    step = partial(measure, problem, estimator, replicates=replicates, device=device)
    process = process_peak(step) / MIB if device == "cpu" else None
    return {"tensors MiB": peak_memory(step, problem.x.to(device)) / MIB, "process MiB": process}


def process_peak(step: Callable[[], object]) -> int:
    """Bytes that the process holds at most, above what it held before."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes resident now (VmRSS), or the most so far (VmHWM); where Linux does not tell, the most so far.

    Linux also has `ru_maxrss`, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peaks(*pickle.load(sys.stdin.buffer))))

"""Peak memory of one measurement, in a process of its own: a pickled problem, estimator and number of replicates on standard
input, MiB above what the process held before on standard output, as tensors count it and as the operating system does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import resource
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from gradiometer.bench import Problem, measure
from gradiometer.bench.costs import peak_memory
from gradiometer.estimators import Estimator

MIB = 2**20


def peaks(problem: Problem, estimator: Estimator, replicates: int) -> dict[str, float]:
    """By tensors, and by the process; the latter first, since following tensors takes memory of its own."""
    measure(problem, estimator, replicates=16)  # code is loaded and compiled, and nothing much is kept
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    measure(problem, estimator, replicates=replicates)
    process = resident("VmHWM") - before
    step = partial(measure, problem, estimator, replicates=replicates)
    return {"tensors MiB": peak_memory(step, problem.x) / MIB, "process MiB": process / MIB}


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

"""What is asked for in Python, refused in one sentence where it makes no sense, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

import torch

from gradiometer.bench import metrics
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.bench.replicates import Engine
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.registry import nearest, parse

LEAST = {"replicates": 4, "minibatches": 4, "budget": 4, "memory": 1, "chunk": 1, "settle": 0, "threads": 1}
DTYPES = (torch.float32, torch.float64)


def estimators_for(problem: Any, words: Sequence[Estimator | str]) -> list[Estimator]:
    """The estimators that are asked for, built.

    Raises:
        ValueError: an unknown one, or one that the problem lacks something for.
    """
    if not isinstance(problem, Problem):
        meant = f": named_problem({problem!r}) makes one" if isinstance(problem, str) else ""
        raise ValueError(f"a problem is a Problem(model, x), not of type {type(problem).__name__}{meant}")
    if isinstance(words, str):
        raise ValueError(f"estimators are a list, [{words!r}], not one word")
    found = [parse(word) for word in words]
    for estimator in found:
        if (reason := reason_to_skip(problem, estimator)) is not None:
            raise ValueError(reason)
    return found


def must_make_sense(
    *,
    engine: Engine = "auto",
    only: Sequence[str] = (),
    precision: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **whole: Any,
) -> None:
    """Whether every argument by itself, and the engine with the metrics that are wanted, can be meant so.

    Args:
        whole: numbers that are at least as in `LEAST`, or None.

    Raises:
        ValueError: one cannot.
    """
    for name, value in whole.items():
        if value is not None and (not isinstance(value, Integral) or value < LEAST.get(name, value)):
            least = f" of at least {LEAST[name]}" if name in LEAST else ""
            raise ValueError(f"{name} should be a whole number{least}, not {value!r}")
    if precision is not None and not (isinstance(precision, Real) and 0 < float(precision) < 1):
        raise ValueError(f"a precision is a part of the value, between 0 and 1 (0.05 for 5 %), not {precision!r}")
    if not has(device):
        raise ValueError(f"this machine has no device {str(device)!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype should be torch.float32 or torch.float64, not {dtype!r}")
    if engine not in (known := list(get_args(Engine))):
        raise ValueError(f"unknown engine {engine!r}{nearest(str(engine), known)}")
    if isinstance(only, str):
        raise ValueError(f"metrics are a list, [{only!r}], not one word")
    if unknown := [name for name in only if name not in metrics.METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r}{nearest(unknown[0], list(metrics.METRICS))}")
    if engine == "ghost" and (lacking := [name for name in only if name in metrics.OF_COORDINATES]):
        raise ValueError(f"squared norms do not tell {lacking[0]}: ask for another engine than ghost")


def has(device: str | torch.device) -> bool:
    """Whether this machine has a device that holds numbers (`meta` can be named, and holds none)."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        return False
    return True

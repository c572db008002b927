"""Why the replicates of an estimator cannot be rows of a batch, as far as one replicate shows that is watched and compared.

A comparison alone may miss a branch that is rarely taken, or a use of a weight that is small in one gradient and not in the mean.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradiometer.bench.batched import Batch, dense, together
from gradiometer.bench.gradients import surrogates
from gradiometer.bench.subject import Subject, batch_of
from gradiometer.bench.tape import NotRows, Pass
from gradiometer.estimators.noise import graphics_processors

TAKING = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.numpy}


def objection(batch: Batch, made: Pass, position: int, subjects: Sequence[Subject], seed: int) -> str | None:
    """Why an estimator's replicates cannot be rows: by what is seen while one is made, and by the slow twin's gradient of it."""
    return _seen(batch, subjects[position], seed) or _difference(made, position, subjects, seed)


def _seen(batch: Batch, subject: Subject, seed: int) -> str | None:
    """What a comparison of gradients may miss, since it is rare, or small in one gradient and not in the mean of many."""
    rng, gpus = subject.rng(seed, 1), graphics_processors()
    constants = [*subject.model.parameters(), *subject.model.buffers()]
    try:
        with (
            batch.network.aside() as parameters,
            Values(constants) as values,
            torch.random.fork_rng(gpus, device_type="cuda"),
        ):
            before = _generators(gpus)
            made = list(surrogates(subject.estimator, subject.model, subject.x, rng, subject.state))
            after = _generators(gpus)
    except Exception as error:  # a stranger's code may not bear to be watched
        subject.one(subject.rng(seed, 1))  # raises, if it is wrong by itself
        return f"watched as it is made, there is a {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not all(map(torch.equal, before, after)):
        return "it draws noise of its own, from torch's global generator, so that the same seed does not give the same numbers"
    if values.taken:
        return (
            f"it takes the value of a tensor in Python ({values.taken}), and so may go another way in every replicate"
        )
    terms = [term.sum() for surrogate in made for term in surrogate.terms.values() if term.requires_grad]
    if not (terms and parameters):
        return None
    slopes: Sequence[Any] = torch.autograd.grad(terms, list(parameters.values()), allow_unused=True)
    used = [name for name, slope in zip(parameters, slopes, strict=True) if slope is not None]
    return f"parameter {used[0]!r} is used outside of its layer's calls" if used else None


def _generators(gpus: Sequence[int]) -> list[Tensor]:
    """States of torch's global ones."""
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]


class Values(TorchFunctionMode):
    """While open, sees where a tensor's value is taken into Python, but that of a parameter or a buffer.

    Torch's own code may look (to validate arguments, say), and ours.
    """

    def __init__(self, constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.constants, self.taken = {id(constant) for constant in constants}, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TAKING and id(args[0]) not in self.constants:
            by = sys._getframe(1)
            if not str(by.f_globals.get("__name__")).startswith(("torch.", "gradiometer.")):
                self.taken = self.taken or f"{Path(by.f_code.co_filename).name}, line {by.f_lineno}"
        return func(*args, **(kwargs or {}))


def _difference(made: Pass, position: int, subjects: Sequence[Subject], seed: int) -> str | None:
    """What tells the second replicate of a pass from the slow twin's, or None."""
    found = _apart(made, position, subjects[position], seed)
    if found is None or subjects[position].x.dtype == torch.float64:
        return found
    try:  # rounding is told from a mistake in double precision
        precise = [subject.double() for subject in subjects]
        batch = batch_of(precise, by_columns=together([subject.estimator for subject in subjects]))
        return _apart(batch.draw(precise[0].rng(seed, range(2))), position, precise[position], seed)
    except (NotRows, RuntimeError):  # a model that is of single precision by its code
        return found


def _apart(made: Pass, position: int, subject: Subject, seed: int) -> str | None:
    """The first parameter in whose gradient the two differ, in a sentence."""
    single = subject.one(subject.rng(seed, 1)).gradients
    batched = dense(made, position, subject.parameters, slice(1, 2)).gradients
    least = 1e-6 * max((_largest(gradient.nan_to_num(0, 0, 0)) for gradient in single.values()), default=0)
    for name, gradient in single.items():
        off, scale = batched[name][0] - gradient, gradient
        if not math.isfinite(_largest(off)):  # numbers that are none in both are the same
            same = (batched[name][0] == gradient) | (batched[name][0].isnan() & gradient.isnan())
            off, scale = off.masked_fill(same, 0), gradient.nan_to_num(0, 0, 0)
        if not _largest(off) <= 10 * math.sqrt(torch.finfo(gradient.dtype).eps) * max(least, _largest(scale)):
            return f"batched, its gradient of {name!r} differs by {_largest(off):.2g}"
    return None


def _largest(values: Tensor) -> float:
    """The largest absolute value, or nan if one is."""
    return float(torch.maximum(values.amax(), -values.amin()))

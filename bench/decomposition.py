"""The law of total variance: how much of a training step's noise is the estimator's, and how much the minibatch's.

Over draws of both, ``Var g = E_minibatch Var[g | minibatch] + Var_minibatch E[g | minibatch]``. A one-way analysis of variance
tells them apart: the variance between the mean gradients of minibatches holds the second part and 1 / R of the first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiometer.bench.accumulators import Accumulator, Piece
from gradiometer.bench.arguments import estimators_for, must_make_sense
from gradiometer.bench.errors import RequestError
from gradiometer.bench.folding import Failure, accumulators
from gradiometer.bench.gradients import Counted, trainable
from gradiometer.bench.measured import columns_of, columns_of_group, row_of
from gradiometer.bench.measurement import Ways
from gradiometer.bench.moments import Array
from gradiometer.bench.oneway import OneWay, parts_of
from gradiometer.bench.problems import Problem
from gradiometer.bench.products import full_precision
from gradiometer.bench.replicates import MEMORY, Engine, Limits, Plan, draws
from gradiometer.bench.statistics import Value
from gradiometer.bench.subject import Subject
from gradiometer.bench.tape import NotRows, Part
from gradiometer.bench.training import SETTLE, evaluations_of_learning, settled
from gradiometer.estimators.base import Estimator

FIRST = 8  # replicates that an accumulator is chosen by


@dataclass(frozen=True)
class Decomposition:
    """The variance of an estimator's gradient over its own noise and over minibatches, by parts.

    Attributes:
        minibatches, replicates: how many there were, and of each minibatch.
        traces: by parameter, as `OneWay` leaves them.
        groups: the parameters of each group.
        evaluations: of the joint, per data point and gradient, with those that control variates learn by.
        settled: steps that its memory was given, if it has one.
        engine, chunk, note: how it was computed, and what went otherwise than planned.
    """

    problem: Problem
    estimator: Estimator
    minibatches: int
    replicates: int
    seed: int
    traces: Mapping[str, Array]
    groups: Mapping[str, tuple[str, ...]]
    evaluations: float
    settled: int
    engine: str
    chunk: int
    note: str = ""

    def variances(self, name: str) -> dict[str, Value]:
        """The parts of a group's variance, or of a parameter's: "estimator", "minibatch" and "both".

        Raises:
            KeyError: the estimator has neither on this problem.
        """
        if name not in self.groups and name not in self.traces:
            raise KeyError(f"no group and no parameter {name!r}; groups are {', '.join(self.groups)}")
        members = self.groups.get(name, (name,))
        return parts_of(np.sum([self.traces[member] for member in members], axis=0), self.replicates)

    def rows(self, tensors: bool = False) -> list[dict[str, Any]]:
        """Tidy rows, one per group and part, and with `tensors` one per parameter and part, too."""
        about = columns_of(self) | {"minibatches": self.minibatches}
        found = []
        for group, members in self.groups.items():
            of_group = about | columns_of_group(self.estimator, group)
            found += [of_group | row_of("variance", v) | {"randomness": p} for p, v in self.variances(group).items()]
            for tensor in members if tensors else ():
                of_tensor = of_group | {"tensor": tensor, "space": "tensor"}
                parts = parts_of(self.traces[tensor], self.replicates)
                found += [of_tensor | row_of("variance", v) | {"randomness": p} for p, v in parts.items()]
        return found


def minibatch(problem: Problem, seed: int, number: int, stream: str = "minibatch") -> Tensor:
    """A minibatch of a problem by its number; no other decides what it holds.

    Raises:
        ValueError: the problem has no other minibatches, or one of another shape.
    """
    if problem.minibatch is None:
        raise RequestError(f"{problem.name} has no minibatches but its own, so no part of the variance is theirs")
    key = blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)  # torch wants an int64
    x = problem.minibatch(generator)
    if x.shape != problem.x.shape:
        raise ValueError(f"a minibatch has shape {tuple(x.shape)}, not that of the problem's, {tuple(problem.x.shape)}")
    return x


def minibatches_of(problem: Problem, minibatches: int, seed: int) -> Iterator[Tensor]:
    """The minibatches of a decomposition; more of them begin with the same ones."""
    return (minibatch(problem, seed, number) for number in range(minibatches))


def decompose(
    problem: Problem,
    estimators: Sequence[Estimator | str],
    *,
    minibatches: int,
    replicates: int = 64,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory: int = MEMORY,
    chunk: int | None = None,
    settle: int = SETTLE,
) -> list[Decomposition]:
    """Tell the estimator's noise from the minibatch's; all estimators see the same minibatches, and on each the same noise.

    What an estimator remembers is settled over minibatches, as in training, and frozen.

    Args:
        problem: one that can draw minibatches; its own is not measured.
        estimators: as in `measure_all`.
        minibatches: at least 4. The minibatch's part is as precise as these are many.
        replicates: of each minibatch, at least 4, with noise of their own.
        seed: of the minibatches and of the noise.
        engine, device, dtype, memory, chunk, settle: as in `measure_all`.

    Raises:
        ValueError: the problem has no minibatches or lacks what an estimator needs, or there are too few.
        Failure: a gradient is not finite.

    Example:
        >>> from gradiometer.bench import named_problem
        >>> toy = named_problem("gaussian-toy:units=2", 5)
        >>> (found,) = decompose(toy, ["sgvb-b"], minibatches=16, replicates=8)
        >>> parts = found.variances("generative")
        >>> parts["minibatch"].value / parts["both"].value > 0.999  # the divergence in closed form has no other noise
        True
    """
    chosen = estimators_for(problem, estimators)
    must_make_sense(
        engine=engine,
        device=device,
        dtype=dtype,
        minibatches=minibatches,
        replicates=replicates,
        seed=seed,
        memory=memory,
        chunk=chunk,
        settle=settle,
    )
    model, x = copy.deepcopy(problem.model).to(device, dtype), problem.x.to(device, dtype)
    counted = Counted(model)
    with full_precision():
        subjects = []
        for estimator in chosen:
            state = settled(
                estimator, model, x, seed, lambda step: minibatch(problem, seed, step, "settle").to(x), settle
            )
            subjects.append(Subject(estimator, counted, x, state, trainable(model, state)))
        asked = _Asked(problem, minibatches, replicates, seed)
        return Ways(engine, seed, Limits(memory, chunk)).carry_out(asked.of, subjects, traces=True)


@dataclass(frozen=True)
class _Asked:
    """What every pass is asked for."""

    problem: Problem
    minibatches: int
    replicates: int
    seed: int

    def of(self, plan: Plan) -> list[Decomposition]:
        """Decompose the variances of the estimators of a plan together."""
        like = plan.subjects[0].x
        sizes = [{n: p.numel() for of in s.parameters.values() for n, p in of.items()} for s in plan.subjects]
        analyses = [{name: OneWay(self.minibatches, size) for name, size in of.items()} for of in sizes]
        counted = plan.subjects[0].model
        before = counted.evaluations
        for number, x in enumerate(minibatches_of(self.problem, self.minibatches, self.seed)):
            replicates = range(number * self.replicates, (number + 1) * self.replicates)
            made = _Minibatch(plan.on(x.to(like)), self.seed, replicates)
            for position, of in enumerate(analyses):
                for name, analysis in of.items():
                    analysis.add(number, *made.moments(position, name, sizes[position][name]))
        gradients = self.minibatches * self.replicates * len(like)
        of_estimate = (counted.evaluations - before) / gradients
        return [
            Decomposition(
                self.problem,
                subject.estimator,
                self.minibatches,
                self.replicates,
                self.seed,
                {name: analysis.traces() for name, analysis in of.items()},
                {group: tuple(members) for group, members in subject.parameters.items()},
                of_estimate + evaluations_of_learning(subject.estimator, subject.model, subject.x, subject.state),
                subject.state.steps,
                plan.engine,
                plan.chunk,
                plan.note,
            )
            for subject, of in zip(plan.subjects, analyses, strict=True)
        ]


class _Minibatch:
    """The replicates of one minibatch, folded: neither shards nor projections are kept of them."""

    def __init__(self, plan: Plan, seed: int, replicates: range) -> None:
        self.number = replicates.start // len(replicates)
        self._sums: dict[str, Accumulator] = {}
        self._parts: list[dict[str, Part]] = []
        self._made: dict[tuple[str, int, torch.Size], tuple[Array, float]] = {}  # estimators may share columns
        middle = replicates.start + len(replicates) // 2  # two halves, since moments are also made without each
        for at, made in draws(plan, seed, replicates):
            if not self._sums:
                self._parts = made.parts
                self._sums = accumulators(made, FIRST, 2, traces=plan.engine == "ghost")
            if made.parts != self._parts:
                raise NotRows("what its gradients are made of changes between replicates")
            cut = min(max(0, middle - at.start), len(at))
            halves = Piece(0, slice(0, cut)), Piece(1, slice(cut, len(at)))
            for name, block in made.blocks.items():
                self._sums[name].fold(block, [piece for piece in halves if len(piece)])
            del made, block  # or they would stay until the next are made

    def moments(self, estimator: int, name: str, size: int) -> tuple[Array, float]:
        """A parameter's mean gradient ``[P]``, and the trace of its covariance."""
        part = self._parts[estimator].get(name)
        if part is None:  # always zero
            return np.zeros(size), 0.0
        if (key := (part.block, part.columns.start, part.shape)) not in self._made:
            found = self._sums[part.block].moments(part.columns, part.shape)
            if not np.isfinite(found.sums.variance):
                raise Failure(f"the gradient of {name!r} is not finite on minibatch {self.number}")
            self._made[key] = found.pooled.mean.reshape(-1), found.sums.variance
        return self._made[key]

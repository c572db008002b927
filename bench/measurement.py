"""Measuring estimators on a problem: which replicates are made, folded, and how many."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradiometer.bench import metrics
from gradiometer.bench.accumulators import Cancelled
from gradiometer.bench.folding import Failure, Folding
from gradiometer.bench.gradients import Counted, trainable
from gradiometer.bench.measured import Measurement, of_moments
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.bench.products import full_precision
from gradiometer.bench.replicates import MEMORY, Engine, Plan, Subject, active_units, draws, looped, plans
from gradiometer.bench.tape import NotRows
from gradiometer.bench.training import settled
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.noise import BLOCK
from gradiometer.estimators.registry import nearest


def measure(
    problem: Problem,
    estimator: Estimator,
    *,
    replicates: int = 1024,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: Estimator | None = None,
    only: Sequence[str] = (),
    precision: float | None = None,
    budget: int | None = None,
    memory: int = MEMORY,
    chunk: int | None = None,
) -> Measurement:
    """Measure the gradient `estimator` gives on `problem`; arguments and errors are those of `measure_all`.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> from gradiometer.estimators import parse
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> sorted(measure(toy, parse("iwae:K=4"), replicates=64).groups)
        ['generative', 'inference']
    """
    (found,) = measure_all(
        problem,
        [estimator],
        replicates=replicates,
        seed=seed,
        engine=engine,
        device=device,
        dtype=dtype,
        reference=reference,
        only=only,
        precision=precision,
        budget=budget,
        memory=memory,
        chunk=chunk,
    )
    return found


def measure_all(
    problem: Problem,
    estimators: Sequence[Estimator],
    *,
    replicates: int = 1024,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: Estimator | None = None,
    only: Sequence[str] = (),
    precision: float | None = None,
    budget: int | None = None,
    memory: int = MEMORY,
    chunk: int | None = None,
) -> list[Measurement]:
    """Measure the gradients of `estimators`, those given by weights of equally many particles in one pass over the same particles.

    The numbers do not depend on which estimators are measured together, but for rounding.

    Args:
        problem: a model held still; it is copied, not changed.
        estimators: as `gradiometer.estimators.parse` returns them.
        replicates: independent gradients, at least 4.
        seed: of the noise; the same seed gives the same noise to every estimator.
        engine: "rows" batches replicates, "ghost" too and keeps squared norms alone, "loop" takes one at a time, "auto" chooses.
        device, dtype: where and how precisely the gradients are computed and added up; results are float64.
        reference: the estimator whose mean gradient is the direction of `cosine` and `directional_snr`; each one's own if None.
        only: the metrics that are wanted; all if none is named. Without those of single coordinates "auto" takes "ghost", where
            that is faster: from 2 to 32 rows in a replicate.
        precision: go on until every interval of a variance is at most this wide on either side, relative to the variance.
        budget: the most replicates that a precision may take; 100 times `replicates` if None.
        memory: bytes to take beside the model and the data, from which the replicates in a batch follow.
        chunk: replicates in a batch; from B, K, the device and `memory` if None.

    Raises:
        ValueError: the problem lacks what an estimator needs, or there are too few replicates.
        Failure: a gradient is not finite, of whichever estimator: measure the others apart from it.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> from gradiometer.estimators import parse
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> found = measure_all(toy, [parse("iwae:K=4"), parse("dreg:K=4")], replicates=64)
        >>> [str(m.estimator) for m in found]
        ['iwae:K=4', 'dreg:K=4']
    """
    for estimator in estimators:
        if (reason := reason_to_skip(problem, estimator)) is not None:
            raise ValueError(reason)
    _must_make_sense(engine, only, precision)
    model, x = copy.deepcopy(problem.model).to(device, dtype), problem.x.to(device, dtype)
    units = None if problem.held_out is None else active_units(model, problem.held_out)
    counted = Counted(model)
    with full_precision():
        means = None
        if reference is not None:  # measured on noise of its own
            trusted = measure(
                problem,
                reference,
                replicates=replicates,
                seed=seed + 1,
                device=device,
                dtype=dtype,
                memory=memory,
                chunk=chunk,
            )
            means = {name: torch.as_tensor(mean, device=device) for name, mean in trusted.mean.items()}
        subjects = []
        for estimator in estimators:
            state = settled(estimator, model, x, seed)
            subjects.append(Subject(estimator, counted, x, state, trainable(model, state)))
        asked = _Asked(problem, replicates, seed, means, precision, budget or 100 * replicates, units)
        found: dict[int, Measurement] = {}
        waiting = plans(subjects, engine, seed, memory, chunk)
        if engine == "auto" and only and not set(only) & set(metrics.OF_COORDINATES):
            waiting = [replace(p, engine="ghost") if p.gains_from_traces else p for p in waiting]
        while waiting:
            plan = waiting.pop(0)
            try:
                made = asked.of(plan)
            except (Cancelled, NotRows, torch.OutOfMemoryError) as error:
                waiting = [*_another_way(plan, error, engine), *waiting]
            else:
                found |= {id(subject): m for subject, m in zip(plan.subjects, made, strict=True)}
    return [found[id(subject)] for subject in subjects]


def _must_make_sense(engine: Engine, only: Sequence[str], precision: float | None) -> None:
    if unknown := [name for name in only if name not in metrics.METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r}{nearest(unknown[0], list(metrics.METRICS))}")
    if engine == "ghost" and (lacking := [name for name in only if name in metrics.OF_COORDINATES]):
        raise ValueError(f"squared norms do not tell {lacking[0]}: ask for another engine than ghost")
    if precision is not None and not 0 < precision < 1:
        raise ValueError(f"a precision is a part of the value, between 0 and 1, not {precision:g}")


def _another_way(plan: Plan, error: Exception, engine: Engine) -> list[Plan]:
    """Plans in the place of one that could not be carried out.

    Raises:
        Failure: there is no other way, or none that was asked for.
    """
    if isinstance(error, torch.OutOfMemoryError):
        if plan.chunk > 1:
            return [plan.halved()]
        raise Failure("memory ran out with one replicate in a batch") from error
    if len(plan.subjects) > 1 and isinstance(error, NotRows):
        return plan.apart()
    if engine != "auto":
        raise Failure(f"{error}: measure with another --engine") from error
    return [replace(plan, engine="rows")] if isinstance(error, Cancelled) else [looped(plan.subjects[0], str(error))]


@dataclass(frozen=True)
class _Asked:
    """What every pass is asked for."""

    problem: Problem
    replicates: int
    seed: int
    means: Mapping[str, Tensor] | None
    precision: float | None
    budget: int
    units: int | None

    def of(self, plan: Plan) -> list[Measurement]:
        """Measure the estimators of a plan together."""
        parameters = [s.parameters for s in plan.subjects]
        estimators, traces = [s.estimator for s in plan.subjects], plan.engine == "ghost"
        folding = Folding(estimators, parameters, self.replicates, traces=traces, means=self.means)
        counted = plan.subjects[0].model
        before = counted.evaluations
        self._fold(plan, folding, range(self.replicates))
        found: dict[int, Measurement] = {}
        while True:
            more = self._further(folding)
            for position, subject in enumerate(plan.subjects):
                if position not in found and ((met := self._precise(folding, position)) or not more):
                    evaluations = (counted.evaluations - before) / (folding.replicates * len(self.problem.x))
                    found[position] = Measurement(
                        self.problem,
                        subject.estimator,
                        folding.replicates,
                        self.seed,
                        folding.moments(position),
                        {group: tuple(members) for group, members in subject.parameters.items()},
                        folding.projections(position),
                        folding.samples(position),
                        evaluations,
                        self.units,
                        plan.engine,
                        plan.chunk,
                        plan.note,
                        met if self.precision else None,
                    )
            if len(found) == len(plan.subjects):
                return [found[position] for position in range(len(found))]
            self._fold(plan, folding, folding.extend(more))

    def _fold(self, plan: Plan, folding: Folding, replicates: range) -> None:
        for at, made in draws(plan, self.seed, replicates):
            folding.add(made, at)

    def _precise(self, folding: Folding, position: int) -> bool:
        """Whether the variances of an estimator are as precise as asked, in every group."""
        if self.precision is None:
            return True
        moments = folding.moments(position)
        for members in folding.parameters[position].values():
            value = of_moments("variance", [moments[name] for name in members])
            if value.value > 0 and not value.high - value.value <= self.precision * value.value:  # the wider side
                return False
        return True

    def _further(self, folding: Folding) -> int:
        """How many replicates more before the next look: a fixed schedule, so that no look depends on what was seen."""
        unit = folding.number * (BLOCK if self.replicates >= 2 * BLOCK * folding.number else 1)
        left = max(0, self.budget - folding.replicates) // unit
        return min(left, math.ceil(folding.replicates / 4 / unit)) * unit


__all__ = ["Engine", "Measurement", "measure", "measure_all"]

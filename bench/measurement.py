"""Measuring estimators on a problem: which replicates are made, folded, and how many."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradiometer.bench import bias, metrics
from gradiometer.bench.accumulators import Cancelled
from gradiometer.bench.arguments import estimators_for, must_make_sense
from gradiometer.bench.folding import Failure, Folding
from gradiometer.bench.gradients import Counted, trainable
from gradiometer.bench.measured import Compared, Measurement, of_moments
from gradiometer.bench.problems import Problem, active_units
from gradiometer.bench.products import full_precision
from gradiometer.bench.replicates import MEMORY, Engine, Limits, Plan, draws, looped, plans
from gradiometer.bench.subject import Subject
from gradiometer.bench.tape import NotRows
from gradiometer.bench.training import SETTLE, evaluations_of_learning, settled
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import BLOCK
from gradiometer.estimators.registry import parse

T = TypeVar("T")
AIM = 0.6  # of the replicates that seem to be needed, before a look at whether they are


def measure(
    problem: Problem,
    estimator: Estimator | str,
    *,
    replicates: int = 1024,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: Estimator | str | None = None,
    only: Sequence[str] = (),
    precision: float | None = None,
    budget: int | None = None,
    memory: int = MEMORY,
    chunk: int | None = None,
    settle: int = SETTLE,
) -> Measurement:
    """Measure the gradient `estimator` gives on `problem`; arguments and errors are those of `measure_all`.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> sorted(measure(toy, "iwae:K=4", replicates=64).groups)
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
        settle=settle,
    )
    return found


def measure_all(
    problem: Problem,
    estimators: Sequence[Estimator | str],
    *,
    replicates: int = 1024,
    seed: int = 0,
    engine: Engine = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: Estimator | str | None = None,
    only: Sequence[str] = (),
    precision: float | None = None,
    budget: int | None = None,
    memory: int = MEMORY,
    chunk: int | None = None,
    settle: int = SETTLE,
) -> list[Measurement]:
    """Measure the gradients of `estimators`, those given by weights of equally many particles in one pass over the same particles.

    The numbers do not depend on which estimators are measured together, but for rounding.

    Args:
        problem: a model held still; it is copied, not changed.
        estimators: as `gradiometer.estimators.parse` returns them, or the words that it takes.
        replicates: independent gradients, at least 4.
        seed: of the noise; the same seed gives the same noise to every estimator.
        engine: "rows" batches replicates, "ghost" too and keeps squared norms alone, "loop" takes one at a time, "auto" chooses.
        device, dtype: where and how precisely the gradients are computed and added up; results are float64.
        reference: the estimator whose mean gradient is the direction of `cosine` and `directional_snr`, and which every estimator
            of the same objective is compared with. If None, directions are each one's own, and what is declared biased is
            compared with a trusted unbiased estimator of its objective, where there is one. A comparison is one pass more.
        only: the metrics that are wanted; all if none is named. Without those of single coordinates "auto" takes "ghost", where
            that is faster: from 2 to 32 rows in a replicate.
        precision: go on until every interval of a variance is at most this wide on either side, relative to the variance.
        budget: the most replicates that a precision may take; 100 times `replicates` if None.
        memory: bytes to take beside the model and the data, from which the replicates in a batch follow.
        chunk: replicates in a batch; from B, K, the device and `memory` if None.
        settle: steps in which averages, baselines, control variates and kernels are learned at the problem's parameters, from fresh
            ones, before they are frozen. The numbers are of that one memory.

    Raises:
        ValueError: the problem lacks what an estimator needs, or an argument makes no sense.
        Failure: a gradient is not finite, of whichever estimator: measure the others apart from it.

    Example:
        >>> from gradiometer.bench.models.toys import GaussianToy
        >>> toy = Problem(GaussianToy(units=2), torch.zeros(5, 2))
        >>> found = measure_all(toy, ["iwae:K=4", "dreg:K=4"], replicates=64)
        >>> [str(m.estimator) for m in found]
        ['iwae:K=4', 'dreg:K=4']
    """
    chosen, trusted = estimators_for(problem, estimators), None if reference is None else parse(reference)
    must_make_sense(
        engine=engine,
        only=only,
        precision=precision,
        device=device,
        dtype=dtype,
        replicates=replicates,
        seed=seed,
        budget=budget,
        memory=memory,
        chunk=chunk,
        settle=settle,
    )
    model, x = copy.deepcopy(problem.model).to(device, dtype), problem.x.to(device, dtype)
    units = None if problem.held_out is None else active_units(model, problem.held_out)
    counted = Counted(model)
    with full_precision():
        means = None
        if trusted is not None:  # measured on noise of its own
            options: dict[str, Any] = {
                "replicates": replicates,
                "device": device,
                "dtype": dtype,
                "memory": memory,
                "chunk": chunk,
                "settle": settle,
            }
            first = measure(problem, trusted, seed=seed + 1, only=["gradient_norm"], **options)
            means = {name: torch.as_tensor(mean, device=device) for name, mean in first.mean.items()}
        subjects = [_subject(estimator, counted, x, seed, settle) for estimator in chosen]
        ways = Ways(engine, seed, Limits(memory, chunk, finer=precision is not None))
        budget = budget or 100 * replicates
        asked = _Asked(problem, replicates, seed, means, precision, budget, units, settle, finer=precision is not None)
        traces = bool(only) and not set(only) & set(metrics.OF_COORDINATES)
        found = ways.carry_out(asked.of, subjects, traces)
        if bias.wanted(only):
            wanted = [bias.comparisons(problem, estimator, trusted) for estimator in chosen]
            found = _compared(asked, ways, subjects, found, wanted)
    return found


def _subject(estimator: Estimator, model: Counted, x: Tensor, seed: int, settle: int) -> Subject:
    state = settled(estimator, model._model, x, seed, steps=settle)
    return Subject(estimator, model, x, state, trainable(model._model, state))


def _compared(
    asked: _Asked,
    ways: Ways,
    subjects: Sequence[Subject],
    measured: Sequence[Measurement],
    wanted: Sequence[Sequence[bias.Comparison]],
) -> list[Measurement]:
    """The measurements with what their bias is told by, from a further pass over the same replicates."""
    known = {str(subject.estimator): subject for subject in subjects}
    found = list(measured)
    for replicates in sorted({m.replicates for m, of in zip(measured, wanted, strict=True) if of}):
        of = [(i, c) for i, m in enumerate(measured) if m.replicates == replicates for c in wanted[i]]
        extra: dict[str, Subject] = {}
        for i, c in of:
            model, x = subjects[i].model, subjects[i].x
            parameters = trainable(model._model, State())
            word = str(c.reference)
            if word not in known:
                known[word] = _subject(c.reference, model, x, asked.seed, asked.settle)
            trusted = known[word]
            extra[word] = replace(trusted, parameters=parameters)
            state = bias.joined(subjects[i].state, trusted.state)
            extra[str(c.difference)] = Subject(c.difference, model, x, state, parameters)
        # Nothing but squared norms is asked of them.
        again = replace(asked, means=None, precision=None, upto=replicates)
        made = dict(zip(extra, ways.carry_out(again.of, list(extra.values()), traces=True), strict=True))
        for i, c in of:
            new = Compared(c.reference, made[str(c.difference)].moments, made[str(c.reference)].moments)
            found[i] = replace(found[i], compared={**found[i].compared, **dict.fromkeys(c.groups, new)})
    return found


@dataclass(frozen=True)
class Ways:
    """How passes may be carried out."""

    engine: Engine
    seed: int
    limits: Limits

    def carry_out(self, run: Callable[[Plan], Sequence[T]], subjects: Sequence[Subject], traces: bool) -> list[T]:
        """What `run` makes of each subject, whatever becomes of the first plan.

        Args:
            run: carries out a plan, one result for each of its subjects.
            traces: squared norms are enough, and are taken where they are faster.

        Raises:
            Failure: there is no way, or none that was asked for.
        """
        found: dict[int, T] = {}
        waiting = plans(subjects, self.engine, self.seed, self.limits)
        if self.engine == "auto" and traces:
            waiting = [replace(p, engine="ghost") if p.gains_from_traces else p for p in waiting]
        while waiting:
            plan = waiting.pop(0)
            try:
                made = run(plan)
            except (Cancelled, NotRows, torch.OutOfMemoryError) as error:
                waiting = [*_another_way(plan, error, self.engine), *waiting]
            else:
                found |= {id(subject): of for subject, of in zip(plan.subjects, made, strict=True)}
        return [found[id(subject)] for subject in subjects]


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
    settle: int
    upto: int | None = None  # replicates, in the place of a precision
    finer: bool = False  # shards, whose errors are precise enough to stop by

    def of(self, plan: Plan) -> list[Measurement]:
        """Measure the estimators of a plan together."""
        parameters = [s.parameters for s in plan.subjects]
        estimators, traces = [s.estimator for s in plan.subjects], plan.engine == "ghost"
        folding = Folding(estimators, parameters, self.replicates, traces=traces, means=self.means, finer=self.finer)
        counted = plan.subjects[0].model
        before = counted.evaluations
        self._fold(plan, folding, range(self.replicates))
        found: dict[int, Measurement] = {}
        looks = dict.fromkeys(range(len(plan.subjects)), 0)  # at how many replicates each is looked at next
        while looks:
            spent = not self._step(folding)
            for position in [p for p, at in looks.items() if spent or folding.replicates >= at]:
                need = self._need(folding, position)
                looks[position] = math.ceil(AIM * need) if math.isfinite(need) else folding.replicates
                if (met := need <= folding.replicates) or spent:
                    del looks[position]
                    each = (counted.evaluations - before) / (folding.replicates * len(self.problem.x))
                    subject = plan.subjects[position]
                    each += evaluations_of_learning(subject.estimator, subject.model, subject.x, subject.state)
                    found[position] = self._measurement(plan, folding, position, each, met)
            if looks:
                self._go_on(plan, folding, min(looks.values()))
        return [found[position] for position in range(len(found))]

    def _measurement(self, plan: Plan, folding: Folding, position: int, evaluations: float, met: bool) -> Measurement:
        """Of an estimator of the plan, as folded so far."""
        subject = plan.subjects[position]
        return Measurement(
            self.problem,
            subject.estimator,
            folding.replicates,
            self.seed,
            folding.moments(position),
            {group: tuple(members) for group, members in subject.parameters.items()},
            folding.directions.projections(position),
            folding.samples(position),
            evaluations,
            self.units,
            plan.engine,
            plan.chunk,
            plan.note,
            met if self.precision else None,
            self.means is not None,
            folding.directions.turns(position),
            settled=subject.state.steps,
        )

    def _fold(self, plan: Plan, folding: Folding, replicates: range) -> None:
        for at, made in draws(plan, self.seed, replicates):
            folding.add(made, at)
            del made  # or it would stay until the next is made

    def _need(self, folding: Folding, position: int) -> float:
        """How many replicates the variances of an estimator take to be as precise as asked, in every group, by what is seen."""
        if self.upto is not None:
            return self.upto
        if self.precision is None:
            return 0
        moments, needs = folding.moments(position), [0.0]
        for members in folding.parameters[position].values():
            value = of_moments("variance", [moments[name] for name in members])
            if value.value > 0:
                width = math.log(value.high / value.value)  # to the wider side
                needs.append(folding.replicates * (width / math.log1p(self.precision)) ** 2)
        return max((math.inf if math.isnan(need) else need) for need in needs)

    def _go_on(self, plan: Plan, folding: Folding, wanted: float) -> None:
        """Take steps until there are as many replicates as wanted: one at least."""
        while step := self._step(folding):
            self._fold(plan, folding, folding.extend(step))
            if folding.replicates >= wanted:
                return

    def _step(self, folding: Folding) -> int:
        """How many replicates more: a fixed schedule, so that the shards of as many replicates are always the same."""
        unit = folding.number * (BLOCK if self.replicates >= 2 * BLOCK * folding.number else 1)
        left = max(0, self.budget - folding.replicates) // unit
        return min(left, math.ceil(folding.replicates / 8 / unit)) * unit


__all__ = ["Engine", "Measurement", "measure", "measure_all"]

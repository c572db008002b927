"""Many replicates of a gradient: which engine makes them, for which estimators together, and in which chunks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradiometer.bench.accumulators import SHARED_FEW
from gradiometer.bench.batched import Batch, together
from gradiometer.bench.gradients import coordinates
from gradiometer.bench.moments import number_of
from gradiometer.bench.objections import objection
from gradiometer.bench.outer import Outer
from gradiometer.bench.subject import Subject, batch_of
from gradiometer.bench.tape import NotRows, Part, Pass
from gradiometer.estimators.noise import BLOCK

Engine = Literal["auto", "rows", "ghost", "loop"]
# Bytes of a batch: more of them leave the processor's cache, fewer cost more in calls than in work.
CHUNK = {"cpu": 36 * 2**20}
GPU_CHUNK = 2**30  # enough to fill a graphics processor
MOST = 4096  # replicates in a batch, however small
MEMORY = 2 * 2**30  # bytes a measurement may take beside the model and the data, if nothing else is asked


@dataclass(frozen=True)
class Limits:
    """What passes may take.

    Attributes:
        memory: bytes beside the model and the data.
        chunk: replicates in a batch; from B, K, the device and the memory if None.
        finer: whether finer shards are kept.
    """

    memory: int = MEMORY
    chunk: int | None = None
    finer: bool = False


@dataclass(frozen=True)
class Plan:
    """How replicates are made: by an engine, for some estimators together, `chunk` at a time.

    Attributes:
        gains_from_traces: whether squared norms cost less than second moments.
    """

    engine: Engine
    subjects: tuple[Subject, ...]
    chunk: int
    batch: Batch | None = None
    gains_from_traces: bool = False
    note: str = ""

    def on(self, x: Tensor) -> Plan:
        """The same on another minibatch of the same shape."""
        subjects = tuple(replace(subject, x=x) for subject in self.subjects)
        return replace(self, subjects=subjects, batch=None if self.batch is None else self.batch.on(x))

    def halved(self) -> Plan:
        """The same with half as many replicates at a time, since memory ran out."""
        chunk = self.chunk // 2
        return replace(self, chunk=chunk, note=f"memory ran out with more than {chunk} replicates in a batch")

    def apart(self) -> list[Plan]:
        """Each estimator in a pass of its own."""
        found = []
        for subject in self.subjects:
            try:
                found.append(replace(self, subjects=(subject,), batch=batch_of([subject])))
            except NotRows as error:
                found.append(looped(subject, str(error)))
        return found


def plans(subjects: Sequence[Subject], engine: Engine, seed: int, limits: Limits) -> list[Plan]:
    """Passes that serve all estimators, those given by weights of as many particles together.

    Replicates are batched only after each estimator's were seen to equal the slow twin's; what cannot be batched is looped, with
    one warning that says why.

    Raises:
        NotRows: it cannot be batched, and another engine than "auto" was asked for.
    """
    found: list[Plan] = []
    waiting = list(subjects)
    while waiting:
        first = waiting[0]
        group = [s for s in waiting if together([first.estimator, s.estimator])] or waiting[:1]
        waiting = [s for s in waiting if s not in group]
        found += [looped(s) for s in group] if engine == "loop" else _agreed(group, engine, seed, limits)
    return found


def looped(subject: Subject, reason: str = "") -> Plan:
    """One replicate at a time, with a warning if there is a reason."""
    if reason:
        warnings.warn(f"{subject.estimator} is measured one replicate at a time: {reason}", stacklevel=6)
    return Plan("loop", (subject,), 1)


def _probed(subjects: Sequence[Subject], seed: int) -> tuple[Batch, Pass]:
    """A batch and its pass over two replicates; of a single estimator by its own terms, where it cannot be by columns.

    Raises:
        NotRows: whatever went wrong.
    """
    try:
        try:
            batch = batch_of(subjects)
            return batch, batch.draw(subjects[0].rng(seed, range(2)))
        except NotRows:
            if len(subjects) > 1 or not together([subjects[0].estimator]):
                raise
            batch = batch_of(subjects, by_columns=False)
            return batch, batch.draw(subjects[0].rng(seed, range(2)))
    except (NotRows, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a stranger's model may do anything when its rows are many
        if len(subjects) == 1:
            subjects[0].one(subjects[0].rng(seed, 1))  # raises, if it is none of ours
        said = (str(error).splitlines() or [""])[0]
        raise NotRows(f"in batches there is a {type(error).__name__}: {said}") from error


def _batched(subjects: Sequence[Subject], batch: Batch, made: Pass, engine: Engine, limits: Limits) -> list[Plan]:
    """One pass; or two, each with half of the estimators, where the moments of all would take most of the memory."""
    first, memory = subjects[0], limits.memory
    shards = number_of(MOST, max(coordinates(s.parameters) for s in subjects) if limits.finer else None)
    one = [block[:1] for block in made.blocks.values()]
    width = sum(math.prod(b.shape if isinstance(b, Outer) else b.shape[1:]) for b in one)
    held = 2 * shards * first.x.element_size() * width
    if held > memory / 2 and len(subjects) > 1:
        half = len(subjects) // 2
        found = []
        for part in (subjects[:half], subjects[half:]):
            batch = batch_of(part)
            found += _batched(part, batch, batch.draw(first.rng(0, range(2))), engine, limits)
        return found
    fitting, most = CHUNK.get(first.x.device.type, GPU_CHUNK), (memory - held) // len(subjects)
    chunk = limits.chunk or chunk_size(fitting / batch.bytes_each, most // batch.bytes_each)
    gains = any(isinstance(of, Outer) and 1 < of.rows <= SHARED_FEW for of in made.blocks.values())
    return [Plan(engine, tuple(subjects), chunk, batch, engine == "rows" and gains)]


def chunk_size(fitting: float, most: int) -> int:
    """Replicates per batch, about as many as are `fitting` and at most `most`.

    A multiple of `BLOCK` or, if fewer, a power of two, which divides it.
    """
    near = 2 ** round(math.log2(max(fitting, 1)))
    wanted = max(1, min(near if near <= BLOCK else int(fitting), most, MOST))
    return wanted // BLOCK * BLOCK if wanted >= BLOCK else 2 ** wanted.bit_length() // 2


def _agreed(group: Sequence[Subject], engine: Engine, seed: int, limits: Limits) -> list[Plan]:
    """Passes of those estimators whose replicates equal the slow twin's, and loops of the others."""
    chosen: Engine = "rows" if engine == "auto" else engine

    def alone(subject: Subject, reason: str) -> Plan:
        if engine != "auto":
            said = reason or "it says that its replicates are not rows"
            raise NotRows(f"{subject.estimator} cannot be measured in batches: {said}")
        return looped(subject, reason)

    candidates = [s for s in group if s.estimator.facts.in_batches]
    apart = [alone(s, "") for s in group if s not in candidates]
    rows: list[Subject] = []
    if candidates:
        try:
            batch, made = _probed(candidates, seed)
        except NotRows as error:
            if len(candidates) > 1:  # each may still be batched by itself
                return apart + [plan for s in candidates for plan in _agreed([s], engine, seed, limits)]
            candidates[0].one(candidates[0].rng(seed, 1))  # raises, if it is wrong by itself
            return [*apart, alone(candidates[0], str(error))]
        for position, subject in enumerate(candidates):
            if (said := objection(batch, made, position, candidates, seed)) is None:
                rows.append(subject)
            else:
                apart.append(alone(subject, said))
    if rows and len(rows) < len(candidates):
        batch, made = _probed(rows, seed)
    return (_batched(rows, batch, made, chosen, limits) if rows else []) + apart


def draws(plan: Plan, seed: int, wanted: range) -> Iterator[tuple[range, Pass]]:
    """Passes over the `wanted` replicates in order, a chunk at a time."""
    held: dict[int, tuple[int, Tensor]] = {}
    first = plan.subjects[0]
    for start in range(wanted.start, wanted.stop, plan.chunk):
        replicates = range(start, min(start + plan.chunk, wanted.stop))
        if plan.batch is not None:
            yield replicates, plan.batch.draw(first.rng(seed, replicates, held))
            continue
        draw = first.one(first.rng(seed, start, held))
        blocks = {name: g.reshape(1, -1) for name, g in draw.gradients.items()}
        parts = {name: Part(name, slice(0, g.numel()), g.shape) for name, g in draw.gradients.items()}
        yield replicates, Pass(blocks, [parts], None if draw.log_w is None else draw.log_w.unsqueeze(1))

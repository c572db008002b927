"""Many replicates of a gradient: which engine makes them, for which estimators together, and in which chunks."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradiometer.bench.accumulators import SHARED_FEW
from gradiometer.bench.batched import Batch, dense, together
from gradiometer.bench.gradients import Parameters, coordinates, estimated, one, surrogates, trainable
from gradiometer.bench.moments import number_of
from gradiometer.bench.outer import Outer
from gradiometer.bench.tape import NotRows, Part, Pass
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import BLOCK, Rng

Engine = Literal["auto", "rows", "ghost", "loop"]
# Bytes of a batch: more of them leave the processor's cache, fewer cost more in calls than in work.
CHUNK = {"cpu": 36 * 2**20}
GPU_CHUNK = 2**30  # enough to fill a graphics processor
MOST = 4096  # replicates in a batch, however small
TAKING = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.numpy}
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


@dataclass(frozen=True, eq=False)
class Subject:
    """An estimator on a model held still: its memory, and the parameters its gradients are taken by.

    Of the parameters given, those that the estimate is no gradient by are left out.
    """

    estimator: Estimator
    model: Any
    x: Tensor
    state: State
    parameters: Parameters

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", estimated(self.estimator, self.state, self.parameters))

    def double(self) -> Subject:
        """A copy in double precision."""
        model = copy.deepcopy(getattr(self.model, "_model", self.model)).double()
        state = copy.deepcopy(self.state)
        for module in state.learned.values():
            module.double()
        return Subject(self.estimator, model, self.x.double(), state, trainable(model, state))


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
                found.append(replace(self, subjects=(subject,), batch=_batch([subject])))
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


def _batch(subjects: Sequence[Subject], by_columns: bool = True) -> Batch:
    first, estimators, states = subjects[0], [s.estimator for s in subjects], [s.state for s in subjects]
    return Batch(estimators, first.model, first.x, states, first.parameters, by_columns=by_columns)


def _probed(subjects: Sequence[Subject], seed: int) -> tuple[Batch, Pass]:
    """A batch and its pass over two replicates; of a single estimator by its own terms, where it cannot be by columns.

    Raises:
        NotRows: whatever went wrong.
    """
    try:
        try:
            batch = _batch(subjects)
            return batch, batch.draw(_probe(subjects[0], seed))
        except NotRows:
            if len(subjects) > 1 or not together([subjects[0].estimator]):
                raise
            batch = _batch(subjects, by_columns=False)
            return batch, batch.draw(_probe(subjects[0], seed))
    except (NotRows, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a stranger's model may do anything when its rows are many
        if len(subjects) == 1:
            _one(subjects[0], Rng(seed, 1, "measure", subjects[0].x.device))  # raises, if it is none of ours
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
            batch = _batch(part)
            found += _batched(part, batch, batch.draw(_probe(first, seed=0)), engine, limits)
        return found
    fitting, most = CHUNK.get(first.x.device.type, GPU_CHUNK), (memory - held) // len(subjects)
    chunk = limits.chunk or chunk_size(fitting / batch.bytes_each, most // batch.bytes_each)
    gains = any(isinstance(of, Outer) and 1 < of.rows <= SHARED_FEW for of in made.blocks.values())
    return [Plan(engine, tuple(subjects), chunk, batch, engine == "rows" and gains)]


def _probe(subject: Subject, seed: int) -> Rng:
    """The noise of the first two replicates."""
    return Rng(seed, range(2), "measure", subject.x.device)


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
            _one(candidates[0], Rng(seed, 1, "measure", candidates[0].x.device))  # raises, if it is wrong by itself
            return [*apart, alone(candidates[0], str(error))]
        for position, subject in enumerate(candidates):
            if (objection := _objection(batch, made, position, candidates, seed)) is None:
                rows.append(subject)
            else:
                apart.append(alone(subject, objection))
    if rows and len(rows) < len(candidates):
        batch, made = _probed(rows, seed)
    return (_batched(rows, batch, made, chosen, limits) if rows else []) + apart


def _objection(batch: Batch, made: Pass, position: int, subjects: Sequence[Subject], seed: int) -> str | None:
    """Why an estimator's replicates cannot be rows: by what is seen while one is made, and by the slow twin's gradient of it."""
    return _seen(batch, subjects[position], seed) or _difference(made, position, subjects, seed)


def _seen(batch: Batch, subject: Subject, seed: int) -> str | None:
    """What a comparison of gradients may miss, since it is rare, or small in one gradient and not in the mean of many."""
    before, rng = torch.random.get_rng_state(), Rng(seed, 1, "measure", subject.x.device)
    constants = [*subject.model.parameters(), *subject.model.buffers()]
    try:
        with batch.network.aside() as parameters, Values(constants) as values:
            made = list(surrogates(subject.estimator, subject.model, subject.x, rng, subject.state))
    except Exception as error:  # a stranger's code may not bear to be watched
        _one(subject, Rng(seed, 1, "measure", subject.x.device))  # raises, if it is wrong by itself
        return f"watched as it is made, there is a {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not torch.equal(before, torch.random.get_rng_state()):
        torch.random.set_rng_state(before)
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
        batch = _batch(precise, by_columns=together([subject.estimator for subject in subjects]))
        return _apart(batch.draw(_probe(precise[0], seed)), position, precise[position], seed)
    except (NotRows, RuntimeError):  # a model that is of single precision by its code
        return found


def _apart(made: Pass, position: int, subject: Subject, seed: int) -> str | None:
    """The first parameter in whose gradient the two differ, in a sentence."""
    single = _one(subject, Rng(seed, 1, "measure", subject.x.device)).gradients
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


def _one(subject: Subject, rng: Rng) -> Any:
    return one(subject.estimator, subject.model, subject.x, rng, subject.state, subject.parameters)


def draws(plan: Plan, seed: int, wanted: range) -> Iterator[tuple[range, Pass]]:
    """Passes over the `wanted` replicates in order, a chunk at a time."""
    held: dict[int, tuple[int, Tensor]] = {}
    device = plan.subjects[0].x.device
    for start in range(wanted.start, wanted.stop, plan.chunk):
        replicates = range(start, min(start + plan.chunk, wanted.stop))
        if plan.batch is not None:
            yield replicates, plan.batch.draw(Rng(seed, replicates, "measure", device, held=held))
            continue
        draw = _one(plan.subjects[0], Rng(seed, start, "measure", device, held=held))
        blocks = {name: g.reshape(1, -1) for name, g in draw.gradients.items()}
        parts = {name: Part(name, slice(0, g.numel()), g.shape) for name, g in draw.gradients.items()}
        yield replicates, Pass(blocks, [parts], None if draw.log_w is None else draw.log_w.unsqueeze(1))


def active_units(model: Any, x: Tensor) -> int:
    """Latents whose posterior mean has a variance over the data `x` above 0.01 (Burda et al. 2016)."""
    like = next(model.parameters())
    with torch.no_grad():
        guide = model.guide(x.to(like))
        try:
            means = guide.mean
        except NotImplementedError:
            means = Rng(0, 0, "units", like.device, block=1).sample(guide, 64).mean(0)
    return int((means.var(0) > 0.01).sum())

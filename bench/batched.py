"""Draws of many replicates at once, as factors: of weighted estimators together, of every other estimator by its own terms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from gradiometer.bench.calls import Call
from gradiometer.bench.gradients import Draw, Parameters, surrogates
from gradiometer.bench.tape import Network, NotRows, Pass, Tape, gradient
from gradiometer.estimators.base import Coefficients, Estimator, State, Weighted
from gradiometer.estimators.noise import Rng


def together(estimators: Sequence[Estimator]) -> bool:
    """Whether one pass serves these estimators: they are given by columns of the same particles' weights alone."""
    return all(
        isinstance(e, Weighted) and type(e).surrogate is Weighted.surrogate and e.K == estimators[0].K
        for e in estimators
    )


class Batch:
    """One estimator, or several that go `together`, on a model held still: `draw` makes many replicates at once.

    Args:
        estimators: whose gradients are wanted.
        model, x: the problem, ``x [B, ...]``.
        states: their memories.
        parameters: of the model, and of what a single estimator learns.
        by_columns: weighted estimators by one backward pass; a single one can also go by its own terms.

    Raises:
        NotRows: a parameter or a layer whose replicates cannot be told apart.
    """

    def __init__(
        self,
        estimators: Sequence[Estimator],
        model: Any,
        x: Tensor,
        states: Sequence[State],
        parameters: Parameters,
        *,
        by_columns: bool = True,
    ) -> None:
        self.estimators, self.model, self.x, self.states = estimators, model, x, states
        self.by_columns = by_columns and together(estimators)
        learned = {}
        if len(estimators) == 1:  # what is learned beside the estimate is called, but has no gradient to record
            learned = {group: module for group, module in states[0].learned.items() if group in parameters}
        self.network = Network(getattr(model, "_model", model), learned, parameters, len(x))
        if self.by_columns and not self._guide_is_known():
            if len(estimators) > 1:
                raise NotRows("the guide is not known by its parameters")
            self.by_columns = False
        two, three = self._calls(2), self._calls(3)
        self.network.find_axes(two, three)
        held = sum(4 * call.output.numel() + 3 * call.inputs.numel() for call in two) / 2  # with gradients and copies
        if self.network.guide is not None:
            held += 12 * len(x) * estimators[0].K * self.network.guide[0].event_shape.numel()  # noise, densities
        self.bytes_each = max(1, int(held) * x.element_size())  # of a replicate, about

    def on(self, x: Tensor) -> Batch:
        """The same on another minibatch of the same shape: shapes stay, and the guide runs once more."""
        changed, network = copy.copy(self), copy.copy(self.network)
        changed.x, changed.network = x, network
        if network.guide is not None:
            # Calls are told from their order in a pass, which has no guide's.
            network.guide, network.called = None, None
            changed._guide_is_known()
            network.called = self.network.called
        return changed

    def draw(self, rng: Rng) -> Pass:
        """Gradients of every replicate of `rng`, those of weights as factors."""
        assert isinstance(rng.replicates, range)
        tape = Tape(self.network, len(rng.replicates), len(self.estimators))
        with tape.recording():
            log_w = self._ascend(tape, rng)
        return tape.finished(log_w)

    def _ascend(self, tape: Tape, rng: Rng) -> Tensor | None:
        x = self.x.expand(tape.R, *self.x.shape)  # [R, B, ...]
        if self.by_columns:
            return self._weigh(_Particles(self, tape, x, rng), x, tape)
        model, log_w = _OneGuide(self.model, x, tape), []
        for surrogate in surrogates(self.estimators[0], model, x, rng, self.states[0]):
            for group, term in surrogate.terms.items():
                if term.requires_grad:
                    if term.shape[:1] != (tape.R,):
                        raise NotRows(f"the term of group {group!r} has shape {tuple(term.shape)}, not (R, B)")
                    tape.ascend(group, term.flatten(1).mean(1).sum())
            log_w += [] if surrogate.log_w is None else [surrogate.log_w]
        return torch.cat(log_w) if log_w else None

    def _weigh(self, drawn: _Particles, x: Tensor, tape: Tape) -> Tensor:
        """One backward pass for all columns: the gradient of each row is its column times the plain one.

        The rows of log p(x, z) and of log q(z|x) are independent, so the derivatives of their plain sums, with respect to the
        layers' outputs and to z, only need weighting by the columns afterwards.
        """
        made = []
        for estimator, state in zip(self.estimators, self.states, strict=True):
            assert isinstance(estimator, Weighted)
            of = estimator.coefficients(estimator.signal(drawn.log_w.clone(), x, state))  # of its own
            made.append(_divided(of, x.shape[1]))
        by_z = _generative(tape, drawn, [of.generative for of in made])
        _inference(tape, drawn, by_z, made)
        return drawn.log_w

    def _guide_is_known(self) -> bool:
        tape = Tape(self.network, 2)
        try:
            with tape.recording():
                tape.guide(lambda: self.model.guide(self.x[None]))
        except NotImplementedError:
            return False
        return True

    def _calls(self, R: int) -> list[Call]:
        """All calls of layers that a pass over so many replicates makes."""
        tape, rng = Tape(self.network, R), Rng(0, range(R), "shapes", self.x.device)
        x = self.x.expand(R, *self.x.shape)
        with tape.recording():
            if self.by_columns:
                _Particles(self, tape, x, rng)
            else:
                list(surrogates(self.estimators[0], _OneGuide(self.model, x, tape), x, rng, self.states[0]))
        return tape.calls


class _Particles:
    """The particles of a pass with their densities, and which calls of layers made what."""

    def __init__(self, batch: Batch, tape: Tape, x: Tensor, rng: Rng) -> None:
        pathwise = any("rsample" in e.facts.needs for e in batch.estimators)
        q = tape.guide(lambda: batch.model.guide(x[:1]), particles=batch.estimators[0].K)  # (K, R, B)
        self.z = rng.rsample(q) if pathwise else rng.sample(q)  # [K, R, B, *event]
        self.at, drawn = self.z.detach().requires_grad_(pathwise), len(tape.calls)
        self.log_q, scored = q.log_prob(self.at), len(tape.calls)
        self.log_p = batch.model.log_joint(x, self.at)  # [K, R, B]
        self.log_w = (self.log_p - self.log_q).detach()
        self.drawing, self.scoring, self.joining = tape.calls[:drawn], tape.calls[drawn:scored], tape.calls[scored:]
        self.by_z = [self.at] if pathwise else []


def _generative(tape: Tape, drawn: _Particles, columns: Sequence[Tensor]) -> Tensor | None:
    """Put the model's own gradients on the tape, once for each distinct column; returns the plain derivative by z."""
    kept, owners = _distinct(columns)
    log_p = drawn.log_p
    mine, free = tape.of_group("generative", drawn.joining), tape.free_of("generative")
    by_row = [call for call in mine if _alike(call, tape.network.axes[call.number], log_p)]
    slopes = gradient(log_p.sum(), [*(call.output for call in by_row), *drawn.by_z])
    tape.put(by_row, slopes[: len(by_row)], owners, kept)
    # A layer called without particles, or with more axes, has other rows than log p: it is differentiated by itself.
    others = [call for call in mine if call not in by_row]
    if others or free:
        for column, estimators in zip(kept, owners, strict=True):
            found = gradient(log_p, [*(call.output for call in others), *free.values()], column)
            tape.put(others, found[: len(others)], [estimators])
            for name, slope in zip(free, found[len(others) :], strict=True):
                tape.put_free(name, slope, estimators)
    return slopes[-1] if drawn.by_z else None


def _alike(call: Call, axis: int, log_p: Tensor) -> bool:
    """Whether the rows of a call are those of ``log_p [K, R, B]``, perhaps flattened or, if K = 1, without the first axis."""
    K, R, B = log_p.shape
    return (call.rows, axis) in ((log_p.shape, 1), ((K * R * B,), 0), ((R, B) if K == 1 else (), 0))


def _inference(tape: Tape, drawn: _Particles, by_z: Tensor | None, columns: Sequence[Coefficients]) -> None:
    """Put the guide's gradients on the tape: of its density at fixed z, and through z."""
    (guide,) = tape.guides
    drawing, scoring = (tape.of_group("inference", calls) for calls in (drawn.drawing, drawn.scoring))
    of_guide = gradient(drawn.log_q.sum(), [*(call.output for call in scoring), *guide.leaves, *drawn.by_z])
    slope = None
    if drawn.by_z:  # of log p - log q by z, the guide's parameters held
        of_density = of_guide.pop()
        slope = by_z if of_density is None else -of_density if by_z is None else by_z - of_density
    through = gradient(drawn.z, [*(call.output for call in drawing), *guide.leaves], slope)
    score, path = [of.score for of in columns], [of.pathwise for of in columns]
    for calls, slopes, weights in ((scoring, of_guide, score), (drawing, through, path)):
        given = [torch.zeros_like(drawn.log_w) if w is None else w for w in weights] if calls else []
        tape.put(calls, slopes[: len(calls)], [[e] for e in range(len(columns))], given)
    by_leaf = zip(of_guide[len(scoring) :], through[len(drawing) :], strict=True)
    tape.carry("inference", guide, [_mixed([(score, s), (path, t)]) for s, t in by_leaf], range(len(columns)))


def _divided(columns: Coefficients, B: int) -> Coefficients:
    """The columns of a mean over the batch."""
    b, c = (None if column is None else column / B for column in (columns.pathwise, columns.score))
    return Coefficients(columns.generative / B, b, c)


def _distinct(columns: Sequence[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
    """The columns that differ, and for each the estimators that have it."""
    kept: list[Tensor] = []
    owners: list[list[int]] = []
    for estimator, column in enumerate(columns):
        same = next((i for i, known in enumerate(kept) if torch.equal(known, column)), None)
        if same is None:
            kept.append(column)
            owners.append([estimator])
        else:
            owners[same].append(estimator)
    return kept, owners


def _mixed(terms: Sequence[tuple[Sequence[Tensor | None], Tensor | None]]) -> Tensor | None:
    """Sums over particles of rows ``[K, R, B, ...]`` weighted by each estimator's columns, ``[E * R, B, ...]``."""
    reached = [(columns, rows) for columns, rows in terms if rows is not None]
    if not reached:
        return None
    found = []
    for estimator in range(len(reached[0][0])):
        total = torch.zeros_like(reached[0][1][0])
        for columns, rows in reached:
            if (column := columns[estimator]) is not None:
                total += (rows * column.view(*column.shape, *[1] * (rows.dim() - column.dim()))).sum(0)
        found.append(total)
    return torch.cat(found)


class _OneGuide:
    """A view of a model whose guide of the data runs once, on ``[1, B]``, and is expanded to all replicates."""

    def __init__(self, model: Any, x: Tensor, tape: Tape) -> None:
        self._model, self._x, self._tape = model, x, tape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def guide(self, x: Tensor) -> Distribution:
        if x is not self._x:  # of something else, a dream for instance: every replicate has its own
            return self._model.guide(x)
        try:
            return self._tape.guide(lambda: self._model.guide(x[:1]))
        except NotImplementedError:
            return self._model.guide(x)


def dense(made: Pass, estimator: int, parameters: Parameters, replicates: slice = slice(None)) -> Draw:
    """The draw of one estimator of a pass, or of some of its replicates, multiplied out."""
    blocks = {name: block[replicates] for name, block in made.blocks.items()}
    R, found = next(len(block) for block in blocks.values()), made.parts[estimator]
    gradients = {
        name: found[name].of(blocks[found[name].block]) if name in found else p.new_zeros(R, *p.shape)
        for members in parameters.values()
        for name, p in members.items()
    }
    return Draw(gradients, made.log_w)

"""Many replicates as the rows of one batch.

Of every linear layer the inputs and the gradients of the outputs are kept, and each replicate's weight gradient is the product of
the rows that are its own (`Outer`). The guide sees the data and no noise, so its networks run once: every replicate has
gradients of its own with respect to the guide's distribution, and these are carried through the networks side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from gradiometer.bench.gradients import Draw, Parameters, surrogates
from gradiometer.bench.outer import Outer
from gradiometer.estimators.base import Estimator, State, Weighted
from gradiometer.estimators.noise import Rng, rebuilt

Call = tuple[nn.Linear, Tensor, Tensor]
"""A linear layer, what it was given, and what it gave."""


class NotRows(Exception):
    """Replicates cannot be rows of one batch here; the message names the layer or parameter."""


def rows(estimator: Estimator, model: Any, x: Tensor, rng: Rng, state: State, parameters: Parameters) -> Draw:
    """A draw for every replicate of `rng` at once, ``{name: [r, *shape]}``, from ``x [B, ...]``; `factors` multiplied out."""
    draw = factors(estimator, model, x, rng, state, parameters)
    dense = {name: g.dense() if isinstance(g, Outer) else g for name, g in draw.gradients.items()}
    return Draw(dense, draw.log_w)


def factors(estimator: Estimator, model: Any, x: Tensor, rng: Rng, state: State, parameters: Parameters) -> Draw:
    """A draw for every replicate of `rng` at once, with the gradients of weights as factors.

    Raises:
        NotRows: a parameter that is not a linear layer's, or a layer whose rows are not ``[..., R, B, features]``.
    """
    assert isinstance(rng.replicates, range)
    R = len(rng.replicates)
    log_w = None
    tape = _Tape(model, state, parameters, R)
    expanded = x.expand(R, *x.shape)  # [R, B, ...]
    with tape.recording():
        view = _OneGuide(model, expanded, tape)
        if isinstance(estimator, Weighted) and type(estimator).surrogate is Weighted.surrogate:
            log_w = _weighted(estimator, view, expanded, rng, state, tape)
        else:
            for surrogate in surrogates(estimator, view, expanded, rng, state):
                for group, term in surrogate.terms.items():
                    if term.requires_grad:
                        if term.shape[:1] != (R,):
                            raise NotRows(f"the term of group {group!r} has shape {tuple(term.shape)}, not (R, B)")
                        tape.ascend(group, term.flatten(1).mean(1).sum())
                log_w = surrogate.log_w if surrogate.log_w is not None else log_w
    return Draw(tape.finished(), log_w)


def _weighted(estimator: Weighted, model: Any, x: Tensor, rng: Rng, state: State, tape: _Tape) -> Tensor:
    """A weighted estimator from one backward pass through the model: each row's gradient is its column times the plain one.

    The rows of log p(x, z) are independent, so the derivatives of their plain sum, with respect to the layers' outputs and to
    z, only need scaling by ``a`` and by ``b`` afterwards.
    """
    q = model.guide(x)
    before = len(tape.calls)
    pathwise = "rsample" in estimator.facts.needs
    z = rng.rsample(q, estimator.K) if pathwise else rng.sample(q, estimator.K)  # [K, R, B, *event]
    at = z.detach().requires_grad_(pathwise)
    log_p, log_q = model.log_joint(x, at), q.log_prob(at)  # [K, R, B]
    log_w = (log_p - log_q).detach()
    columns = estimator.coefficients(log_w - estimator.baseline(x, state))
    B = x.shape[1]
    a, b, c = columns.generative / B, columns.pathwise, columns.score
    calls = tape.of_group("generative", tape.calls[before:])
    # A layer called without particles, or with more axes, has other rows than log p: it is differentiated by itself.
    by_row = [call for call in calls if call[2].shape[:-1] == log_p.shape]
    others = [call for call in calls if call[2].shape[:-1] != log_p.shape]
    outputs = [output for _, _, output in by_row]
    slopes = _grad(log_p.sum(), [*outputs, at] if b is not None else outputs)
    tape.put(by_row, [None if s is None else _times(a, s) for s in slopes[: len(outputs)]])
    if others:
        tape.put(others, _grad((a * log_p).sum(), [output for _, _, output in others]))
    terms = []
    if b is not None:
        (slope,) = torch.autograd.grad(-log_q.sum(), at, retain_graph=True)  # of the guide's density, parameters held
        if slopes[-1] is not None:
            slope = slope + slopes[-1]
        terms.append((z * _times(b / B, slope)).sum())
    if c is not None:
        terms.append((c / B * q.log_prob(z.detach())).sum())
    if terms:
        tape.ascend("inference", torch.stack(terms).sum())
    return log_w


class _OneGuide:
    """A view of a model whose guide of the data runs once, on ``[1, B]``, and is expanded to all replicates."""

    def __init__(self, model: Any, x: Tensor, tape: _Tape) -> None:
        self._model, self._x, self._tape = model, x, tape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def guide(self, x: Tensor) -> Distribution:
        if x is not self._x:  # of something else, a dream for instance: every replicate has its own
            return self._model.guide(x)
        start = len(self._tape.calls)
        try:
            return self._tape.cut(self._model.guide(x[:1]), start)
        except NotImplementedError:
            del self._tape.calls[start:]
            return self._model.guide(x)


class _Tape:
    """Replicate gradients by parameter, gathered from the layers' inputs and the gradients of their outputs."""

    def __init__(self, model: Any, state: State, parameters: Parameters, R: int) -> None:
        self.R = R
        self.parameters = parameters
        self.modules = [getattr(model, "_model", model), *state.learned.values()]
        self.owner = {id(p): name for members in parameters.values() for name, p in members.items()}
        self.calls: list[Call] = []  # all of them: a later surrogate may reach back into the graph of an earlier one
        self.guides: list[tuple[list[Call], list[tuple[Tensor, Tensor]]]] = []
        self.found: dict[str, Any] = {}
        self._layers = {m for module in self.modules for m in module.modules() if isinstance(m, nn.Linear)}
        linear = {id(p) for layer in self._layers for p in layer.parameters(recurse=False)}
        for identity, name in self.owner.items():
            if identity not in linear:
                raise NotRows(f"parameter {name!r} does not belong to a linear layer")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While open, every call of a linear layer is kept."""

        def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            self.calls.append((layer, inputs[0].detach(), output))

        handles = [layer.register_forward_hook(record) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def cut(self, q: Distribution, start: int) -> Distribution:
        """The guide `q` ``(1, B)`` with parameters that are leaves ``[R, B, ...]``; its calls are those from `start` on.

        Raises:
            NotImplementedError: `q` is not rebuilt from its parameters.
        """
        pairs: list[tuple[Tensor, Tensor]] = []

        def leaf(parameter: Tensor) -> Tensor:
            if parameter.shape[:1] != (1,):
                raise NotImplementedError("a parameter of the guide has no batch axis")
            grown = parameter.detach().expand(self.R, *parameter.shape[1:])
            if parameter.requires_grad:
                pairs.append((parameter, grown.requires_grad_()))
            return grown

        made = rebuilt(q, leaf)
        self.guides.append((self.calls[start:], pairs))
        del self.calls[start:]
        return made

    def of_group(self, group: str, calls: Sequence[Call]) -> list[Call]:
        """Those calls whose layer belongs to a group and whose output has a gradient."""
        members = {id(p) for p in self.parameters.get(group, {}).values()}
        return [call for call in calls if id(call[0].weight) in members and call[2].requires_grad]

    def ascend(self, group: str, total: Tensor) -> None:
        """Add the gradient of `total`, a sum over replicates, for the parameters of a group."""
        mine = self.of_group(group, self.calls)
        guides = [(calls, pairs) for known, pairs in self.guides if (calls := self.of_group(group, known))]
        leaves = [leaf for _, pairs in guides for _, leaf in pairs]
        slopes = _grad(total, [*(output for _, _, output in mine), *leaves])
        self.put(mine, slopes[: len(mine)])
        of_leaf = dict(zip(map(id, leaves), slopes[len(mine) :], strict=True))
        for calls, pairs in guides:
            reached = [(p, s) for p, leaf in pairs if (s := of_leaf[id(leaf)]) is not None]
            if reached:
                carried = torch.autograd.grad(
                    [parameter for parameter, _ in reached],
                    [output for _, _, output in calls],
                    [slope.unsqueeze(1) for _, slope in reached],  # [R, 1, B, ...]
                    is_grads_batched=True,
                    retain_graph=True,
                    allow_unused=True,
                )
                self._put_shared(calls, carried)

    def put(self, calls: Sequence[Call], slopes: Sequence[Tensor | None]) -> None:
        """Add calls whose rows are ``[..., R, B, features]``, given the gradients of their outputs."""
        for (layer, inputs, _), slope in zip(calls, slopes, strict=True):
            if slope is not None:
                if slope.dim() < 3 or slope.shape[-3] != self.R or inputs.shape[-3] != self.R:
                    name, shape = self.owner[id(layer.weight)], tuple(inputs.shape)
                    raise NotRows(f"{name!r} was called on shape {shape}, which has no replicate axis")
                self._add(layer, *(t.movedim(-3, 0).reshape(self.R, -1, t.shape[-1]) for t in (inputs, slope)))

    def _put_shared(self, calls: Sequence[Call], slopes: Sequence[Tensor | None]) -> None:
        for (layer, inputs, _), slope in zip(calls, slopes, strict=True):
            if slope is not None:
                self._add(layer, inputs.reshape(1, -1, inputs.shape[-1]), slope.reshape(self.R, -1, slope.shape[-1]))

    def _add(self, layer: nn.Linear, inputs: Tensor, slope: Tensor) -> None:
        made: list[tuple[Tensor, Any]] = [(layer.weight, Outer(inputs, slope))]
        if layer.bias is not None:
            made.append((layer.bias, slope.sum(1)))
        for parameter, gradient in made:
            name = self.owner[id(parameter)]
            self.found[name] = self.found[name] + gradient if name in self.found else gradient

    def finished(self) -> dict[str, Any]:
        """All gradients; zeros where nothing was added."""
        for members in self.parameters.values():
            for name, p in members.items():
                if name not in self.found:
                    self.found[name] = p.new_zeros(self.R, *p.shape)
        return self.found


def _times(column: Tensor, slope: Tensor) -> Tensor:
    """Rows ``[K, R, B, ...]`` times their weights ``[K, R, B]``."""
    return slope * column.reshape(*column.shape, *[1] * (slope.dim() - column.dim()))


def _grad(total: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    if not wanted or not total.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, list(wanted), retain_graph=True, allow_unused=True))

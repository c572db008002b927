"""The seam between estimators and numbers: surrogate terms in, replicate gradients out.

`one` is the slow twin: one replicate, plain autograd. `rows` makes many replicates one batch: of every linear layer it keeps the
inputs and the gradients of the outputs, and forms each replicate's weight gradient from the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.bench.models.protocol import parameters_of
from gradiometer.bench.outer import Outer
from gradiometer.estimators.base import Estimator, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng

Parameters = Mapping[str, Mapping[str, nn.Parameter]]
"""``{group: {name: parameter}}``"""
Call = tuple[nn.Linear, Tensor, Tensor]
"""A linear layer, what it was given, and what it gave."""


class NotRows(Exception):
    """Replicates cannot be rows of one batch here; the message names the layer or parameter."""


@dataclass
class Draw:
    """Gradients of some replicates ``{name: [r, *shape]}`` (no leading axis from `one`), and their detached log weights."""

    gradients: dict[str, Any]
    log_w: Tensor | None


class Counted:
    """A view of a model that counts evaluations of the joint (or of the likelihood, by those that use it alone)."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.evaluations = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        value: Tensor = self._model.log_joint(x, z)
        self.evaluations += value.numel()
        return value

    def likelihood(self, z: Tensor) -> Any:
        distribution = self._model.likelihood(z)
        self.evaluations += distribution.batch_shape.numel()
        return distribution


def trainable(model: Any, state: State) -> dict[str, dict[str, nn.Parameter]]:
    """The parameter groups of a model and of what an estimator learns beside it."""
    groups = parameters_of(model)
    for group, module in state.learned.items():
        groups[group] = {f"{group}.{name}": parameter for name, parameter in module.named_parameters()}
    return {group: members for group, members in groups.items() if members}


def surrogates(estimator: Estimator, model: Any, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
    """The estimator's surrogates, one or several."""
    made = estimator.surrogate(model, x, rng, state)
    return iter([made]) if isinstance(made, Surrogate) else made


def one(
    estimator: Estimator,
    model: Any,
    x: Tensor,
    rng: Rng,
    state: State,
    parameters: Parameters,
    observe: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> Draw:
    """One draw of the gradient of the batch-mean objective, ``{name: [*shape]}``, from ``x [B, ...]``."""
    total: dict[str, Tensor] = {}
    log_w = None
    for surrogate in surrogates(estimator, model, x, rng, state):
        _add_gradients(total, surrogate.terms, parameters)
        log_w = surrogate.log_w if surrogate.log_w is not None else log_w
        if observe is not None:
            observe(surrogate.observe)
    for members in parameters.values():
        for name, parameter in members.items():
            total.setdefault(name, torch.zeros_like(parameter))
    return Draw(total, log_w)


def _add_gradients(total: dict[str, Tensor], terms: Mapping[str, Tensor], parameters: Parameters) -> None:
    shared: dict[int, list[str]] = {}
    for group, term in terms.items():
        if group in parameters and term.requires_grad:
            shared.setdefault(id(term), []).append(group)  # one backward for groups that ascend the same term
    for number, groups in enumerate(shared.values(), start=1):
        members = {name: p for group in groups for name, p in parameters[group].items()}
        gradients = torch.autograd.grad(
            terms[groups[0]].mean(), list(members.values()), retain_graph=number < len(shared), allow_unused=True
        )
        for name, gradient in zip(members, gradients, strict=True):
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient


@contextmanager
def linear_calls(modules: list[nn.Module]) -> Iterator[list[Call]]:
    """Records ``(layer, input, output)`` of every call of a linear layer."""
    calls: list[Call] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append((layer, inputs[0].detach(), output))

    layers = {layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)}
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def rows(estimator: Estimator, model: Any, x: Tensor, rng: Rng, state: State, parameters: Parameters) -> Draw:
    """A draw for every replicate of `rng` at once, ``{name: [r, *shape]}``, from ``x [B, ...]``; `factors` multiplied out.

    Raises:
        NotRows: a parameter that is not a linear layer's, or a layer whose rows are not ``[..., R, B, features]``.
    """
    draw = factors(estimator, model, x, rng, state, parameters)
    dense = {name: g.dense() if isinstance(g, Outer) else g for name, g in draw.gradients.items()}
    return Draw(dense, draw.log_w)


def factors(estimator: Estimator, model: Any, x: Tensor, rng: Rng, state: State, parameters: Parameters) -> Draw:
    """As `rows`, with the gradients of weights as factors, which is what makes moments cheap."""
    assert isinstance(rng.replicates, range)
    R = len(rng.replicates)
    tape = _Tape(model, state, parameters, R)
    expanded = x.expand(R, *x.shape)  # [R, B, ...]
    log_w = None
    with linear_calls(tape.modules) as calls:
        if isinstance(estimator, Weighted) and type(estimator).surrogate is Weighted.surrogate:
            log_w = _weighted(estimator, model, expanded, rng, state, tape, calls)
        else:
            # Calls are kept over all surrogates of the estimate: a later one may reach back into an earlier one's graph.
            for surrogate in surrogates(estimator, model, expanded, rng, state):
                for group, term in surrogate.terms.items():
                    if term.requires_grad:
                        if term.shape[:1] != (R,):
                            raise NotRows(f"the term of group {group!r} has shape {tuple(term.shape)}, not (R, B)")
                        total = term.flatten(1).mean(1).sum()
                        tape.add(group, calls, lambda outputs, total=total: _grad(total, outputs))
                log_w = surrogate.log_w if surrogate.log_w is not None else log_w
    return Draw(tape.finished(), log_w)


def _weighted(
    estimator: Weighted, model: Any, x: Tensor, rng: Rng, state: State, tape: _Tape, calls: list[Call]
) -> Tensor:
    """A weighted estimator from one backward pass through the model: each row's gradient is its column times the plain one.

    The rows of log p(x, z) are independent, so the derivatives of their plain sum, with respect to the layers' outputs and to
    z, only need scaling by ``a`` and by ``b`` afterwards.
    """
    q = model.guide(x)
    of_guide = len(calls)
    pathwise = "rsample" in estimator.facts.needs
    z = rng.rsample(q, estimator.K) if pathwise else rng.sample(q, estimator.K)  # [K, R, B, *event]
    at = z.detach().requires_grad_(pathwise)
    log_p, log_q = model.log_joint(x, at), q.log_prob(at)  # [K, R, B]
    log_w = (log_p - log_q).detach()
    columns = estimator.coefficients(log_w - estimator.baseline(x, state))
    a, b, c = (
        None if column is None else column / x.shape[1]
        for column in (columns.generative, columns.pathwise, columns.score)
    )
    outputs = [output for _, _, output in tape.of_group("generative", calls[of_guide:])]
    # A layer called without particles sums over them, and one with an inner axis has rows of its own: neither can be
    # weighted afterwards.
    by_particle = [output for output in outputs if output.shape[:-1] == log_p.shape]
    slopes = _grad(log_p.sum(), [*by_particle, at] if b is not None else by_particle)
    plain = {id(output): slope for output, slope in zip(by_particle, slopes, strict=False)}

    def of_model(wanted: list[Tensor]) -> list[Tensor | None]:
        summed = [output for output in wanted if id(output) not in plain]
        rest = dict(zip(map(id, summed), _grad((a * log_p).sum(), summed) if summed else [], strict=True))
        return [rest[id(o)] if id(o) in rest else _times(a, plain[id(o)]) for o in wanted]

    tape.add("generative", calls[of_guide:], of_model)
    terms = []
    if b is not None:
        slope_q = torch.autograd.grad(log_q.sum(), at, retain_graph=True)[
            0
        ]  # of the guide's density, its parameters held
        slope = slopes[-1] - slope_q if slopes[-1] is not None else -slope_q
        terms.append((z * _times(b, slope)).sum())
    if c is not None:
        terms.append((c * q.log_prob(z.detach())).sum())
    if terms:
        tape.add("inference", list(calls), lambda wanted: _grad(sum(terms[1:], terms[0]), wanted))
    return log_w


def _times(column: Tensor, slope: Tensor | None) -> Tensor | None:
    """Rows ``[K, R, B, ...]`` times their weights ``[K, R, B]``."""
    return None if slope is None else slope * column.reshape(*column.shape, *[1] * (slope.dim() - column.dim()))


def _grad(total: Tensor, wanted: list[Tensor]) -> list[Tensor | None]:
    if not wanted or not total.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True))


class _Tape:
    """Replicate gradients by parameter, gathered from the layers' inputs and the gradients of their outputs."""

    def __init__(self, model: Any, state: State, parameters: Parameters, R: int) -> None:
        self.parameters, self.R = parameters, R
        self.modules = [getattr(model, "_model", model), *state.learned.values()]
        self.owner = {id(p): name for members in parameters.values() for name, p in members.items()}
        self.found: dict[str, Tensor | Outer] = {}
        _must_be_linear(self.modules, self.owner)

    def of_group(self, group: str, calls: list[Call]) -> list[Call]:
        members = {id(p) for p in self.parameters.get(group, {}).values()}
        return [call for call in calls if id(call[0].weight) in members and call[2].requires_grad]

    def add(self, group: str, calls: list[Call], cotangents: Callable[[list[Tensor]], list[Tensor | None]]) -> None:
        """Add to the gradients of a group, given the map from its layers' outputs to their gradients."""
        mine = self.of_group(group, calls)
        for (layer, inputs, _), cotangent in zip(mine, cotangents([call[2] for call in mine]), strict=True):
            if cotangent is not None:
                self._add(layer, inputs, cotangent)

    def _add(self, layer: nn.Linear, inputs: Tensor, cotangent: Tensor) -> None:
        """Each replicate's gradient of one call of a linear layer; rows are ``[..., R, B, features]``."""
        R = self.R
        if cotangent.dim() < 3 or cotangent.shape[-3] != R or inputs.shape[-3] != R:
            name = self.owner[id(layer.weight)]
            raise NotRows(f"{name!r} was called on shape {tuple(inputs.shape)}, which has no replicate axis")
        A = inputs.movedim(-3, 0).reshape(R, -1, inputs.shape[-1])  # [R, rows, in]
        D = cotangent.movedim(-3, 0).reshape(R, -1, cotangent.shape[-1])  # [R, rows, out]
        made: list[tuple[Tensor, Tensor | Outer]] = [(layer.weight, Outer(A, D))]
        if layer.bias is not None:
            made.append((layer.bias, D.sum(1)))
        for parameter, gradient in made:
            name = self.owner[id(parameter)]
            known = self.found.get(name)
            self.found[name] = gradient if known is None else known + gradient  # type: ignore[operator]

    def finished(self) -> dict[str, Tensor | Outer]:
        """All gradients; zeros where nothing was added."""
        for members in self.parameters.values():
            for name, p in members.items():
                if name not in self.found:
                    self.found[name] = p.new_zeros(self.R, *p.shape)
        return self.found


def _must_be_linear(modules: list[nn.Module], owner: Mapping[int, str]) -> None:
    linear = {
        id(p)
        for m in modules
        for layer in m.modules()
        if isinstance(layer, nn.Linear)
        for p in layer.parameters(recurse=False)
    }
    for identity, name in owner.items():
        if identity not in linear:
            raise NotRows(f"parameter {name!r} does not belong to a linear layer")

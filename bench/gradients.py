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
from gradiometer.estimators.base import Estimator, State, Surrogate
from gradiometer.estimators.noise import Rng

Parameters = Mapping[str, Mapping[str, nn.Parameter]]
"""``{group: {name: parameter}}``"""


class NotRows(Exception):
    """Replicates cannot be rows of one batch here; the message names the layer or parameter."""


@dataclass
class Draw:
    """Gradients of some replicates ``{name: [r, *shape]}`` (no leading axis from `one`), and their detached log weights."""

    gradients: dict[str, Tensor]
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
def linear_calls(modules: list[nn.Module]) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    """Records ``(layer, input, output)`` of every call of a linear layer."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

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
    """A draw for every replicate of `rng` at once, ``{name: [r, *shape]}``, from ``x [B, ...]``.

    Raises:
        NotRows: a parameter that is not a linear layer's, or a layer whose rows are not ``[..., R, B, features]``.
    """
    assert isinstance(rng.replicates, range)
    R = len(rng.replicates)
    owner = {id(p): name for members in parameters.values() for name, p in members.items()}
    module = getattr(model, "_model", model)
    learned = list(state.learned.values())
    _must_be_linear([module, *learned], owner)
    gradients: dict[str, Tensor] = {}
    log_w = None
    expanded = x.expand(R, *x.shape)  # [R, B, ...]
    # Calls are kept over all surrogates of the estimate: a later one may reach back into the graph of an earlier one.
    with linear_calls([module, *learned]) as calls:
        for surrogate in surrogates(estimator, model, expanded, rng, state):
            for group, term in surrogate.terms.items():
                members = {id(p) for p in parameters.get(group, {}).values()}
                mine = [call for call in calls if id(call[0].weight) in members and call[2].requires_grad]
                if not mine or not term.requires_grad:
                    continue
                if term.shape[:1] != (R,):
                    raise NotRows(f"the term of group {group!r} has shape {tuple(term.shape)}, not (R, B)")
                total = term.flatten(1).mean(1).sum()
                cotangents = torch.autograd.grad(
                    total, [call[2] for call in mine], retain_graph=True, allow_unused=True
                )
                for (layer, inputs, _), cotangent in zip(mine, cotangents, strict=True):
                    if cotangent is not None:
                        _add_linear(gradients, layer, inputs, cotangent, R, owner)
            log_w = surrogate.log_w if surrogate.log_w is not None else log_w
    for members_of in parameters.values():
        for name, p in members_of.items():
            gradients.setdefault(name, p.new_zeros(R, *p.shape))
    return Draw(gradients, log_w)


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


def _add_linear(
    total: dict[str, Tensor], layer: nn.Linear, inputs: Tensor, cotangent: Tensor, R: int, owner: Mapping[int, str]
) -> None:
    """Each replicate's gradient of one call of a linear layer; rows are ``[..., R, B, features]``."""
    if cotangent.dim() < 3 or cotangent.shape[-3] != R or inputs.shape[-3] != R:
        raise NotRows(
            f"{owner[id(layer.weight)]!r} was called on shape {tuple(inputs.shape)}, which has no replicate axis"
        )
    A = inputs.movedim(-3, 0).reshape(R, -1, inputs.shape[-1])  # [R, rows, in]
    D = cotangent.movedim(-3, 0).reshape(R, -1, cotangent.shape[-1])  # [R, rows, out]
    made = [(layer.weight, torch.bmm(D.mT, A))]
    if layer.bias is not None:
        made.append((layer.bias, D.sum(1)))
    for parameter, gradient in made:
        name = owner[id(parameter)]
        total[name] = total[name] + gradient if name in total else gradient

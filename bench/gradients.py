"""The seam between estimators and numbers: surrogate terms in, gradients out.

`one` is the slow twin: one replicate, plain autograd, any model and any surrogate. `batched.py` must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.bench.models.protocol import parameters_of
from gradiometer.estimators.base import Estimator, State, Surrogate
from gradiometer.estimators.noise import Rng

Parameters = Mapping[str, Mapping[str, nn.Parameter]]
"""``{group: {name: parameter}}``"""


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
        self.evaluations += _elements(value)
        return value

    def likelihood(self, z: Tensor) -> Any:
        distribution = self._model.likelihood(z)
        self.evaluations += distribution.batch_shape.numel() * (_elements(z) // max(1, z.numel()))
        return distribution


def _elements(values: Tensor) -> int:
    """How many there are, those included that `torch.func.vmap` runs over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        values = torch._C._functorch.get_unwrapped(values)
    return values.numel()


def trainable(model: Any, state: State) -> dict[str, dict[str, nn.Parameter]]:
    """The parameter groups of a model and of what an estimator learns beside it."""
    groups = parameters_of(model)
    for group, module in state.learned.items():
        groups[group] = {f"{group}.{name}": parameter for name, parameter in module.named_parameters()}
    free = {group: {name: p for name, p in members.items() if p.requires_grad} for group, members in groups.items()}
    return {group: members for group, members in free.items() if members}


def estimated(estimator: Estimator, state: State, parameters: Parameters) -> Parameters:
    """Those parameters that the estimate is a gradient by: of the model, and of learned groups that its objective names.

    A baseline or a control variate learns, too, but by terms of its own, which are no part of the estimate.
    """
    beside = set(state.learned) - estimator.facts.named
    return {group: members for group, members in parameters.items() if group not in beside}


def coordinates(parameters: Parameters) -> int:
    """How many a gradient has."""
    return sum(p.numel() for members in parameters.values() for p in members.values())


def surrogates(estimator: Estimator, model: Any, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
    """The estimator's surrogates, one or several."""
    return each(estimator.surrogate(model, x, rng, state))


def each(made: Surrogate | Iterator[Surrogate]) -> Iterator[Surrogate]:
    """What an estimator returned or yields, one by one."""
    return iter([made]) if isinstance(made, Surrogate) else made


def one(
    estimator: Estimator,
    model: Any,
    x: Tensor,
    rng: Rng,
    state: State,
    parameters: Parameters,
    heard: Callable[[Surrogate], None] | None = None,
) -> Draw:
    """One draw of the gradient of the batch-mean objective, ``{name: [*shape]}``, from ``x [B, ...]``.

    Each surrogate is first `heard`, while it has its graph.
    """
    total: dict[str, Tensor] = {}
    log_w: list[Tensor] = []
    named: set[str] = set()
    for surrogate in surrogates(estimator, model, x, rng, state):
        _must_make_sense(estimator, model, x, state, surrogate.terms)
        named |= surrogate.terms.keys()
        if heard is not None:
            heard(surrogate)
        add_gradients(total, surrogate.terms, parameters)
        log_w += [] if surrogate.log_w is None else [surrogate.log_w]
    if lacking := [group for group in model.groups if group in parameters and group not in named]:
        have = " and ".join(sorted(named))
        raise ValueError(
            f"{estimator} has no term for the group {lacking[0]!r}, only for {have}: put its parameters in one"
        )
    for members in parameters.values():
        for name, parameter in members.items():
            total.setdefault(name, torch.zeros_like(parameter))
    if (particles := sum(map(len, log_w))) not in (0, estimator.K):
        raise ValueError(f"{estimator} gives log weights of {particles} particles, and K is {estimator.K}")
    return Draw(total, torch.cat(log_w) if log_w else None)


def _must_make_sense(estimator: Estimator, model: Any, x: Tensor, state: State, terms: Mapping[str, Tensor]) -> None:
    """Terms of a group that nothing has would be lost without a word, and of other shapes weighted wrongly.

    Raises:
        ValueError: a sentence.
    """
    groups = [*model.groups, *state.learned]
    for group, term in terms.items():
        if group not in groups:
            raise ValueError(f"{estimator} has a term for the group {group!r}; the model has {', '.join(groups)}")
        if term.shape != x.shape[:1]:
            raise ValueError(
                f"the term of {estimator} for the group {group!r} has shape {tuple(term.shape)}, not {tuple(x.shape[:1])}: "
                "a number per data point"
            )


def add_gradients(
    total: dict[str, Tensor], terms: Mapping[str, Tensor], parameters: Parameters, retain_graph: bool = False
) -> None:
    """Add the gradient of each group's term, a mean over the batch, to what there is of its parameters."""
    shared: dict[int, list[str]] = {}
    for group, term in terms.items():
        if group in parameters and term.requires_grad:
            shared.setdefault(id(term), []).append(group)  # one backward for groups that ascend the same term
    for number, groups in enumerate(shared.values(), start=1):
        members = {name: p for group in groups for name, p in parameters[group].items()}
        gradients = torch.autograd.grad(
            terms[groups[0]].mean(),
            list(members.values()),
            retain_graph=retain_graph or number < len(shared),
            allow_unused=True,
        )
        for name, gradient in zip(members, gradients, strict=True):
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient

"""Replicates as rows of one batch: the tape keeps what layers were given, and makes each replicate's gradient of its own rows.

The guide sees the data and no noise, so its networks run once: every replicate has gradients of its own with respect to the guide's
distribution, and these are carried through the networks side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from gradiometer.bench.calls import Call, known
from gradiometer.bench.gradients import Parameters
from gradiometer.bench.outer import Beside, Outer
from gradiometer.bench.products import fast_forward
from gradiometer.estimators.noise import rebuilt

Owners = Sequence[Sequence[int]]
"""For each column of a gradient, the estimators it belongs to."""


class NotRows(ValueError):
    """Replicates cannot be rows of one batch here; the message names the layer or parameter."""


@dataclass(frozen=True)
class Part:
    """Where an estimator's gradient of one parameter is found: the columns (last axis) of a block."""

    block: str
    columns: slice
    shape: Size

    def of(self, block: Tensor | Outer) -> Tensor:
        """The gradients of all replicates, ``[r, *shape]``."""
        dense = block.columns(self.columns).dense() if isinstance(block, Outer) else block[:, self.columns]
        return dense.reshape(len(block), *self.shape)


@dataclass
class Pass:
    """Gradients of some replicates for several estimators.

    Attributes:
        blocks: gradients ``[r, ...]``, each for one estimator or, as its columns, for several.
        parts: per estimator, where its gradient of each parameter is; of those that are missing it is zero.
        log_w: detached, ``[K, r, B]``.
    """

    blocks: dict[str, Tensor | Outer | Beside]
    parts: list[dict[str, Part]]
    log_w: Tensor | None


class Network:
    """A model's layers and parameters, as recording needs them.

    Args:
        model: whose calls are recorded.
        learned: the modules an estimator learns beside it.
        parameters: ``{group: {name: parameter}}``.
        batch: data points.

    Raises:
        NotRows: a parameter that replicates cannot have gradients of their own for.
    """

    def __init__(self, model: Any, learned: Mapping[str, nn.Module], parameters: Parameters, batch: int) -> None:
        self.parameters, self.batch = parameters, batch
        self.owner = {id(p): name for members in parameters.values() for name, p in members.items()}
        modules = dict.fromkeys(m for root in (model, *learned.values()) for m in root.modules())
        self.layers = [m for m in modules if known(m)]
        of_layers = {id(p) for layer in self.layers for p in layer.parameters(recurse=False)}
        self.free = {
            name: (module, attribute, p)
            for module in modules
            for attribute, p in module.named_parameters(recurse=False)
            if id(p) not in of_layers and (name := self.owner.get(id(p))) is not None
        }
        for name, (module, _, _) in self.free.items():
            if type(module).__module__.startswith("torch.nn") and type(module) is not nn.Module:
                raise NotRows(f"parameter {name!r} belongs to a layer of type {type(module).__name__}")
        forwards = {layer: fast_forward(layer) for layer in self.layers if type(layer) is nn.Linear}
        self.forwards = {layer: forward for layer, forward in forwards.items() if forward is not None}
        self.guide: tuple[Distribution, list[Call]] | None = None  # once it ran
        self.opaque = False  # whether the guide is not known by its parameters, so that every replicate runs its own
        self.called: list[nn.Module] | None = None  # the layers in the order of their calls, once that is known
        self.axes: list[int] = []  # where replicates are, by the number of the call
        self.overwritten: set[nn.Module] | None = None  # layers whose outputs are changed in place, once that is known
        self._copies: list[tuple[nn.Module, Tensor]] = []

    def find_axes(self, two: Sequence[Call], three: Sequence[Call]) -> None:
        """Find the replicate axis of every call from the shapes of the same calls for two and for three replicates.

        And whose outputs are changed in place, as by ``ReLU(inplace=True)``: from then on, these alone hand out copies.
        """
        self.overwritten = {layer for layer, copy in self._copies if copy._version}
        self._copies.clear()
        self.called = [call.layer for call in two]
        if self.called != [call.layer for call in three]:
            raise NotRows("the calls of its layers change with the number of replicates")
        for number, (a, b) in enumerate((one.rows, other.rows) for one, other in zip(two, three, strict=True)):
            changed = [i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n]
            if len(a) != len(b) or len(changed) != 1:
                raise NotRows(f"call {number + 1} of its layers, on shape {tuple(a)}, has no replicate axis")
            self.axes.append(changed[0])

    @contextmanager
    def recording(
        self, record: Callable[[nn.Module, Tensor, Tensor], None], leaves: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """While open, calls of layers are reported, linear ones are made fast, and free parameters stand aside for `leaves`."""

        def hook(layer: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor) -> Tensor:
            (inputs,) = (*given, *named.values())
            record(layer, inputs.detach(), output)
            if self.overwritten is None:
                self._copies.append((layer, output := output.clone()))
            return output.clone() if self.overwritten and layer in self.overwritten else output

        handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in self.layers]
        aside: list[tuple[Any, str, Any]] = []
        aside += [(module, attribute, leaves[name]) for name, (module, attribute, _) in self.free.items()]
        aside += [(layer, "forward", forward) for layer, forward in self.forwards.items()]
        for module, attribute, instead in aside:
            module.__dict__[attribute] = instead  # found before the parameter or method of that name
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, attribute, _ in aside:
                module.__dict__.pop(attribute, None)

    @contextmanager
    def aside(self) -> Iterator[dict[str, nn.Parameter]]:
        """While open, calls of layers do without their parameters' gradients; yields those parameters by name.

        What still has a gradient by one of them uses it elsewhere than in a call of its layer.
        """

        def before(layer: nn.Module, given: Any) -> None:
            layer.__dict__.update({name: p.detach() for name, p in layer._parameters.items() if p is not None})

        def back(layer: nn.Module) -> None:
            for name in layer._parameters:
                layer.__dict__.pop(name, None)

        def after(layer: nn.Module, given: Any, output: Tensor) -> Tensor:
            back(layer)
            # As if by the weight; no leaf, which could not be overwritten.
            return output if output.requires_grad else output.requires_grad_().clone()

        handles = [layer.register_forward_pre_hook(before) for layer in self.layers]
        handles += [layer.register_forward_hook(after) for layer in self.layers]
        found = {self.owner.get(id(p), ""): p for layer in self.layers for p in layer.parameters(recurse=False)}
        try:
            yield {name: p for name, p in found.items() if name}
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers:
                back(layer)


class _Guide:
    """A guide that ran once: the calls of its networks, and its parameters with the leaves that stand for them."""

    def __init__(self, calls: list[Call], pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.calls, self.pairs = calls, pairs

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for _, leaf in self.pairs]

    def carried(self, calls: Sequence[Call], slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients ``[n, *output]`` of the calls' outputs, from gradients ``[n, B, ...]`` of the guide's parameters."""
        reached = [(p, s) for (p, _), s in zip(self.pairs, slopes, strict=True) if s is not None]
        found: dict[int, Tensor] = {}
        if reached and calls:
            parameters, outputs = [p for p, _ in reached], [call.output for call in calls]

            def pulled_back(*slope: Tensor) -> dict[int, Tensor]:
                made: Sequence[Any] = torch.autograd.grad(
                    parameters, outputs, slope, retain_graph=True, allow_unused=True
                )
                return {i: g for i, g in enumerate(made) if g is not None}

            found = torch.func.vmap(pulled_back)(*(s.unsqueeze(1) for _, s in reached))  # [n, 1, B, ...]
        return [found.get(i) for i in range(len(calls))]


class Tape:
    """Records one pass over `R` replicates and gathers their gradients by parameter, for a number of estimators."""

    def __init__(self, network: Network, R: int, estimators: int = 1) -> None:
        self.R, self.network = R, network
        self.calls: list[Call] = []  # all of them: a later surrogate may reach back into the graph of an earlier one
        self.guides: list[_Guide] = []
        self.weights: dict[str, Outer] = {}
        self.others: dict[str, Tensor | Outer] = {}  # biases and free parameters
        self.parts: list[dict[str, Part]] = [{} for _ in range(estimators)]
        self._leaves = {  # beside events of the same shape
            name: p.detach().expand(R, 1, *(p.shape or (1,))).requires_grad_()
            for name, (_, _, p) in network.free.items()
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While open, every call of a known layer is kept, and each replicate has a copy of every other parameter."""

        def record(layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
            number, called = len(self.calls), self.network.called
            if called is not None and called[number : number + 1] != [layer]:
                raise NotRows("the calls of its layers change with the data")
            self.calls.append(Call(layer, inputs, output, number))

        with self.network.recording(record, self._leaves):
            yield

    def guide(self, make: Callable[[], Distribution], particles: int | None = None) -> Distribution:
        """The guide, which `make` gives ``(1, B)``, with parameters that are leaves ``[R, B, ...]``, or ``[K, R, B, ...]``.

        Raises:
            NotImplementedError: it is not rebuilt from its parameters, or they are not ``[1, B, ...]``.
        """
        if self.network.opaque:
            raise NotImplementedError("the guide is not known by its parameters")
        q, calls = self.network.guide or self._run(make)
        pairs: list[tuple[Tensor, Tensor]] = []
        lead = (self.R,) if particles is None else (particles, self.R)

        def leaf(parameter: Tensor) -> Tensor:
            if parameter.shape[:1] != (1,):
                raise NotImplementedError("a parameter of the guide has no batch axis")
            grown = parameter.detach().expand(*lead, *parameter.shape[1:])
            if parameter.requires_grad:
                pairs.append((parameter, grown.requires_grad_()))
            return grown

        try:
            changed = rebuilt(q, leaf)
        except NotImplementedError:
            self.network.opaque = True
            raise
        self.network.guide = q, calls
        self.guides.append(_Guide(calls, pairs))
        return changed

    def _run(self, make: Callable[[], Distribution]) -> tuple[Distribution, list[Call]]:
        """The guide with the calls of its networks, which are not the pass's."""
        start = len(self.calls)
        try:
            return make(), self.calls[start:]
        except RuntimeError as error:
            if not self._leaves:
                raise
            self.network.opaque = True  # the copies of its parameters do not fit the single run
            raise NotImplementedError("the guide is not known by its parameters") from error
        finally:
            del self.calls[start:]

    def of_group(self, group: str, calls: Sequence[Call]) -> list[Call]:
        """Those calls whose layer belongs to a group and whose output has a gradient."""
        members = {id(p) for p in self.network.parameters.get(group, {}).values()}
        return [
            call
            for call in calls
            if call.output.requires_grad and any(id(p) in members for p in call.layer.parameters(recurse=False))
        ]

    def free_of(self, group: str) -> dict[str, Tensor]:
        """The copies that replicates have of a group's parameters outside layers, ``[R, 1, *shape]``; of scalars ``[R, 1, 1]``."""
        return {name: self._leaves[name] for name in self.network.parameters.get(group, {}) if name in self._leaves}

    def ascend(self, group: str, total: Tensor) -> None:
        """Add the gradient of `total`, a sum over replicates, for the only estimator and the parameters of a group."""
        mine, free = self.of_group(group, self.calls), self.free_of(group)
        leaves = [leaf for guide in self.guides for leaf in guide.leaves]
        slopes = iter(gradient(total, [*(call.output for call in mine), *free.values(), *leaves]))
        self.put(mine, list(islice(slopes, len(mine))), [[0]])
        for name in free:
            self.put_free(name, next(slopes), [0])
        for guide in self.guides:
            self.carry(group, guide, list(islice(slopes, len(guide.leaves))), [0])

    def carry(self, group: str, guide: _Guide, slopes: Sequence[Tensor | None], owners: Sequence[int]) -> None:
        """Add what gradients ``[E * R, B, ...]`` of a guide's parameters are for the networks behind it."""
        calls = self.of_group(group, guide.calls)
        for call, slope in zip(calls, guide.carried(calls, slopes), strict=True):
            if slope is None:
                continue
            for of in call.factors(slope):
                if of.inputs is not None and of.inputs.shape[:-2] != call.rows:
                    raise NotRows(f"a {type(call.layer).__name__} in the guide has no inputs that all replicates share")
                for owner, rows in zip(owners, of.cotangents.split(self.R), strict=True):
                    cotangents = rows.reshape(self.R, -1, rows.shape[-1])
                    if of.weight is not None and of.inputs is not None:
                        inputs = of.inputs.reshape(1, -1, of.inputs.shape[-1])
                        self._add(self.weights, of.weight, Outer(inputs, cotangents), [[owner]], owner)
                    if of.bias is not None:
                        self._add(self.others, of.bias, _summed(cotangents), [[owner]], owner)

    def put(
        self,
        calls: Sequence[Call],
        slopes: Sequence[Tensor | None],
        owners: Owners,
        columns: Sequence[Tensor] | None = None,
    ) -> None:
        """Add calls, given the gradients of their outputs, as they are or with the rows weighted by columns ``[..., R, B]``."""
        for call, slope in zip(calls, slopes, strict=True):
            if slope is None:
                continue
            alone = owners[0][0] if columns is None else None
            for of in call.factors(slope):
                cotangents = self._replicates_first(call, of.cotangents, columns)
                if of.weight is not None and of.inputs is not None:
                    inputs = self._replicates_first(call, of.inputs, columns)
                    inputs = inputs if columns is None else _weighted(inputs, columns)
                    self._add(self.weights, of.weight, Outer(inputs, cotangents), owners, alone)
                if of.bias is not None:
                    made = _summed(cotangents) if columns is None else _weighted_sum(of.cotangents, columns)
                    self._add(self.others, of.bias, made, owners, alone)

    def put_free(self, name: str, slope: Tensor | None, owners: Sequence[int]) -> None:
        """Add a gradient ``[R, 1, *shape]`` of the copies of a parameter outside layers."""
        if slope is not None:
            _, _, parameter = self.network.free[name]
            self._add(self.others, parameter, slope.flatten(1).unsqueeze(-1), [owners], owners[0])

    def finished(self, log_w: Tensor | None) -> Pass:
        """All that was added; biases and free parameters as one block."""
        blocks: dict[str, Tensor | Outer | Beside] = dict(self.weights)
        at, start = {}, 0
        for name, block in self.others.items():
            at[name] = start
            start += block.shape.numel() if isinstance(block, Outer) else block[0].numel()
        if self.others:
            blocks["others"] = Beside(tuple(self.others.values()))
        for parts in self.parts:
            for name, part in parts.items():
                if part.block in self.others:
                    wide = part.shape.numel()
                    begin = at[part.block] + part.columns.start * wide
                    parts[name] = Part("others", slice(begin, begin + wide), part.shape)
        return Pass(blocks, self.parts, log_w)

    def _replicates_first(self, call: Call, rows: Tensor, columns: Sequence[Tensor] | None) -> Tensor:
        """The rows of a call, ``[R, rows, features]``, or ``[R, K, B, L, features]`` where they are weighted by columns."""
        if columns is not None:
            if call.rows.numel() != columns[0].numel():
                raise NotRows(f"{type(call.layer).__name__} was called on shape {tuple(call.inputs.shape)}")
            return rows.reshape(*columns[0].shape, *rows.shape[-2:]).movedim(-4, 0)
        axis = self.network.axes[call.number]
        if len(call.rows) == 1:  # a model may have flattened them
            B = self.network.batch
            if call.rows[0] % (self.R * B):
                raise NotRows(f"{type(call.layer).__name__} was called on shape {tuple(call.inputs.shape)}")
            rows, axis = rows.reshape(-1, self.R, B, *rows.shape[-2:]), 1
        return rows.movedim(axis, 0).flatten(1, -2)

    def _add(
        self, into: dict[str, Any], parameter: Tensor, made: Tensor | Outer, owners: Owners, alone: int | None
    ) -> None:
        """Add gradients of a parameter, side by side on the last axis for those who own them, or of one estimator `alone`."""
        name = self.network.owner.get(id(parameter))
        if name is None:  # frozen
            return
        block = name if alone is None else f"{name}#{alone}"
        into[block] = into[block] + made if block in into else made
        wide = made.shape[-1] // len(owners)
        for column, estimators in enumerate(owners):
            part = Part(block, slice(column * wide, (column + 1) * wide), parameter.shape)
            for estimator in estimators:
                if self.parts[estimator].setdefault(name, part) != part:
                    raise NotRows(f"{name!r} was called in two ways that do not add up row by row")


def _weighted(inputs: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Inputs ``[R, K, B, L, in]``, once for every column of row weights ``[K, R, B]``, ``[R, K, B, L, C * in]``."""
    made = inputs.new_empty(*inputs.shape[:-1], len(columns), inputs.shape[-1])
    for column, weights in enumerate(columns):
        torch.mul(inputs, weights.movedim(1, 0)[..., None, None], out=made[..., column, :])
    return made.flatten(-2)


def _summed(cotangents: Tensor) -> Tensor:
    """The gradient of a bias from the rows ``[R, n, out]`` of its layer's outputs, ``[R, out, 1]``."""
    return cotangents.mT if cotangents.shape[1] == 1 else cotangents.sum(1).unsqueeze(-1)


def _weighted_sum(cotangents: Tensor, columns: Sequence[Tensor]) -> Tensor | Outer:
    """The gradients of a bias from rows ``[.., L, out]`` of its layer's outputs, weighted by each column, ``[R, out, C]``."""
    K, R, B = columns[0].shape
    if cotangents.shape[-2] > 1:
        cotangents = cotangents.sum(-2, keepdim=True)
    rows, weights = cotangents.view(K, R, B, -1), torch.stack(list(columns), 2)  # [K, R, B, out], [K, R, C, B]
    if K * B == 1:  # no sum: it can wait
        return Outer(weights[0].mT, rows[0])
    if B > 1:
        return (weights @ rows).sum(0).mT
    rows, weights = rows[:, :, 0].movedim(0, 1), weights[..., 0].movedim(0, 2)  # [R, K, out], [R, C, K]
    return (weights @ rows).mT


def gradient(total: Tensor, wanted: Sequence[Tensor], along: Tensor | None = None) -> list[Tensor | None]:
    """Gradients of `total` (or of its product with `along`) with respect to tensors, None where there is none."""
    if not wanted or not total.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, list(wanted), along, retain_graph=True, allow_unused=True))

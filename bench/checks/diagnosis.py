"""The name of a mistake, as far as the exact gradients can tell: which group or layer, and which kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradiometer.bench.checks.expectations import Gradients
from gradiometer.bench.checks.targets import OBJECTIVES, parts, target
from gradiometer.bench.checks.worlds import World

HINTS = {
    "K": "a sum over particles where their mean is meant",
    "(K-1)/K": "a baseline that sees its own sample",
    "B": "a sum over the batch",
    "1/B": "divided by the batch once too often",
}
ALIKE = 1e-3  # what two gradients may differ by that are called the same, relative to the larger


def diagnose(found: Gradients, wanted: Gradients, world: World, K: int) -> str:
    """What the gradient of one group looks like beside what it should be, in words.

    Args:
        found, wanted: by parameter of the group.
    """
    whole, exact = _flat(found), _flat(wanted)
    if float(whole.norm()) < ALIKE * float(exact.norm()):
        return "it is zero"
    if (factor := _factor(whole, exact)) is not None:
        return _scaled(factor, K, len(world.x))
    layers = {name: _factor(found[name].flatten(), wanted[name].flatten()) for name in wanted}
    wrong = {name: f for name, f in layers.items() if f is None or abs(f - 1) > ALIKE}
    if wrong and len(wrong) < len(layers):
        name, factor = next(iter(wrong.items()))
        said = "it is wrong" if factor is None else _scaled(factor, K, len(world.x))
        if len(wrong) == 1:
            return f"in {name!r} alone {said}"
        if all(f is not None for f in wrong.values()):
            return "its scale differs by layer: " + ", ".join(f"{n} {f:.3g}" for n, f in wrong.items())
    for explanation, other in _explanations(wanted, world, K) if world.most >= K else ():
        if float((whole - other).norm()) < ALIKE * float(exact.norm()):
            return explanation
    cosine = float(whole @ exact / whole.norm() / exact.norm())
    return f"it points elsewhere (cosine {cosine:.3g}, length {float(whole.norm() / exact.norm()):.3g} of what it should be)"


def _factor(found: Tensor, wanted: Tensor) -> float | None:
    """By how much `found` is a multiple of `wanted`, if it is one."""
    if not float(wanted.norm()) > 0:
        return 1.0 if not float(found.norm()) > 0 else None
    factor = float(found @ wanted / (wanted @ wanted))
    return factor if float((found - factor * wanted).norm()) < ALIKE * float(wanted.norm()) else None


def _scaled(factor: float, K: int, B: int) -> str:
    if abs(factor + 1) < ALIKE:
        return "its sign is wrong"
    known = {"K": K, "1/K": 1 / K, "K/(K-1)": K / max(K - 1, 0.5), "(K-1)/K": (K - 1) / K, "B": B, "1/B": 1 / B}
    names = [n for n, value in known.items() if abs(factor - value) < ALIKE * value and abs(value - 1) > ALIKE]
    if names:
        hints = [HINTS[name] for name in names if name in HINTS]
        return f"it is {' = '.join(names)} = {factor:.3g} times what it should be" + (
            f": {' or '.join(hints)}" if hints else ""
        )
    return f"it is scaled by {factor:.4g}"


def _explanations(wanted: Gradients, world: World, K: int) -> Iterator[tuple[str, Tensor]]:
    """Gradients that a known mistake would give, each with the mistake's name."""
    exact = _flat(wanted)
    for name, objective in OBJECTIVES.items():
        other = target(world, objective, K)[0]
        gradient = _flat({n: other[n] for n in wanted})
        yield f"it is the gradient of another objective, {name}", gradient
        yield f"it is the gradient of another objective, -{name}", -gradient
    for name, part in parts(world, K).items():
        component = _flat({n: part[n] for n in wanted})
        if not float(component.norm()) > 0:
            continue
        yield f"{name} is missing", exact - component
        yield f"{name} has the wrong sign", exact - 2 * component
        yield f"{name} is there once too often", exact + component


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])

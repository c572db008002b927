"""Biases that vanish as K grows: exact expectations at K, 2K and 4K particles, extrapolated to infinitely many."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.differences import at
from gradiometer.bench.checks.exact import Planted, wanted_of
from gradiometer.bench.checks.expectations import Effort, expectation
from gradiometer.bench.checks.identities import experienced
from gradiometer.bench.checks.worlds import World, bit, broad
from gradiometer.estimators.base import Estimator

COUNTS = (4, 8, 16)
SMALL = 0.005  # what extrapolation may leave of a bias, relative to a tensor's largest coordinate


def consistent(estimator: Estimator, effort: Effort, planted: Planted | None = None) -> Iterator[Claim]:
    """For every group that is declared consistent: its bias falls with K, and extrapolates to nothing."""
    groups = estimator.facts.consistent
    world = next((world for world in (bit(), broad()) if world.admits(estimator)), None)
    if not groups or world is None:
        return
    biases = [_bias(estimator, world, K, effort, planted) for K in COUNTS]
    for group in groups:
        where = f"{world.name}, K = {COUNTS[0]} to {COUNTS[-1]}"
        sizes = [max(float(of.mean(0).abs().max()) / scale for of, scale in bias[group].values()) for bias in biases]
        left = max(
            (_left([bias[group][name] for bias in biases]) for name in biases[0][group]), key=lambda of: of[0] / of[1]
        )
        holds = sizes[0] > sizes[1] > sizes[2] and left[0] < left[1]
        said = "its bias goes " + ", ".join(f"{size:.2g}" for size in sizes) + f", and extrapolates to {left[0]:.1g}"
        yield Claim("consistent", holds, where, said, *left, group)


def _left(biases: list[tuple[Tensor, float]]) -> tuple[float, float]:
    """What is left of a tensor's bias for infinitely many particles, and what may be, by its size and the rule's error."""
    e, scale = [of for of, _ in biases], biases[-1][1]
    once = [2 * e[1] - e[0], 2 * e[2] - e[1]]  # without the term in 1/K
    twice = (4 * once[1] - once[0]) / 3  # [S, *shape]
    error = float(twice.std(0).max()) / math.sqrt(len(twice)) if len(twice) > 1 else 0.0
    return float(twice.mean(0).abs().max()) / scale, SMALL + 6 * error / scale


def _bias(
    estimator: Estimator, world: World, K: int, effort: Effort, planted: Planted | None
) -> dict[str, dict[str, tuple[Tensor, float]]]:
    """By group and parameter, the bias ``[S, *shape]``, and the largest coordinate of what is wanted."""
    one = at(estimator, K)
    assert one is not None
    found = expectation(one, world, experienced(one, world), effort).samples
    found = found if planted is None else planted(found)
    result: dict[str, dict[str, tuple[Tensor, float]]] = {}
    for group in estimator.facts.consistent:
        made = wanted_of(one, world, one.facts.objective_of(group), effort)
        assert made is not None
        wanted = made.gradients
        names = [name for name in found if name.split(".")[0] in world.model.groups[group]]
        result[group] = {n: (found[n] - wanted[n], float(wanted[n].mean(0).abs().max())) for n in names}
    return result

"""Biases that vanish as K grows: exact expectations at K, 2K and 4K particles, extrapolated to infinitely many."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.checks.differences import at
from gradiometer.bench.checks.exact import Planted, wanted_of
from gradiometer.bench.checks.expectations import expectation
from gradiometer.bench.checks.identities import experienced
from gradiometer.bench.checks.worlds import World, bit
from gradiometer.estimators.base import Estimator

COUNTS = (4, 8, 16)
SMALL = 0.005  # what extrapolation may leave of a bias, relative to a tensor's largest coordinate


def consistent(estimator: Estimator, planted: Planted | None = None) -> Iterator[Claim]:
    """For every group that is declared consistent: its bias falls with K, and extrapolates to nothing."""
    world = bit()
    if not estimator.facts.consistent or not world.admits(estimator):
        return
    biases = [_bias(estimator, world, K, planted) for K in COUNTS]
    for group in estimator.facts.consistent:
        where = f"{group}, {world.name}, K = {COUNTS[0]} to {COUNTS[-1]}"
        sizes, left = [], 0.0
        for K in range(len(COUNTS)):
            sizes.append(max(float(g.abs().max()) / scale for g, scale in biases[K][group].values()))
        for name in biases[0][group]:
            e, scale = [of[group][name][0] for of in biases], biases[-1][group][name][1]
            once = [2 * e[1] - e[0], 2 * e[2] - e[1]]  # without the term in 1/K
            left = max(left, float(((4 * once[1] - once[0]) / 3).abs().max()) / scale)
        falls = sizes[0] > sizes[1] > sizes[2]
        said = "its bias goes " + ", ".join(f"{size:.2g}" for size in sizes) + f", and extrapolates to {left:.1g}"
        yield Claim("consistent", falls and left < SMALL, where, said, left, SMALL)


def _bias(
    estimator: Estimator, world: World, K: int, planted: Planted | None
) -> dict[str, dict[str, tuple[Tensor, float]]]:
    one = at(estimator, K)
    assert one is not None
    found = expectation(one, world, experienced(one, world)).mean
    found = found if planted is None else planted(found)
    result: dict[str, dict[str, tuple[Tensor, float]]] = {}
    for group in estimator.facts.consistent:
        wanted = wanted_of(one, world, group)
        assert wanted is not None
        names = [name for name in found if name.split(".")[0] in world.model.groups[group]]
        result[group] = {n: (found[n] - wanted[n], float(wanted[n].abs().max())) for n in names}
    return result

"""Gradients kept as factors against the gradients multiplied out, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradiometer.bench.outer import Outer, pairs_of, twice

R, WIDE, TALL = 10, 7, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_one_axis(rows: int, replicates: int = R) -> Outer:
    return Outer(normal(replicates, rows, WIDE), normal(replicates, rows, TALL, seed=1) + 0.3)


def particles_first(weighted: bool) -> Outer:
    """As the engine has them, ``[R, K, B, L, features]``: replicates lie inside particles, and inputs may have been weighted."""
    inputs, cotangents = (normal(3, R, 2, 2, width, seed=width).movedim(1, 0) for width in (WIDE, TALL))
    return Outer(inputs.contiguous() if weighted else inputs, cotangents)


def gapped() -> Outer:
    """Views with gaps in every axis."""
    return Outer(normal(2 * R, 3, 4, 2 * WIDE)[::2, :, ::2, ::2], normal(R, 3, 2 * TALL, 2, seed=1).mT[..., ::2])


KINDS: dict[str, Callable[[], Outer]] = {
    **{f"{rows} rows": lambda rows=rows: on_one_axis(rows) for rows in (1, 2, 3, 8, 40)},
    "particles, data, places": lambda: particles_first(weighted=True),
    "particles, data, places in views": lambda: particles_first(weighted=False),
    "one particle, one datum": lambda: Outer(*(normal(1, R, 1, width).movedim(1, 0) for width in (WIDE, TALL))),
    "views with gaps": gapped,
    "one replicate": lambda: on_one_axis(3, replicates=1),
    "one input": lambda: on_one_axis(4).columns(slice(2, 3)),
    "some inputs": lambda: particles_first(weighted=True).columns(slice(1, 6)),
    **{f"shared, {n} rows": lambda n=n: Outer(normal(1, n, WIDE), normal(R, n, TALL, seed=1)) for n in (1, 4, 20)},
    "shared, data and places": lambda: Outer(normal(1, 3, 4, WIDE)[:, :, ::2], normal(R, 3, 2, TALL, seed=1)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def multiplied_out(g: Outer) -> Tensor:
    """``[r, out, in]`` in float64, row by row."""
    a, d = (t.double().reshape(len(t), -1, t.shape[-1]) for t in (g.inputs, g.cotangents))
    made = torch.zeros(len(d), d.shape[-1], a.shape[-1], dtype=torch.float64)
    for n in range(a.shape[1]):
        made += d[:, n, :, None] * a[:, n, None, :]
    return made


def one_by_one(g: Outer, units: slice = slice(None)) -> Tensor:
    return torch.stack([gradient.clone() for gradient in g.each(units)])


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    """Equal to rounding, relative to the largest element."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def wrong(g: Outer, dense: Tensor, tolerance: float = 1e-12) -> set[str]:
    """What factors say of gradients that is not so."""
    direction = normal(*dense.shape[1:], seed=9)
    along, squared = g.projections(direction.to(g.inputs))
    said = {
        "dense": (g.dense(), dense),
        "each": (one_by_one(g), dense),
        "total": (g.total(), dense.sum(0)),
        "squared": (g.squared().total(), dense.square().sum(0)),
        "along": (along, (dense * direction).sum((1, 2))),
        "norms": (squared, dense.square().sum((1, 2))),
        "norms alone": (g.squared_norms(), dense.square().sum((1, 2))),
    }
    return {name for name, (found, wanted) in said.items() if not close(found, wanted, tolerance)}


@kinds
def test_the_cases_are_what_they_are_named_for(kind: str) -> None:
    g = KINDS[kind]()
    assert len(g) == (1 if kind == "one replicate" else R)
    assert g.shared == kind.startswith("shared")
    assert g.shape == multiplied_out(g).shape[1:]
    assert g.rows == g.cotangents[0].numel() // g.shape[0]
    if "views" in kind:
        assert not g.cotangents.is_contiguous()
        assert not g.inputs.is_contiguous()


@kinds
def test_factors_say_of_gradients_what_is_so(kind: str) -> None:
    g = KINDS[kind]()
    assert not wrong(g, multiplied_out(g))
    assert not wrong(g.flat(), multiplied_out(g))
    assert close(g.squared().dense(), multiplied_out(g).square())
    assert g.squared().rows == g.rows * (g.rows + 1) // 2


SEEN = {
    "an input": {"dense", "each", "total", "squared", "along", "norms", "norms alone"},
    "a scaled output": {"dense", "each", "total", "squared", "along", "norms", "norms alone"},
    "a replicate less": {"dense", "each", "total", "squared", "along", "norms", "norms alone"},
    "two replicates exchanged": {"dense", "each", "along", "norms", "norms alone"},
}


@pytest.mark.parametrize("kind", ["1 rows", "3 rows", "particles, data, places in views", "shared, 4 rows"])
@pytest.mark.parametrize("mistake", SEEN)
def test_a_planted_mistake_is_seen(kind: str, mistake: str) -> None:
    g = KINDS[kind]()
    inputs, cotangents = g.inputs.clone(), g.cotangents.clone()
    if mistake == "an input":
        inputs[-1, ..., 3] += 1e-6
    elif mistake == "a scaled output":
        cotangents[..., 2] *= 1 + 1e-6
    elif mistake == "a replicate less":
        inputs, cotangents = (t if len(t) == 1 else t[:-1] for t in (inputs, cotangents))
    elif mistake == "two replicates exchanged":
        order = [1, 0, *range(2, R)]
        inputs, cotangents = (t if len(t) == 1 else t[order] for t in (inputs, cotangents))
    assert wrong(Outer(inputs, cotangents), multiplied_out(g)) == SEEN[mistake]


@kinds
def test_some_outputs_one_gradient_after_the_other(kind: str) -> None:
    g = KINDS[kind]()
    dense = multiplied_out(g)
    for units in (slice(0, 2), slice(2, 5), slice(4, 9)):
        assert close(one_by_one(g, units), dense[:, units])
    assert not close(one_by_one(g, slice(0, 2)), dense[:, 1:3])


@kinds
def test_some_replicates(kind: str) -> None:
    g = KINDS[kind]()
    for replicates in (slice(0, 1), slice(3, 8), slice(0, 100), slice(5, None, 2)):
        if len(dense := multiplied_out(g)[replicates]):
            assert not wrong(g[replicates], dense)
    assert list(g[:0].each()) == []


@kinds
def test_some_inputs(kind: str) -> None:
    g = KINDS[kind]()
    for columns in (slice(0, 1), slice(2, 6), slice(None), slice(None, 4)):
        if (dense := multiplied_out(g)[..., columns]).numel():
            assert not wrong(g.columns(columns), dense)


@pytest.mark.parametrize(
    "one", [kind for kind in KINDS if KINDS[kind]().shape == (TALL, WIDE) and "replicate" not in kind]
)
@pytest.mark.parametrize("other", ["3 rows", "particles, data, places in views", "shared, 4 rows"])
def test_calls_of_a_layer_add_up(one: str, other: str) -> None:
    g, h = KINDS[one](), KINDS[other]()
    assert not wrong(g + h, multiplied_out(g) + multiplied_out(h))
    assert wrong(g + h, multiplied_out(g) + 1.001 * multiplied_out(h))
    assert (g + h).rows == g.rows + h.rows


def test_estimators_stand_side_by_side() -> None:
    g = particles_first(weighted=False)
    weights = [normal(*g.inputs.shape[:-1], 1, seed=seed) for seed in (4, 5)]
    both = Outer(torch.cat([g.inputs * w for w in weights], -1), g.cotangents)
    own = [multiplied_out(Outer(g.inputs * w, g.cotangents)) for w in weights]
    assert not wrong(both, torch.cat(own, -1))
    assert not wrong(both.columns(slice(0, WIDE)), own[0])
    assert not wrong(both.columns(slice(WIDE, 2 * WIDE)), own[1])


def test_every_pair_of_rows_stands_in_a_square_as_often_as_it_should() -> None:
    n, m = pairs_of(4, torch.device("cpu"))
    counted = torch.zeros(4, 4).index_put_((n, m), twice(n, m)[:, 0], accumulate=True)
    assert torch.equal(counted + counted.T, torch.full((4, 4), 2.0))


def single(g: Outer) -> Outer:
    return Outer(g.inputs.float(), g.cotangents.float())


@kinds
def test_single_precision_costs_rounding_only(kind: str) -> None:
    g = single(KINDS[kind]())
    assert not wrong(g, multiplied_out(g), 3e-6)
    assert wrong(g, multiplied_out(KINDS[kind]()) * (1 + 1e-5), 3e-6)


@pytest.mark.parametrize("rows", [(4, 2), (8, 8)])  # from 64 rows on, one gradient is a large product too
@pytest.mark.parametrize("shared", [False, True])
def test_products_large_enough_for_the_other_library(rows: tuple[int, int], shared: bool) -> None:
    inputs, cotangents = normal(1 if shared else 12, *rows, 150), normal(12, *rows, 120, seed=1)
    g = single(Outer(inputs, cotangents))
    assert not wrong(g, multiplied_out(g), 5e-6)
    assert not wrong(g.columns(slice(20, 149)), multiplied_out(g)[..., 20:149], 5e-6)
    assert close(one_by_one(g, slice(7, 119)).double(), multiplied_out(g)[:, 7:119], 5e-6)

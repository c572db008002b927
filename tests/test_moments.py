"""Accumulators against moments of the replicates multiplied out, in float64."""

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import Tensor

from gradiometer.bench import accumulators, moments
from gradiometer.bench.accumulators import (
    Accumulator,
    Cancelled,
    Dense,
    Paired,
    Piece,
    Pilot,
    Shared,
    Traces,
    accumulator,
)
from gradiometer.bench.moments import Moments
from gradiometer.bench.outer import Outer

WIDE, TALL = 6, 5
SLICES = ((0, 2), (2, 6))  # two estimators side by side
PARTS = (range(0, 9), range(9, 20), range(20, 33), range(33, 40))  # the replicates of each shard
QUARTERS = tuple(range(start, start + 128) for start in range(0, 512, 128))
Block = Tensor | Outer
Parts = tuple[range, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(replicates: int = 40) -> Tensor:
    return 0.3 + normal(replicates, WIDE)


def rows(n: int, replicates: int = 40) -> Outer:
    return Outer(0.5 + normal(replicates, n, WIDE), 0.3 + normal(replicates, n, TALL, seed=1))


def shared(n: int, replicates: int = 40) -> Outer:
    return Outer(normal(1, n, WIDE), 0.3 + normal(replicates, n, TALL, seed=1))


def on_two_axes(g: Outer) -> Outer:
    """As particles and data are."""
    return Outer(*(t.unflatten(1, (2, -1)).transpose(1, 2) for t in (g.inputs, g.cotangents)))


def multiplied_out(g: Block) -> Tensor:
    """``[r, *shape]`` in float64."""
    if isinstance(g, Tensor):
        return g.double()
    a, d = (t.double().reshape(len(t), -1, t.shape[-1]) for t in (g.inputs, g.cotangents))
    return torch.einsum("rno,rni->roi", d, a.expand(len(d), -1, -1))


def single(g: Block) -> Block:
    return g.float() if isinstance(g, Tensor) else Outer(g.inputs.float(), g.cotangents.float())


# Accumulators of every kind, about nothing or about something near the mean that is not the mean.

Make = Callable[[Block], Accumulator]


def dense(g: Block) -> Accumulator:
    return Dense(g, 4, SLICES)


def off_centre(g: Block) -> Tensor:
    return (0.1 + multiplied_out(g)[:5].mean(0)).to(g if isinstance(g, Tensor) else g.inputs)


def about_a_pilot(g: Block) -> Accumulator:
    return Dense(g, 4, SLICES, Pilot(off_centre(g)))


def about_columns(g: Block) -> Accumulator:
    return Dense(g, 4, SLICES, Pilot(off_centre(g) * torch.tensor([0, 1, 0, 0, 1, 0]), (1, 4)))


def paired(g: Outer) -> Accumulator:
    return Paired(g, 4, SLICES)


def about_a_centre(g: Outer) -> Accumulator:
    return Paired(g, 4, SLICES, Outer(*(0.1 + t[:5].mean(0, keepdim=True) for t in (g.inputs, g.cotangents))))


def of_shared(g: Outer) -> Accumulator:
    return Shared(g, 4, SLICES)


def traces(g: Block) -> Accumulator:
    return Traces(g, 4, SLICES)


def automatic(g: Block) -> Accumulator:
    return accumulator(g, 4, SLICES)


KINDS: dict[str, tuple[Callable[[], Block], Make]] = {
    **{f"{make.__name__}, tensors": (tensors, make) for make in (dense, about_a_pilot, traces)},
    **{f"{make.__name__}, 3 rows": (lambda: rows(3), make) for make in (dense, about_a_pilot, about_columns, traces)},
    **{f"{make.__name__}, 40 rows": (lambda: rows(40), make) for make in (dense, about_a_pilot, about_columns, traces)},
    **{f"paired, {n} rows": (lambda n=n: rows(n), paired) for n in range(1, 6)},
    **{f"about_a_centre, {n} rows": (lambda n=n: rows(n), about_a_centre) for n in range(1, 6)},
    **{f"shared, {n} rows": (lambda n=n: shared(n), of_shared) for n in (1, 4, 20)},
    **{f"{make.__name__}, 6 shared rows": (lambda: shared(6), make) for make in (dense, traces)},
    **{f"{make.__name__}, two axes": (lambda: on_two_axes(rows(4)), make) for make in (dense, paired, traces)},
    "shared, two axes": (lambda: on_two_axes(shared(4)), of_shared),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def folded(g: Block, make: Make, cut: int = 16, parts: Parts = PARTS) -> Accumulator:
    """All replicates, in chunks of `cut` that are cut again where a shard ends."""
    sums = make(g[:16])
    for start in range(0, len(g), cut):
        ends = [(max(start, part.start), min(start + cut, part.stop)) for part in parts]
        pieces = [Piece(i, slice(first - start, last - start)) for i, (first, last) in enumerate(ends) if first < last]
        if pieces:
            sums.fold(g[start : start + cut], pieces)
    return sums


def of_each(sums: Accumulator) -> list[Moments]:
    return [sums.moments(slice(a, b), torch.Size((*sums.shape[:-1], b - a))) for a, b in SLICES]


def sums_of(each: Tensor) -> list[float]:
    """What `Sums` holds of replicates ``[r, P]``."""
    g = each.numpy()
    noisy = (g != g[0]).any(0)
    mean, variance = g.mean(0), g.var(0, ddof=1)
    ratio = np.abs(mean[noisy]) / np.sqrt(variance[noisy])
    return [len(g), (mean**2).sum(), variance[noisy].sum(), noisy.sum(), ratio.sum(), (ratio**2).sum()]


def wrong(sums: Accumulator, g: Block, tolerance: float, parts: Parts = PARTS) -> set[str]:
    """What the moments of both estimators say that is not so, relative to a coordinate's own mean and variance."""
    found: set[str] = set()
    known = slice(3 if isinstance(sums, Traces) else None)  # of traces, no coordinate's variance
    for m, of in zip(of_each(sums), SLICES, strict=True):
        each = multiplied_out(g)[..., slice(*of)]
        mean, variance, flat = each.mean(0).numpy(), each.var(0).numpy(), each.flatten(1)
        over_all = np.array(sums_of(flat)[known])
        without = np.array([sums_of(torch.cat([flat[: p.start], flat[p.stop :]]))[known] for p in parts])
        said = {
            "mean": (m.pooled.mean, mean, np.abs(mean) + np.sqrt(variance)),
            "variance": (m.pooled.variance, variance, variance),
            "sums": (np.array(astuple(m.sums)[known]), over_all, np.abs(over_all)),
            "without": (np.array([astuple(s)[known] for s in m.without]), without, np.abs(without)),
        }
        assert all(value.shape == wanted.shape for value, wanted, _ in said.values())
        found |= {
            name for name, (value, wanted, by) in said.items() if not (abs(value - wanted) <= tolerance * by).all()
        }
    return found - ({"variance"} if isinstance(sums, Traces) else set())


@pytest.fixture(params=["one by one", "many at once"])
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How gradients are multiplied out; many at once, two of them."""
    if request.param == "many at once":
        monkeypatch.setattr(accumulators, "_one_by_one", accumulators._many_at_once)
        monkeypatch.setattr(accumulators, "GPU_AT_ONCE", 2 * rows(3).shape.numel())
    return request.param


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("tiny", [False, True])
@kinds
def test_moments_are_those_of_the_replicates(kind: str, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {(moments, "TILE"): 4, (accumulators, "LARGE"): 8, (accumulators, "PAIRED"): 7}
    for (module, name), size in sizes.items() if tiny else ():  # so that everything is made in parts
        monkeypatch.setattr(module, name, size)
    replicates, make = KINDS[kind]
    g = replicates()
    for cut in (1, 3, 16, 40):
        sums = folded(g, make, cut)
        assert not wrong(sums, g, 1e-10)
        assert sums.count.tolist() == [len(part) for part in PARTS]
        for upto in (1, 2, 4):
            wanted = multiplied_out(g)[: PARTS[upto - 1].stop].mean(0)
            torch.testing.assert_close(sums.mean(upto), wanted, rtol=0, atol=1e-11)
        assert not wrong(sums, g, 1e-10)  # to be asked changes nothing


@kinds
def test_inner_products_tell_the_means_of_shards_apart(kind: str) -> None:
    """Each may lack the same multiple of its replicates, the pilot's product."""
    replicates, make = KINDS[kind]
    g = replicates()
    sums = folded(g, make)
    for a, b in SLICES:
        direction = (
            torch.linspace(-1, 2, multiplied_out(g)[0, ..., a:b].numel()).double().reshape(*sums.shape[:-1], b - a)
        )
        found = sums.along(direction, slice(a, b), 3) / sums.count[:3]
        wanted = [float((multiplied_out(g)[p.start : p.stop, ..., a:b].mean(0) * direction).sum()) for p in PARTS[:3]]
        np.testing.assert_allclose(found - found[0], np.array(wanted) - wanted[0], atol=1e-10)


@kinds
def test_single_precision_costs_rounding_only(kind: str) -> None:
    replicates, make = KINDS[kind]
    sums = folded(single(replicates()), make)
    assert not wrong(sums, single(replicates()), 2e-6)
    assert wrong(sums, replicates(), 1e-10)


@pytest.mark.parametrize("mistake", ["a noise entry", "a scaled layer", "a replicate less", "not a number"])
@kinds
def test_a_planted_mistake_is_seen(kind: str, mistake: str) -> None:
    replicates, make = KINDS[kind]
    g, parts = replicates(), PARTS
    of_noise = g if isinstance(g, Tensor) else g.cotangents
    if mistake == "a noise entry":
        of_noise[17, ..., 2] += 1e-6
    elif mistake == "a scaled layer":
        of_noise *= 1 + 1e-8
    elif mistake == "not a number":
        of_noise[25, ..., 2] = torch.nan
    elif mistake == "a replicate less":
        g, parts = g[:-1], (*PARTS[:-1], range(33, 39))
    sums = folded(g, make, parts=parts)
    seen = {"mean", "sums", "without"} | (set() if isinstance(sums, Traces) else {"variance"})
    assert wrong(sums, replicates(), 1e-10) == seen


def once_each(kind: str) -> bool:
    """Whether each gradient is multiplied out, once, so that it is projected then."""
    return kind.startswith(("dense", "about")) and kind.endswith("40 rows")


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("wanted", [1, 7, 11])
@kinds
def test_projections_are_those_of_the_gradients(kind: str, wanted: int) -> None:
    replicates, make = KINDS[kind]
    g = replicates()
    direction, sums = normal(*multiplied_out(g).shape[1:], seed=7), make(g[:16])
    for number, part in enumerate(PARTS):
        own = g[part.start : part.stop]
        piece = Piece(number, slice(0, len(own)), wanted if number == 1 else 0)
        found = sums.fold(own, [piece], direction if number == 1 else None)
        assert set(found) == (set(SLICES) if number == 1 and once_each(kind) else set())
        if number == 1 and not found:
            found = sums.projections(own[:wanted], direction)
        for of, (along, squared) in found.items():
            each = multiplied_out(own)[:wanted, ..., slice(*of)].flatten(1)
            torch.testing.assert_close(along, each @ direction[..., slice(*of)].flatten(), rtol=0, atol=1e-11)
            torch.testing.assert_close(squared, each.square().sum(1), rtol=1e-12, atol=0)
    assert not wrong(sums, g, 1e-10)  # to project changes nothing


# Which accumulator, and what it is there for.


def chosen(g: Block, **options: bool) -> str:
    found = accumulator(g[:16], 4, SLICES, **options)
    if isinstance(found, Paired):
        return "Paired" if found.centre is None else "Paired about a centre"
    if isinstance(found, Dense) and found.pilot is not None:
        return "Dense about a pilot" if found.pilot.columns is None else f"Dense about columns {found.pilot.columns}"
    return type(found).__name__


def cancelling(g: Outer, closeness: float) -> Outer:
    """In single precision, every row once more, nearly, with the opposite cotangent."""
    again = g.inputs + closeness * normal(*g.inputs.shape, seed=8)
    return single(Outer(torch.cat([g.inputs, again], 1), torch.cat([g.cotangents, -g.cotangents], 1)))


def with_a_bias(g: Outer) -> Outer:
    """The third input is one in every row and the cotangents are steady: a column that needs a pilot."""
    inputs = g.inputs.clone()
    inputs[..., 2] = 1
    return Outer(inputs, 1 + 1e-3 * g.cotangents)


def test_the_accumulator_follows_the_first_replicates() -> None:
    for n in range(1, 6):
        assert chosen(rows(n)) == "Paired"
        assert chosen(with_a_bias(rows(n))) == "Paired about a centre"
        assert chosen(rows(n)[:3]).startswith("Dense")  # too few to tell whether terms cancel
        assert chosen(rows(n), traces=True) == "Traces"
    for n in (6, 40):
        assert chosen(rows(n)) == "Dense"
        assert chosen(with_a_bias(rows(n))) == "Dense about columns (2,)"
    assert chosen(rows(32), traces=True) == "Traces"
    assert chosen(rows(33), traces=True) == "Dense"  # inner products of so many rows cost more than gradients
    for n in (1, 4, 20, 32):
        assert chosen(shared(n)) == chosen(shared(n), traces=True) == "Shared"
    assert chosen(shared(33)) == "Dense"
    for few, many in ((rows(1), "Paired"), (rows(2), "Paired"), (shared(4), "Shared")):
        assert chosen(cancelling(few, 0.1)) == many
        assert chosen(cancelling(few, 1e-4)) == "Dense"
    assert chosen(tensors()) == chosen(tensors(), traces=True) == "Dense"
    assert chosen(1e4 + tensors()) == "Dense about a pilot"
    assert chosen(rows(3)[:1]) == "Dense about columns (0, 1, 2, 3, 4, 5)"  # of one replicate, nothing is known
    many_columns = Outer(torch.ones(16, 6, 9).double(), 1 + 1e-3 * rows(6).cotangents[:16])
    assert chosen(many_columns) == "Dense about a pilot"


def steady(n: int, share: bool) -> Block:
    """In single precision, a mean some ten thousand times the noise."""
    if n == 0:
        return (1e4 + normal(512, WIDE)).float()
    inputs = 1 + (0.3 if share else 1e-4) * normal(1 if share else 512, n, WIDE)
    return single(Outer(inputs, 1 + 1e-4 * normal(512, n, TALL, seed=1)))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 8, 20, 40])  # none are tensors
@pytest.mark.parametrize("share", [False, True])
def test_a_mean_ten_thousand_times_the_noise_keeps_its_variance_in_single_precision(n: int, share: bool) -> None:
    g = steady(n, share)
    each = multiplied_out(g)
    assert float((each.mean(0) / each.std(0)).abs().min()) > 5000
    sums = folded(g, automatic, parts=QUARTERS)
    assert not wrong(sums, g, 5e-3, QUARTERS)
    torch.testing.assert_close(sums.mean(4).double(), each.mean(0), rtol=1e-6, atol=0)
    assert wrong(folded(g, dense, parts=QUARTERS), g, 0.5, QUARTERS) >= {"variance", "sums", "without"}  # no pilot


CANCELLING = {"own": (rows, paired), "shared": (shared, of_shared)}


@pytest.mark.parametrize("kind", CANCELLING)
@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_rows_that_cancel_keep_their_variance_in_single_precision(n: int, kind: str) -> None:
    make, pairs = CANCELLING[kind]
    g = cancelling(make(n, 512), 1e-4)
    assert not wrong(folded(g, automatic, parts=QUARTERS), g, 5e-3, QUARTERS)
    assert "variance" in wrong(folded(g, pairs, parts=QUARTERS), g, 0.1, QUARTERS)


def norms_off(g: Outer, **options: bool) -> tuple[float, float]:
    """Relative errors of the squared norms of the last replicates, and of the trace of the variance."""
    sums, each = accumulator(g[:16], 4, SLICES, **options), multiplied_out(g)
    for number, part in enumerate(QUARTERS):
        own = g[part.start : part.stop]
        piece, towards = Piece(number, slice(0, len(own)), 128), each[0].float()
        found = sums.fold(own, [piece], towards) or sums.projections(own, towards)
    squared, trace = sum(squared for _, squared in found.values()), sum(m.sums.variance for m in of_each(sums))
    return float((squared / each[384:].square().sum((1, 2)) - 1).abs().max()), abs(trace / float(each.var(0).sum()) - 1)


@pytest.mark.parametrize("kind", CANCELLING)
@pytest.mark.parametrize("n", [1, 3, 20])
def test_rows_that_cancel_keep_their_norms_in_single_precision(n: int, kind: str) -> None:
    make, _ = CANCELLING[kind]
    assert max(norms_off(cancelling(make(n, 512), 0.1))) < 1e-3
    assert max(norms_off(cancelling(make(n, 512), 1e-4))) < 5e-2


@pytest.mark.parametrize("n", [1, 3, 20])
def test_traces_of_rows_that_cancel_are_right_or_refused(n: int) -> None:
    for closeness in (0.1, 1e-2, 1e-3, 1e-4, 1e-5):
        try:
            _, off = norms_off(cancelling(rows(n, 512), closeness), traces=True)
        except Cancelled:
            continue
        assert off < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 6, 40])
def test_traces_of_a_steady_gradient_are_right_or_refused(n: int, dtype: torch.dtype) -> None:
    refused = set()
    for ratio in (1.0, 10.0, 50.0, 100.0, 1e3, 1e4):  # of the mean to the noise of a row
        factors = [(1 + normal(512, max(n, 1), width, seed=width) / ratio).to(dtype) for width in (WIDE, TALL)]
        g = Outer(*factors) if n else factors[0][:, 0]
        sums = folded(g, traces, parts=QUARTERS)
        try:
            assert not wrong(sums, g, 1e-2, QUARTERS)
        except Cancelled:
            refused.add(ratio)
    assert not refused & {1.0, 10.0}
    assert refused >= {1e3, 1e4} if dtype == torch.float32 else not refused


@pytest.mark.parametrize("tile", [4, 2**16])
def test_large_gradients_keep_their_variance_in_single_precision(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "TILE", tile)
    g = (1e17 * (1 + normal(512, WIDE))).float()
    sums = folded(g, dense, parts=QUARTERS)
    for m in of_each(sums):
        trace = m.pooled.variance.sum()
        assert trace > 1e34
        assert abs(m.sums.variance / trace - 1) < 1e-5
        assert all(abs(of.variance / trace - 1) < 0.2 for of in m.without)


def test_moments_do_not_change_with_the_data() -> None:
    g = single(shared(1))
    m = folded(g, of_shared).moments()
    before = m.pooled.mean.copy()
    g.inputs.zero_()
    np.testing.assert_array_equal(m.pooled.mean, before)


def test_no_pilot_spoils_double_precision() -> None:
    g = tensors()
    g[0] += 1e3  # the first replicate is an outlier, and the only one that is known
    sums = folded(g, lambda beginning: automatic(beginning[:1]))
    assert chosen(g[:1]) == "Dense about a pilot"
    assert not wrong(sums, g, 1e-8)


# Coordinates without noise, and replicates without a number.


def constant(n: int, share: bool, seed: int, scale: float) -> Block:
    """Gradients of which some coordinates are the same in every replicate."""
    values = scale * normal(2, max(n, 1), seed=seed + 100)
    if n == 0:
        g = normal(512, WIDE, seed=seed)
        g[:, [2, 4]] = values[:, 0]
        return g
    inputs, cotangents = normal(1 if share else 512, n, WIDE, seed=seed), normal(512, n, TALL, seed=seed + 1)
    inputs[:, :, 3], cotangents[:, :, 4] = values
    return Outer(inputs, cotangents)


STEADIES = [(0, False), (1, True), (8, False), (40, False), (40, True)]
PAIRS = [(1, False), (3, False), (5, False), (4, True), (20, True)]


@pytest.mark.parametrize(("n", "share"), [*STEADIES, *PAIRS])
def test_coordinates_that_are_zero_have_no_noise(n: int, share: bool) -> None:
    g = single(constant(n, share, seed=0, scale=0))
    assert not wrong(folded(g, automatic, parts=QUARTERS), g, 1e-3, QUARTERS)
    assert sum(m.sums.noisy for m in of_each(folded(g, automatic, parts=QUARTERS))) == (4 if n == 0 else 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "share"), [*STEADIES, *PAIRS])
def test_coordinates_that_never_change_have_no_noise(n: int, share: bool, dtype: torch.dtype) -> None:
    for seed in range(10):
        g = constant(n, share, seed, scale=1)
        g = single(g) if dtype == torch.float32 else g
        assert not wrong(folded(g, lambda beginning: automatic(beginning[:11]), parts=QUARTERS), g, 5e-3, QUARTERS)


def not_finite(sums: Accumulator) -> list[int | None]:
    """Per estimator, the shard in which a gradient is not finite."""
    fine = [np.isfinite(m.sums.variance) for m in of_each(sums)]
    return [None if good else sums.first_not_finite(slice(*of)) for of, good in zip(SLICES, fine, strict=True)]


def spoilt(kind: str, replicate: int) -> Accumulator:
    """The second estimator's gradient is not a number in one replicate; of shared inputs, both are not."""
    replicates, make = KINDS[kind]
    g = replicates()
    changed = g if isinstance(g, Tensor) else g.cotangents if g.shared else g.inputs
    changed[replicate, ..., 4] = torch.nan
    return folded(g, make)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_is_found_in_its_shard(kind: str) -> None:
    of_first = 2 if "shared" in kind else None
    assert not_finite(spoilt(kind, 25)) == [of_first, 2]
    replicates, make = KINDS[kind]
    assert not_finite(folded(replicates(), make)) == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_from_the_beginning_is_found_in_its_shard(kind: str) -> None:
    assert not_finite(spoilt(kind, 12)) == [1 if "shared" in kind else None, 1]


@pytest.mark.parametrize("n", [0, 1, 8])
def test_a_pilot_does_not_hide_where_a_gradient_is_not_a_number(n: int) -> None:
    g = steady(n, share=False)
    (g if isinstance(g, Tensor) else g.inputs)[12, ..., 4] = torch.nan
    assert not_finite(folded(g, automatic)) == [None, 1]


def test_a_parameter_without_axes_has_its_own_shape() -> None:
    m = folded(tensors(), dense).moments(slice(0, 1), torch.Size([]))
    assert m.pooled.mean.shape == m.pooled.variance.shape == ()

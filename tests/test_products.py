"""Products by either library against float64, and the precision that is held while measuring."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradiometer.bench import products
from gradiometer.bench.products import SMALL, fast_forward, full_precision, multiplier, product

SIZES = [(3, 5, 4), (1, 40, 1), (40, 1, 30), (130, 120, 140), (2000, 1, 600), (5, 300, 900)]  # m, k, n
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "gaps between rows": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "gaps between elements": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "every other row": lambda t: torch.stack([t, t + 1], 1)[:, 0],
    "one row for all": lambda t: t[:1].expand_as(t),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def off(found: Tensor, left: Tensor, right: Tensor) -> float:
    """The largest difference from ``left @ right.T``, in roundings of the norms of the two rows."""
    wanted = torch.einsum("mk,nk->mn", left.double(), right.double())
    scale = torch.outer(left.double().norm(dim=1), right.double().norm(dim=1)) * torch.finfo(found.dtype).eps
    return float(((found.double() - wanted).abs() / scale).max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that oneDNN is given from here on."""
    true, seen = products._onednn, []

    def spy(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(inputs.shape)
        return true(inputs, weight, bias)

    products._has_onednn(torch.float32, "cpu")  # found out once
    monkeypatch.setattr(products, "_onednn", spy)
    return seen


def is_large(*sizes: int) -> bool:
    """Whether oneDNN is expected to be used, where torch has it."""
    return torch.Size(sizes).numel() >= SMALL and products._has_onednn(torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_one_whatever_the_layout(
    calls: list[torch.Size], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    m, k, n = size
    left, right = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1)
    for first in LAYOUTS.values():
        for second in LAYOUTS.values():
            a, b = first(left), second(right)
            assert off(product(a, b), a, b) < 16
    used = dtype == torch.float32 and is_large(m, k, n)
    assert len(calls) == (len(LAYOUTS) ** 2 if used else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_multiplier_does_the_same_for_many(
    calls: list[torch.Size], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    m, k, n = size
    left, right = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1)
    multiply, place = multiplier(m, k, n, left), left.new_empty(m, n)
    for first in LAYOUTS.values():
        for second in (right, right.T.contiguous().T):
            a = first(left)
            assert off(multiply(a, second, place), a, second) < 16
    assert bool(calls) == (dtype == torch.float32 and is_large(m, k, n))


def test_rounded_operands_and_a_changed_entry_are_seen() -> None:
    left, right = normal(130, 120), normal(140, 120, seed=1)
    assert off(product(left.bfloat16().float(), right.bfloat16().float()), left, right) > 1000
    changed = left.clone()
    changed[17, 3] += 1e-4
    assert off(product(changed, right), left, right) > 16


# The fast layer.


def layer(wide: int, tall: int, bias: bool = True) -> nn.Linear:
    made = nn.Linear(wide, tall, bias=bias)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number) / wide**0.5)
    return made


def fast(own: nn.Linear) -> Callable[[Tensor], Tensor]:
    forward = fast_forward(own)
    if forward is None:
        pytest.skip("this build of torch has no oneDNN")
    return forward


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> bool:
    """Equal to rounding in float32, relative to the largest element."""
    assert found.shape == wanted.shape
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


SHAPES = [(4, 100), (64, 100), (2, 3, 2, 100), (4, 8, 5, 100)]  # the second and the last are large


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fast_layer_gives_what_the_layer_gives(calls: list[torch.Size], shape: tuple[int, ...], bias: bool) -> None:
    own = layer(100, 200, bias)
    forward, inputs = fast(own), normal(*shape).requires_grad_()
    cotangents = normal(*shape[:-1], 200, seed=3)
    found, wanted = forward(inputs), own(inputs)
    assert close(found, wanted)
    slopes = (torch.autograd.grad(made, inputs, cotangents)[0] for made in (found, wanted))
    assert close(*slopes)
    large = is_large(inputs.numel(), 200)
    assert len(calls) == (2 if large else 0)  # there and back
    assert not close(forward(inputs + 1e-4), wanted)
    for strided in (inputs.movedim(0, -2), inputs[:1].expand_as(inputs), normal(*shape[:-1], 200)[..., ::2]):
        assert close(forward(strided), own(strided))


def test_gradients_are_carried_back_side_by_side(calls: list[torch.Size]) -> None:
    """As through a guide's networks: the graph is made once, and every replicate has cotangents of its own."""
    first, last = layer(100, 200), layer(200, 60)
    cotangents, x = normal(7, 30, 60), normal(30, 100, seed=5).requires_grad_()

    def carried(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        hidden = one(x)
        made = other(hidden.tanh())

        def back(slope: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(made, (hidden, x), slope, retain_graph=True)

        return torch.func.vmap(back)(cotangents)

    for found, wanted in zip(carried(fast(first), fast(last)), carried(first, last), strict=True):
        assert close(found, wanted)
        assert not close(found.roll(1, 0), wanted)
    assert torch.Size([7, 30, 60]) in calls  # all replicates at once


def test_a_fast_layer_is_differentiated_twice() -> None:
    own, inputs = layer(100, 200), normal(64, 100).requires_grad_()

    def second(forward: Callable[[Tensor], Tensor]) -> Tensor:
        (slope,) = torch.autograd.grad(forward(inputs).tanh().square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), inputs)[0]

    assert close(second(fast(own)), second(own), 1e-5)


def test_parameters_get_no_gradient_and_outputs_ask_for_theirs() -> None:
    own, inputs = layer(100, 200), normal(64, 100)
    made = fast(own)(inputs)  # of data, which ask for none
    assert made.requires_grad
    (slope,) = torch.autograd.grad(made.square().sum(), made)
    assert close(slope, 2 * made.detach())
    fast(own)(inputs.requires_grad_()).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is None for parameter in own.parameters())
    own(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in own.parameters())
    with torch.no_grad():
        assert not fast(own)(inputs).requires_grad


def test_small_layers_and_double_precision_are_left_to_torch() -> None:
    assert fast_forward(layer(31, 33)) is None
    assert fast_forward(layer(100, 200).double()) is None
    assert (fast_forward(layer(32, 32)) is not None) == products._has_onednn(torch.float32, "cpu")


# Precision.


def places() -> dict[str, Any]:
    """Where torch keeps the precision of products, by operation."""
    b: Any = torch.backends
    return {
        "matmul": b.cuda.matmul,
        "conv": b.cudnn.conv,
        "rnn": b.cudnn.rnn,
        "cpu": b.mkldnn.matmul,
        "cpu conv": b.mkldnn.conv,
    }


def by_place() -> dict[str, str]:
    return {name: place.fp32_precision for name, place in places().items()}


def by_old_names() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from torch 2.9 on


@pytest.fixture
def settings() -> Iterator[None]:
    old, new = by_old_names(), by_place() if NEW else {}
    yield
    torch.set_float32_matmul_precision(old[0])
    torch.backends.cudnn.allow_tf32 = old[1]
    for name, precision in new.items():
        places()[name].fp32_precision = precision


def is_full() -> bool:
    return set(by_place().values()) == {"ieee"} if NEW else by_old_names() == ("highest", False)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("found", [("highest", False), ("high", True), ("medium", True), ("medium", False)])
def test_precision_is_full_inside_and_as_it_was_outside(found: tuple[str, bool]) -> None:
    torch.set_float32_matmul_precision(found[0])
    torch.backends.cudnn.allow_tf32 = found[1]
    left, right, before = normal(130, 120), normal(140, 120, seed=1), by_place() if NEW else {}
    assert is_full() == (not NEW and found == ("highest", False))
    with full_precision():
        assert is_full()
        with full_precision():
            assert is_full()
        assert is_full()
        assert off(product(left, right), left, right) < 16
    assert by_old_names() == found
    assert (by_place() if NEW else {}) == before

    def broken() -> None:
        with full_precision():
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        broken()
    assert by_old_names() == found
    assert (by_place() if NEW else {}) == before


@pytest.mark.skipif(not NEW, reason="this torch has one way to set it")
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("place", ["matmul", "conv", "rnn", "cpu"])
def test_precision_may_have_been_set_place_by_place(place: str) -> None:
    places()[place].fp32_precision = "tf32"
    before = by_place()
    with full_precision():
        assert is_full()
    assert by_place() == before
    assert before[place] == "tf32"


@pytest.mark.parametrize("found", [True, False])
def test_convolutions_are_repeatable_inside_and_as_they_were_outside(
    found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", not found)
    monkeypatch.setattr(cudnn, "benchmark", found)
    with full_precision():
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == (not found, found)

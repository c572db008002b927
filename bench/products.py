"""Matrix products in full precision, by the faster of torch's two libraries.

On a processor of another make than its own, MKL falls back to half of the vector width that oneDNN uses: twice the time for every
product of some size. Small ones stay with MKL, which is called at less cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**20  # multiplications below which calling oneDNN costs more than it gains


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of matrices ``[m, k]`` and ``[n, k]``."""
    if left.shape[0] * right.numel() < SMALL or not _has_onednn(left.dtype, left.device.type):
        return torch.mm(left, right.T)
    # A weight with gaps between its rows would be copied element by element.
    dense = right.is_contiguous() or right.T.is_contiguous()
    return _onednn(left, right if dense else right.contiguous(), None)


def multiplier(m: int, k: int, n: int, like: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`product` of many matrices of one size: a function of both (the second without gaps) and of a place for the result."""
    if m * k * n >= SMALL and _has_onednn(like.dtype, like.device.type):
        return lambda left, right, place: _onednn(left, right, None)
    return lambda left, right, place: torch.mm(left, right.T, out=place)


@functools.cache
def _has_onednn(dtype: torch.dtype, device: str) -> bool:
    """Whether this build of torch has the operation, and it does what we take it for."""
    if dtype != torch.float32 or device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    left, right, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        return torch.equal(_onednn(left, right, bias), left @ right.T + bias)
    except (AttributeError, RuntimeError):
        return False


def _onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return made


class _Linear(torch.autograd.Function):
    """A linear layer that is differentiated by its inputs alone: the weight's gradient is made from the output's."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        if inputs.dim() > 1 and inputs.numel() * weight.shape[0] >= SMALL:
            return _onednn(inputs, weight, bias)
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        _, weight, transposed, _ = inputs
        ctx.save_for_backward(weight, transposed)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        weight, transposed = ctx.saved_tensors
        return _Linear.apply(slope, transposed, weight, None), None, None, None

    @staticmethod
    def vmap(info: Any, axes: Any, inputs: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Any:
        return _Linear.apply(inputs.movedim(axes[0], 0), weight, transposed, bias), 0


def fast_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """The layer's forward pass by oneDNN, without gradients of its parameters; None where torch's own is as good."""
    weight, own = layer.weight.detach(), layer._parameters["bias"]
    bias = None if own is None else own.detach()
    if weight.numel() * 1024 < SMALL or not _has_onednn(weight.dtype, weight.device.type):
        return None
    transposed = weight.T.contiguous()

    def forward(inputs: Tensor) -> Tensor:
        made: Tensor = _Linear.apply(inputs, weight, transposed, bias)
        if torch.is_grad_enabled() and not made.requires_grad:
            made.requires_grad_()  # as if by the weight
        return made

    return forward


@contextmanager
def full_precision() -> Iterator[None]:
    """While open, no product is rounded to TF32 or bfloat16, or a variance would be that of the rounding.

    Nor does cuDNN choose how to convolve by what is fastest today: the same seed gives the same bits.
    """
    backends: Any = torch.backends
    with ExitStack() as as_it_was:

        def change(place: Any, name: str, value: object) -> None:
            as_it_was.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        change(backends.cudnn, "deterministic", True)
        change(backends.cudnn, "benchmark", False)
        if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
            as_it_was.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            change(backends.cudnn, "allow_tf32", False)
        else:
            cpu, gpu = backends.mkldnn, backends.cudnn
            for place in (backends.cuda.matmul, cpu.matmul, gpu.conv, gpu.rnn, cpu.conv):
                change(place, "fp32_precision", "ieee")
        yield

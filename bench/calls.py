"""What a call of a layer contributes to the gradients of its parameters: the factors of an outer product, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn
from torch.nn.functional import one_hot, unfold


@dataclass(frozen=True)
class Factors:
    """A weight's gradient as the sum over rows of ``cotangents (outer) inputs``: ``[*rows, L, in]``, ``[*rows, L, out]``.

    ``L`` counts the places where a row uses the weight (one, but for convolutions). A `bias` is the weight of one more input,
    which is always one.
    """

    weight: Tensor
    inputs: Tensor
    cotangents: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A layer, what it was given, and what it gave; `number` counts the calls of a pass."""

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    number: int = 0

    @property
    def rows(self) -> Size:
        """The leading axes of the call, over which its gradient is a sum."""
        events = 3 if isinstance(self.layer, nn.Conv2d | nn.ConvTranspose2d) else 1
        return self.output.shape[:-events]

    def factors(self, slope: Tensor) -> list[Factors]:
        """From the gradient `slope` of the output, with the call's rows or more axes before them."""
        return LAYERS[type(self.layer)](self.layer, self.inputs, slope)


def known(layer: nn.Module) -> bool:
    """Whether gradients of the layer's parameters can be made from its calls."""
    if layer._parameters.get("weight") is None:  # made from other parameters, as by spectral_norm
        return False
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return type(layer) in LAYERS and layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and layer.padding_idx is None and not layer.scale_grad_by_freq
    return type(layer) in LAYERS


def _linear(layer: nn.Linear, inputs: Tensor, slope: Tensor) -> list[Factors]:
    return [Factors(layer.weight, inputs.unsqueeze(-2), slope.unsqueeze(-2), layer.bias)]


def _convolution(layer: nn.Conv2d, inputs: Tensor, slope: Tensor) -> list[Factors]:
    return [Factors(layer.weight, _patches(layer, inputs), slope.flatten(-2).mT, layer.bias)]


def _transposed_convolution(layer: nn.ConvTranspose2d, inputs: Tensor, slope: Tensor) -> list[Factors]:
    made = [Factors(layer.weight, _patches(layer, slope), inputs.flatten(-2).mT)]
    if layer.bias is not None:
        places = slope.flatten(-2).mT  # [*rows, L, out]
        made.append(Factors(layer.bias, torch.ones_like(places[..., :1]), places))
    return made


def _embedding(layer: nn.Embedding, inputs: Tensor, slope: Tensor) -> list[Factors]:
    chosen = one_hot(inputs, layer.num_embeddings).to(slope.dtype)
    return [Factors(layer.weight, slope.unsqueeze(-2), chosen.unsqueeze(-2))]


def _patches(layer: nn.Conv2d | nn.ConvTranspose2d, images: Tensor) -> Tensor:
    """What each place of the smaller image sees of the larger one, ``[*rows, L, channels * kernel]``."""
    assert not isinstance(layer.padding, str) or layer.padding == "valid"
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    flat = images.reshape(-1, *images.shape[-3:])
    patches = unfold(flat, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.mT.reshape(*images.shape[:-3], patches.shape[-1], patches.shape[-2])


LAYERS: dict[type[nn.Module], Callable[..., list[Factors]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed_convolution,
    nn.Embedding: _embedding,
}

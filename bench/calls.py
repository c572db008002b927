"""What a call of a layer contributes to the gradients of its parameters: the factors of an outer product, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn
from torch.nn.functional import batch_norm, group_norm, layer_norm, one_hot, unfold


@dataclass(frozen=True)
class Factors:
    """A weight's gradient as the sum over rows of ``cotangents (outer) inputs``: ``[*rows, L, out]``, ``[*rows, L, in]``.

    ``L`` counts the places where a row uses the weight (one, but for convolutions). The gradient of a `bias`, or of any parameter
    with a component for each output, is the sum of the cotangents alone; then there may be no weight.
    """

    cotangents: Tensor
    bias: Tensor | None = None
    weight: Tensor | None = None
    inputs: Tensor | None = None


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
        if isinstance(self.layer, nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            return self.output.shape[:1]
        events = len(self.layer.normalized_shape) if isinstance(self.layer, nn.LayerNorm) else 1
        events = 3 if isinstance(self.layer, nn.Conv2d | nn.ConvTranspose2d) else events
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
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):  # by the statistics of a batch it would mix its rows
        return type(layer) in LAYERS and not layer.training and layer.running_mean is not None
    return type(layer) in LAYERS


def _linear(layer: nn.Linear, inputs: Tensor, slope: Tensor) -> list[Factors]:
    return [Factors(slope.unsqueeze(-2), layer.bias, layer.weight, inputs.unsqueeze(-2))]


def _convolution(layer: nn.Conv2d, inputs: Tensor, slope: Tensor) -> list[Factors]:
    return [Factors(slope.flatten(-2).mT, layer.bias, layer.weight, _patches(layer, inputs))]


def _transposed_convolution(layer: nn.ConvTranspose2d, inputs: Tensor, slope: Tensor) -> list[Factors]:
    of_weight = Factors(inputs.flatten(-2).mT, weight=layer.weight, inputs=_patches(layer, slope))
    return [of_weight, Factors(slope.flatten(-2).mT, layer.bias)]  # [*rows, L, out]


def _embedding(layer: nn.Embedding, inputs: Tensor, slope: Tensor) -> list[Factors]:
    chosen = one_hot(inputs, layer.num_embeddings).to(slope.dtype)
    return [Factors(chosen.unsqueeze(-2), weight=layer.weight, inputs=slope.unsqueeze(-2))]


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, slope: Tensor) -> list[Factors]:
    normalised = layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    axes = len(layer.normalized_shape)
    return _scaled(layer, normalised.flatten(-axes).unsqueeze(-2), slope.flatten(-axes).unsqueeze(-2))


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, slope: Tensor) -> list[Factors]:
    return _by_channel(layer, group_norm(inputs, layer.num_groups, eps=layer.eps), slope)


def _batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, inputs: Tensor, slope: Tensor) -> list[Factors]:
    return _by_channel(layer, batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps), slope)


def _by_channel(layer: Any, normalised: Tensor, slope: Tensor) -> list[Factors]:
    """Of a call on ``[rows, channels, *places]``; the slope may have more axes before them."""
    channel = slope.dim() - normalised.dim() + 1
    places = slope.flatten(channel + 1).mT if normalised.dim() > 2 else slope.unsqueeze(-2)
    values = normalised.flatten(2).mT if normalised.dim() > 2 else normalised.unsqueeze(-2)
    return _scaled(layer, values, places)


def _scaled(layer: Any, normalised: Tensor, slope: Tensor) -> list[Factors]:
    return [Factors(normalised * slope, layer.weight), Factors(slope, layer.bias)]


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
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
}

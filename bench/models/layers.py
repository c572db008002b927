"""The parts of the common VAE: perceptrons, heads that give distributions, and the joint distribution of a chain of layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical, constraints
from torch.nn.functional import softplus

from gradiometer.estimators.noise import Rng, rebuilt

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.3),  # the slope of the DisARM line of binary networks
    "linear": nn.Identity,
}


def perceptron(inputs: int, hidden: Sequence[int], outputs: int, activation: str) -> nn.Sequential:
    """Linear layers of the named `hidden` sizes with `activation` between them, and a linear output."""
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Head(nn.Module):
    """A perceptron whose output parameterises a factorised distribution over `units` latents or pixels.

    Kinds: "gaussian" (mean and softplus standard deviation), "bernoulli", "categorical" (one-hot, event ``[units, classes]``).
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], units: int, kind: str, activation: str, classes: int
    ) -> None:
        super().__init__()
        self.kind, self.units, self.classes = kind, units, classes
        width = {"gaussian": 2 * units, "bernoulli": units, "categorical": units * classes}[kind]
        self.net = perceptron(inputs, hidden, width, activation)

    def forward(self, h: Tensor) -> Distribution:
        return factorized(self.kind, self.net(h), self.classes)


def factorized(kind: str, output: Tensor, classes: int = 1) -> Distribution:
    """The distribution of `kind` that a network's `output` ``[*batch, width]`` parameterises."""
    if kind == "gaussian":
        mean, raw = output.chunk(2, -1)
        # 0.54 makes a fresh network's standard deviation one; the floor keeps log densities finite.
        return Independent(Normal(mean, softplus(raw + 0.54) + 1e-4, validate_args=False), 1)
    if kind == "bernoulli":
        return Independent(Bernoulli(logits=output, validate_args=False), 1)
    logits = output.unflatten(-1, (-1, classes))  # [*batch, D, C]
    return Independent(OneHotCategorical(logits=logits, validate_args=False), 1)


class Chain(Distribution):
    """The joint distribution of latents drawn one layer after the other, ``q(z_1) q(z_2|z_1) ...``, concatenated along the units.

    Args:
        first: the distribution of the first layer.
        links: for each further layer, the map from the layer before it to its distribution.
        units: latents per layer, in order.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (the base class's own type)

    def __init__(
        self, first: Distribution, links: Sequence[Callable[[Tensor], Distribution]], units: Sequence[int]
    ) -> None:
        self.first, self.links, self.units = first, list(links), list(units)
        event = Size([sum(units), *first.event_shape[1:]])
        super().__init__(first.batch_shape, event, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.first.has_rsample

    @property
    def dtype(self) -> torch.dtype:
        mean: Tensor = self.first.mean
        return mean.dtype

    def expand(self, batch_shape: Any, _instance: Any = None) -> Chain:
        return Chain(self.first.expand(batch_shape), self.links, self.units)

    def rebuilt(self, change: Callable[[Tensor], Tensor]) -> Chain:
        """The chain with `change` applied to the parameters of its first layer, which the others follow."""
        return Chain(rebuilt(self.first, change), self.links, self.units)

    def draw(self, rng: Rng, particles: int | None, *, differentiable: bool) -> Tensor:
        take = rng.rsample if differentiable else rng.sample
        layers = [take(self.first, particles)]
        for link in self.links:
            layers.append(take(link(flat(layers[-1], self.first))))
        return torch.cat(layers, dim=-len(self.event_shape))

    def log_prob(self, z: Tensor) -> Tensor:
        layers = z.split(self.units, dim=-len(self.event_shape))
        total = self.first.log_prob(layers[0])
        for link, before, after in zip(self.links, layers, layers[1:], strict=False):
            total = total + link(flat(before, self.first)).log_prob(after)
        return total


def flat(z: Tensor, q: Distribution) -> Tensor:
    """Latents as a network reads them: one-hot categoricals ``[D, C]`` become ``[D * C]``."""
    return z.flatten(-2) if len(q.event_shape) == 2 else z

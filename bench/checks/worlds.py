"""The small models that checks happen on: every parameter away from any symmetry, so that no error hides in one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from gradiometer.bench.models.protocol import offers
from gradiometer.bench.models.toys import GaussianToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.problems import Problem
from gradiometer.estimators.base import Estimator


@dataclass(frozen=True, eq=False)
class World:
    """A model held still in double precision, its minibatch ``[B, D]``, and how finely its latents are integrated.

    Args:
        nodes: of the quadrature over one Gaussian latent, by the number of latents that are integrated together.
        accuracy: of expectations, relative to the largest coordinate of a tensor.
        most: particles whose outcomes are few enough.
        planted: whether mistakes are planted on it, too; not where a world like it is cheaper.
    """

    name: str
    model: Any
    x: Tensor
    nodes: Mapping[int, int] = field(default_factory=lambda: {1: 80, 2: 64, 3: 36})
    accuracy: float = 1e-9
    most: int = 4
    planted: bool = True

    @cached_property
    def offered(self) -> set[str]:
        """The capabilities that estimators may need."""
        return offers(self.model, self.x)

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.model, self.x, name=self.name)

    def admits(self, estimator: Estimator) -> bool:
        return set(estimator.facts.needs) <= self.offered


def _vae(seed: int, scale: float, **sizes: object) -> nn.Module:
    return _scrambled(VAE(Architecture(**sizes)), seed, scale)  # type: ignore[arg-type]


def _scrambled(model: nn.Module, seed: int, scale: float) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def bits(rows: int, columns: int) -> Tensor:
    """Binary data ``[rows, columns]``, always the same."""
    generator = torch.Generator().manual_seed(100 * rows + columns)
    return torch.bernoulli(torch.full((rows, columns), 0.4), generator=generator).double()


class Conjugate(nn.Module):
    """``z ~ N(0, I)``, ``x|z ~ N(z, I)``, and a guide that is the exact posterior ``N(x/2, I/2)``, or `off` by so much."""

    groups = MappingProxyType({"generative": (), "inference": ("encoder", "width")})

    def __init__(self, off: float = 0.0, units: int = 2) -> None:
        super().__init__()
        self.encoder, self.width = nn.Linear(units, units), nn.Linear(1, units, bias=False)
        self.double()
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(units) / 2 + off)
            self.encoder.bias.zero_()
            self.width.weight.fill_(-0.5 * math.log(2))

    def guide(self, x: Tensor) -> Distribution:
        mean = self.encoder(x)
        stddev = self.width(torch.ones_like(x[..., :1])).exp()
        return Independent(Normal(mean, stddev, validate_args=False), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + (x - z) ** 2 + 2 * math.log(2 * math.pi)).sum(-1)


def small() -> list[World]:
    """Where expectations are exact: of few latents, with few states or smooth enough for quadrature."""
    binary = {"data": 4, "hidden": (3,), "kind": "bernoulli"}
    three = {"data": 3, "hidden": (3,)}
    categorical = _vae(4, 1.0, data=4, hidden=(3,), latent=(2,), kind="categorical", classes=3)
    layers = _vae(8, 0.3, **three, latent=(1, 1), between=(2,))
    return [
        World("binary", _vae(5, 1.2, latent=(2,), **binary), bits(4, 4)),
        World("categorical", categorical, bits(4, 4), most=3),
        gaussian(),
        # A prior and a likelihood other than the usual ones, and two latents in one layer.
        World("shifted prior", _scrambled(GaussianToy(2), 12, 0.5), bits(4, 2) - 0.3, {2: 16, 4: 16}, 1e-3, 2),
        # Means and scales of several latents that are learned.
        World("two gaussians", _vae(14, 0.2, **three, latent=(2,)), bits(4, 3), {2: 24, 4: 16}, 1e-3, 2, planted=False),
        World("two binary layers", _vae(7, 0.9, latent=(1, 1), between=(2,), **binary), bits(4, 4)),
        World("two gaussian layers", layers, bits(4, 3), {1: 40, 2: 16, 4: 16}, 1e-3, 2),
    ]


def gaussian() -> World:
    """One Gaussian latent."""
    return World("gaussian", _vae(6, 0.4, data=3, hidden=(3,), latent=(1,)), bits(4, 3), accuracy=2e-4, most=3)


def broad() -> World:
    """The same under a guide that is wider than the posterior: log weights are bounded, and biases are series in 1/K."""
    world = gaussian()
    with torch.no_grad():
        world.model.get_parameter("encoder.net.2.bias")[1] += 0.3  # of the logarithm of the standard deviation
    return replace(world, name="broad gaussian")


def bit() -> World:
    """One binary latent, so that many particles have few outcomes."""
    return World("one bit", _vae(13, 0.6, data=3, hidden=(2,), latent=(1,), kind="bernoulli"), bits(2, 3))


def wide() -> list[World]:
    """Of about a thousand parameters, where expectations are estimated."""
    sizes = {"data": 20, "hidden": (20,)}
    return [
        World("wide binary", _vae(9, 0.35, latent=(3,), kind="bernoulli", **sizes), bits(4, 20)),
        World("wide gaussian", _vae(10, 0.3, latent=(4,), **sizes), bits(4, 20)),
    ]

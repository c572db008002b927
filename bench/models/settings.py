"""Toys by their settings: what ``gaussian-toy:distance=0.5`` stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gradiometer.bench.models.toys import BernoulliToy, FunctionToy, GaussianToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.estimators.noise import seeded


class Toy(Protocol):
    """Settings of a problem that needs no training."""

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model at its parameters, and all its data ``[N, D]``."""


@dataclass(frozen=True)
class GaussianSetting:
    """Rainforth et al.'s Gaussian toy, each parameter tensor at `distance` from its optimum."""

    units: int = 20
    distance: float = 0.1
    data: int = 1024

    def __post_init__(self) -> None:
        _require("units >= 1", self.units >= 1, self.units)
        _require("data >= 1", self.data >= 1, self.data)
        _require("a finite distance", math.isfinite(self.distance), self.distance)

    def build(self) -> tuple[nn.Module, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mu = torch.randn(self.units, generator=generator)
        x = mu + math.sqrt(2) * torch.randn(self.data, self.units, generator=generator)
        model = GaussianToy(self.units)
        model.place(x, self.distance, generator)
        return model, x


@dataclass(frozen=True)
class BernoulliSetting:
    """``E[(b - p0)^2]`` of one Bernoulli, ascended, with respect to its logit."""

    p0: float = 0.499
    logit: float = 0.5

    def __post_init__(self) -> None:
        _require("a finite p0", math.isfinite(self.p0), self.p0)
        _require("a finite logit", math.isfinite(self.logit), self.logit)

    def build(self) -> tuple[nn.Module, Tensor]:
        return BernoulliToy(self.p0, self.logit), torch.ones(1, 1)


@dataclass(frozen=True)
class FunctionSetting:
    """``E[f(z)]`` under ``N(mu, sigma^2)``, with respect to mu and sigma (Mohamed et al. 2020)."""

    function: Literal["quadratic", "exponential", "cosine"] = "quadratic"
    k: float = 0.5
    mu: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        _require("a finite k", math.isfinite(self.k), self.k)
        _require("a finite mu", math.isfinite(self.mu), self.mu)
        _require("a finite sigma > 0", 0 < self.sigma < math.inf, self.sigma)

    def build(self) -> tuple[nn.Module, Tensor]:
        return FunctionToy(self.function, self.k, self.mu, self.sigma), torch.ones(1, 1)


@dataclass(frozen=True)
class EnumerableSetting:
    """A binary VAE small enough to enumerate: 6 pixels, 3 latents, at random parameters."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _require("a finite scale", math.isfinite(self.scale), self.scale)

    def build(self) -> tuple[nn.Module, Tensor]:
        with seeded(0):
            model = VAE(Architecture(data=6, hidden=(4,), latent=(3,), kind="bernoulli"))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(self.scale * torch.randn_like(parameter))
            return model, torch.bernoulli(torch.full((64, 6), 0.4))


TOYS: MappingProxyType[str, type[Any]] = MappingProxyType(
    {
        "gaussian-toy": GaussianSetting,
        "bernoulli-toy": BernoulliSetting,
        "function-toy": FunctionSetting,
        "enumerable-vae": EnumerableSetting,
    }
)


def _require(what: str, true: bool, given: float) -> None:
    """Refuse a setting that gives no model; the caller knows the toy's name."""
    if not true:
        raise ValueError(f"needs {what}, not {given}")

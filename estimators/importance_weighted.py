"""Estimators of the gradient of the K-sample bound ``E log mean_k w_k``, and of bounds between it and the ELBO."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gradiometer.estimators.base import Coefficients, Facts, Weighted
from gradiometer.estimators.registry import register
from gradiometer.estimators.weights import log_mean_exp, log_mean_exp_with, mean_of_others, normalized

FAMILY = "importance-weighted"


@register
@dataclass(frozen=True)
class IWAE(Weighted):
    """Pathwise gradient of the K-sample bound (Burda et al. 2016)."""

    K: int = 8
    facts = Facts(
        "iwae",
        family=FAMILY,
        objective="iwelbo",
        needs=("rsample",),
        same_draws={"K=1": "sgvb-a"},
        cite="burda2016importance",
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, pathwise=w, score=-w)


@register
@dataclass(frozen=True)
class IWAESTL(Weighted):
    """Pathwise gradient of the K-sample bound without the score of the guide; biased (Roeder et al. 2017).

    The score has mean zero under equal weights, not under those of the bound, so the inference gradient is biased for K > 1.
    """

    K: int = 8
    facts = Facts(
        "iwae-stl",
        family=FAMILY,
        objective="iwelbo",
        biased=("inference",),
        needs=("rsample",),
        noiseless=True,
        same_draws={"K=1": "stl"},
        cite="roeder2017sticking",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.K == 1:
            self._claim(biased=())

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, pathwise=w)


@register
@dataclass(frozen=True)
class DReG(Weighted):
    """Doubly reparameterised gradient of the K-sample bound (Tucker et al. 2019)."""

    K: int = 8
    facts = Facts(
        "dreg",
        family=FAMILY,
        objective="iwelbo",
        needs=("rsample",),
        noiseless=True,
        same_draws={"K=1": "stl"},
        cite="tucker2019dreg",
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, pathwise=w**2)


@register
@dataclass(frozen=True)
class IWAEScore(Weighted):
    """Score-function gradient of the K-sample bound without a baseline (Mnih & Rezende 2016)."""

    K: int = 8
    facts = Facts("iwae-score", family=FAMILY, objective="iwelbo", same_mean={"": "iwae"}, cite="mnih2016vimco")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, score=log_mean_exp(log_w) - w)


@register
@dataclass(frozen=True)
class VIMCO(Weighted):
    """Score-function gradient of the K-sample bound, each particle against the bound without it (Mnih & Rezende 2016).

    The missing weight is replaced by the geometric mean of the others.
    """

    K: int = 8
    facts = Facts("vimco", family=FAMILY, objective="iwelbo", least_particles=2, cite="mnih2016vimco")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        without = log_mean_exp_with(log_w, mean_of_others(log_w))  # [K, *batch]
        return Coefficients(generative=w, score=log_mean_exp(log_w) - without - w)


@register
@dataclass(frozen=True)
class VR(Weighted):
    """Pathwise gradient of the K-sample Renyi bound of order alpha (Li & Turner 2016).

    ``E log(mean_k w_k^(1 - alpha)) / (1 - alpha)`` falls with alpha; it is the K-sample bound at 0, and the ELBO at 1.
    """

    K: int = 8
    alpha: float = 0.5
    facts = Facts(
        "vr",
        family=FAMILY,
        objective="renyi bound",
        needs=("rsample",),
        same_draws={"K=1": "sgvb-a", "alpha=1": "sgvb-a", "alpha=0": "iwae"},
        variants=("alpha=-1", "alpha=2"),
        cite="li2016renyi",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"vr needs a finite alpha, not alpha={self.alpha}")
        if self.alpha == 0 or self.alpha == 1 or self.K == 1:
            self._claim(objective="iwelbo" if self.alpha == 0 else "elbo")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        v = normalized((1 - self.alpha) * log_w)
        return Coefficients(generative=v, pathwise=v, score=-v)

    def objective(self, log_w: Tensor) -> Tensor:
        if self.alpha == 1:
            return log_w.mean(0)
        powers = (1 - self.alpha) * log_w
        top = powers.amax(0)
        # Near alpha = 1 the log K of log_mean_exp would cancel all but a few digits, and those are then divided by 1 - alpha.
        return (top + (powers - top).expm1().mean(0).log1p()) / (1 - self.alpha)


@register
@dataclass(frozen=True)
class CIWAE(Weighted):
    """Pathwise gradient of a convex combination of the ELBO and the K-sample bound (Rainforth et al. 2018)."""

    K: int = 8
    beta: float = 0.5
    facts = Facts(
        "ciwae",
        family=FAMILY,
        objective="ciwae bound",
        needs=("rsample",),
        same_draws={"K=1": "sgvb-a", "beta=1": "sgvb-a", "beta=0": "iwae"},
        cite="rainforth2018tighter",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"ciwae needs 0 <= beta <= 1, not beta={self.beta}")
        if self.beta == 0 or self.beta == 1 or self.K == 1:
            self._claim(objective="iwelbo" if self.beta == 0 else "elbo")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        m = self.beta / self.K + (1 - self.beta) * normalized(log_w)
        return Coefficients(generative=m, pathwise=m, score=-m)

    def objective(self, log_w: Tensor) -> Tensor:
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)

"""Estimators of the gradient of the K-sample bound ``E log mean_k w_k``."""

from __future__ import annotations

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
    facts = Facts("iwae", family=FAMILY, objective="iwelbo", needs=("rsample",), cite="burda2016importance")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, pathwise=w, score=-w)


@register
@dataclass(frozen=True)
class DReG(Weighted):
    """Doubly reparameterised gradient of the K-sample bound (Tucker et al. 2019)."""

    K: int = 8
    facts = Facts("dreg", family=FAMILY, objective="iwelbo", needs=("rsample",), cite="tucker2019dreg")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, pathwise=w**2)


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

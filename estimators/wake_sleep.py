"""The wake-sleep family: the guide descends the inclusive divergence ``KL(p(z|x) || q(z|x))``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from gradiometer.estimators.base import Coefficients, Facts, Weighted
from gradiometer.estimators.registry import register
from gradiometer.estimators.weights import normalized


@register
@dataclass(frozen=True)
class RWS(Weighted):
    """Reweighted wake-sleep, wake-wake: self-normalised weights for both groups (Bornschein & Bengio 2015; Le et al. 2019).

    The generative gradient is that of the K-sample bound; the inference gradient is biased at any finite K, and consistent.
    """

    K: int = 8
    facts = Facts(
        "rws",
        family="wake-sleep",
        objective={"generative": "iwelbo", "inference": "inclusive KL"},
        biased=("inference",),
        consistent=("inference",),
        cite="bornschein2015reweighted",
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, score=w)


@register
@dataclass(frozen=True)
class RWSDReG(Weighted):
    """Reweighted wake-sleep with the inference gradient doubly reparameterised (Tucker et al. 2019).

    It has the expectation of `rws`, bias included, and is noiseless at the exact posterior.
    """

    K: int = 8
    facts = replace(
        RWS.facts,
        name="rws-dreg",
        needs=("rsample",),
        noiseless=True,
        same_mean={"": "rws"},
        cite="tucker2019dreg",
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(generative=w, pathwise=w - w**2)

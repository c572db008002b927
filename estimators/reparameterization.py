"""Pathwise estimators of the ELBO: the sample carries the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, full_like

from gradiometer.estimators.base import Coefficients, Estimator, Facts, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import register


@register
@dataclass(frozen=True)
class SGVBA(Weighted):
    """Pathwise gradient of the ELBO, all three densities sampled (Kingma & Welling 2014, eq. 6; Rezende et al. 2014)."""

    facts = Facts(
        "sgvb-a", family="reparameterization", objective="elbo", needs=("rsample",), cite="kingma2014autoencoding"
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        mean = full_like(log_w, 1 / self.K)
        return Coefficients(generative=mean, pathwise=mean, score=-mean)


@register
@dataclass(frozen=True)
class STL(Weighted):
    """Pathwise gradient of the ELBO without the score of the guide; noiseless at the exact posterior (Roeder et al. 2017)."""

    facts = Facts(
        "stl",
        family="reparameterization",
        objective="elbo",
        needs=("rsample",),
        noiseless=True,
        cite="roeder2017sticking",
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        mean = full_like(log_w, 1 / self.K)
        return Coefficients(generative=mean, pathwise=mean)


@register
@dataclass(frozen=True)
class SGVBB(Estimator):
    """Pathwise gradient of the ELBO with the divergence from prior to guide in closed form (Kingma & Welling 2014, eq. 7)."""

    facts = Facts(
        "sgvb-b",
        family="reparameterization",
        objective="elbo",
        needs=("rsample", "likelihood", "kl", "prior"),
        cite="kingma2014autoencoding",
    )

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        z = rng.rsample(q, self.K)  # [K, *batch, D]
        reconstruction = model.likelihood(z).log_prob(x)  # [K, *batch]
        kl = model.kl(q)  # [*batch]
        bound = reconstruction.mean(0) - kl
        log_w = (reconstruction + model.prior(q).log_prob(z) - q.log_prob(z)).detach()
        return Surrogate({"generative": bound, "inference": bound}, log_w)

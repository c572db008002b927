"""Estimators from antithetic pairs: two particles from one uniform, each with the guide's distribution, as unlike as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, ones_like, zeros_like
from torch.distributions import Independent, Uniform

from gradiometer.estimators.base import Estimator, Facts, State, Surrogate
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import register


@register
@dataclass(frozen=True)
class DisARM(Estimator):
    """Antithetic gradient of the ELBO for Bernoulli latents (Dong et al. 2020): ARM, its uniforms integrated out given the pair.

    The same estimate as U2G (Yin et al. 2020). The K particles are K/2 pairs.
    """

    K: int = 2
    facts = Facts(
        "disarm",
        family="antithetic",
        objective="elbo",
        needs=("bernoulli",),
        least_particles=2,
        noiseless=True,
        cite="dong2020disarm",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.K % 2:
            raise ValueError(f"disarm needs an even K, since its particles come in pairs, not K={self.K}")

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        logits, p = q.base_dist.logits, q.base_dist.probs.detach()  # [*batch, D]
        u = rng.sample(Independent(Uniform(zeros_like(p), ones_like(p), validate_args=False), 1), self.K // 2)
        b, other = (u < p).to(p), (1 - u < p).to(p)  # [K/2, *batch, D]
        z = torch.cat([b, other])
        log_p = model.log_joint(x, z)  # [K, *batch]
        log_w = (log_p - q.log_prob(z)).detach()
        f, f_other = log_w.unsqueeze(-1).chunk(2)
        # (-1)^b~ where the pair differs, and 0 elsewhere, is b - b~. That f holds the guide by its own log q adds a mean of zero.
        g = (f - f_other) / 2 * (b - other) * torch.maximum(p, 1 - p)  # [K/2, *batch, D], by the logits
        return Surrogate({"generative": log_p.mean(0), "inference": (g.mean(0) * logits).sum(-1)}, log_w)

"""Score-function estimators: only log-probabilities are differentiated, so discrete latents are as good as continuous ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, full_like

from gradiometer.estimators.base import Average, Coefficients, Facts, State, Weighted
from gradiometer.estimators.registry import register
from gradiometer.estimators.weights import mean_of_others


@register
@dataclass(frozen=True)
class Reinforce(Weighted):
    """Score-function gradient of the ELBO without a baseline (Williams 1992; Ranganath et al. 2014)."""

    facts = Facts("reinforce", family="score-function", objective="elbo", cite="williams1992reinforce")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=full_like(log_w, 1 / self.K), score=log_w / self.K)


@register
@dataclass(frozen=True)
class MovingAverage(Weighted):
    """Score-function gradient of the ELBO with a moving average of the signal as its baseline (Williams 1992).

    The average holds earlier draws only, so the estimate stays unbiased.
    """

    decay: float = 0.9
    facts = Facts("moving-average", family="score-function", objective="elbo", cite="williams1992reinforce")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"moving-average needs 0 <= decay < 1, not decay={self.decay}")

    def init_state(self, model: Any, x: Tensor) -> State:
        return State(tracked={"signal": Average(self.decay)})

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        return log_w - state.tracked["signal"].value

    def observe(self, log_w: Tensor) -> Mapping[str, Tensor]:
        return {"signal": log_w}

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=full_like(log_w, 1 / self.K), score=log_w / self.K)


@register
@dataclass(frozen=True)
class RLOO(Weighted):
    """Score-function gradient of the ELBO, each particle against the mean of the others (Kool et al. 2019).

    The same estimate as VarGrad (Richter et al. 2020).
    """

    K: int = 8
    facts = Facts(
        "rloo", family="score-function", objective="elbo", least_particles=2, noiseless=True, cite="kool2019buy"
    )

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=full_like(log_w, 1 / self.K), score=(log_w - mean_of_others(log_w)) / self.K)

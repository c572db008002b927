"""Score-function estimators: only log-probabilities are differentiated, so discrete latents are as good as continuous ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, full_like, nn

from gradiometer.estimators.base import Average, Coefficients, Facts, State, Weighted
from gradiometer.estimators.registry import register
from gradiometer.estimators.weights import mean_of_others

HIDDEN = 100  # units of nvil's baseline, as in its paper


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

    def observe(self, log_w: Tensor, x: Tensor, state: State) -> Mapping[str, Tensor]:
        return {"signal": log_w}

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=full_like(log_w, 1 / self.K), score=log_w / self.K)


@register
@dataclass(frozen=True)
class NVIL(Weighted):
    """Neural variational inference and learning: the score function with a baseline that is a network of x (Mnih & Gregor 2014).

    The signal ``l - C(x)`` is centred by its moving average ``m`` and divided by ``max(1, sqrt v)``, its standard deviation, so the
    inference gradient has the ELBO's direction and a length of its own. The paper's averages hold the step's own draws; these hold
    earlier ones only, or else the direction would be biased.
    """

    decay: float = 0.8
    facts = Facts("nvil", family="score-function", objective="elbo", rescaled=("inference",), cite="mnih2014neural")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"nvil needs 0 <= decay < 1, not decay={self.decay}")

    def init_state(self, model: Any, x: Tensor) -> State:
        baseline = nn.Sequential(nn.Linear(x[0].numel(), HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        return State({"signal": Average(self.decay), "square": Average(self.decay)}, {"baseline": baseline})

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        m, square = state.tracked["signal"].value, state.tracked["square"].value
        v = torch.as_tensor(square - m**2)
        return (self._less_baseline(log_w, x, state).detach() - m) / v.clamp(min=1.0).sqrt()

    def observe(self, log_w: Tensor, x: Tensor, state: State) -> Mapping[str, Tensor]:
        signal = self._less_baseline(log_w, x, state).detach()
        return {"signal": signal, "square": signal**2}

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=full_like(log_w, 1 / self.K), score=log_w / self.K)

    def learn(self, log_w: Tensor, x: Tensor, state: State) -> Mapping[str, Tensor]:
        error = self._less_baseline(log_w, x, state) - state.tracked["signal"].value
        return {"baseline": -error.square().mean(0)}

    def _less_baseline(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        """``l - C(x)``, ``[K, *batch]``."""
        pixels = x.reshape(*log_w.shape[1:], -1)  # an image may have several axes
        return log_w - state.learned["baseline"](pixels).squeeze(-1)


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

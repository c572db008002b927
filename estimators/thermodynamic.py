"""The thermodynamic variational objective: a sum in place of the integral that is the log evidence.

    log p(x) = integral over B of E_{pi_B}[log w],   pi_B(z|x) proportional to q(z|x)^(1 - B) p(x, z)^B

B runs from 0, the guide, to 1, the posterior.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, zeros_like

from gradiometer.estimators.base import Coefficients, Facts, Weighted
from gradiometer.estimators.registry import register
from gradiometer.estimators.weights import normalized


@register
@dataclass(frozen=True)
class TVO(Weighted):
    """Covariance gradient of the thermodynamic variational objective, the left and so the lower sum (Masrani et al. 2019).

    The first of `partitions` ends at `beta1`; from there to 1 they are equal on the logarithmic scale. The averages under ``pi_B``
    are self-normalised, so both gradients are biased at any finite K, and consistent. One partition gives the ELBO's, unbiased.
    """

    K: int = 8
    partitions: int = 2
    beta1: float = 0.025
    facts = Facts(
        "tvo",
        family="thermodynamic",
        objective="tvo",
        biased=("generative", "inference"),
        consistent=("generative", "inference"),
        least_particles=2,
        variants=("partitions=1",),
        cite="masrani2019thermodynamic",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partitions < 1:
            raise ValueError(f"tvo needs partitions >= 1, not partitions={self.partitions}")
        if not 0 < self.beta1 < 1:
            raise ValueError(f"tvo needs 0 < beta1 < 1, not beta1={self.beta1}")
        if self.partitions == 1:  # weights are equal, so nothing is self-normalised
            self._claim(objective="elbo", biased=(), consistent=())

    def coefficients(self, log_w: Tensor) -> Coefficients:
        correction = self.K / (self.K - 1)  # the mean holds the particle's own signal; exact at beta = 0
        a, c = zeros_like(log_w), zeros_like(log_w)
        for beta, width in self._partition():
            u = normalized(beta * log_w)
            signal = correction * (log_w - (u * log_w).sum(0))
            a = a + width * u * (1 + beta * signal)
            c = c + width * u * ((1 - beta) * signal - 1)
        return Coefficients(generative=a, score=c)

    def objective(self, log_w: Tensor) -> Tensor:
        total = zeros_like(log_w[0])
        for beta, width in self._partition():
            total = total + width * (normalized(beta * log_w) * log_w).sum(0)
        return total

    def _partition(self) -> Iterator[tuple[float, float]]:
        """The left end and the width of each partition."""
        last = self.partitions - 1
        ends = [0.0] + [self.beta1 ** (1 - j / last) for j in range(last)] + [1.0]
        for left, right in pairwise(ends):
            yield left, right - left

"""Estimators by continuous relaxation: a discrete latent is a step function of continuous noise, and the step is smoothed.

    b = H(z),   z = logit + logistic noise,   sigma_tau(z) = sigmoid(z / tau), which tends to H(z) as tau tends to 0

for a Bernoulli latent; a one-hot one is an arg max with Gumbel noise, and a softmax. The joint is evaluated between the latent's
values, which not every model allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, ones_like, zeros_like
from torch.distributions import Bernoulli, Distribution, Independent, Uniform
from torch.nn.functional import softplus

from gradiometer.estimators.base import Estimator, Facts, State, Surrogate
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import register

FAMILY = "relaxed"
HIDDEN = 10  # units of relax's network, as in its paper
PACE = 10  # eta and log tau learn ten times as fast as weights, as in Tucker et al. 2017: a step of Adam is of one size for all
Signal = Callable[[Tensor], Tensor]  # relaxed latents [K, *batch, D] -> [K, *batch]


@register
@dataclass(frozen=True)
class Concrete(Estimator):
    """Pathwise gradient of the ELBO at relaxed latents, Bernoulli or one-hot (Maddison et al. 2017; Jang et al. 2017).

    Exact for the mean of ``log p(x, s) - log q(s|x)`` at ``s = sigma_tau(z)``, where q is still the probability of a latent, as a
    formula in s; biased for the ELBO: as tau falls, the bias shrinks and the variance grows.
    """

    tau: float = 0.5
    facts = Facts(
        "concrete",
        family=FAMILY,
        objective="elbo",
        biased=("generative", "inference"),
        needs=("discrete", "relaxed"),
        cite="maddison2017concrete",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_temperature(self.facts.name, self.tau)

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        logits, u = q.base_dist.logits, _uniform(q, self.K, rng)
        if isinstance(q.base_dist, Bernoulli):
            s = ((logits - _logit(u)) / self.tau).sigmoid()  # [K, *batch, D]
            log_q = q.log_prob(s)
        else:
            s = ((logits - (-u.log()).log()) / self.tau).softmax(-1)  # [K, *batch, D, C]
            log_q = (s * logits).sum((-2, -1))  # torch's own is that of the nearest one-hot, a step function
        signal = (model.log_joint(x, s) - log_q).mean(0)
        # No log weights: q is a probability of latents and s has a density, so p/q at s estimates no evidence and bounds nothing.
        return Surrogate({"generative": signal, "inference": signal}, value=signal.detach())


@dataclass(frozen=True)
class Controlled(Estimator):
    """The score function with a control variate c, a function of the noise whose mean the pathwise gradient gives back:

    g = [f(b) - c(z~)] grad log q(b|x) + grad c(z) - grad c(z~),   b = H(z),   z ~ q(z|x),   z~ ~ q(z|x, b)

    The signal f holds the guide's parameters also in its ``-log q``. They are kept fixed there: in f(b) they would add the score,
    of mean zero; in c, the same mean to ``grad c(z)`` as to ``grad c(z~)``. Noise both times, and no bias.
    """

    tau: float = 0.5  # where the temperature starts

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_temperature(self.facts.name, self.tau)

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        b, c, log_p = self._draw(model, x, rng, state, q)
        log_q = q.log_prob(b)
        log_w = (log_p - log_q).detach()
        inference = ((log_w - c).detach() * log_q + c).mean(0)
        terms = {"generative": log_p.mean(0), "inference": inference}
        return Surrogate(terms, log_w, learn=lambda: self._learn(q.base_dist.logits, b, log_w, c))

    def _learn(self, logits: Tensor, b: Tensor, f: Tensor, c: Tensor) -> Mapping[str, Tensor]:
        """Make ``|g|^2`` small, g by the guide's logits: c does not move the mean of g, so this is its variance."""
        if not logits.requires_grad:  # of a frozen guide
            return {}
        (path,) = torch.autograd.grad(c.mean(0).sum(), logits, create_graph=True)
        # c keeps its graph as a factor, too: detached, the control would not see most of the variance.
        g = ((f - c).unsqueeze(-1) * (b - logits.sigmoid())).mean(0) + path
        return {"control": -g.square().sum(-1)}

    def _draw(self, model: Any, x: Tensor, rng: Rng, state: State, q: Independent) -> tuple[Tensor, Tensor, Tensor]:
        """Latents b ``[K, *batch, D]``; c, with the value of ``c(z~)`` and the gradient of ``c(z) - c(z~)``; ``log p(x, b)``.

        Both from the same randomness, by which z~ is z in all but its gradient (Tucker et al. 2017, appendix G.2): so c takes one
        evaluation, and not two.
        """
        logits = q.base_dist.logits
        p, u = logits.detach().sigmoid(), _uniform(q, self.K, rng)
        b = (u < p).to(p)
        z = logits - _logit(u)  # positive where u < p
        v = torch.where(u < p, u / p, (u - p) / (1 - p))  # uniform, whatever b is
        given = conditional(logits, b, v)
        fixed = _bernoulli(logits.detach())
        c = state.learned["control"](lambda s: model.log_joint(x, s) - fixed.log_prob(s), z - given + given.detach())
        return b, c, model.log_joint(x, b)


def conditional(logits: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The noise z given that ``H(z) = b``, from uniforms v (Tucker et al. 2017, appendix C).

    ``z = logit(p) - logit(u)`` with u uniform, and ``b = 1`` where ``u < p``: given b, u is ``v p`` or ``p + v (1 - p)``.
    """
    sign = 2 * b - 1
    # Of u = v p, exp z = (1 - u) p / u / (1 - p) = 1 + (1 - v) / v / (1 - p), and 1 / (1 - p) = exp(softplus(logit)).
    margin = torch.finfo(v.dtype).eps / 4
    return sign * softplus(softplus(sign * logits) - sign * _logit(v.clamp(margin, 1 - 2 * margin)))


class RebarControl(nn.Module):
    """``c(z) = eta f(sigma_tau(z))``."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.eta = nn.Parameter(torch.tensor(1 / PACE))
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau) / PACE))

    def forward(self, f: Signal, z: Tensor) -> Tensor:
        return PACE * self.eta * f((z / (PACE * self.log_tau).exp()).sigmoid())


class RelaxControl(nn.Module):
    """``c(z) = f(sigma_tau(z)) + r(z)``, r a network that starts as zero."""

    def __init__(self, tau: float, units: int) -> None:
        super().__init__()
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau) / PACE))
        self.r = nn.Sequential(nn.Linear(units, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1, bias=False))
        last: Any = self.r[-1]
        nn.init.zeros_(last.weight)

    def forward(self, f: Signal, z: Tensor) -> Tensor:
        return f((z / (PACE * self.log_tau).exp()).sigmoid()) + self.r(z).squeeze(-1)


@register
@dataclass(frozen=True)
class REBAR(Controlled):
    """Score function of the ELBO with the relaxed signal as its control variate, for Bernoulli latents (Tucker et al. 2017)."""

    facts = Facts("rebar", family=FAMILY, objective="elbo", needs=("bernoulli", "relaxed"), cite="tucker2017rebar")

    def init_state(self, model: Any, x: Tensor) -> State:
        return State(learned={"control": RebarControl(self.tau)})


@register
@dataclass(frozen=True)
class RELAX(Controlled):
    """Score function of the ELBO, its control variate the relaxed signal and a network (Grathwohl et al. 2018)."""

    facts = Facts(
        "relax", family=FAMILY, objective="elbo", needs=("bernoulli", "relaxed"), cite="grathwohl2018backpropagation"
    )

    def init_state(self, model: Any, x: Tensor) -> State:
        return State(learned={"control": RelaxControl(self.tau, model.guide(x).event_shape[-1])})


def _require_temperature(name: str, tau: float) -> None:
    if not 0 < tau < math.inf:
        raise ValueError(f"{name} needs a finite tau > 0, not tau={tau}")


def _uniform(q: Distribution, K: int, rng: Rng) -> Tensor:
    """A uniform for each element of the latents, ``[K, *batch, *event]``: those that would draw them without relaxation."""
    zeros = zeros_like(q.base_dist.logits.detach())  # type: ignore[attr-defined]
    return rng.sample(Independent(Uniform(zeros, ones_like(zeros), validate_args=False), len(q.event_shape)), K)


def _bernoulli(logits: Tensor) -> Independent:
    return Independent(Bernoulli(logits=logits, validate_args=False), 1)


def _logit(u: Tensor) -> Tensor:
    return u.log() - (-u).log1p()

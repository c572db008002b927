"""Nested variational inference: a chain of annealed targets, each level trained against the one before it.

    gamma_k(z; x) = q_0(z|x)^(1 - beta_k) p(x, z)^beta_k,   k = 1..levels,   beta_1 = 0,   beta_levels = 1

Notation, as in Zimmermann et al. 2021: ``a = log gamma_{k-1}(z_{k-1})``, ``t = log gamma_k(z_k)``, ``r`` and ``q`` the log
densities of the reverse and forward kernels, ``log v = t + r - a - q``; ``W_{k-1}`` and ``W_k`` the normalised weights before
and after level k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.functional import softplus

from gradiometer.estimators.base import Estimator, Facts, State, Surrogate
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import register
from gradiometer.estimators.weights import log_mean_exp, normalized

HIDDEN = 50  # units of each kernel, as in the annealing experiment of Zimmermann et al. 2021
MEMORY = 0.5  # correlation of a fresh kernel's move


class Kernel(nn.Module):
    """A Gaussian move in the guide's own coordinates ``u = (z - mean) / stddev``, residual and amortised by the guide.

    Fresh, it is the autoregressive move ``u' = MEMORY u + noise`` that leaves the guide invariant and is its own reverse, so that
    an untrained chain is annealed importance sampling between the guide and the posterior with that move.
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.body = nn.Linear(3 * latent, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2 * latent)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z: Tensor, mean: Tensor, stddev: Tensor) -> Distribution:
        u = (z - mean) / stddev  # [K, *batch, D]
        context = [part.expand_as(u) for part in (mean, stddev.log())]
        shift, width = self.head(torch.relu(self.body(torch.cat([u, *context], -1)))).chunk(2, -1)
        fresh = (1 - MEMORY**2) ** 0.5
        scale = fresh * softplus(width + 0.5413248546129181)  # softplus(0.5413...) = 1
        return Independent(Normal(mean + stddev * (MEMORY * u + shift), stddev * scale, validate_args=False), 1)


class Path(nn.Module):
    """Annealing exponents of the intermediate targets; a softmax of increments keeps them in order."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.increments = nn.Linear(1, levels - 1, bias=False)  # free parameters: the input is one
        nn.init.zeros_(self.increments.weight)

    def forward(self, ones: Tensor) -> Tensor:
        increments = self.increments(ones).softmax(-1)  # [*batch, levels - 1]
        return torch.cat([torch.zeros_like(ones), increments.cumsum(-1)], -1)


@register
@dataclass(frozen=True)
class NVI(Estimator):
    """Nested variational inference with the exclusive divergence at each level (Zimmermann et al. 2021).

    ``levels`` counts the annealed targets, the guide's own among them, so there are ``levels - 1`` pairs of kernels. Each of the K
    particles costs ``levels`` evaluations of the joint. The guide ascends the ELBO (sticking the landing); each level's kernels
    and the path descend ``KL(F_k || B_k)``; the model ascends the bound of the last weights. No level sees the graph of another.
    """

    K: int = 8
    levels: int = 2
    resample: Literal["none", "systematic"] = "none"
    path: Literal["linear", "learned"] = "linear"
    facts = Facts(
        "nvi",
        family="nested",
        objective={"generative": "iwelbo", "inference": "elbo", "kernels": "nested KL", "path": "nested KL"},
        biased=("kernels", "path"),
        needs=("rsample", "gaussian"),
        variants=("levels=3", "levels=3,resample=systematic,path=learned"),
        cite="zimmermann2021nested",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 2:
            raise ValueError(f"nvi needs levels >= 2 (the guide and the posterior), not levels={self.levels}")
        # Weights before the only pair of kernels are equal, so nothing is self-normalised; resampled weights are the
        # gradient of no bound in theta, because the intermediate targets no longer cancel.
        moves = ("kernels", "path") if self.learns_path else ("kernels",)
        biased = () if self.levels == 2 else moves if self.resample == "none" else ("generative", *moves)
        objective = {"generative": "iwelbo", "inference": "elbo"} | dict.fromkeys(moves, "nested KL")
        self._claim(biased=biased, objective=objective)

    @property
    def learns_path(self) -> bool:
        """Whether there is anything between the guide and the posterior to be learned."""
        return self.path == "learned" and self.levels > 2

    def init_state(self, model: Any, x: Tensor) -> State:
        latent = model.guide(x).event_shape[-1]
        pairs = [
            nn.ModuleDict({"proposal": Kernel(latent), "reversal": Kernel(latent)}) for _ in range(self.levels - 1)
        ]
        learned: dict[str, nn.Module] = {"kernels": nn.ModuleList(pairs)}
        if self.learns_path:
            learned["path"] = Path(self.levels)
        return State(learned=learned)

    def betas(self, state: State, like: Tensor) -> Tensor:
        """The annealing exponents from 0 to 1, ``[*batch, levels]``, for `like` ``[*batch]``."""
        if "path" in state.learned:
            return state.learned["path"](torch.ones_like(like).unsqueeze(-1))
        return torch.linspace(0, 1, self.levels).to(like).expand(*like.shape, -1)

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Iterator[Surrogate]:
        q0 = model.guide(x)
        z = rng.rsample(q0, self.K)  # [K, *batch, D]
        log_p, log_q0 = model.log_joint(x, z), q0.log_prob(z)
        landing = (log_p - log_q0 + q0.log_prob(z.detach())).mean(0)
        yield Surrogate({"inference": landing})

        mean, stddev = q0.mean.detach(), q0.stddev.detach()
        frozen = Independent(Normal(mean, stddev, validate_args=False), 1)
        z, log_w = z.detach(), torch.zeros_like(log_q0.detach())
        log_p, log_q0 = log_p.detach(), log_q0.detach()  # of the incoming particles
        pairs: Any = state.learned["kernels"]
        for level, pair in enumerate(pairs, start=1):
            if level > 1 and self.resample == "systematic":
                z, log_p, log_q0, log_w = _resampled(rng.uniform(like=q0), log_w, z, log_p, log_q0)
            before = log_w
            forward = pair["proposal"](z, mean, stddev)
            moved = rng.rsample(forward)  # [K, *batch, D]
            log_p_moved, log_q0_moved = model.log_joint(x, moved), frozen.log_prob(moved)
            # Made anew at each level, whose graph is freed before the next.
            beta_in, beta = self.betas(state, log_q0[0])[..., level - 1 : level + 1].unbind(-1)  # [*batch]
            t = (1 - beta) * log_q0_moved + beta * log_p_moved
            a = (1 - beta_in) * log_q0 + beta_in * log_p
            r, q = pair["reversal"](moved, mean, stddev).log_prob(z), forward.log_prob(moved)
            log_v = (t + r - a - q).detach()
            log_w = before + log_v
            stuck = q - forward.log_prob(moved.detach())  # its gradient is the pathwise part alone
            terms = self._terms(normalized(before), normalized(log_w), log_v, t, r, a, stuck, state)
            if level == self.levels - 1:
                terms["generative"] = (normalized(log_w) * log_p_moved).sum(0)
                yield Surrogate(terms, log_w)
            else:
                yield Surrogate(terms)
            z, log_p, log_q0 = moved.detach(), log_p_moved.detach(), log_q0_moved.detach()

    def _terms(
        self, W_in: Tensor, W_out: Tensor, log_v: Tensor, t: Tensor, r: Tensor, a: Tensor, stuck: Tensor, state: State
    ) -> dict[str, Tensor]:
        """Surrogates of one level, ascended; each group takes its own derivative of them, never a neighbour's."""
        terms = {"kernels": (W_in * (t + r - stuck)).sum(0)}
        if "path" in state.learned:
            centred = W_in * (
                log_v - (W_in * log_v).sum(0)
            )  # the target before: a covariance, since log Z_{k-1} moves too
            terms["path"] = (W_in * t - W_out * t + centred * a).sum(0)
        return terms


def _resampled(u: Tensor, log_w: Tensor, z: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Systematic resampling per data point, with one uniform each; the weights become their mean, so that Z stays unbiased."""
    K = log_w.shape[0]
    edges = normalized(log_w).movedim(0, -1).cumsum(-1).contiguous()  # [*batch, K]
    points = (torch.arange(K).to(u) + u.unsqueeze(-1)) / K
    ancestors = torch.searchsorted(edges, points).clamp_(max=K - 1).movedim(-1, 0)  # [K, *batch]
    picked = [value.gather(0, ancestors) for value in values]
    z = z.gather(0, ancestors.unsqueeze(-1).expand_as(z))
    return z, *picked, log_mean_exp(log_w).expand_as(log_w)


__all__ = ["NVI", "Kernel", "Path"]

"""Estimators of pydrobert-pytorch: functions that give one sample's gradient in the logits; particles are more rows."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from pydrobert.torch import estimators as theirs
from torch import Tensor
from torch.distributions import Independent, OneHotCategorical

from adapters.feeding import Feed, log_probability
from gradiometer.estimators.base import Estimator, Facts, State, Surrogate


@dataclass(frozen=True)
class Pydrobert(Estimator):
    """The signal ``log p(x, b) - log q(b|x)`` with q's parameters held, so that it is a function of b alone."""

    facts = Facts("pydrobert", family="pydrobert")

    @abstractmethod
    def estimate(self, f: Any, signal: Tensor, b: Tensor, logits: Tensor, z: Tensor, kind: str) -> Tensor: ...

    def draw(self, logits: Tensor, family: type, kind: str) -> tuple[Tensor, Tensor]:
        """Relaxed latents, and latents, both ``[K, *batch, *event]``."""
        z = theirs.to_z(logits, kind)
        return z, theirs.to_b(z, kind).detach()

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        q = model.guide(x)
        family = type(q.base_dist)
        kind = "onehot" if family is OneHotCategorical else "bern"
        made = q.base_dist.logits
        logits = made.detach().expand(self.K, *made.shape).clone().requires_grad_()  # [K, *batch, D]
        held = Independent(family(logits=logits.detach(), validate_args=False), 1, validate_args=False)

        def f(s: Tensor) -> Tensor:
            return (model.log_joint(x, s) - log_probability(held, s)).unsqueeze(
                -1
            )  # [K, *batch, 1]: the same for each latent

        with Feed(rng, q):
            z, b = self.draw(logits, family, kind)
            signal = f(b).detach()
            g = self.estimate(f, signal, b, logits, z, kind).detach()
        log_p = model.log_joint(x, b)
        inference = (g.mean(0) * made).flatten(len(q.batch_shape)).sum(-1)
        log_w = (log_p - q.log_prob(b)).detach()
        return Surrogate({"generative": log_p.mean(0), "inference": inference}, log_w)


@dataclass(frozen=True)
class Reinforce(Pydrobert):
    """`reinforce`, of Bernoulli and one-hot latents."""

    facts = Facts("pydrobert-reinforce", "pydrobert", needs=("discrete",))

    def draw(self, logits: Tensor, family: type, kind: str) -> tuple[Tensor, Tensor]:
        b = family(logits=logits.detach(), validate_args=False).sample()  # which can be enumerated
        return b, b

    def estimate(self, f: Any, signal: Tensor, b: Tensor, logits: Tensor, z: Tensor, kind: str) -> Tensor:
        return theirs.reinforce(signal, b, logits, kind)


@dataclass(frozen=True)
class REBAR(Pydrobert):
    """`relax` with `REBARControlVariate`, of Bernoulli latents."""

    temperature: float = 0.5
    eta: float = 0.7
    facts = Facts("pydrobert-rebar", "pydrobert", needs=("bernoulli", "relaxed"))

    def estimate(self, f: Any, signal: Tensor, b: Tensor, logits: Tensor, z: Tensor, kind: str) -> Tensor:
        control = theirs.REBARControlVariate(f, kind, self.temperature, self.eta)
        return theirs.relax(signal, b, logits, z, control, kind)


@dataclass(frozen=True)
class RELAX(Pydrobert):
    """`relax` with a fixed control variate, of Bernoulli latents."""

    facts = Facts("pydrobert-relax", "pydrobert", needs=("bernoulli", "relaxed"))

    def estimate(self, f: Any, signal: Tensor, b: Tensor, logits: Tensor, z: Tensor, kind: str) -> Tensor:
        return theirs.relax(signal, b, logits, z, lambda s: (s.sigmoid() - 0.3).square().sum(-1, keepdim=True), kind)


@dataclass(frozen=True)
class REBAROneHot(REBAR):
    """`relax` with `REBARControlVariate`, of one-hot latents, too."""

    facts = Facts("pydrobert-rebar-onehot", "pydrobert", needs=("discrete", "relaxed"))

"""Small models with exact answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal


class GaussianToy(nn.Module):
    """``z ~ N(mu, I)``, ``x|z ~ N(z, I)``, guide ``N(A x + b, 2/3 I)`` (Rainforth et al. 2018, section 4).

    The guide's variance is larger than the posterior's 1/2 by design, so no parameters make it exact. Given data of mean ``m``, the
    optimum is ``mu = m, A = I/2, b = m/2``. ``log p(x)`` is that of ``N(mu, 2 I)``.
    """

    groups = MappingProxyType({"generative": ("mu",), "inference": ("encoder",)})

    def __init__(self, units: int = 20) -> None:
        super().__init__()
        self.mu = nn.Linear(1, units, bias=False)  # a free vector: its input is one
        self.encoder = nn.Linear(units, units)

    def guide(self, x: Tensor) -> Distribution:
        mean = self.encoder(x)
        return Independent(Normal(mean, torch.full_like(mean, math.sqrt(2 / 3)), validate_args=False), 1)

    def prior(self, q: Distribution) -> Distribution:
        mean = self.mu(torch.ones(*q.batch_shape, 1).to(self.mu.weight))
        return Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        return Independent(Normal(z, torch.ones_like(z), validate_args=False), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        mean = self.mu(torch.ones_like(x[..., :1]))
        prior = Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1)
        return prior.log_prob(z) + self.likelihood(z).log_prob(x)

    def kl(self, q: Distribution) -> Tensor:
        return torch.distributions.kl_divergence(q, self.prior(q))

    def place(self, x: Tensor, distance: float, generator: torch.Generator) -> None:
        """Put each parameter tensor at Euclidean `distance` from its optimum for the data `x` ``[N, D]``, in a random direction."""
        optimum = x.mean(0)
        with torch.no_grad():
            self.mu.weight.copy_(optimum.unsqueeze(1))
            self.encoder.weight.copy_(torch.eye(len(optimum)) / 2)
            self.encoder.bias.copy_(optimum / 2)
            for parameter in self.parameters():
                direction = torch.randn(parameter.shape, generator=generator)
                parameter.add_(distance * direction / direction.norm())


class Expectation(nn.Module):
    """A guide without data whose objective is the plain expectation ``E_q[f(z)]`` of a function, at ``x = 1``.

    ``log_joint`` is ``f(z)`` plus the guide's own log density with its parameters held, so that the log weight is ``f(z)``
    and every score-function estimator of the ELBO, and ``stl``, become the textbook estimators of ``grad E_q[f]``.
    """

    groups = MappingProxyType({"generative": (), "inference": ("encoder",)})

    def __init__(self, f: Callable[[Tensor], Tensor], start: list[float]) -> None:
        super().__init__()
        self.f = f
        self.encoder = nn.Linear(1, len(start), bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.tensor(start).unsqueeze(1))

    def distribution(self, parameters: Tensor) -> Distribution:
        raise NotImplementedError

    def guide(self, x: Tensor) -> Distribution:
        return self.distribution(self.encoder(x))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        held = self.distribution(self.encoder(x).detach())
        return self.f(z).sum(-1) + held.log_prob(z)


class BernoulliToy(Expectation):
    """``E[(b - p0)^2]`` over one Bernoulli, ascended (Tucker et al. 2017); the gradient is with respect to the logit."""

    relaxed = True

    def __init__(self, p0: float = 0.499, logit: float = 0.5) -> None:
        super().__init__(lambda b: (b - p0) ** 2, [logit])

    def distribution(self, parameters: Tensor) -> Distribution:
        return Independent(Bernoulli(logits=parameters, validate_args=False), 1)


FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "quadratic": lambda z, k: (z - k) ** 2,
    "exponential": lambda z, k: (-k * z**2).exp(),
    "cosine": lambda z, k: (k * z).cos(),
}


class FunctionToy(Expectation):
    """``E[f(z)]`` over ``N(mu, sigma^2)`` for the test functions of Mohamed et al. 2020; parameters are ``mu`` and ``sigma``."""

    def __init__(self, function: str = "quadratic", k: float = 0.5, mu: float = 1.0, sigma: float = 1.0) -> None:
        super().__init__(lambda z: FUNCTIONS[function](z, k), [mu, sigma])

    def distribution(self, parameters: Tensor) -> Distribution:
        mean, stddev = parameters.chunk(2, -1)
        return Independent(Normal(mean, stddev, validate_args=False), 1)

"""Exact answers that share no code with what they check: all outcomes enumerated, or expectations by Gauss-Hermite quadrature.

An estimator is fed every outcome at once, as the rows of one batch ``(T, B)``, by a source of noise that hands out what it was
given; its terms are weighted with the outcomes' probabilities. What comes out is its expectation, without statistics.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

torch.set_num_threads(1)

Gradients = dict[str, Tensor]  # {group: [P]}


class Given:
    """A source of noise that hands out given draws, in order: values themselves, or standard normals to be shifted and scaled."""

    def __init__(self, *draws: Tensor, standard: bool) -> None:
        self._draws = iter(draws)
        self._standard = standard

    def rsample(self, q: Distribution, particles: int | None = None) -> Tensor:
        draw = next(self._draws)
        assert draw.shape == (() if particles is None else (particles,)) + q.batch_shape + q.event_shape
        return q.mean + q.stddev * draw if self._standard else draw

    def sample(self, q: Distribution, particles: int | None = None) -> Tensor:
        return self.rsample(q, particles).detach()


def scrambled(model: nn.Module, seed: int = 0, scale: float = 0.6) -> nn.Module:
    """The model in float64 with every parameter somewhere without symmetry, whatever it started from."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def groups_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by group, as the names say."""
    return {
        group: [p for name, p in model.named_parameters() if name.split(".")[0] in prefixes]
        for group, prefixes in model.groups.items()  # type: ignore[union-attr,operator]
    }


def derivative(value: Tensor, groups: Mapping[str, list[nn.Parameter]]) -> Gradients:
    """The gradient of one number with respect to every group, each flattened."""
    return {group: _flat_gradient(value, members) for group, members in groups.items()}


def _flat_gradient(value: Tensor, members: list[nn.Parameter]) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros(p.numel()).double() for p in members])
    found = torch.autograd.grad(value, members, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(members, found, strict=True)])


class Outcomes:
    """Every outcome of K particles: draws ``[K, T, B, D]``, and their probabilities ``[T, B]`` with their graph."""

    def __init__(self, model: nn.Module, x: Tensor, K: int) -> None:
        self.model, self.x, self.K = model, x, K
        self.groups = groups_of(model)

    def source(self) -> Given:
        raise NotImplementedError

    def log_weights(self) -> Tensor:
        """``[K, T, B]``, with the graph of everything."""
        z = self.draws()
        return self.model.log_joint(self.x, z) - self.model.guide(self.x).log_prob(z)

    def draws(self) -> Tensor:
        raise NotImplementedError

    def probabilities(self) -> Tensor:
        raise NotImplementedError

    def exact(self, objective: Callable[[Tensor], Tensor]) -> Gradients:
        """The gradient of the expectation of ``objective(log_w)``, averaged over the batch."""
        value = objective(self.log_weights())  # [T, B]
        return derivative((self.probabilities() * value).sum(0).mean(), self.groups)

    def expected(self, estimator, state) -> Gradients:
        """The expectation of what the estimator gives."""
        probability = self.probabilities().detach()
        x = self.x.expand(len(probability), *self.x.shape)  # [T, B, ...]
        made = estimator.surrogate(self.model, x, self.source(), state)
        total = {group: torch.zeros(sum(p.numel() for p in members)).double() for group, members in self.groups.items()}
        for surrogate in made if isinstance(made, Iterator) else [made]:
            for group, term in surrogate.terms.items():
                if group in total:
                    assert term.shape == probability.shape
                    total[group] += _flat_gradient((probability * term).sum(0).mean(), self.groups[group])
        return total

    def single_draws(self, estimator, state) -> tuple[Tensor, Tensor]:
        """Of a batch of one: the inference gradient of each outcome ``[T, P]``, and the outcomes' probabilities ``[T]``."""
        probability = self.probabilities().detach()
        x = self.x.expand(len(probability), *self.x.shape)
        term = estimator.surrogate(self.model, x, self.source(), state).terms["inference"][:, 0]
        rows = [_flat_gradient(each, self.groups["inference"]) for each in term]
        return torch.stack(rows), probability[:, 0]

    def by_logits(self, estimator, state) -> tuple[Tensor, Tensor]:
        """Of one data point: each outcome's gradient by the guide's Bernoulli logits ``[T, D]``, and probability ``[T, 1]``."""
        probability = self.probabilities().detach()
        x = self.x.expand(len(probability), *self.x.shape)
        logits = self.model.guide(x).base_dist.logits.detach().requires_grad_()
        q = Independent(Bernoulli(logits=logits, validate_args=False), 1)
        view = SimpleNamespace(guide=lambda x: q, log_joint=self.model.log_joint)
        term = estimator.surrogate(view, x, self.source(), state).terms["inference"]
        return torch.autograd.grad(term.sum(), logits)[0][:, 0], probability


class Enumerated(Outcomes):
    """All K-tuples of a binary latent of few units."""

    def __init__(self, model: nn.Module, x: Tensor, K: int) -> None:
        super().__init__(model, x, K)
        units = model.guide(x).event_shape[0]
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=x.dtype)  # [S, D]
        chosen = torch.tensor(list(itertools.product(range(len(states)), repeat=K)))  # [T, K]
        self.z = states[chosen.T].unsqueeze(2).expand(-1, -1, len(x), -1)  # [K, T, B, D]

    def source(self) -> Given:
        return Given(self.z, standard=False)

    def draws(self) -> Tensor:
        return self.z

    def probabilities(self) -> Tensor:
        return self.model.guide(self.x).log_prob(self.z).sum(0).exp()


class Quadrature(Outcomes):
    """Gauss-Hermite nodes for K particles of one Gaussian latent (times `moves` further draws of each particle)."""

    def __init__(self, model: nn.Module, x: Tensor, K: int, nodes: int = 40, moves: int = 0) -> None:
        super().__init__(model, x, K)
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        weights = weights / weights.sum()
        axes = K * (1 + moves)
        grid = torch.tensor(np.stack([g.ravel() for g in np.meshgrid(*[points] * axes, indexing="ij")]))  # [axes, T]
        weight = np.prod(np.stack([g.ravel() for g in np.meshgrid(*[weights] * axes, indexing="ij")]), axis=0)
        self.weight = torch.tensor(weight).unsqueeze(1).expand(-1, len(x))  # [T, B]
        draws = grid.unflatten(0, (1 + moves, K))[..., None, None].expand(-1, -1, -1, len(x), 1)
        self.noise = list(draws.unbind(0))  # of each draw, [K, T, B, 1]

    def source(self) -> Given:
        return Given(*self.noise, standard=True)

    def draws(self) -> Tensor:
        q = self.model.guide(self.x)
        return q.mean + q.stddev * self.noise[0]

    def probabilities(self) -> Tensor:
        return self.weight


def doubly_exponential(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights in (0, 1), closer and closer together at its ends (Takahasi & Mori 1974)."""
    t = np.linspace(-2.9, 2.9, nodes)
    weights = np.cosh(t) / np.cosh(np.pi / 2 * np.sinh(t)) ** 2
    return 1 / (1 + np.exp(-np.pi * np.sinh(t))), weights / weights.sum()


class Uniforms(Outcomes):
    """Uniforms for a binary latent: the cube is cut where a unit flips, at p and 1 - p, and each piece is integrated by itself.

    Args:
        draws: uniforms per latent unit.
        nodes: of a quadrature on either side of p that allows for singularities at 0 and 1; None for what is linear on each of the
            three pieces.
    """

    def __init__(self, model: nn.Module, x: Tensor, draws: int, nodes: int | None = None) -> None:
        super().__init__(model, x, draws)
        p = model.guide(x).mean.detach().numpy()  # [B, D]
        cuts = np.sort(np.stack([0 * p, p, 1 - p, 0 * p + 1]), axis=0)
        points, weights = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts, axis=0)  # [n, B, D]
        if nodes is not None:
            near, weight = (of[:, None, None] for of in doubly_exponential(nodes))
            points = np.concatenate([p * near, 1 - (1 - p) * near])
            weights = np.concatenate([p * weight, (1 - p) * weight])
        units = p.shape[-1]
        chosen = np.stack([g.ravel() for g in np.meshgrid(*[range(len(points))] * (draws * units), indexing="ij")], 1)
        chosen = chosen.reshape(-1, draws, units).swapaxes(0, 1)  # [draws, T, D]
        at = (chosen[:, :, None], np.arange(len(x))[:, None], np.arange(units))
        self.u = torch.tensor(points[at])  # [draws, T, B, D]
        self.weight = torch.tensor(weights[at].prod(axis=(0, 3)))  # [T, B]

    def source(self) -> Given:
        return Given(self.u, standard=False)

    def probabilities(self) -> Tensor:
        return self.weight


class Scattered(Uniforms):
    """Scrambled Sobol points, where there are too many uniforms for a grid: the mean of a few `seed`s has an error bar."""

    def __init__(self, model: nn.Module, x: Tensor, draws: int, seed: int) -> None:
        Outcomes.__init__(self, model, x, draws)
        units = model.guide(x).event_shape[0]
        points = qmc.Sobol(draws * units, rng=np.random.default_rng(seed)).random_base2(11).clip(1e-12, 1 - 1e-12)
        self.u = torch.tensor(points).unflatten(1, (draws, units)).movedim(1, 0).unsqueeze(2).expand(-1, -1, len(x), -1)
        self.weight = torch.full(self.u.shape[1:3], 1 / len(points)).double()


def elbo(log_w: Tensor) -> Tensor:
    return log_w.sum(0) / len(log_w)


def bound(log_w: Tensor) -> Tensor:
    """The K-sample bound, with nothing clever in it."""
    return (log_w.exp().sum(0) / len(log_w)).log()


def off(found: Gradients, wanted: Gradients) -> dict[str, float]:
    """How far each group is from what it should be, relative to the largest coordinate."""
    return {g: float((found[g] - wanted[g]).abs().max() / wanted[g].abs().max()) for g in wanted if len(wanted[g])}

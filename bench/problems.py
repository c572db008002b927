"""A problem: a model held still, with fixed parameters and one minibatch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.bench.models.protocol import offers
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.noise import Rng


@dataclass(frozen=True)
class Problem:
    """A model at fixed parameters and one minibatch, on which estimators are measured.

    Args:
        model: any `LatentVariableModel`, of which the problem keeps a copy in evaluation mode.
        x: the minibatch ``[B, ...]``, already binarised.
        name: as typed, ``digits-vae@late``.
        held_out: data on which active units are counted.
        about: columns of the rows: model, dataset, snapshot. Their digest, of parameters and data, is added.
        minibatch: draws another minibatch like `x` from the training data, with all of its randomness from the generator; None
            where there is no other.

    Raises:
        ValueError: a model or a minibatch that cannot be measured.
    """

    model: Any
    x: Tensor
    name: str = "problem"
    held_out: Tensor | None = None
    about: dict[str, str] = field(default_factory=dict)
    minibatch: Callable[[torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        kind = type(self.model).__name__
        if lacking := [name for name in ("guide", "log_joint", "groups") if not hasattr(self.model, name)]:
            raise ValueError(f"{kind} is no latent-variable model: it has no {lacking[0]}")
        if not isinstance(self.model, nn.Module) or not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                f"{kind} has no parameters to take gradients of: a model is an nn.Module that is not frozen"
            )
        if not isinstance(self.x, Tensor):
            raise ValueError(f"x is a tensor [B, ...], not of type {type(self.x).__name__}")
        if self.x.dim() == 0 or len(self.x) == 0:
            raise ValueError(
                f"x is a minibatch [B, ...] of at least one data point, not of shape {tuple(self.x.shape)}"
            )
        object.__setattr__(self, "model", copy.deepcopy(self.model).eval())
        object.__setattr__(self, "about", self.about | {"digest": digest(self.model, self.x, self.held_out)})

    def lacks(self, estimator: Estimator) -> list[str]:
        """The capabilities that `estimator` needs and this problem does not offer."""
        offered = offers(self.model, self.x)
        return [need for need in estimator.facts.needs if need not in offered]


def digest(model: nn.Module, x: Tensor, held_out: Tensor | None = None) -> str:
    """The hash of everything a measurement reads of a problem."""
    found = hashlib.sha256()
    for name, tensor in [*sorted(model.state_dict().items()), ("x", x), ("held_out", held_out)]:
        found.update(name.encode())
        if isinstance(tensor, Tensor):  # a module may keep more than tensors, and NumPy has no bfloat16
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


DRAWS = 64  # of which the posterior means of several layers are averages
ADVICE = {
    "rsample": "needs a reparameterisable guide; try rloo or vimco",
    "kl": "needs a divergence from prior to guide in closed form; try sgvb-a or stl",
    "likelihood": "needs a model with a separate likelihood; try sgvb-a or rloo",
    "prior": "needs a prior as a distribution; try sgvb-a or stl",
    "gaussian": "needs a guide of independent Gaussians; try iwae or vimco",
    "bernoulli": "needs one layer of independent Bernoulli latents; try rloo or vimco",
    "discrete": "needs one layer of independent Bernoulli or one-hot latents; try sgvb-a or rloo",
    "relaxed": "needs a joint that makes sense between the values of its latents; try rloo or disarm",
}


def reason_to_skip(problem: Problem, estimator: Estimator) -> str | None:
    """Why a pair cannot be measured, in a sentence, or None."""
    lacking = problem.lacks(estimator)
    if not lacking:
        return None
    name = estimator.facts.name
    return f"{name} {ADVICE.get(lacking[0], f'needs {lacking[0]!r}, which the problem does not offer')}"


def active_units(model: Any, x: Tensor) -> int:
    """Latents whose posterior mean has a variance over the data `x` above 0.01 (Burda et al. 2016).

    The means of a guide of several layers are averages over draws, whose own variance is taken out; a latent of several classes
    is active if the probability of one of them is.
    """
    like = next(model.parameters())
    noise: Tensor | float = 0.0
    with torch.no_grad():
        guide = model.guide(x.to(like))
        try:
            means = guide.mean
        except NotImplementedError:
            draws = Rng(0, 0, "units", like.device, block=1).sample(guide, DRAWS)
            means, noise = draws.mean(0), draws.var(0).mean(0) / DRAWS
    active = means.var(0) - noise > 0.01  # [D], or [D, classes]
    return int((active.any(-1) if active.dim() > 1 else active).sum())

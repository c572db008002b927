"""A problem: a model held still, with fixed parameters and one minibatch."""

from __future__ import annotations

import copy
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
        about: columns of the rows: model, dataset, snapshot, digest.
        minibatch: draws another minibatch like `x` from the training data, with all of its randomness from the generator; None
            where there is no other.

    Raises:
        ValueError: the model or the minibatch is none.
    """

    model: Any
    x: Tensor
    name: str = "problem"
    held_out: Tensor | None = None
    about: dict[str, str] = field(default_factory=dict)
    minibatch: Callable[[torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if lacking := [name for name in ("guide", "log_joint", "groups") if not hasattr(self.model, name)]:
            raise ValueError(f"{type(self.model).__name__} is no latent-variable model: it has no {lacking[0]}")
        if not isinstance(self.x, Tensor):
            raise ValueError(f"x is a tensor [B, ...], not of type {type(self.x).__name__}")
        if self.x.dim() == 0 or len(self.x) == 0:
            raise ValueError(
                f"x is a minibatch [B, ...] of at least one data point, not of shape {tuple(self.x.shape)}"
            )
        if isinstance(self.model, nn.Module):
            object.__setattr__(self, "model", copy.deepcopy(self.model).eval())

    def lacks(self, estimator: Estimator) -> list[str]:
        """The capabilities that `estimator` needs and this problem does not offer."""
        offered = offers(self.model, self.x)
        return [need for need in estimator.facts.needs if need not in offered]


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
    """Latents whose posterior mean has a variance over the data `x` above 0.01 (Burda et al. 2016)."""
    like = next(model.parameters())
    with torch.no_grad():
        guide = model.guide(x.to(like))
        try:
            means = guide.mean
        except NotImplementedError:
            means = Rng(0, 0, "units", like.device, block=1).sample(guide, 64).mean(0)
    return int((means.var(0) > 0.01).sum())

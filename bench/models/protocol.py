"""What a model must offer to be measured, and what it may offer on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical


@runtime_checkable
class LatentVariableModel(Protocol):
    """A joint density ``p(x, z)`` and a guide ``q(z|x)``, both differentiable in their parameters.

    Optional capabilities, offered by the methods' presence:

    - ``likelihood(z)``, the distribution ``p(x|z)``, and ``prior(q)``, ``p(z)`` with the guide's batch shape;
    - ``kl(q)``, the divergence from prior to guide in closed form, ``[*batch]``; where an attribute ``has_kl`` is false, neither it
      nor ``prior`` counts as offered.

    ``relaxed``, an attribute or property, is true of a model of discrete latents whose ``log_joint`` may be evaluated between their
    values, and is smooth there.
    """

    groups: Mapping[str, tuple[str, ...]]
    """Parameter groups, disjoint: ``{"generative": ("decoder",), "inference": ("encoder",)}``, by prefixes of parameter names."""

    def guide(self, x: Tensor) -> Distribution:
        """``q(z|x)`` with batch shape ``[*batch]``, for ``x [*batch, D]``; several layers are one joint distribution."""

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """``log p(x, z)``, ``[K, *batch]``; ``x`` broadcasts against ``z``."""


def offers(model: LatentVariableModel, x: Tensor) -> set[str]:
    """The capabilities an estimator may ask for in ``facts.needs`` that `model` has at the minibatch `x`.

    "rsample", "gaussian", "bernoulli" and "discrete" (Bernoulli or one-hot) are of the guide, the last three of one layer of
    independent latents; "likelihood", "prior", "kl" and "relaxed" of the model.
    """
    assert isinstance(model, nn.Module)
    held = next(model.parameters())
    guide = model.guide(x.to(held))  # a measurement converts both; here only the shapes matter
    closed = getattr(model, "has_kl", True)
    found = {name for name in ("likelihood", "prior", "kl") if callable(getattr(model, name, None))}
    found -= set() if closed else {"prior", "kl"}
    if guide.has_rsample:
        found.add("rsample")
    family, axes = type(getattr(guide, "base_dist", None)), len(guide.event_shape)  # a subclass may be another family
    if isinstance(guide, Independent):
        found |= {"gaussian"} if family is Normal else set()
        found |= {"bernoulli", "discrete"} if family is Bernoulli and axes == 1 else set()
        found |= {"discrete"} if family is OneHotCategorical and axes == 2 else set()
    if getattr(model, "relaxed", False):
        found.add("relaxed")
    return found


def parameters_of(model: LatentVariableModel) -> dict[str, dict[str, nn.Parameter]]:
    """``{group: {name: parameter}}``.

    Raises:
        ValueError: a parameter in no group or in two, or tied across groups.
    """
    assert isinstance(model, nn.Module)
    found: dict[str, dict[str, nn.Parameter]] = {group: {} for group in model.groups}
    for name, parameter in model.named_parameters():
        owners = [
            group
            for group, prefixes in model.groups.items()
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        if len(owners) != 1:
            where = "no group" if not owners else f"groups {' and '.join(owners)}"
            raise ValueError(
                f"parameter {name!r} of {type(model).__name__} is in {where}; groups must be disjoint and complete"
            )
        found[owners[0]][name] = parameter
    names = {id(parameter) for parameter in model.parameters()}
    if len(names) != len(list(model.named_parameters(remove_duplicate=False))):
        raise ValueError(f"{type(model).__name__} ties parameters, so its groups' gradients are not separate")
    return found

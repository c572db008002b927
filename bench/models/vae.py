"""The common variational auto-encoder that every estimator shares, and the sizes the literature uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical, kl_divergence

from gradiometer.bench.models.layers import ACTIVATIONS, Chain, Head, factorized, flat, perceptron


@dataclass(frozen=True)
class Architecture:
    """Sizes and kinds of a VAE.

    Args:
        data: pixels.
        hidden: hidden sizes of the encoder's first network; the decoder mirrors them.
        latent: latents per stochastic layer, from the data upwards; one entry per layer.
        kind: "gaussian", "bernoulli" or "categorical" latents.
        likelihood: "bernoulli", or "gaussian" with mean and standard deviation per pixel from the decoder.
        activation: of the hidden layers.
        between: hidden sizes of the networks between stochastic layers.
        classes: of a categorical latent.
        centred: the encoder sees the data less its training mean, and the decoder starts at its logit.
    """

    data: int
    hidden: Sequence[int] = (200, 200)
    latent: Sequence[int] = (50,)
    kind: str = "gaussian"
    likelihood: str = "bernoulli"
    activation: str = "tanh"
    between: Sequence[int] = field(default=(100, 100))
    classes: int = 10
    centred: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, ("gaussian", "bernoulli", "categorical")),
            ("likelihood", self.likelihood, ("gaussian", "bernoulli")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in known:
                raise ValueError(f"{name} of a VAE should be one of {', '.join(known)}, not {value!r}")
        if not self.latent or min([self.data, *self.hidden, *self.latent, *self.between]) < 1:
            raise ValueError(f"sizes of a VAE are positive, and it has a stochastic layer: {self}")


PRESETS = MappingProxyType(
    {
        "digits": Architecture(data=64, hidden=(32,), latent=(8,)),  # 64-32-8
        "digits-two-layers": Architecture(data=64, hidden=(32,), latent=(12, 6), between=(16,)),
        "digits-binary": Architecture(data=64, hidden=(32,), latent=(16,), kind="bernoulli"),
        "digits-categorical": Architecture(data=64, hidden=(32,), latent=(6,), kind="categorical", classes=4),
        "digits-gaussian": Architecture(data=64, hidden=(32,), latent=(8,), likelihood="gaussian"),
        "burda-1": Architecture(data=784, hidden=(200, 200), latent=(50,)),  # Burda et al. 2016, one layer
        "burda-2": Architecture(data=784, hidden=(200, 200), latent=(100, 50), between=(100, 100)),  # and two
        "disarm-linear": Architecture(data=784, hidden=(), latent=(200,), kind="bernoulli"),  # Dong et al. 2020
        "disarm-nonlinear": Architecture(
            data=784, hidden=(200, 200), latent=(200,), kind="bernoulli", activation="leaky-relu"
        ),
    }
)


class VAE(nn.Module):
    """``p(z_L) ... p(z_1|z_2) p(x|z_1)`` and ``q(z_1|x) ... q(z_L|z_{L-1})``, any number of stochastic layers.

    Args:
        architecture: sizes and kinds.
        mean: mean of the training data ``[D]``, used if the architecture is centred; one half if not given.
    """

    groups = MappingProxyType({"generative": ("decoder", "descents"), "inference": ("encoder", "ascents")})

    def __init__(self, architecture: Architecture, mean: Tensor | None = None) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.units = list(a.latent)
        widths = [units * (a.classes if a.kind == "categorical" else 1) for units in a.latent]
        self.center: Tensor
        self.register_buffer("center", torch.full((a.data,), 0.5) if mean is None else mean.clone())
        self.encoder = Head(a.data, a.hidden, a.latent[0], a.kind, a.activation, a.classes)
        self.decoder = perceptron(
            widths[0], a.hidden[::-1], a.data * (2 if a.likelihood == "gaussian" else 1), a.activation
        )
        self.ascents = nn.ModuleList(
            Head(below, a.between, above, a.kind, a.activation, a.classes)
            for below, above in zip(widths, a.latent[1:], strict=False)
        )
        self.descents = nn.ModuleList(
            Head(above, a.between[::-1], below, a.kind, a.activation, a.classes)
            for above, below in zip(widths[1:], a.latent, strict=False)
        )
        if a.centred:
            self._start_at_mean()

    def _start_at_mean(self) -> None:
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        mean = self.center.clamp(0.001, 0.999)
        with torch.no_grad():
            last.bias[: mean.numel()] = mean.logit() if self.architecture.likelihood == "bernoulli" else mean

    @property
    def has_kl(self) -> bool:
        """Whether the divergence from prior to guide has a closed form: one stochastic layer."""
        return len(self.units) == 1

    @property
    def relaxed(self) -> bool:
        """Whether the joint is smooth between the values of discrete latents: a decoder reads them like any numbers, and the prior
        of a single layer is uniform."""
        return self.architecture.kind != "gaussian" and len(self.units) == 1

    def guide(self, x: Tensor) -> Distribution:
        q = self.encoder(x - self.center if self.architecture.centred else x)
        return q if self.has_kl else Chain(q, list(self.ascents), self.units)

    def likelihood(self, z: Tensor) -> Distribution:
        """``p(x|z)`` for latents of all layers ``[..., D]`` (``[..., D, C]`` if categorical); only the first layer matters."""
        first = z.narrow(-2 if self.architecture.kind == "categorical" else -1, 0, self.units[0])
        output = self.decoder(first.flatten(-2) if self.architecture.kind == "categorical" else first)
        return factorized(self.architecture.likelihood, output)

    def prior(self, q: Distribution) -> Distribution:
        """``p(z)`` expanded to the batch shape of the guide `q`; layers as the guide orders them, so of one layer only."""
        if not self.has_kl:
            raise NotImplementedError(
                "the prior of several layers has no distribution in the guide's order: use log_joint"
            )
        return self._top(self.units[0]).expand(q.batch_shape)

    def kl(self, q: Distribution) -> Tensor:
        """``KL(q || p)``, ``[*batch]``, one stochastic layer only."""
        return kl_divergence(q, self.prior(q))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        layers = z.split(self.units, dim=-2 if self.architecture.kind == "categorical" else -1)
        top = self._top(self.units[-1])
        total = self.likelihood(layers[0]).log_prob(x) + top.log_prob(layers[-1])
        for descent, below, above in zip(self.descents, layers, layers[1:], strict=False):
            total = total + descent(flat(above, top)).log_prob(below)
        return total

    def _top(self, units: int) -> Distribution:
        """The fixed prior of the top layer: standard normal, or uniform over the values of a discrete latent."""
        zeros = self.center.new_zeros(units)
        match self.architecture.kind:
            case "gaussian":
                return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), 1)
            case "bernoulli":
                return Independent(Bernoulli(logits=zeros, validate_args=False), 1)
        flat_logits = zeros.unsqueeze(-1).expand(units, self.architecture.classes)
        return Independent(OneHotCategorical(logits=flat_logits, validate_args=False), 1)

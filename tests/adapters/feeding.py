"""What adapters have in common: a library is given our noise, our guide's parameters as leaves, and is differentiated at its edge.

A library knows torch's distributions and a loss of the whole batch. Three things turn that into terms of each row:

- `Feed` answers the calls that torch's generator would, with draws of the harness: the library draws as it always does;
- `Leaves` are the guide's parameters, one set per row of the batch, in which the library's loss is differentiated;
- the joint carries a zero per particle and row, whose derivative is the weight that the library gives to that particle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical, Uniform
from torch.overrides import TorchFunctionMode

from gradiometer.estimators.base import State, Surrogate

PARAMETERS = {Normal: ("loc", "scale"), Bernoulli: ("logits",), OneHotCategorical: ("logits",)}


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Another default precision: libraries make weights like 1/n in it, and the harness's noise is of the usual one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Feed(TorchFunctionMode):
    """While it is entered, random draws of the shape of a guide's latents come from `rng`, and `backward` only notes its loss.

    Args:
        rng: the harness's noise.
        q: the guide, with batch shape ``[*batch]``; a library may flatten the batch, and put particles in front of it.
    """

    def __init__(self, rng: Any, q: Distribution) -> None:
        super().__init__()
        self.rng, self.batch, self.event = rng, q.batch_shape, q.event_shape
        self.losses: list[Tensor] = []
        self.dtype = torch.get_default_dtype()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.bernoulli:
            return self._draw(args[0].shape, args[0].dtype, lambda p: Bernoulli(p, validate_args=False), args[0])
        if func is torch.rand:
            shape = torch.Size(args[0] if not isinstance(args[0], int) else args)
            return self._uniform(shape, kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.rand_like:
            return self._uniform(args[0].shape, args[0].dtype)
        if func is torch.Tensor.normal_:
            drawn = self._draw(args[0].shape, args[0].dtype, lambda z: Normal(z, torch.ones_like(z)))
            return args[0].copy_(drawn)
        if func is torch.normal and isinstance(args[0], Tensor):
            drawn = self._draw(args[0].shape, args[0].dtype, lambda z: Normal(z, torch.ones_like(z)))
            return args[0] + args[1] * drawn
        if func is torch.multinomial:
            return self._classes(*args)
        if func is torch.Tensor.backward:
            self.losses.append(args[0])
            return None
        if getattr(func, "__name__", "") in ("normal", "randn", "randn_like", "randint", "uniform_", "exponential_"):
            raise NotImplementedError(f"{func.__name__} is not fed")
        return func(*args, **kwargs)

    def _uniform(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._draw(shape, dtype, lambda z: Uniform(z, torch.ones_like(z), validate_args=False))

    def _draw(self, shape: torch.Size, dtype: torch.dtype, family: Callable, parameter: Tensor | None = None) -> Tensor:
        """Draws of `shape`, which ends with the guide's event shape; of particles of a row, the parameter is the same."""
        if parameter is None and len(shape) > 1 and shape[-1] == 2 and shape[0] == self.batch.numel():
            return self._of_rows(shape, dtype, family)
        if shape[len(shape) - len(self.event) :] != self.event:
            raise NotImplementedError(f"a draw of shape {tuple(shape)} is not of latents {tuple(self.event)}")
        particles, left = divmod(shape.numel(), self.batch.numel() * self.event.numel())
        if left or not particles:
            raise NotImplementedError(f"a draw of shape {tuple(shape)} is not of rows {tuple(self.batch)}")
        rows = torch.Size([*self.batch, *self.event])
        made = torch.zeros(rows, dtype=dtype) if parameter is None else parameter.reshape(particles, *rows)[0]
        q = Independent(family(made), len(self.event), validate_args=False)
        return self._sample(q, particles).reshape(shape).to(dtype)

    def _sample(self, q: Distribution, particles: int | None = None) -> Tensor:
        with precision(self.dtype):
            return self.rng.sample(q, particles)

    def _of_rows(self, shape: torch.Size, dtype: torch.dtype, family: Callable) -> Tensor:
        """Draws ``[N, ...]`` of each row for the two values of one Bernoulli latent: sampling without replacement."""
        q = Independent(family(torch.zeros(*self.batch, *shape[1:], dtype=dtype)), len(shape) - 1, validate_args=False)
        return self._sample(q).reshape(shape).to(dtype)

    def _classes(self, probabilities: Tensor, number: int, replacement: bool = False) -> Tensor:
        """Of categorical latents ``[N * D, C]``, or ``[K * N * D, C]``, as `Categorical.sample` asks for them."""
        rows = self.batch.numel() * self.event[0]
        lead = len(probabilities) // rows
        q = OneHotCategorical(probabilities[:rows].reshape(*self.batch, *self.event), validate_args=False)
        chosen = self._sample(Independent(q, 1, validate_args=False), lead * number).argmax(-1)  # [K, *batch, D]
        return chosen.reshape(number, -1).T if lead == 1 else chosen.reshape(-1, number)


class Drawn:
    """A source of noise for one row, of latents ``[K, *event]`` that were drawn for all rows at once."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def sample(self, q: Distribution, particles: int | None = None) -> Tensor:
        return self.z.reshape(len(self.z) if particles is None else particles, *q.batch_shape, *q.event_shape)


@dataclass(frozen=True)
class Leaves:
    """The parameters of a guide of one layer of latents, cut from the network that gives them, and the way back to it."""

    family: type
    made: dict[str, Tensor]  # with the graph of the guide
    given: dict[str, Tensor]  # leaves, for the library

    @classmethod
    def of(cls, q: Independent) -> Leaves:
        family = type(q.base_dist)
        made = {name: getattr(q.base_dist, name) for name in PARAMETERS[family]}
        return cls(family, made, {n: p.detach().clone().requires_grad_() for n, p in made.items()})

    def term(self, gradients: dict[str, Tensor], batch: torch.Size) -> Tensor:
        """A term ``[*batch]`` that has these gradients in the parameters ``[*batch, *event]``."""
        parts = [(gradients[n] * p).flatten(len(batch)).sum(-1) for n, p in self.made.items()]
        return torch.stack(parts).sum(0)


def derivatives(loss: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss that is descended, the gradients that are ascended; zeros where it does not hang on something."""
    found = torch.autograd.grad(loss, list(of.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else -g.detach() for (n, p), g in zip(of.items(), found, strict=True)}


def log_probability(q: Independent, z: Tensor) -> Tensor:
    """``log q(z)``, also between the values of discrete latents, where torch gives one-hot ones that of the nearest."""
    if isinstance(q.base_dist, OneHotCategorical):
        return (z * q.base_dist.logits).sum((-2, -1))
    return q.log_prob(z)


def row_by_row(run: Callable[..., Surrogate], model: Any, x: Tensor, rng: Any, K: int, state: State) -> Surrogate:
    """What `run(model, x, q, rng, state)` gives for each row alone, a batch of one data point, of Bernoulli latents."""
    q = model.guide(x)
    batch, logits, z = q.batch_shape, q.base_dist.logits, rng.sample(q, K)  # z [K, *batch, D]
    data = x.expand(*batch, *x.shape[len(batch) :])
    made = []
    for number in range(batch.numel()):
        row = torch.unravel_index(torch.tensor(number), batch)
        one = Independent(Bernoulli(logits=logits[row].unsqueeze(0), validate_args=False), 1)
        made.append(run(model, data[row].unsqueeze(0), one, Drawn(z[(slice(None), *row)]), state))
    terms = {group: torch.cat([of.terms[group] for of in made]).reshape(batch) for group in made[0].terms}
    log_w = torch.cat([of.log_w for of in made if of.log_w is not None], 1).reshape(K, *batch)
    return Surrogate(terms, log_w)

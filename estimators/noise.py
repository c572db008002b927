"""Noise as an argument: the same seed gives the same draws in a loop, in a batch, in any chunk size.

The noise of replicate ``r`` depends on the seed, the stream, ``r`` and the ordinal of the draw, and on nothing else. A
generator per replicate would cost more than a replicate, so generators are keyed by fixed blocks of `BLOCK` replicates,
and a chunk takes the rows it needs from the blocks it touches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Size, Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical, Transform, Uniform

BLOCK = 16  # replicates that share one generator; part of what a seed means, so a change of it changes every number


@runtime_checkable
class Ancestral(Protocol):
    """A distribution that draws itself from an `Rng`, part by part (several stochastic layers, for instance)."""

    def draw(self, rng: Rng, particles: int | None, *, differentiable: bool) -> Tensor: ...


class Rng:
    """A source of noise for one replicate, or for a range of replicates as one batch.

    Args:
        seed: the user's seed.
        replicates: one index (draws have the distribution's own batch shape), or a range (the last-but-one batch axis of
            every distribution drawn from is then the replicate axis, ``(R, B)``, and row ``i`` gets the noise of replicate
            ``replicates[i]``).
        stream: separates uses that must not share noise ("measure", "settle", "train").
        block: replicates that share a generator; 1 where replicates are never batched, so that no draw is wasted.
        held: a dictionary that a loop over replicates hands to each of its sources, so that a block is drawn once and not
            once per replicate.
        device: where draws are returned. They are made on the CPU and in float32, so that every device and dtype sees the
            same noise.

    Example:
        >>> q = Normal(torch.zeros(3, 2), torch.ones(3, 2))
        >>> batch = Rng(0, range(4)).rsample(Independent(q.expand((4, 3, 2)), 1), 5)  # [K, R, B, D]
        >>> alone = Rng(0, 2).rsample(Independent(q, 1), 5)  # [K, B, D]
        >>> torch.equal(batch[:, 2], alone)
        True
    """

    def __init__(
        self,
        seed: int,
        replicates: int | range = 0,
        stream: str = "measure",
        device: torch.device | str = "cpu",
        block: int = BLOCK,
        held: dict[int, tuple[int, Tensor]] | None = None,
    ) -> None:
        self.seed = seed
        self.replicates = replicates
        self.stream = stream
        self.device = torch.device(device)
        self.block = block
        self._held = held
        self._ordinal = 0

    def rsample(self, q: Distribution, particles: int | None = None) -> Tensor:
        """Reparameterised draws ``[K, *batch, *event]`` (``[*batch, *event]`` without ``particles``)."""
        if not q.has_rsample:
            raise NotImplementedError(f"{type(q).__name__} cannot be reparameterised: draw with sample()")
        return self._draw(q, particles, differentiable=True)

    def sample(self, q: Distribution, particles: int | None = None) -> Tensor:
        """Draws ``[K, *batch, *event]`` without a gradient; the same numbers as `rsample`."""
        with torch.no_grad():
            return self._draw(q, particles, differentiable=False)

    def uniform(self, like: Distribution) -> Tensor:
        """One uniform in ``(0, 1)`` per element of ``like``'s batch, ``[*batch]``."""
        return self._noise(like.batch_shape, len(like.batch_shape), _fill_uniform).to(_dtype(like))

    def normal(self, like: Distribution) -> Tensor:
        """One standard normal per element of ``like``'s batch, ``[*batch]``."""
        return self._noise(like.batch_shape, len(like.batch_shape), _fill_normal).to(_dtype(like))

    def _draw(self, q: Distribution, particles: int | None, *, differentiable: bool) -> Tensor:
        if isinstance(q, Ancestral):
            return q.draw(self, particles, differentiable=differentiable)
        base: Any = q
        batch_axes = len(q.batch_shape)
        while isinstance(base, Independent):
            base = base.base_dist
        shape = Size(() if particles is None else (particles,)) + q.batch_shape + q.event_shape
        axes = batch_axes + (particles is not None)
        family = type(base)  # a subclass may draw in another way
        if family is Normal:
            return base.loc + base.scale * self._noise(shape, axes, _fill_normal).to(base.loc.dtype)
        if family is Uniform:
            u = self._noise(shape, axes, _fill_uniform).to(base.low.dtype)  # as `u < p` draws a Bernoulli
            return base.low + (base.high - base.low) * u
        if family is Bernoulli:
            probs = base.probs
            return (self._noise(shape, axes, _fill_uniform).to(probs.dtype) < probs).to(probs.dtype)
        if family is OneHotCategorical:
            gumbel = -(-self._noise(shape, axes, _fill_uniform).log()).log()
            logits = base.logits + gumbel.to(base.logits.dtype)
            return torch.nn.functional.one_hot(logits.argmax(-1), shape[-1]).to(logits.dtype)
        return self._draw_by_torch(q, particles, differentiable=differentiable)

    def _noise(self, shape: Size, axes: int, fill: Callable[[Tensor, torch.Generator], object]) -> Tensor:
        """Noise of `shape`, whose first `axes` axes are particles and batch; rows are cut from whole blocks."""
        if isinstance(self.replicates, int):
            wanted, inner, axis = range(self.replicates, self.replicates + 1), shape, 0
        else:
            wanted, axis = self.replicates, axes - 2
            self._must_have_replicates(shape, axis)
            inner = shape[:axis] + shape[axis + 1 :]
        first, last = wanted.start // self.block, (wanted.stop - 1) // self.block
        rows = self._blocks(range(first, last + 1), inner, fill)
        self._ordinal += 1
        rows = rows[wanted.start - first * self.block :][: len(wanted)].to(self.device, non_blocking=True)
        return rows[0] if isinstance(self.replicates, int) else rows.movedim(0, axis)

    def _must_have_replicates(self, shape: Size, axis: int) -> None:
        assert isinstance(self.replicates, range)
        if axis < 0 or shape[axis] != len(self.replicates):
            raise ValueError(
                f"a draw of shape {tuple(shape)} has no replicate axis of {len(self.replicates)}: "
                "expand the distribution to the guide's batch shape (R, B)"
            )

    def _blocks(self, blocks: range, inner: Size, fill: Callable[[Tensor, torch.Generator], object]) -> Tensor:
        slot = 2 * self._ordinal + (fill is _fill_uniform)  # uniforms are never taken for normals
        if self._held is not None and len(blocks) == 1:
            known, rows = self._held.get(slot, (-1, None))
            if known == blocks.start and rows is not None and rows.shape[1:] == inner:
                return rows
        # From pinned memory a copy waits for nothing: a graphics processor works while the next noise is made.
        pinned = self.device.type == "cuda"
        rows = torch.empty(len(blocks) * self.block, *inner, dtype=torch.float32, device="cpu", pin_memory=pinned)
        for i, block in enumerate(blocks):
            fill(rows[i * self.block :][: self.block], self._generator(block))
        if self._held is not None and len(blocks) == 1:
            self._held[slot] = (blocks.start, rows)
        return rows

    def _generator(self, block: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._key(block))

    def _key(self, block: int) -> int:
        name = f"{self.seed}/{self.stream}/{self.block}/{block}/{self._ordinal}"
        return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1  # torch wants an int64

    def _draw_by_torch(self, q: Distribution, particles: int | None, *, differentiable: bool) -> Tensor:
        """Draws of a family we hold no transform for: one row at a time, on the CPU too, from a seeded global generator."""
        draws = []
        single = isinstance(self.replicates, int)
        indices = [self.replicates] if isinstance(self.replicates, int) else list(self.replicates)
        if not single:
            self._must_have_replicates(q.batch_shape + q.event_shape, len(q.batch_shape) - 2)
        here = q if self.device.type == "cpu" else moved(q, torch.device("cpu"))
        for row, replicate in enumerate(indices):
            with seeded(self._key(-1 - replicate)):
                part = here if single else rebuilt(here, partial(torch.select, dim=len(q.batch_shape) - 2, index=row))
                shape = Size(() if particles is None else (particles,))
                draws.append(part.rsample(shape) if differentiable else part.sample(shape))
        self._ordinal += 1
        axis = len(q.batch_shape) - 2 + (particles is not None)
        return (draws[0] if single else torch.stack(draws, axis)).to(self.device, non_blocking=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, torch's global generators start from a seed; afterwards they go on as if nothing had been drawn."""
    gpus = graphics_processors()
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed what CUDA starts with, later
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


def graphics_processors() -> list[int]:
    """Those whose generators may be drawn from: none before CUDA was used."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _fill_normal(rows: Tensor, generator: torch.Generator) -> None:
    rows.normal_(generator=generator)


def _fill_uniform(rows: Tensor, generator: torch.Generator) -> None:
    # The open interval: a draw of exactly 0 (one in 2^24) would make log(u) infinite.
    rows.uniform_(generator=generator).clamp_(min=2.0**-25)


def _dtype(q: Distribution) -> torch.dtype:
    while isinstance(q, Independent):
        q = q.base_dist
    if isinstance(named := getattr(q, "dtype", None), torch.dtype):  # an ancestral distribution may have no mean
        return named
    return q.mean.dtype


def moved(value: Any, device: torch.device) -> Any:
    """The same distribution, whatever it was built with, of tensors on a device; what else a distribution holds stays."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, Distribution | Transform):
        made = copy.copy(value)
        made.__dict__.update({name: moved(part, device) for name, part in vars(value).items()})
        return made
    return value


def rebuilt(q: Distribution, change: Callable[[Tensor], Tensor]) -> Distribution:
    """The distribution of the same family with `change` applied to each of its parameters.

    Raises:
        NotImplementedError: the family is not built from its constrained arguments.
    """
    if isinstance(q, Independent):
        return Independent(rebuilt(q.base_dist, change), q.reinterpreted_batch_ndims)
    if callable(own := getattr(q, "rebuilt", None)):
        return own(change)
    given = {name: getattr(q, name) for name in q.arg_constraints}
    for named, again in (("logits", ("probs",)), ("scale_tril", ("covariance_matrix", "precision_matrix"))):
        if named in given:  # the same parameter by other names, of which a family takes one
            given = {name: value for name, value in given.items() if name not in again}
    changed: dict[str, Any] = {name: change(v) for name, v in given.items() if isinstance(v, Tensor)}
    try:
        return type(q)(**changed, validate_args=False)
    except TypeError as error:
        raise NotImplementedError(
            f"replicates of {type(q).__name__} cannot be drawn one by one: "
            "give it a method draw(rng, particles, differentiable=...)"
        ) from error


__all__ = ["BLOCK", "Ancestral", "Rng", "graphics_processors", "rebuilt", "seeded"]

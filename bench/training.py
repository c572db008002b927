"""Gradient ascent: training a model with an estimator, and settling what an estimator remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.bench.data import Dataset
from gradiometer.bench.gradients import Draw, one, trainable
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import Rng

SETTLE = 300  # steps that tracked averages and learned modules get at the problem's parameters before they are frozen


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam on minibatches drawn with replacement, everything decided by the seed."""

    estimator: str
    steps: int
    batch: int = 100
    learning_rate: float = 1e-3
    seed: int = 0


def train(model: Any, estimator: Estimator, dataset: Dataset, recipe: Recipe) -> Iterator[tuple[int, float]]:
    """Train `model` in place; yields ``(steps taken, seconds spent training)``, first before the first step.

    Time that the caller spends between two yields is not counted.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    device = next(model.parameters()).device
    state = initial_state(estimator, model, dataset.train[: recipe.batch].to(device), recipe.seed)
    parameters = trainable(model, state)
    everything = [p for members in parameters.values() for p in members.values()]
    optimizer = torch.optim.Adam(everything, recipe.learning_rate)
    yield 0, 0.0
    spent = 0.0
    for step in range(recipe.steps):
        began = time.perf_counter()
        indices = torch.randint(len(dataset.train), (recipe.batch,), generator=generator)
        x = dataset.batch(indices, generator).to(device)
        learning_step(
            estimator, model, x, Rng(recipe.seed, step, "train", device, block=1), state, parameters, optimizer
        )
        spent += time.perf_counter() - began
        yield step + 1, spent


def settled(
    estimator: Estimator, model: Any, x: Tensor, seed: int, minibatch: Callable[[int], Tensor] | None = None
) -> State:
    """The estimator's memory after `SETTLE` steps at these parameters, on noise of its own.

    All steps are on `x`, or each on the `minibatch` of its number.
    """
    state = initial_state(estimator, model, x, seed)
    learn(estimator, model, x, state, SETTLE, seed, minibatch=minibatch)
    return state


def learn(
    estimator: Estimator,
    model: Any,
    x: Tensor,
    state: State,
    steps: int,
    seed: int,
    *,
    rate: float = 1e-3,
    minibatch: Callable[[int], Tensor] | None = None,
) -> None:
    """Let an estimator's memory, and nothing else, take steps of learning at these parameters."""
    if not (state.tracked or state.learned):
        return
    learned = {g: m for g, m in trainable(model, state).items() if g in state.learned}
    optimizer = torch.optim.Adam(
        [p for members in learned.values() for p in members.values()] or [torch.zeros(1)], rate
    )
    for step in range(steps):
        rng = Rng(seed, step, "settle", x.device, block=1)
        learning_step(estimator, model, x if minibatch is None else minibatch(step), rng, state, learned, optimizer)


def initial_state(estimator: Estimator, model: Any, x: Tensor, seed: int) -> State:
    """Fresh memory; what it learns starts from the same values for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = estimator.init_state(model, x)
    for module in state.learned.values():
        module.to(x.device, x.dtype)
    return state


def learning_step(
    estimator: Estimator,
    model: Any,
    x: Tensor,
    rng: Rng,
    state: State,
    parameters: Mapping[str, Mapping[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
) -> Draw:
    """One step of gradient ascent on `parameters`, learned modules by their own terms too; tracked averages fold afterwards."""
    seen: dict[str, Tensor] = {}
    draw = one(estimator, model, x, rng, state, parameters, observe=seen.update)
    extra = estimator.learn(model, x, rng, state)
    for group, members in parameters.items():
        wanted = list(members.values())
        learnt = (
            torch.autograd.grad(extra[group].mean(), wanted, retain_graph=True, allow_unused=True)
            if group in extra
            else [None] * len(wanted)
        )
        for (name, parameter), more in zip(members.items(), learnt, strict=True):
            total = draw.gradients[name] if more is None else draw.gradients[name] + more
            parameter.grad = -total
    optimizer.step()
    for name, observation in seen.items():
        state.tracked[name].update(observation)
    return draw

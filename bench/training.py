"""Gradient ascent: training a model with an estimator, and settling what an estimator remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.bench.data import Dataset
from gradiometer.bench.gradients import Counted, Draw, add_gradients, one, surrogates, trainable
from gradiometer.estimators.base import Estimator, State, Surrogate
from gradiometer.estimators.noise import Rng, seeded

SETTLE = 300  # steps that a memory gets at the problem's parameters before it is frozen, if nothing else is asked


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
        finish(device)
        spent += time.perf_counter() - began
        yield step + 1, spent


def finish(device: torch.device) -> None:
    """Wait until a graphics processor has done what it was given; before that, a clock tells what giving took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settled(
    estimator: Estimator,
    model: Any,
    x: Tensor,
    seed: int,
    minibatch: Callable[[int], Tensor] | None = None,
    steps: int = SETTLE,
) -> State:
    """The estimator's memory after some steps at these parameters, on noise of its own.

    All steps are on `x`, or each on the `minibatch` of its number.
    """
    state = initial_state(estimator, model, x, seed)
    learn(estimator, model, x, state, steps, seed, minibatch=minibatch)
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
    state.steps += steps


def initial_state(estimator: Estimator, model: Any, x: Tensor, seed: int) -> State:
    """Fresh memory; what it learns starts from the same values for the same seed."""
    with seeded(seed):
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
    draw = ascent(estimator, model, x, rng, state, parameters, seen)
    for members in parameters.values():
        for name, parameter in members.items():
            parameter.grad = -draw.gradients[name]
    optimizer.step()
    for name, observation in seen.items():
        state.tracked[name].update(observation)
    return draw


def ascent(
    estimator: Estimator,
    model: Any,
    x: Tensor,
    rng: Rng,
    state: State,
    parameters: Mapping[str, Mapping[str, nn.Parameter]],
    seen: dict[str, Tensor] | None = None,
) -> Draw:
    """The gradients of one step of training: the estimate's, and those that learned control variates learn by.

    What tracked averages follow is put into `seen`.
    """
    learnt: dict[str, Tensor] = {}

    def heard(surrogate: Surrogate) -> None:
        add_gradients(learnt, surrogate.learn(), parameters, retain_graph=True)
        if seen is not None:
            seen.update(surrogate.observe)

    draw = one(estimator, model, x, rng, state, parameters, heard)
    for name, gradient in learnt.items():
        draw.gradients[name] = draw.gradients[name] + gradient
    return draw


def evaluations_of_learning(estimator: Estimator, model: Any, x: Tensor, state: State) -> float:
    """Evaluations of the joint, per data point, that a step of training takes beside the estimate's, to learn control variates."""
    counted, taken = Counted(getattr(model, "_model", model)), 0
    for surrogate in surrogates(estimator, counted, x, Rng(0, 0, "cost", x.device, block=1), state):
        before = counted.evaluations
        surrogate.learn()
        taken += counted.evaluations - before
    return taken / len(x)

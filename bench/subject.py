"""What is measured: an estimator on a model held still. Its replicates are made one by one, or many at once and in company."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradiometer.bench.batched import Batch
from gradiometer.bench.gradients import Draw, Parameters, estimated, one, trainable
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import Rng


@dataclass(frozen=True, eq=False)
class Subject:
    """An estimator on a model held still: its memory, and the parameters its gradients are taken by.

    Of the parameters given, those that the estimate is no gradient by are left out.
    """

    estimator: Estimator
    model: Any
    x: Tensor
    state: State
    parameters: Parameters

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", estimated(self.estimator, self.state, self.parameters))

    def double(self) -> Subject:
        """A copy in double precision."""
        model = copy.deepcopy(getattr(self.model, "_model", self.model)).double()
        state = copy.deepcopy(self.state)
        for module in state.learned.values():
            module.double()
        return Subject(self.estimator, model, self.x.double(), state, trainable(model, state))

    def rng(self, seed: int, replicates: int | range, held: dict[int, tuple[int, Tensor]] | None = None) -> Rng:
        """The noise of one replicate or of several."""
        return Rng(seed, replicates, "measure", self.x.device, held=held)

    def one(self, rng: Rng) -> Draw:
        """A replicate by plain autograd, the slow twin of those in batches."""
        return one(self.estimator, self.model, self.x, rng, self.state, self.parameters)


def batch_of(subjects: Sequence[Subject], by_columns: bool = True) -> Batch:
    """Subjects with the same model and minibatch in one pass.

    Raises:
        NotRows: their replicates cannot be told apart.
    """
    first, estimators, states = subjects[0], [s.estimator for s in subjects], [s.state for s in subjects]
    return Batch(estimators, first.model, first.x, states, first.parameters, by_columns=by_columns)

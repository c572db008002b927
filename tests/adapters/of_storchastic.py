"""Estimators of Storchastic: a method samples the guide, the cost is minus the signal, and `storch.backward` does the rest."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import storch
import torch
from storch.method import (
    ARM,
    REBAR,
    RELAX,
    DisARM,
    Expect,
    GumbelSoftmax,
    Method,
    Reparameterization,
    ScoreFunction,
    ScoreFunctionWOR,
    UnorderedSetEstimator,
)
from torch import Tensor
from torch.distributions import Distribution, Independent

from adapters.feeding import Feed, Leaves, derivatives, log_probability, precision, row_by_row
from gradiometer.estimators.base import Average, Estimator, Facts, State, Surrogate


def fresh() -> None:
    """As after its import: Storchastic keeps its graph and contexts in globals, and validation off for all of torch.

    A call that raised leaves the first, and Pyro switches the last.
    """
    Distribution.set_default_validate_args(False)
    storch.inference._cost_tensors = []
    wrappers = storch.wrappers
    wrappers._context_stochastic, wrappers._context_deterministic, wrappers._ignore_wrap = False, 0, False
    wrappers._stochastic_parents, wrappers._plate_links = [], []


@dataclass(frozen=True)
class Storchastic(Estimator):
    """One of Storchastic's methods on all rows, which are a plate.

    The signal is ``log p(x, z) - log q(z|x)`` with q's parameters held: a cost is a function of z alone.
    """

    facts = Facts("storch", family="storchastic")
    rows_first = False  # Storchastic's axes of samples without replacement come after the rows
    pathwise = False  # the cost's own derivative in z counts, and log q must not be held

    @abstractmethod
    def method(self, state: State) -> Method: ...

    def particles(self, z: Tensor) -> Tensor:
        """Those evaluations ``[S, N, D]`` that are draws of the guide, for the log weights."""
        return z[: self.K]

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        return self.run(model, x, model.guide(x), rng, state)

    def run(self, model: Any, x: Tensor, q: Any, rng: Any, state: State) -> Surrogate:
        batch, leaves = q.batch_shape, Leaves.of(q)
        rows = batch.numel()
        flat = x.expand(*batch, *x.shape[len(batch) :]).reshape(rows, -1)  # [N, pixels]
        seen: dict[str, Tensor] = {}

        def guide() -> Distribution:
            flat = {n: p.reshape(rows, *q.event_shape) for n, p in leaves.given.items()}
            first = next(iter(flat))
            given = flat | {first: storch.denote_independent(flat[first], 0, "rows")}
            return leaves.family(**given, validate_args=False)

        @storch.deterministic
        def cost(z: Tensor) -> Tensor:
            z = z.to(flat.dtype)
            z = z.movedim(1, 0) if self.rows_first else z
            kept = {n: p.reshape(rows, *q.event_shape) for n, p in leaves.given.items()}
            if not self.pathwise:
                kept = {n: p.detach() for n, p in kept.items()}
            held = Independent(leaves.family(**kept, validate_args=False), 1, validate_args=False)
            log_p, log_q = model.log_joint(flat, z), log_probability(held, z)
            seen.update(
                z=z.detach().reshape(-1, rows, *q.event_shape), zeros=torch.zeros_like(log_p, requires_grad=True)
            )
            value = log_q - log_p - seen["zeros"]
            return value.movedim(0, 1) if self.rows_first else value

        fresh()
        with Feed(rng, q) as feed, precision(torch.float64):
            storch.add_cost(cost(self.method(state)(guide())), "cost")
            storch.backward(update_estimator_params=False)
        at = dict(leaves.given) | {"zeros": seen["zeros"]}
        found = {
            n: rows * g for n, g in derivatives(feed.losses[0], at).items()
        }  # the mean over rows was differentiated
        z = seen["z"]
        again = z.reshape(len(z), *batch, *q.event_shape)
        generative = (found["zeros"].reshape(len(z), *batch) * model.log_joint(x, again)).sum(0)
        draws = self.particles(z).reshape(-1, *batch, *q.event_shape)
        log_w = (model.log_joint(x, draws) - q.log_prob(draws)).detach()
        terms = {"generative": generative, "inference": leaves.term(found, batch)}
        return Surrogate(terms, log_w)


@dataclass(frozen=True)
class Score(Storchastic):
    """ScoreFunction without a baseline."""

    facts = Facts("storch-score", "storchastic", needs=("bernoulli",))

    def method(self, state: State) -> Method:
        return ScoreFunction("z", n_samples=self.K)


@dataclass(frozen=True)
class ScoreOfOthers(Storchastic):
    """ScoreFunction with the average of the other samples as its baseline."""

    K: int = 2
    facts = Facts(
        "storch-batch-average", "storchastic", needs=("bernoulli",), least_particles=2, same_draws={"": "rloo"}
    )

    def method(self, state: State) -> Method:
        return ScoreFunction("z", n_samples=self.K, baseline_factory="batch_average")


@dataclass(frozen=True)
class ScoreMovingAverage(Storchastic):
    """ScoreFunction with a moving average of the cost as its baseline, one data point at a time.

    The average is the harness's, of earlier draws, put into Storchastic's buffer before each call.
    """

    facts = Facts("storch-moving-average", "storchastic", needs=("bernoulli",))

    def init_state(self, model: Any, x: Tensor) -> State:
        return State(tracked={"signal": Average(0.95)})

    def method(self, state: State) -> Method:
        made = ScoreFunction("z", n_samples=self.K, baseline_factory="moving_average")
        make = made.baseline_factory

        def factory(*given: Any) -> Any:
            baseline = make(*given)
            baseline.moving_average = -torch.as_tensor(state.tracked["signal"].value)  # of costs
            return baseline

        made.baseline_factory = factory
        return made

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        made = row_by_row(self.run, model, x, rng, self.K, state)
        assert made.log_w is not None
        return replace(made, observe={"signal": made.log_w})


@dataclass(frozen=True)
class Pathwise(Storchastic):
    """Reparameterization."""

    facts = Facts("storch-reparameterization", "storchastic", needs=("gaussian",), same_draws={"": "sgvb-a"})
    pathwise = True

    def method(self, state: State) -> Method:
        return Reparameterization("z", n_samples=self.K)


@dataclass(frozen=True)
class Enumerated(Storchastic):
    """Expect: the sum over all latents."""

    facts = Facts("storch-expect", "storchastic", needs=("bernoulli",))

    def method(self, state: State) -> Method:
        return Expect("z")

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        rng.sample(model.guide(x), 1)  # not used: the gate enumerates noise, and there has to be some
        return replace(super().surrogate(model, x, rng, state), log_w=None)


@dataclass(frozen=True)
class Relaxed(Storchastic):
    """GumbelSoftmax: the pathwise gradient at relaxed latents, whose temperature starts at one."""

    facts = Facts(
        "storch-gumbel-softmax", "storchastic", biased=("generative", "inference"), needs=("bernoulli", "relaxed")
    )

    def method(self, state: State) -> Method:
        return GumbelSoftmax("z", n_samples=self.K)

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        return replace(super().surrogate(model, x, rng, state), log_w=None)


@dataclass(frozen=True)
class OfARM(Storchastic):
    """ARM."""

    facts = Facts("storch-arm", "storchastic", needs=("bernoulli",))

    def method(self, state: State) -> Method:
        return ARM("z", n_samples=self.K)


@dataclass(frozen=True)
class OfDisARM(Storchastic):
    """DisARM; its antithetic samples are draws of the guide, too."""

    facts = Facts("storch-disarm", "storchastic", needs=("bernoulli",))

    def method(self, state: State) -> Method:
        return DisARM("z", n_samples=self.K)


@dataclass(frozen=True)
class OfREBAR(Storchastic):
    """REBAR, its temperature and eta at one."""

    facts = Facts("storch-rebar", "storchastic", needs=("bernoulli", "relaxed"))

    def method(self, state: State) -> Method:
        return REBAR("z", n_samples=self.K)


@dataclass(frozen=True)
class OfREBARCategorical(OfREBAR):
    """REBAR of categorical latents."""

    facts = Facts("storch-rebar-categorical", "storchastic", needs=("discrete", "relaxed"))


@dataclass(frozen=True)
class OfRELAX(Storchastic):
    """RELAX with a fixed control variate."""

    facts = Facts("storch-relax", "storchastic", needs=("bernoulli", "relaxed"))

    def method(self, state: State) -> Method:
        return RELAX("z", n_samples=self.K, c_phi=lambda s: ((s - 0.3) ** 2).sum(-1))


@dataclass(frozen=True)
class Unordered(Storchastic):
    """UnorderedSetEstimator with its baseline: K samples without replacement."""

    K: int = 2
    rows_first = True
    facts = Facts("storch-unordered-set", "storchastic", needs=("bernoulli",), least_particles=2)

    def method(self, state: State) -> Method:
        return UnorderedSetEstimator("z", k=self.K)

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        return replace(super().surrogate(model, x, rng, state), log_w=None)


@dataclass(frozen=True)
class WithoutReplacement(Unordered):
    """ScoreFunctionWOR(biased=False): importance-weighted samples without replacement, the last of K the threshold."""

    facts = Facts("storch-wor", "storchastic", needs=("bernoulli",), least_particles=2)

    def method(self, state: State) -> Method:
        return ScoreFunctionWOR("z", k=self.K, biased=False)

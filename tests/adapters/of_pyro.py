"""Estimators of Pyro: ``loss_and_grads`` of its `ELBO` objects, on a model and a guide as a user writes them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.distributions import Bernoulli, Normal, OneHotCategorical

from adapters.feeding import Feed, Leaves, derivatives, row_by_row
from gradiometer.estimators.base import Average, Estimator, Facts, State, Surrogate

FAMILIES = {Normal: dist.Normal, Bernoulli: dist.Bernoulli, OneHotCategorical: dist.OneHotCategorical}
BASELINE = "__baseline_avg_downstream_cost_z"  # where Pyro keeps its decaying average for the site z


def of_pyro(q: Any, provenance: frozenset = frozenset()) -> Any:
    """The same distribution by Pyro's class."""
    parameters = {n: p.expand(q.batch_shape + q.event_shape) for n, p in Leaves.of(q).made.items()}
    if provenance:
        parameters = {n: track_provenance(p, provenance) for n, p in parameters.items()}
    return FAMILIES[type(q.base_dist)](**parameters, validate_args=False).to_event(1)


@dataclass(frozen=True)
class Pyro(Estimator):
    """One of Pyro's objectives, its particles vectorised, replicates and data in plates of their own."""

    score: bool = False  # switch the reparameterisation of a Normal off, as Pyro's own tests do
    facts = Facts("pyro", family="pyro")

    @abstractmethod
    def elbo(self, particles: int, nesting: int) -> Any: ...

    def infer(self) -> dict:
        return {}

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        q = model.guide(x)
        return self.run(model, x, q, rng, state)

    def run(self, model: Any, x: Tensor, q: Any, rng: Any, state: State) -> Surrogate:
        batch, leaves, prior = q.batch_shape, Leaves.of(q), Leaves.of(model.prior(q))
        shape = torch.Size([self.K, *batch]) if self.K > 1 else batch
        seen: dict[str, Tensor] = {}

        def theirs_guide() -> None:
            given = {n: pyro.param(n, p.detach().clone()) for n, p in leaves.given.items()}
            seen.update(given)
            family = NonreparameterizedNormal if self.score else FAMILIES[leaves.family]
            with _all(_rows(batch)):
                pyro.sample("z", family(**given, validate_args=False).to_event(1), infer=self.infer())

        def theirs_model() -> None:
            zeros = pyro.param("zeros", torch.zeros(shape, dtype=x.dtype))
            given = {n: pyro.param(f"prior {n}", p.detach().clone()) for n, p in prior.given.items()}
            with _all(_rows(batch)):
                z = pyro.sample("z", FAMILIES[prior.family](**given, validate_args=False).to_event(1))
                # Networks get plain latents, and what they give the provenance of these: TraceGraph_ELBO follows it.
                likelihood = of_pyro(model.likelihood(detach_provenance(z)), get_provenance(z))
                pyro.sample("x", likelihood, obs=x)
                pyro.factor("weight", zeros)
            seen.update(zeros=zeros, z=detach_provenance(z).detach(), **{f"prior {n}": p for n, p in given.items()})

        pyro.clear_param_store()
        self.prepare(shape, x.dtype, state)
        with Feed(rng, q) as feed, pyro.validation_enabled(False):
            self.elbo(self.K, len(batch)).loss_and_grads(theirs_model, theirs_guide)
        at = {n: p for n, p in seen.items() if n != "z"}
        loss = sum(feed.losses, torch.zeros(()))
        found = derivatives(loss, at) if loss.requires_grad else {n: torch.zeros_like(p) for n, p in at.items()}
        pyro.clear_param_store()
        z = seen["z"].reshape(self.K, *batch, *q.event_shape)
        log_p, log_q = model.log_joint(x, z), q.log_prob(z)  # [K, *batch]
        weighed = (found["zeros"].reshape(self.K, *batch) * model.likelihood(z).log_prob(x)).sum(0)
        generative = weighed + prior.term({n: found[f"prior {n}"] for n in prior.given}, batch)
        log_w = (log_p - log_q).detach()
        return Surrogate(
            {"generative": generative, "inference": leaves.term(found, batch)}, log_w, self.observed(log_w)
        )

    def prepare(self, shape: torch.Size, dtype: torch.dtype, state: State) -> None:
        """Put what the library remembers where it looks for it."""

    def observed(self, log_w: Tensor) -> dict[str, Tensor]:
        return {}


def _rows(batch: torch.Size) -> list:
    """A plate for each axis of the batch: replicates, data."""
    return [pyro.plate(f"rows_{i}", n, dim=i - len(batch)) for i, n in enumerate(batch)]


class _all:
    """Several context managers as one."""

    def __init__(self, contexts: list) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


ONE_LAYER = ("likelihood", "prior")


@dataclass(frozen=True)
class TracePathwise(Pyro):
    """Trace_ELBO with a reparameterised guide."""

    facts = Facts("pyro-trace", "pyro", needs=(*ONE_LAYER, "gaussian"), same_draws={"": "sgvb-a"})

    def elbo(self, particles: int, nesting: int) -> Any:
        return Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting)


@dataclass(frozen=True)
class TraceScore(TracePathwise):
    """Trace_ELBO with a discrete guide: the score function."""

    facts = Facts("pyro-trace-score", "pyro", needs=(*ONE_LAYER, "discrete"))


@dataclass(frozen=True)
class TraceScoreOfNormal(TracePathwise):
    """Trace_ELBO with a Normal guide whose reparameterisation is switched off."""

    score: bool = True
    facts = Facts("pyro-trace-normal-score", "pyro", needs=(*ONE_LAYER, "gaussian"))


@dataclass(frozen=True)
class TraceGraph(Pyro):
    """TraceGraph_ELBO with a discrete guide, without a baseline."""

    facts = Facts("pyro-tracegraph", "pyro", needs=(*ONE_LAYER, "discrete"))

    def elbo(self, particles: int, nesting: int) -> Any:
        return TraceGraph_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting)


@dataclass(frozen=True)
class TraceGraphBaseline(TraceGraph):
    """TraceGraph_ELBO with its decaying average of the downstream cost as the baseline.

    The average is the harness's, of earlier draws, put into Pyro's parameter store before each call.
    """

    facts = Facts("pyro-tracegraph-baseline", "pyro", needs=(*ONE_LAYER, "discrete"))

    def infer(self) -> dict:
        return {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}

    def init_state(self, model: Any, x: Tensor) -> State:
        return State(tracked={"cost": Average(0.9)})

    def prepare(self, shape: torch.Size, dtype: torch.dtype, state: State) -> None:
        value = float(torch.as_tensor(state.tracked["cost"].value))
        while shape and shape[0] == 1:  # Pyro's costs have lost such axes
            shape = shape[1:]
        pyro.param(BASELINE, torch.full(shape, value, dtype=dtype))

    def observed(self, log_w: Tensor) -> dict[str, Tensor]:
        return {"cost": log_w}


@dataclass(frozen=True)
class MeanField(Pyro):
    """TraceMeanField_ELBO: the analytic divergence."""

    facts = Facts("pyro-meanfield", "pyro", needs=(*ONE_LAYER, "gaussian", "kl"), same_draws={"": "sgvb-b"})

    def elbo(self, particles: int, nesting: int) -> Any:
        return TraceMeanField_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting)


@dataclass(frozen=True)
class Renyi(Pyro):
    """RenyiELBO of order alpha."""

    K: int = 3
    alpha: float = 0.0
    facts = Facts(
        "pyro-renyi",
        "pyro",
        objective="renyi bound",
        needs=(*ONE_LAYER, "gaussian"),
        variants=("alpha=0.5", "alpha=2.0"),
    )

    def elbo(self, particles: int, nesting: int) -> Any:
        return RenyiELBO(alpha=self.alpha, num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting)

    def objective(self, log_w: Tensor) -> Tensor:
        order = 1 - self.alpha
        return (order * log_w).exp().mean(0).log() / order


@dataclass(frozen=True)
class RenyiIWAE(Renyi):
    """RenyiELBO(alpha=0), which its documentation says is the bound of importance weighted autoencoders."""

    facts = replace(Renyi.facts, name="pyro-renyi-iwae", objective="iwelbo", same_draws={"": "iwae"}, variants=())


@dataclass(frozen=True)
class RenyiScore(Renyi):
    """RenyiELBO with a discrete guide."""

    facts = replace(Renyi.facts, name="pyro-renyi-score", needs=(*ONE_LAYER, "discrete"))


@dataclass(frozen=True)
class RenyiScoreIWAE(Renyi):
    """RenyiELBO(alpha=0) with a discrete guide."""

    facts = replace(RenyiIWAE.facts, name="pyro-renyi-iwae-score", needs=(*ONE_LAYER, "discrete"), same_draws={})


@dataclass(frozen=True)
class WakeWake(Pyro):
    """ReweightedWakeSleep(insomnia=1), one data point at a time: minibatches are "not supported yet", says its documentation."""

    K: int = 2
    facts = Facts(
        "pyro-rws",
        "pyro",
        objective={"generative": "iwelbo", "inference": "inclusive KL"},
        biased=("inference",),
        needs=(*ONE_LAYER, "bernoulli"),
        least_particles=2,
        same_draws={"": "rws"},
    )

    def elbo(self, particles: int, nesting: int) -> Any:
        return ReweightedWakeSleep(num_particles=particles, insomnia=1.0, max_plate_nesting=nesting)

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        return row_by_row(self.run, model, x, rng, self.K, state)


@dataclass(frozen=True)
class Enumerated(Estimator):
    """TraceEnum_ELBO, each latent a site of its own that is enumerated in parallel: no noise."""

    facts = Facts("pyro-traceenum", "pyro", needs=(*ONE_LAYER, "bernoulli"))

    def surrogate(self, model: Any, x: Tensor, rng: Any, state: State) -> Surrogate:
        q = model.guide(x)
        batch, leaves = q.batch_shape, Leaves.of(q)
        prior = model.prior(q).base_dist.logits
        seen: dict[str, Tensor] = {}
        rng.sample(q, 1)  # not used: the gate enumerates noise, and there has to be some

        def theirs_guide() -> None:
            seen["logits"] = pyro.param("logits", leaves.given["logits"].detach().clone())
            with _all(_rows(batch)):
                self._sites(seen["logits"])

        def theirs_model() -> None:
            with _all(_rows(batch)):
                z = self._sites(prior)
                shape = torch.broadcast_shapes(z.shape[:-1], batch)  # [2, ..., 2, *batch]
                z = z.expand(*shape, -1)
                seen["z"] = z.detach()
                seen["zeros"] = pyro.param("zeros", torch.zeros(shape, dtype=x.dtype))
                pyro.sample("x", of_pyro(model.likelihood(z)), obs=x)
                pyro.factor("weight", seen["zeros"])

        pyro.clear_param_store()
        with Feed(rng, q) as feed, pyro.validation_enabled(False):
            TraceEnum_ELBO(max_plate_nesting=len(batch)).loss_and_grads(theirs_model, theirs_guide)
        found = derivatives(sum(feed.losses, torch.zeros(())), {n: seen[n] for n in ("logits", "zeros")})
        pyro.clear_param_store()
        z, weight = (
            seen["z"].flatten(0, -len(batch) - 2),
            found["zeros"].flatten(0, -len(batch) - 1),
        )  # [2^D, *batch, D]
        generative = (weight * model.log_joint(x, z)).sum(0)
        return Surrogate({"generative": generative, "inference": leaves.term(found, batch)})

    def _sites(self, logits: Tensor) -> Tensor:
        made = [
            pyro.sample(f"z_{d}", dist.Bernoulli(logits=logits[..., d]), infer={"enumerate": "parallel"})
            for d in range(logits.shape[-1])
        ]
        return torch.stack(torch.broadcast_tensors(*made), -1)

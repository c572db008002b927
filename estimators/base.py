"""What an estimator is: a frozen dataclass whose fields are its hyper-parameters and whose `facts` are its claims."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from gradiometer.estimators.noise import Rng
from gradiometer.estimators.weights import log_mean_exp

OBJECTIVES = MappingProxyType(
    {
        "elbo": lambda log_w: log_w.mean(0),  # [*batch]
        "iwelbo": log_mean_exp,  # [*batch]
    }
)


@dataclass(frozen=True)
class Facts:
    """The claims of an estimator; each is a test.

    Args:
        name: the word of the command line and of every table.
        family: the estimators it belongs with.
        objective: the name of what it is the gradient of; a mapping from groups where they differ.
        biased: the groups whose gradient is not unbiased for that objective.
        needs: capabilities a problem must offer: of the guide "rsample", "gaussian", "bernoulli" or "discrete"; of the model
            "likelihood", "prior", "kl" or "relaxed".
        least_particles: the smallest K that makes sense.
        consistent: the biased groups whose bias vanishes as K grows.
        rescaled: the groups whose gradient has the objective's direction and a positive factor of its own.
        noiseless: the inference gradient has no noise where the guide is the exact posterior.
        same_draws: from settings of this estimator to the one whose gradients it then gives, draw by draw and at the same K:
            ``{"K=1": "sgvb-a"}``; the settings "" are any.
        same_mean: likewise, to one whose expectation it has.
        variants: settings that change what is claimed, to be checked like estimators of their own.
        couples_data: the gradient of one data point depends on the others of its batch.
        replicates_as_rows: false if replicates cannot be rows of one batch (it perturbs network weights, say).
        cite: a BibTeX key for the paper that the docstring names.
    """

    name: str
    family: str
    objective: str | Mapping[str, str] = "elbo"
    biased: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    least_particles: int = 1
    consistent: tuple[str, ...] = ()
    rescaled: tuple[str, ...] = ()
    noiseless: bool = False
    same_draws: Mapping[str, str] = field(default_factory=dict)
    same_mean: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    couples_data: bool = False
    replicates_as_rows: bool = True
    cite: str = ""

    def __post_init__(self) -> None:
        for claim in ("biased", "needs", "consistent", "rescaled", "variants"):
            if isinstance(getattr(self, claim), str):
                raise ValueError(
                    f"{claim} of {self.name} is a tuple: write ({getattr(self, claim)!r},), with its comma"
                )
        if unbiased := [group for group in self.consistent if group not in self.biased]:
            raise ValueError(f"{self.name} is consistent in {unbiased[0]!r}, which it does not say is biased")

    @property
    def named(self) -> frozenset[str]:
        """The groups that the objective names one by one; none, where one objective serves all."""
        return frozenset() if isinstance(self.objective, str) else frozenset(self.objective)

    @property
    def in_batches(self) -> bool:
        """Whether replicates can be rows of one batch: data points do not interact, and nothing else forbids it."""
        return self.replicates_as_rows and not self.couples_data

    def objective_of(self, group: str) -> str:
        """The name of the objective that `group` ascends; empty for a group the claims do not know."""
        return self.objective if isinstance(self.objective, str) else self.objective.get(group, "")


@dataclass(frozen=True)
class Surrogate:
    """Losses in place of gradients.

    ``terms[g]`` is differentiated with respect to group ``g`` only, and ascended; its value means nothing. ``log_w`` (detached,
    ``[K, *batch]``, of several surrogates K together) gives the objective and the weights' statistics; ``observe`` is what
    tracked averages follow. ``value`` (detached) is for terms that are one function's derivative, exact for its mean and biased
    for the objective, a relaxation's: checks hold them to it, and it is never reported. ``learn()`` gives
    terms that train learned baselines and control variates on the same draws, and are no part of the estimate; only training
    asks for them.
    """

    terms: Mapping[str, Tensor]  # {group: [*batch]}
    log_w: Tensor | None = None
    observe: Mapping[str, Tensor] = field(default_factory=dict)
    value: Tensor | None = None  # [*batch]
    learn: Callable[[], Mapping[str, Tensor]] = dict


class Average:
    """An exponential moving average that starts at its first observation (and is 0 before it)."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.value: Tensor | float = 0.0
        self._seen = False

    def update(self, observation: Tensor) -> None:
        """Fold in one observation; anything but a scalar is averaged first."""
        new = observation.detach().mean()
        self.value = self.decay * self.value + (1 - self.decay) * new if self._seen else new
        self._seen = True


@dataclass
class State:
    """What an estimator remembers between steps: `tracked` averages, and `learned` modules, one parameter group each; and how many
    `steps` it was given at the parameters where it is measured.

    A learned group is part of the estimate, and is measured, if ``facts.objective`` is a mapping that names it; the others are
    baselines and control variates, which only training moves.
    """

    tracked: dict[str, Average] = field(default_factory=dict)
    learned: dict[str, nn.Module] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Estimator(ABC):
    """A gradient estimator with ``K`` particles per data point, written for one replicate."""

    K: int = 1
    facts: ClassVar[Facts]

    def __post_init__(self) -> None:
        least = self.facts.least_particles
        if least > self.K:
            raise ValueError(f"{self.facts.name} needs K >= {least}, not K={self.K}")

    def __str__(self) -> str:
        """The word that `parse` reads back: K unless it is 1 by default, and every other field that is not at its default."""
        shown = [f for f in fields(self) if getattr(self, f.name) != f.default or (f.name == "K" and f.default != 1)]
        settings = ",".join(f"{f.name}={getattr(self, f.name)}" for f in shown)
        return f"{self.facts.name}:{settings}" if settings else self.facts.name

    def _claim(self, **changes: Any) -> None:
        """Other facts than the class's, for settings that change them."""
        object.__setattr__(self, "facts", replace(self.facts, **changes))

    @abstractmethod
    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate | Iterator[Surrogate]:
        """One draw of the estimate, as surrogate terms; if several are yielded, the estimate is their sum."""

    def init_state(self, model: Any, x: Tensor) -> State:
        """Memory before the first step; `x` is one minibatch ``[B, ...]``."""
        return State()

    def ascends(self, group: str) -> str:
        """The objective of a group's gradient with all that it depends on: those that share it have one mean, but for bias.

        The ELBO and the inclusive divergence depend on nothing; of one particle, the K-sample bound is the ELBO. Where an estimator
        draws by networks of its own, which its objectives name, its bounds are its own, too.
        """
        name = self.facts.objective_of(group)
        if name in ("", "elbo", "inclusive KL"):
            return name
        if self.facts.named - {"generative", "inference"}:
            return f"{name} of {self}"
        if name == "iwelbo":
            return f"iwelbo:K={self.K}" if self.K > 1 else "elbo"
        return f"{name}:{','.join(f'{f.name}={getattr(self, f.name)}' for f in fields(self))}"

    def objective(self, log_w: Tensor) -> Tensor:
        """The value of the objective from the log weights ``[K, *batch]``; ``[*batch]``."""
        name = self.facts.objective_of("generative")
        if name not in OBJECTIVES:
            raise ValueError(
                f"{self.facts.name} ascends {name!r}, which is none of {', '.join(OBJECTIVES)}: override objective(log_w)"
            )
        return OBJECTIVES[name](log_w)


@dataclass(frozen=True)
class Coefficients:
    """The columns ``a, b, c`` of a weighted estimator, each ``[K, *batch]``; None stands for zeros."""

    generative: Tensor
    pathwise: Tensor | None = None
    score: Tensor | None = None


@dataclass(frozen=True)
class Weighted(Estimator):
    """An estimator given by three columns of weights, functions of the detached `signal`, which is the log weights by itself:

    g_generative = sum_k a_k grad_theta log p(x, z_k)
    g_inference  = sum_k b_k (dz_k/dphi)^T grad_z [log p(x, z_k) - log q(z_k|x)] + c_k grad_phi log q(z_k|x) (z_k held fixed)
    """

    @abstractmethod
    def coefficients(self, log_w: Tensor) -> Coefficients:
        """The columns, from the `signal` ``[K, *batch]``."""

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        """What the columns are formed from: the detached log weights ``[K, *batch]``, less a baseline where there is one."""
        return log_w

    def observe(self, log_w: Tensor, x: Tensor, state: State) -> Mapping[str, Tensor]:
        """What the tracked averages follow."""
        return {}

    def learn(self, log_w: Tensor, x: Tensor, state: State) -> Mapping[str, Tensor]:
        """Terms ``{group: [*batch]}`` that train learned baselines, and are no part of the estimate."""
        return {}

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        pathwise = "rsample" in self.facts.needs
        z = rng.rsample(q, self.K) if pathwise else rng.sample(q, self.K)  # [K, *batch, *event]
        log_p, log_q = model.log_joint(x, z), q.log_prob(z)  # [K, *batch]
        _must_be_of_shape((self.K, *q.batch_shape), {"log_joint(x, z)": log_p, "the guide's log_prob(z)": log_q})
        log_w = (log_p - log_q).detach()
        columns = self.coefficients(self.signal(log_w.clone(), x, state))  # of its own: log_w is reported
        a, b, c = columns.generative, columns.pathwise, columns.score
        _must_be_of_shape(log_w.shape, {f"the column {name!r}": column for name, column in vars(columns).items()})
        if b is not None and not pathwise:
            raise ValueError(
                f"{self} has a pathwise column but draws without a gradient: add 'rsample' to the needs of its facts"
            )
        held = q.log_prob(z.detach()) if pathwise else log_q
        inference = (0.0 if c is None else c) * held
        if (
            b is not None
        ):  # log q(z) also holds phi directly; b log q(stop(z)) takes that out again, exactly, for any distribution
            inference = inference + b * (log_p - log_q + held)
        # The generative term is differentiated by theta alone, so z need not be detached in it.
        terms = {"generative": (a * log_p).sum(0), "inference": inference.sum(0)}
        return Surrogate(terms, log_w, self.observe(log_w, x, state), learn=lambda: self.learn(log_w, x, state))


def _must_be_of_shape(shape: Sequence[int], found: Mapping[str, Tensor | None]) -> None:
    """Another shape would be broadcast, and give wrong numbers without a word."""
    for name, values in found.items():
        if values is not None and tuple(values.shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, not {tuple(shape)}: K and the batch shape of the guide"
            )

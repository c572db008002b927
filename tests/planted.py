"""Mistakes that people have published, or could: each is an estimator that claims to be right, and must not pass a check."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, full_like, nn
from torch.distributions import Bernoulli, Independent, Normal, Uniform

from gradiometer.estimators.antithetic import DisARM
from gradiometer.estimators.base import Average, Coefficients, Estimator, Facts, State, Surrogate, Weighted
from gradiometer.estimators.nested import NVI
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.relaxed import REBAR, Concrete, conditional
from gradiometer.estimators.score_function import NVIL

SCORE = Facts("planted", family="test")
PATHWISE = Facts("planted", family="test", needs=("rsample",))
BOUND = replace(SCORE, objective="iwelbo")
PATHWISE_BOUND = replace(PATHWISE, objective="iwelbo")
MISTAKES: dict[str, tuple[Estimator, str]] = {}  # name -> the estimator, and a word of what its card must say


def mistake(name: str, says: str = ""):
    def add(cls: type[Estimator]) -> type[Estimator]:
        MISTAKES[name] = (cls(), says)
        return cls

    return add


def equal(log_w: Tensor) -> Tensor:
    return full_like(log_w, 1 / len(log_w))


# Columns.


@mistake("weights of the wrong sign", "sign")
@dataclass(frozen=True)
class WrongSign(Weighted):
    K: int = 3
    facts = BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=-w, score=log_w.logsumexp(0) - w)


@mistake("normalised over the batch", "batch")
@dataclass(frozen=True)
class OverBatch(Weighted):
    K: int = 3
    facts = PATHWISE_BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(-1)
        return Coefficients(generative=w, pathwise=w, score=-w)


@mistake("normalised over all axes", "row")
@dataclass(frozen=True)
class OverAll(Weighted):
    K: int = 3
    facts = PATHWISE_BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.flatten().softmax(0).view_as(log_w)
        return Coefficients(generative=w, pathwise=w**2)


@mistake("groups of M normalised together", "unbiased")
@dataclass(frozen=True)
class OverM(Weighted):
    """MIWAE whose M groups share one normalisation, and claim the bound of the K in a group: here M = 2."""

    K: int = 4
    facts = replace(PATHWISE_BOUND, objective="mean of bounds")

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w, score=-w)

    def objective(self, log_w: Tensor) -> Tensor:
        half = (len(log_w) + 1) // 2
        return (log_w[:half].logsumexp(0) + log_w[half:].logsumexp(0)) / 2 if len(log_w) > 1 else log_w[0]


@mistake("no inference gradient for discrete latents", "zero")
@dataclass(frozen=True)
class NoScore(Weighted):
    K: int = 3
    facts = BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=log_w.softmax(0))


@mistake("a sum over particles for their mean", "sum over particles")
@dataclass(frozen=True)
class SumForMean(Weighted):
    K: int = 3
    facts = SCORE

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), score=log_w - (log_w.sum(0) - log_w) / max(1, len(log_w) - 1))


@mistake("a baseline that sees its own sample", "baseline that sees its own sample")
@dataclass(frozen=True)
class OwnSample(Weighted):
    K: int = 4
    facts = replace(SCORE, least_particles=2)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), score=(log_w - log_w.mean(0)) / len(log_w))


@mistake("a bound's baseline that sees its own sample", "unbiased")
@dataclass(frozen=True)
class OwnSampleOfBound(Weighted):
    K: int = 4
    facts = replace(BOUND, least_particles=2)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w, bound = log_w.softmax(0), log_w.logsumexp(0)
        return Coefficients(generative=w, score=bound - 0.5 * (bound + log_w) - w)


@mistake("w for w squared", "unbiased")
@dataclass(frozen=True)
class NotSquared(Weighted):
    K: int = 3
    facts = PATHWISE_BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w)


@mistake("w squared, and the score as well", "normalised weights")
@dataclass(frozen=True)
class SquaredWithScore(Weighted):
    K: int = 3
    facts = PATHWISE_BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w**2, score=-w)


@mistake("the bound's score without its weights", "the score of the guide with the normalised weights")
@dataclass(frozen=True)
class NoWeightsInScore(Weighted):
    K: int = 3
    facts = BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=log_w.softmax(0), score=log_w.logsumexp(0).expand_as(log_w))


@mistake("the gradient of the ELBO in the name of the bound", "another objective, elbo")
@dataclass(frozen=True)
class ElboForBound(Weighted):
    K: int = 3
    facts = PATHWISE_BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), pathwise=equal(log_w))


@mistake("the gradient of the bound in the name of the ELBO", "another objective, iwelbo")
@dataclass(frozen=True)
class BoundForElbo(Weighted):
    K: int = 3
    facts = PATHWISE

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w**2)


@mistake("unbiased only where all weights are equal", "unbiased")
@dataclass(frozen=True)
class RightAtTheCentre(Weighted):
    K: int = 2
    facts = SCORE

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), score=log_w.tanh() / len(log_w))


@mistake("its scale right for one group only", "scaled by 1.5")
@dataclass(frozen=True)
class HalfScaled(Weighted):
    K: int = 1
    facts = PATHWISE

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=1.5 * equal(log_w), pathwise=equal(log_w))


@mistake("a declared bias that is none", "drop it")
@dataclass(frozen=True)
class NotBiased(Weighted):
    K: int = 2
    facts = replace(PATHWISE, biased=("inference",))

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), pathwise=equal(log_w))


@mistake("an average of the present draw", "moved a tracked average")
@dataclass(frozen=True)
class AverageOfNow(Weighted):
    K: int = 2
    facts = SCORE

    def init_state(self, model, x: Tensor) -> State:
        return State(tracked={"signal": Average(0.5)})

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        state.tracked["signal"].update(log_w)
        return log_w - state.tracked["signal"].value

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), score=log_w / len(log_w))


@mistake("identities that it does not have", "on the same noise their gradients")
@dataclass(frozen=True)
class NotThatOne(Weighted):
    K: int = 3
    facts = replace(PATHWISE_BOUND, same_draws={"K=1": "sgvb-a"})

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w**2)


@mistake("noiseless, it says", "not noiseless")
@dataclass(frozen=True)
class NotNoiseless(Weighted):
    K: int = 3
    facts = replace(PATHWISE_BOUND, noiseless=True)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w, score=-w)


# Surrogates.


@dataclass(frozen=True)
class OfBound(Estimator):
    """What the ones below have in common: K reparameterised particles, and a loss of their log weights."""

    K: int = 3
    facts = PATHWISE_BOUND

    def particles(self, model, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        q = model.guide(x)
        z = rng.rsample(q, self.K)
        return z, model.log_joint(x, z), q.log_prob(z)

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p - log_q).logsumexp(0)

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        _, log_p, log_q = self.particles(model, x, rng)
        term = self.loss(log_p, log_q)
        return Surrogate({"generative": term, "inference": term}, (log_p - log_q).detach())


@mistake("weights not detached", "unbiased")
@dataclass(frozen=True)
class NotDetached(OfBound):
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_w = log_p - log_q
        return (log_w.softmax(0) * log_w).sum(0)


@mistake("the surrogate's value reported for the bound", "it reports")
@dataclass(frozen=True)
class ValueOfSurrogate(OfBound):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        _, log_p, log_q = self.particles(model, x, rng)
        term = self.loss(log_p, log_q)
        weights = (log_p - log_q).detach().softmax(0)
        return Surrogate({"generative": term, "inference": term}, (weights * (log_p - log_q)).detach())


@mistake("the entropy forgotten", "unbiased")
@dataclass(frozen=True)
class NoEntropy(OfBound):
    K: int = 1
    facts = PATHWISE

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.mean(0)


@mistake("the batch averaged within", "batch")
@dataclass(frozen=True)
class AveragedWithin(OfBound):
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        value = (log_p - log_q).logsumexp(0)
        return value.mean(-1, keepdim=True).expand_as(value)


@mistake("divided by the batch a second time", "1/B")
@dataclass(frozen=True)
class DividedTwice(OfBound):
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p - log_q).logsumexp(0) / log_p.shape[-1]


@mistake("noise from elsewhere", "all noise comes from rng")
@dataclass(frozen=True)
class OwnNoise(OfBound):
    def particles(self, model, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        q = model.guide(x)
        z = q.rsample((self.K,))
        return z, model.log_joint(x, z), q.log_prob(z)


@mistake("one draw for all particles", "unbiased")
@dataclass(frozen=True)
class OneDraw(OfBound):
    def particles(self, model, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        q = model.guide(x)
        z = rng.rsample(q, 1).expand(self.K, *[-1] * (x.dim()))
        return z, model.log_joint(x, z), q.log_prob(z)


@mistake("antithetic particles in the bound of independent ones", "unbiased")
@dataclass(frozen=True)
class Antithetic(OfBound):
    K: int = 2

    def particles(self, model, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        q = model.guide(x)
        half = rng.rsample(q, max(1, self.K // 2))
        z = torch.cat([half, 2 * q.mean - half])[: self.K]
        return z, model.log_joint(x, z), q.log_prob(z)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "facts", replace(self.facts, needs=("rsample", "gaussian")))


@mistake("the particles' axis taken for the batch's", "row")
@dataclass(frozen=True)
class WrongAxis(OfBound):
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        value = (log_p - log_q).flatten(1).logsumexp(1)  # over the batch, one value per particle
        return value.mean() + 0 * log_p[0]


@mistake("the graph of the weights left on", "detach")
@dataclass(frozen=True)
class GraphLeft(OfBound):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        _, log_p, log_q = self.particles(model, x, rng)
        term = self.loss(log_p, log_q)
        return Surrogate({"generative": term, "inference": term}, log_p - log_q)


@mistake("the groups' terms exchanged", "zero")
@dataclass(frozen=True)
class Exchanged(OfBound):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        z, log_p, log_q = self.particles(model, x, rng)
        of_theta = model.log_joint(x, z.detach()).logsumexp(0)
        return Surrogate({"generative": -log_q.sum(0), "inference": of_theta}, (log_p - log_q).detach())


@mistake("a mean over the batch in the place of a value per datum", "shape")
@dataclass(frozen=True)
class NoBatch(OfBound):
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p - log_q).logsumexp(0).mean()


@mistake("each layer's parameters detached for themselves", "two gaussian layers")
@dataclass(frozen=True)
class LayerByLayer(Estimator):
    """DReG of several layers that removes the score by detaching each layer's distribution whole, and so cuts z_1 -> q(z_2|z_1)."""

    K: int = 2
    facts = PATHWISE_BOUND

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        z = rng.rsample(q, self.K)
        log_p, log_q = model.log_joint(x, z), q.log_prob(z)
        cut = log_q
        if hasattr(q, "first"):
            layers = z.split(q.units, dim=-1)
            cut = _still(q.first).log_prob(layers[0])
            for link, below, above in zip(q.links, layers, layers[1:], strict=False):
                cut = cut + _still(link(below)).log_prob(above)
        else:
            cut = _still(q).log_prob(z)
        w = (log_p - log_q).detach().softmax(0)
        terms = {"generative": (w * log_p).sum(0), "inference": (w**2 * (log_p - cut)).sum(0)}
        return Surrogate(terms, (log_p - log_q).detach())


def _still(q: Independent) -> Independent:
    return Independent(Normal(q.base_dist.loc.detach(), q.base_dist.scale.detach()), 1)


@mistake("an objective that nobody knows", "untested")
@dataclass(frozen=True)
class UnknownObjective(Weighted):
    K: int = 3
    facts = replace(BOUND, objective={"generative": "iwelbo", "inference": "inclusive kl"})

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0)
        return Coefficients(generative=w, score=-w)


@mistake("wrong from five particles on", "K = 8")
@dataclass(frozen=True)
class WrongFromFive(Weighted):
    K: int = 8
    facts = PATHWISE_BOUND

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = log_w.softmax(0) if len(log_w) < 5 else (0.9 * log_w).softmax(0)
        return Coefficients(generative=w, pathwise=w**2)


@mistake("consistent, it says", "consistent")
@dataclass(frozen=True)
class NotConsistent(Weighted):
    K: int = 3
    facts = replace(PATHWISE_BOUND, biased=("generative", "inference"), consistent=("generative", "inference"))

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = (log_w / 2).softmax(0)
        return Coefficients(generative=w, pathwise=w**2)


@mistake("the prior taken for a standard normal", "shifted prior")
@dataclass(frozen=True)
class StandardPrior(Estimator):
    facts = replace(PATHWISE, needs=("gaussian", "likelihood"))

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        z, base = rng.rsample(q, self.K), q.base_dist
        kl = 0.5 * (base.loc**2 + base.scale**2 - 1 - 2 * base.scale.log()).sum(-1)
        term = model.likelihood(z).log_prob(x).mean(0) - kl
        return Surrogate({"generative": term, "inference": term}, (model.log_joint(x, z) - q.log_prob(z)).detach())


@mistake("the data changed in place", "changed the data in place")
@dataclass(frozen=True)
class DataInPlace(OfBound):
    def particles(self, model, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        x.data.clamp_(1e-3, 1 - 1e-3)
        return super().particles(model, x, rng)


@mistake("a baseline trained uphill", "multiply the variance")
@dataclass(frozen=True)
class TrainedUphill(Weighted):
    facts = SCORE

    def init_state(self, model, x: Tensor) -> State:
        return State(learned={"baseline": nn.Linear(x[0].numel(), 1)})

    def signal(self, log_w: Tensor, x: Tensor, state: State) -> Tensor:
        return log_w - state.learned["baseline"](x).squeeze(-1).detach()

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(generative=equal(log_w), score=log_w / len(log_w))

    def learn(self, log_w: Tensor, x: Tensor, state: State) -> Mapping[str, Tensor]:
        return {"baseline": (log_w - state.learned["baseline"](x).squeeze(-1)).square().mean(0)}


@mistake("a regulariser put into what trains the baseline", "nothing else")
@dataclass(frozen=True)
class TrainsTheGuide(NVIL):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        made, q = super().surrogate(model, x, rng, state), model.guide(x)
        return replace(made, learn=lambda: {**made.learn(), "inference": -q.log_prob(rng.sample(q, 1)).mean(0)})


# Control variates, antithetic pairs, relaxations, nested moves.


@mistake("a control's conditional sample drawn without its condition", "unbiased")
@dataclass(frozen=True)
class NotConditional(REBAR):
    def _draw(self, model, x: Tensor, rng: Rng, state: State, q: Independent) -> tuple[Tensor, Tensor, Tensor]:
        b, z, given, c, log_p = self._with(model, x, rng, state, q, lambda logits, b, v: logits + v.logit())
        return b, c(z - given + given.detach()), log_p

    def _with(self, model, x, rng, state, q, conditional):
        logits = q.base_dist.logits
        zeros = torch.zeros_like(logits.detach())
        u, v = (rng.sample(Independent(Uniform(zeros, zeros + 1), 1), self.K) for _ in range(2))
        b = (u < logits.sigmoid()).to(u)
        fixed = Independent(Bernoulli(logits=logits.detach(), validate_args=False), 1)
        control = state.learned["control"]
        c = lambda z: control(lambda s: model.log_joint(x, s) - fixed.log_prob(s), z)  # noqa: E731
        return b, logits - u.logit(), conditional(logits, b, v), c, model.log_joint(x, b)


@mistake("a control's conditional sample detached", "unbiased")
@dataclass(frozen=True)
class ConditionalDetached(NotConditional):
    def _draw(self, model, x: Tensor, rng: Rng, state: State, q: Independent) -> tuple[Tensor, Tensor, Tensor]:
        b, z, given, c, log_p = self._with(model, x, rng, state, q, conditional)
        held = given.detach()
        return b, c(held) + c(z) - c(z).detach(), log_p


@mistake("a control that nothing trains", "nothing trains 'control'")
@dataclass(frozen=True)
class NotTrained(REBAR):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        made = super().surrogate(model, x, rng, state)
        return replace(made, learn=lambda: {name: term.detach() for name, term in made.learn().items()})


@mistake("a control trained by the estimate", "no part of the estimate")
@dataclass(frozen=True)
class TrainedByTheEstimate(REBAR):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        made = super().surrogate(model, x, rng, state)
        return replace(made, terms={**made.terms, "control": made.terms["inference"]})


@mistake("an antithetic pair without its sign", "unbiased")
@dataclass(frozen=True)
class NoSign(DisARM):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        logits, p = q.base_dist.logits, q.base_dist.probs.detach()
        u = rng.sample(Independent(Uniform(torch.zeros_like(p), torch.ones_like(p)), 1), self.K // 2)
        b, other = (u < p).to(p), (1 - u < p).to(p)
        z = torch.cat([b, other])
        log_p = model.log_joint(x, z)
        log_w = (log_p - q.log_prob(z)).detach()
        f, f_other = log_w.unsqueeze(-1).chunk(2)
        g = (f - f_other) / 2 * (b - other).abs() * torch.maximum(p, 1 - p)
        return Surrogate({"generative": log_p.mean(0), "inference": (g.mean(0) * logits).sum(-1)}, log_w)


@mistake("a straight-through gradient that claims to be none", "unbiased")
@dataclass(frozen=True)
class StraightThrough(Estimator):
    facts = Facts("planted", family="test", needs=("bernoulli", "relaxed"))

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        b = rng.sample(q, self.K)
        through = b + q.base_dist.probs - q.base_dist.probs.detach()
        log_p, log_q = model.log_joint(x, through), q.log_prob(through)
        return Surrogate({"generative": log_p.mean(0), "inference": (log_p - log_q).mean(0)}, (log_p - log_q).detach())


@mistake("scales of all latents but the first", "inference, two gaussians")
@dataclass(frozen=True)
class LaterScales(Estimator):
    """Pathwise, but the derivative by the scales is 1.03 times too large, where a layer has more latents than one."""

    facts = Facts("planted", family="test", needs=("rsample", "gaussian"))

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        of = model.guide(x).base_dist
        factor = torch.ones(of.scale.shape[-1]).to(of.scale)
        factor[1:] = 1.03
        scale = factor * of.scale + (1 - factor) * of.scale.detach()
        q = Independent(Normal(of.loc, scale, validate_args=False), 1)
        z = rng.rsample(q, self.K)
        log_w = model.log_joint(x, z) - q.log_prob(z)  # [K, *batch]
        return Surrogate(dict.fromkeys(("generative", "inference"), log_w.mean(0)), log_w.detach())


@dataclass(frozen=True)
class Moved(Estimator):
    """Particles take a step of noise before they are weighed, with the step's own reversal: a bound of its own, and right.

    With `held`, the density that they were drawn with is wrongly kept without its derivative.
    """

    held: bool = False
    facts = Facts("moved", family="test", objective="moved bound", needs=("rsample", "gaussian"))

    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        z = rng.rsample(q, self.K)
        step = Independent(Normal(z, torch.full_like(z, 0.5), validate_args=False), 1)
        log_q = q.log_prob(z)
        bound = model.log_joint(x, rng.rsample(step)) - (log_q.detach() if self.held else log_q)
        return Surrogate(dict.fromkeys(("generative", "inference"), bound.mean(0)), bound.detach())

    def objective(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)


MISTAKES["particles that are moved, and their density held"] = (Moved(held=True), "gradient of its moved bound")


@mistake("a relaxation that is not of the value it names", "own value")
@dataclass(frozen=True)
class NotItsValue(Concrete):
    def surrogate(self, model, x: Tensor, rng: Rng, state: State) -> Surrogate:
        made = super().surrogate(model, x, rng, state)
        return replace(made, terms={**made.terms, "inference": 1.02 * made.terms["inference"]})


@mistake("nested: the incoming target's own derivative kept", "kernels")
@dataclass(frozen=True)
class DirectDerivative(NVI):
    """The proposal's own log density is differentiated directly, as the derivative of the incoming target would be."""

    K: int = 2

    def _terms(self, W_in, W_out, log_v, t, r, a, stuck, state) -> Mapping[str, Tensor]:
        terms = super()._terms(W_in, W_out, log_v, t, r, a, stuck, state)
        return terms | {"kernels": (W_in * (t + r)).sum(0)}

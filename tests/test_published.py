"""What the gate finds in published libraries, and each finding once more by the library's own interface and by hand.

The libraries are optional: `tox run -e published`. Versions and sizes are in results/checks/published.md.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal, OneHotCategorical
from torch.distributions.utils import clamp_probs

pyro = pytest.importorskip("pyro")
storch = pytest.importorskip("storch")
pytest.importorskip("pydrobert.torch.estimators")

import adapters.of_pydrobert as of_pydrobert  # noqa: E402
import adapters.of_pyro as of_pyro  # noqa: E402
import adapters.of_storchastic as of_storchastic  # noqa: E402
import pyro.distributions as dist  # noqa: E402
from adapters.feeding import Feed, Leaves, precision  # noqa: E402
from pyro.infer import RenyiELBO, Trace_ELBO  # noqa: E402
from storch import method as methods  # noqa: E402

from gradiometer.bench.checks import exact, identities  # noqa: E402
from gradiometer.bench.checks.differences import at  # noqa: E402
from gradiometer.bench.checks.gate import LEVELS, check  # noqa: E402
from gradiometer.bench.checks.worlds import small  # noqa: E402
from gradiometer.estimators.base import Estimator  # noqa: E402
from gradiometer.estimators.noise import Rng  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
WORLDS = {world.name: world for world in small()}

PASSED: list[Estimator] = [
    of_storchastic.Enumerated(),
    of_pyro.TracePathwise(),
    of_pyro.TraceScore(),
    of_pyro.TraceScoreOfNormal(),
    of_pyro.TraceGraph(),
    of_pyro.TraceGraphBaseline(),
    of_pyro.MeanField(),
    of_pyro.RenyiIWAE(),
    of_pyro.Renyi(alpha=0.5),
    of_pyro.Renyi(alpha=2.0),
    of_pyro.WakeWake(),
    of_pyro.Enumerated(),
    of_storchastic.Score(),
    of_storchastic.ScoreOfOthers(),
    of_storchastic.Pathwise(),
    of_storchastic.Relaxed(),
    of_pydrobert.Reinforce(),
    of_pydrobert.REBAR(),
    of_pydrobert.REBAROneHot(),
    of_pydrobert.RELAX(),
]
# What is broken: the claim, where, and a word of what is said of it.
BROKEN: list[tuple[Estimator, str, str]] = [
    (of_pyro.RenyiScoreIWAE(), "inference, binary, K = 2", "it is zero"),
    (of_pyro.RenyiScore(alpha=0.5), "inference, binary, K = 2", "length 0.252"),
    (of_pyro.RenyiScore(alpha=2.0), "inference, binary, K = 2", "length 0.672"),
    (of_storchastic.ScoreMovingAverage(), "inference, binary, K = 1", "scaled by 0.95"),
    (of_storchastic.OfARM(), "generative, binary, K = 3", "scaled by 2"),
    (of_storchastic.OfDisARM(), "inference, binary, K = 1", "points elsewhere"),
    (of_storchastic.OfDisARM(), "generative, binary, K = 1", "scaled by 1.5"),
    (of_storchastic.OfREBAR(), "inference, binary, K = 1", "points elsewhere"),
    (of_storchastic.OfRELAX(), "inference, binary, K = 1", "points elsewhere"),
    (of_storchastic.Unordered(), "inference, binary, K = 2", "points elsewhere"),
    (of_storchastic.WithoutReplacement(), "inference, binary, K = 2", "points elsewhere"),
    (of_storchastic.WithoutReplacement(), "generative, binary, K = 2", "points elsewhere"),
]

SLOW = (of_pyro.WakeWake, of_storchastic.ScoreMovingAverage, of_storchastic.Unordered)  # a row at a time, or integrals


def _param(estimator: Estimator, *more: str) -> object:
    slow = [pytest.mark.slow] if type(estimator) in SLOW else []
    return pytest.param(estimator, *more, id=", ".join([str(estimator), *more[:1]]), marks=slow)


@pytest.mark.parametrize("estimator", [_param(estimator) for estimator in PASSED])
def test_what_is_right_passes(estimator: Estimator) -> None:
    card = check(estimator, "quick")
    assert card.passed, card.text()


@pytest.mark.parametrize(("estimator", "where", "says"), [_param(*row) for row in BROKEN])
def test_what_is_wrong_is_found(estimator: Estimator, where: str, says: str) -> None:
    there = at(estimator, int(where[-1]))
    assert there is not None
    found = list(exact.claims(there, WORLDS["binary"], LEVELS["quick"].effort))
    broken = [claim for claim in found if claim.holds is False]
    assert any(claim.place == where and says in claim.says for claim in broken), broken
    card = check(estimator, "quick")
    assert not card.passed
    assert {claim.name for claim in card.broken} <= {"unbiased", "level", "no bias found"}


# Adapters are not at fault.


@pytest.mark.parametrize("number", [0, 1])
def test_feeding_gives_the_draws_of_the_harness(number: int) -> None:
    world = WORLDS["gaussian" if number else "binary"]
    q = world.model.guide(world.x)
    leaves = Leaves.of(q)
    with Feed(Rng(3, 0), q):
        drawn = leaves.family(**leaves.given, validate_args=False).sample((5,))
    assert torch.equal(drawn, Rng(3, 0).sample(q, 5).to(drawn))


@pytest.mark.parametrize("K", [1, 2])
def test_storchastic_rebar_of_one_hot_latents_is_right(K: int) -> None:
    """By the same adapter; what differs is how the conditional noise is drawn."""
    found = list(exact.claims(of_storchastic.OfREBARCategorical(K=K), WORLDS["categorical"], LEVELS["quick"].effort))
    assert len(found) == 3
    assert all(claim.holds for claim in found), found


@pytest.mark.parametrize("estimator", [of_storchastic.OfREBAR(), of_storchastic.OfRELAX()], ids=str)
def test_storchastic_with_another_conditional_noise_is_right(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(hard: Tensor, probs: Tensor, bernoulli: bool, temperature: Tensor) -> Tensor:
        probs = clamp_probs(probs.expand_as(hard))
        v = clamp_probs(torch.rand(hard.shape, dtype=probs.dtype))
        u = torch.where(hard == 1, v * probs + 1 - probs, v * (1 - probs))
        return ((probs.log() - (-probs).log1p() + u.log() - (-u).log1p()) / temperature).sigmoid()

    monkeypatch.setattr(storch, "conditional_gumbel_rsample", storch.deterministic(right))
    monkeypatch.setattr("storch.method.relax.conditional_gumbel_rsample", storch.deterministic(right))
    assert check(estimator, "quick").passed


# The findings once more, with nothing of ours but the arithmetic.

LOGITS = torch.tensor([0.7, -0.4], dtype=torch.float64)  # of two Bernoulli latents
CLASSES = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)  # of a categorical one
COSTS = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)


def of_latents(b: Tensor) -> Tensor:
    b = b.to(torch.float64)
    return (b[..., 0] + 2 * b[..., 1]) ** 2 + b[..., 0] / 2


def of_class(z: Tensor) -> Tensor:
    return (z.to(torch.float64) * COSTS).sum(-1)


def by_storch(
    method: methods.Method,
    logits: Tensor,
    cost: Callable[[Tensor], Tensor],
    family: Callable[..., Distribution] = Bernoulli,
) -> Tensor:
    """The gradient of each row's cost in its logits, ``[N, D]``."""
    leaf = logits.clone().requires_grad_()
    with precision(torch.float64):
        z = method(family(logits=storch.denote_independent(leaf, 0, "rows")))
        storch.add_cost(storch.deterministic(cost)(z), "cost")
        storch.backward(update_estimator_params=False)
    assert leaf.grad is not None
    return len(logits) * leaf.grad.detach()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        of_storchastic.fresh()
        torch.manual_seed(0)
        yield
    of_storchastic.fresh()
    pyro.clear_param_store()


def off(samples: Tensor, wanted: Tensor) -> Tensor:
    """By how many standard errors a mean is off, coordinate by coordinate."""
    return (samples.mean(0) - wanted) / (samples.std(0) / len(samples) ** 0.5)


def exact_of_latents() -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    p = logits.sigmoid()
    value = torch.zeros((), dtype=torch.float64)
    for values in itertools.product((0.0, 1.0), repeat=2):
        b = torch.tensor(values, dtype=torch.float64)
        value = value + (p**b * (1 - p) ** (1 - b)).prod() * of_latents(b)
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: methods.ScoreFunction("z"), False),
        (lambda: methods.ARM("z"), False),  # of the latents' own parameters
        (lambda: methods.DisARM("z"), True),
        (lambda: methods.DisARM("z", n_samples=2), True),
        (lambda: methods.REBAR("z"), True),
        (lambda: methods.RELAX("z", c_phi=lambda s: ((s - 0.3) ** 2).sum(-1)), True),
    ],
)
def test_storchastic_means_of_many_draws(make: Callable[[], methods.Method], wrong: bool) -> None:
    with precision(torch.float64):
        method = make()
    found = off(by_storch(method, LOGITS.expand(100_000, 2), of_latents), exact_of_latents())
    assert (found.abs().max() > 8) if wrong else (found.abs().max() < 5)


def test_storchastic_disarm_has_mean_zero() -> None:
    """It adds the antithetic sample's cost and does not subtract it; exchanging the two samples then changes the sign alone."""
    with precision(torch.float64):
        found = by_storch(methods.DisARM("z"), LOGITS.expand(100_000, 2), of_latents)
    assert off(found, torch.zeros(2)).abs().max() < 5


@pytest.mark.parametrize(("D", "arm", "disarm"), [(1, 1.0, 1.5), (2, 2.0, 1.5), (3, 3.0, 1.5)])
def test_storchastic_gradients_of_parameters_of_the_cost(D: int, arm: float, disarm: float) -> None:
    """The cost is a parameter, whatever the latents, and its gradient one; ARM does not sum its score over latents, so its cost is
    broadcast over D of them."""
    for method, wanted in ((methods.ARM("z"), arm), (methods.DisARM("z"), disarm), (methods.ScoreFunction("z"), 1.0)):
        theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        by_storch(method, torch.full((5, D), 0.3, dtype=torch.float64), lambda z, theta=theta: theta + 0 * z.sum(-1))
        assert theta.grad is not None
        assert float(theta.grad) == pytest.approx(wanted)


def test_storchastic_moving_average_holds_its_own_draw() -> None:
    """At birth the average is 0, and then 0.05 of the cost that it is subtracted from."""
    found = []
    for baseline in (None, "moving_average"):
        torch.manual_seed(1)
        with precision(torch.float64):
            method = methods.ScoreFunction("z", baseline_factory=baseline)
        found.append(by_storch(method, LOGITS.expand(1, 2), of_latents))
    assert torch.allclose(found[1], 0.95 * found[0], rtol=1e-6)


def test_storchastic_conditional_noise_contradicts_its_condition() -> None:
    """Given that b is one, z has to be above the threshold; a share is not."""
    hard = torch.ones(100_000)
    drawn = storch.conditional_gumbel_rsample(hard, torch.full_like(hard, 0.7), True, torch.tensor(1.0))
    share = float((drawn < 0.5).double().mean())
    # sigmoid(log p + log(1 + p) + log u + log(1 + u)) < 1/2 where u (1 + u) < 1/(p (1 + p)); u is uniform above 1 - p.
    threshold = (math.sqrt(1 + 4 / (0.7 * 1.7)) - 1) / 2
    assert share == pytest.approx((threshold - 0.3) / 0.7, abs=0.01)
    assert share > 0.3


def test_storchastic_unordered_set_subtracts_one_sample_twice() -> None:
    """Of sets of two of three classes, its first-order ratios are right, and its second-order ones are not."""
    p = CLASSES.softmax(0)
    with precision(torch.float64):
        rows = storch.denote_independent(CLASSES.expand(6, 3).clone().requires_grad_(), 0, "rows")
        z = methods.UnorderedSetEstimator("z", k=2)(OneHotCategorical(logits=rows))
    plate = z.get_plate("z")
    seen = set()
    for row, chosen in enumerate(z._tensor.argmax(-1).tolist()):
        seen.add(frozenset(chosen))
        one, other = (float(p[i]) for i in chosen)
        rest = 1 - one - other
        together = one * other / (1 - one) + one * other / (1 - other)
        weights = torch.tensor([one * other / (1 - one), other * one / (1 - other)]).double() / together
        assert torch.allclose(plate.weight._tensor[row], weights, atol=1e-3)  # what the trapezoid rule leaves
        found = float(plate.log_snd_leave_one_out._tensor[row, 0, 1].exp())
        assert abs(found - (1 - one) / other) > 0.1  # 1 / P(the other is drawn next, one aside)
        v = (np.arange(4_000_000) + 0.5) / 4_000_000
        lift = math.exp(5)  # Storchastic's `a`
        density, term = v ** (lift * rest - 1), {s: 1 - v ** (lift * s) for s in (one, other)}
        assert found == pytest.approx(
            (density * term[other] / term[one]).mean() / (density * term[other]).mean(), rel=0.02
        )
    assert len(seen) > 1


def test_the_papers_unordered_set_estimator_is_unbiased() -> None:
    """By enumeration, so that the comparison above is with something right (Kool et al. 2020, equation 17)."""
    logits = CLASSES.clone().requires_grad_()
    wanted = torch.autograd.grad(logits.softmax(0) @ COSTS, logits)[0]
    p, score = CLASSES.softmax(0), torch.eye(3, dtype=torch.float64) - CLASSES.softmax(0)
    mean = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.combinations(range(3), 2):
        for s, t in (pair, pair[::-1]):
            baseline = p[s] * COSTS[s] + (1 - p[s]) * COSTS[t]
            mean += p[s] * p[t] / (1 - p[s]) * score[s] * (COSTS[s] - baseline)
    assert torch.allclose(mean, wanted)
    many = [by_storch(methods.UnorderedSetEstimator("z", k=2), LOGITS.expand(4000, 2), of_latents) for _ in range(10)]
    assert off(torch.cat(many), exact_of_latents()).abs().max() > 5


@pytest.mark.parametrize("baseline", [True, False])
def test_storchastic_without_replacement_is_quadratic_in_the_cost(baseline: bool) -> None:
    found = []
    for factor in (1, 2):
        torch.manual_seed(3)
        with precision(torch.float64):
            method = methods.ScoreFunctionWOR("z", k=2, biased=False, use_baseline=baseline)
        found.append(by_storch(method, CLASSES.expand(1, 3), lambda z, f=factor: f * of_class(z), OneHotCategorical))
    assert torch.allclose(found[1], 4 * found[0])


def test_storchastic_weights_without_replacement_do_not_have_mean_one() -> None:
    """Its largest perturbed logit is held at 0, and is independent of which class that is, but not of the threshold.

    Held so, the second largest is ``-log(1 + t)``, t exponential of rate ``1 - p`` where p is the first class's probability.
    """
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    method = methods.ScoreFunctionWOR("z", k=2, biased=False)
    by_storch(method, CLASSES.expand(40_000, 3), lambda z: theta + 0 * of_class(z), OneHotCategorical)
    t = np.linspace(0, 60, 600_001)
    wanted = 0.0
    for p in CLASSES.softmax(0).tolist():
        weight = p / (1 - np.exp(-p * (1 + t)))
        wanted += p * float(np.trapezoid((1 - p) * np.exp(-(1 - p) * t) * weight, t))
    assert wanted == pytest.approx(0.7188, abs=1e-3)
    assert float(theta.grad) == pytest.approx(wanted, abs=0.005)  # type: ignore[arg-type]


def test_storchastic_lax_raises() -> None:
    latents = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(NameError, match="derivs"):
        by_storch(
            methods.LAX("z", c_phi=lambda z: z.sum(-1)),
            latents,
            lambda z: z.sum(-1) ** 2,
            lambda logits: Normal(logits, torch.ones_like(latents)),
        )


def test_storchastic_unordered_set_without_a_baseline_raises() -> None:
    with pytest.raises(NotImplementedError, match="iterate"):
        by_storch(methods.UnorderedSetEstimator("z", k=2, use_baseline=False), LOGITS.expand(4, 2), of_latents)


# Pyro's Renyi bound of a discrete guide: one Bernoulli latent, rows in a plate.

JOINT = torch.tensor([-1.3, -0.2], dtype=torch.float64)  # log p(x, z)
LOGIT = 0.4


def by_pyro(elbo: object, rows: int) -> Tensor:
    """The ascent gradient of each row's objective in its logit, ``[N]``."""
    pyro.clear_param_store()

    def model() -> None:
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(torch.full((rows,), 0.5, dtype=torch.float64)))
            pyro.factor("x", JOINT[z.long()] - math.log(0.5))

    def guide() -> None:
        logit = pyro.param("logit", torch.full((rows,), LOGIT, dtype=torch.float64))
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    elbo.loss_and_grads(model, guide)  # type: ignore[attr-defined]
    found = pyro.param("logit").grad
    return torch.zeros(rows, dtype=torch.float64) if found is None else -found


def renyi_gradient(alpha: float, K: int) -> float:
    """By enumeration; of infinitely many particles if K is 0."""
    logit = torch.tensor(LOGIT, dtype=torch.float64, requires_grad=True)
    q = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    log_w = JOINT - q.log()
    if K == 0:
        value = (q * ((1 - alpha) * log_w).exp()).sum().log() / (1 - alpha)
    else:
        value = torch.zeros((), dtype=torch.float64)
        for z in itertools.product((0, 1), repeat=K):
            bound = (torch.logsumexp((1 - alpha) * log_w[list(z)], 0) - math.log(K)) / (1 - alpha)
            value = value + q[list(z)].prod() * bound
    return torch.autograd.grad(value, logit)[0].item()


def renyi(alpha: float, K: int) -> RenyiELBO:
    return RenyiELBO(alpha=alpha, num_particles=K, vectorize_particles=True, max_plate_nesting=1)


def test_pyro_iwae_of_a_discrete_guide_has_no_gradient() -> None:
    assert not by_pyro(renyi(0.0, 2), 1000).any()
    assert renyi_gradient(0.0, 2) == pytest.approx(0.0817, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_pyro_renyi_of_a_discrete_guide_is_that_of_infinitely_many_particles(alpha: float) -> None:
    few = by_pyro(renyi(alpha, 2), 100_000)
    assert abs(off(few, torch.tensor(renyi_gradient(alpha, 2)))) > 20
    many = by_pyro(renyi(alpha, 512), 2000)
    assert many.mean() == pytest.approx(renyi_gradient(alpha, 0), rel=0.03)


def test_pyro_elbo_of_the_same_guide_is_right() -> None:
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    logit = torch.tensor(LOGIT, dtype=torch.float64, requires_grad=True)
    q = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    wanted = torch.autograd.grad((q * (JOINT - q.log())).sum(), logit)[0]
    # Trace_ELBO divides by the particles where they are vectorised, so each row's gradient is that of their mean.
    assert abs(off(by_pyro(elbo, 100_000), wanted)) < 5


def test_identities_see_the_library_and_no_global_noise() -> None:
    world = WORLDS["binary"]
    first, second = (identities.draw(of_pyro.TraceScore(K=2), world, 5).gradients for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)

"""Other devices than the processor: the numbers are the same, tensors are where they belong, and no pass waits for the one before.

`away` stands for a graphics processor on machines that have none; where there is one, it is tested, too.
"""

import warnings
from collections import Counter
from dataclasses import replace

import away
import numpy as np
import pytest
import torch
from engine import WORDS, Convolutional, Shifted, data, home
from oracles import scrambled
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    Laplace,
    Multinomial,
    Normal,
    TransformedDistribution,
)

from gradiometer.bench import Problem, measure
from gradiometer.bench.cells import Cell, attempt_together
from gradiometer.bench.costs import cost
from gradiometer.bench.decomposition import decompose
from gradiometer.bench.measurement import measure_all
from gradiometer.bench.named import named_problem
from gradiometer.bench.problems import reason_to_skip
from gradiometer.estimators.noise import seeded
from gradiometer.estimators.registry import parse

DEVICES = [away.NAME] * away.KNOWN_TO_TORCH + ["cuda"] * torch.cuda.is_available()
EXACT = {"dtype": torch.float64, "settle": 3}
device = pytest.mark.parametrize("device", DEVICES)


def agree(there, here) -> None:  # type: ignore[no-untyped-def]
    """Measurements on two devices, in double precision."""
    assert there.engine == here.engine
    for group in here.groups:
        ours, theirs = here.metrics(group), there.metrics(group)
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            assert theirs[name].value == pytest.approx(value.value, rel=1e-7, abs=1e-12, nan_ok=True), (group, name)
    for name, mean in here.mean.items():
        np.testing.assert_allclose(there.mean[name], mean, rtol=1e-9, atol=1e-12 * np.abs(mean).max())
        np.testing.assert_allclose(there.variance[name], here.variance[name], rtol=1e-7, atol=1e-12)


def holder(word: str, B: int) -> Problem:
    """A VAE that has what the estimator needs, and enough coordinates for a part of the replicates to be projected."""
    gaussian, binary = (named_problem(name, B) for name in ("digits-vae@init", "digits-vae-bernoulli@init"))
    return gaussian if reason_to_skip(gaussian, parse(word)) is None else binary


@device
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("word", WORDS)
def test_every_estimator(word: str, engine: str, device: str) -> None:
    problem = Problem(home(word), data(3))
    with away.draws() as drawn:
        there, here = (measure(problem, word, replicates=40, engine=engine, device=d, **EXACT) for d in (device, "cpu"))
    agree(there, here)
    assert not drawn


class Heavy(Shifted):
    """A guide of a family that torch draws."""

    def guide(self, x: Tensor) -> Distribution:
        return Independent(Laplace(self.encoder(x), torch.ones_like(x)), 1)


class Counts(Shifted):
    """A family with a setting that is no tensor."""

    def guide(self, x: Tensor) -> Distribution:
        return Multinomial(3, logits=self.encoder(x))


class Bent(Shifted):
    """A family made of another one and transforms with tensors of their own."""

    def guide(self, x: Tensor) -> Distribution:
        shift = AffineTransform(torch.ones_like(x), 2.0)
        return Independent(TransformedDistribution(Normal(self.encoder(x), torch.ones_like(x)), [shift]), 1)


@device
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(("model", "word"), [(Heavy, "dreg:K=3"), (Counts, "rloo:K=3"), (Bent, "iwae:K=3")])
def test_families_that_torch_draws_see_the_noise_of_the_processor(
    model: type[Shifted], word: str, engine: str, device: str
) -> None:
    problem = Problem(model(), data(3, 2))
    with warnings.catch_warnings(), away.draws() as drawn:
        warnings.simplefilter("ignore", UserWarning)  # of the loop that some of them take
        there, here = (measure(problem, word, replicates=40, engine=engine, device=d, **EXACT) for d in (device, "cpu"))
    agree(there, here)
    assert not drawn
    assert here.metrics("inference")["variance"].value > 0


def test_what_cuda_will_start_with_is_left_alone() -> None:
    torch.manual_seed(5)
    before = list(torch.cuda._lazy_seed_tracker.get_calls())
    with seeded(7):
        torch.rand(1)
    assert torch.cuda._lazy_seed_tracker.get_calls() == before


@device
def test_global_generators_go_on_as_if_nothing_had_been_drawn(device: str) -> None:
    def following() -> list[Tensor]:
        return [torch.rand(3), torch.rand(3, device="cuda" if device == "cuda" else "cpu")]

    heavy, learning = Problem(Heavy(), data(3, 2)), Problem(home("nvil"), data(3))
    torch.manual_seed(5)
    wanted = following()
    torch.manual_seed(5)
    for problem, word in ((heavy, "dreg:K=3"), (learning, "nvil:K=3")):
        measure(problem, word, replicates=8, device=device, **EXACT)
    assert all(map(torch.equal, following(), wanted))


@device
@pytest.mark.parametrize(
    ("model", "word"),
    [(scrambled(Convolutional(), seed=3), "rloo:K=3"), (Shifted(), "dreg:K=3"), (Shifted(), "sgvb-a:K=2")],
)
def test_convolutions_embeddings_and_bare_parameters(model: nn.Module, word: str, device: str) -> None:
    problem = Problem(model, data(3, 16 if isinstance(model, Convolutional) else 2))
    there, here = (measure(problem, word, replicates=40, device=d, **EXACT) for d in (device, "cpu"))
    assert there.engine == "rows"
    agree(there, here)


@device
def test_several_in_one_pass_with_a_reference_to_a_precision(device: str) -> None:
    problem = Problem(home("iwae"), data(3), held_out=data(20))
    words = ["iwae:K=3", "dreg:K=3", "iwae-stl:K=3", "vimco:K=3"]
    options = EXACT | {"replicates": 40, "reference": "vimco:K=8", "precision": 0.3, "budget": 200}
    for there, here in zip(*(measure_all(problem, words, device=d, **options) for d in (device, "cpu")), strict=True):
        agree(there, here)


@device
def test_both_sources_of_variance(device: str) -> None:
    problem, options = named_problem("digits-vae@init", 4), EXACT | {"minibatches": 4, "replicates": 8}
    (there,), (here,) = (decompose(problem, ["iwae:K=3"], device=d, **options) for d in (device, "cpu"))
    for group in here.groups:
        for part, value in here.variances(group).items():
            assert there.variances(group)[part].value == pytest.approx(value.value, rel=1e-7)


@device
@pytest.mark.parametrize("word", ["dreg:K=3", "rebar:K=2", "nvil:K=2"])
def test_costs(word: str, device: str) -> None:
    problem = Problem(home(word), data(3).float())
    there, here = (cost(problem, word, device=d, seconds=0.01) for d in (device, "cpu"))
    assert there["evaluations"].value == here["evaluations"].value
    assert there["peak_memory"].value > 0


@device
def test_training(device: str) -> None:
    cell = Cell("training", "digits-vae", "dreg:K=2", steps=3, every=3, batch=20, device=device)
    (here,), (there,) = (attempt_together([replace(cell, device=d)]) for d in ("cpu", device))
    assert (here[1], there[1]) == ("ok", "ok"), (here, there)
    for one, other in zip(here[0], there[0], strict=True):
        assert other["value"] == pytest.approx(one["value"], rel=1e-4)


@pytest.mark.skipif(not away.KNOWN_TO_TORCH, reason="torch before 2.10 has no devices written in Python")
@pytest.mark.parametrize("word", ["iwae:K=3", "rloo:K=3", "disarm:K=4", "rebar:K=2", "nvil:K=3", "sgvb-b:K=2"])
def test_no_pass_waits_for_the_one_before(word: str) -> None:
    """So that the processor draws the next noise while a graphics processor works."""
    problem, found = holder(word, 4), []
    for replicates in (512, 1024):  # in the second, 32 passes more; as many replicates are projected in both
        with away.waits() as waits:
            measure(problem, word, replicates=replicates, chunk=16, device=away.NAME, settle=0)
        found.append(Counter(waits))
    assert found[0].total() > 0
    assert found[1] - found[0] == {}


@pytest.mark.skipif(not away.KNOWN_TO_TORCH, reason="torch before 2.10 has no devices written in Python")
def test_the_device_of_these_tests_is_strict() -> None:
    there, here = torch.ones(3, device=away.NAME), torch.ones(3)
    with pytest.raises(RuntimeError, match="tensors here and away"):
        there + here
    for waiting in (lambda: float(there[0]), there.cpu, lambda: here.to(away.NAME), there.tolist):
        with away.waits() as waits:
            waiting()
        assert waits.total() == 1
    with away.draws() as drawn:
        there.normal_()
    assert drawn.total() == 1
    with away.waits() as waits:
        there + here[0] + here.to(away.NAME, non_blocking=True)
    assert waits.total() == 0


@pytest.mark.skipif(not away.KNOWN_TO_TORCH, reason="torch before 2.10 has no devices written in Python")
@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("word", ["iwae:K=1", "iwae:K=8", "rloo:K=8", "rebar:K=2", "nvil:K=3", "sgvb-b:K=2"])
def test_a_pass_of_more_replicates_makes_no_more_calls(word: str, B: int) -> None:
    """A graphics processor takes longer to be called than to compute: nothing goes through replicates one by one."""
    problem, found = holder(word, B), []
    for replicates in (64, 256):
        with away.calls() as calls:
            measure(problem, word, replicates=replicates, chunk=replicates, device=away.NAME, settle=0)
        found.append(calls.total())
    assert found[1] <= found[0]

"""What a gradient costs: evaluations counted, memory followed, seconds that agree with the throughputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradiometer.bench import cost, decompose, measure, named_problem
from gradiometer.bench.costs import ROUNDS, _median, peak_memory
from gradiometer.bench.efficiency import widened
from gradiometer.bench.gradients import Parameters, estimated, trainable
from gradiometer.bench.statistics import Value
from gradiometer.bench.training import ascent, initial_state
from gradiometer.estimators import parse
from gradiometer.estimators.base import Coefficients, Estimator, Facts, State, Surrogate, Weighted
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.relaxed import REBAR
from gradiometer.estimators.score_function import NVIL

KILO = 4000  # bytes of a thousand float32


@pytest.mark.parametrize(
    ("word", "evaluations"),
    [
        ("sgvb-a", 1),
        ("sgvb-b:K=3", 3),
        ("stl:K=2", 2),
        ("reinforce:K=5", 5),
        ("rloo:K=5", 5),
        ("iwae:K=8", 8),
        ("dreg:K=8", 8),
        ("vimco:K=4", 4),
        ("rws:K=4", 4),
        ("nvi:levels=2,K=4", 8),
        ("nvi:levels=3,K=8", 24),
        ("nvi:levels=3,K=8,resample=systematic,path=learned", 24),
    ],
)
@pytest.mark.parametrize("batch", [1, 7])
def test_evaluations_are_counted_per_data_point(word: str, evaluations: int, batch: int) -> None:
    found = cost(named_problem("gaussian-toy:units=3", batch), parse(word), seconds=1e-3)["evaluations"]
    assert (found.value, found.stderr) == (evaluations, 0.0)


def test_memory_follows_every_storage_until_it_is_freed() -> None:
    def step() -> None:
        a = torch.zeros(1000)  # 1
        b = a * 2  # 2
        view = b.view(10, 100)[:5]  # no more
        b.add_(1)  # no more
        del a  # 1
        c = torch.cat([view.reshape(-1), view.reshape(-1)])  # 2
        del b, view  # 1
        d = c + 1  # 2
        del c, d

    assert peak_memory(step, torch.zeros(1)) == 2 * KILO


def test_memory_that_was_there_before_is_not_the_steps() -> None:
    held = torch.zeros(1_000_000)
    assert peak_memory(lambda: held.add_(1).view(1000, 1000), torch.zeros(1)) == 0
    assert peak_memory(lambda: held[:1000] * 2, torch.zeros(1)) == KILO


def test_the_backward_pass_counts_too() -> None:
    weight = torch.zeros(1000, requires_grad=True)

    def step() -> None:
        y = weight * 2  # 1
        z = y.exp()  # 2, kept for the backward pass
        torch.autograd.grad(z, weight, torch.ones(1000))  # 3 with the ones, 4 with z's gradient, 5 with y's

    assert 4 * KILO <= peak_memory(step, torch.zeros(1)) <= 5 * KILO


def test_memory_and_evaluations_are_the_same_every_time_and_grow_with_k() -> None:
    problem = named_problem("gaussian-toy:units=3", 5)
    found = [cost(problem, parse(word), seconds=1e-3)["peak_memory"].value for word in ("iwae", "iwae", "iwae:K=64")]
    assert found[0] == found[1] > 0
    assert found[2] > 4 * found[0]


def test_throughputs_are_the_seconds_upside_down() -> None:
    values = cost(named_problem("gaussian-toy:units=3", 5), parse("iwae:K=8"), seconds=0.05)
    seconds, gradients, particles = (
        values[name].value for name in ("seconds_per_gradient", "gradients_per_second", "particles_per_second")
    )
    assert 1e-5 < seconds < 1
    assert gradients * seconds == pytest.approx(1, rel=0.05)  # medians of an even number of blocks
    assert particles == pytest.approx(8 * 5 * gradients)
    for name in ("seconds_per_gradient", "gradients_per_second", "particles_per_second"):
        value = values[name]
        assert value.low <= value.value <= value.high
        assert math.isfinite(value.stderr)
        assert not value.jackknife  # paired with no other's
    assert values["peak_memory"].stderr == 0


def test_a_slower_gradient_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from gradiometer.bench import costs

    problem = named_problem("gaussian-toy:units=3", 5)
    honest, one = cost(problem, parse("stl"), seconds=0.02), costs.ascent

    def slow(*arguments: object) -> object:
        time.sleep(0.02)
        return one(*arguments)

    monkeypatch.setattr(costs, "ascent", slow)
    delayed = cost(problem, parse("stl"), seconds=0.02)
    added = delayed["seconds_per_gradient"].value - honest["seconds_per_gradient"].value
    assert 0.019 < added < 0.04


@dataclass(frozen=True)
class LearnsByDrawsOfItsOwn(NVIL):
    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        def learn() -> Mapping[str, Tensor]:
            z = rng.sample(model.guide(x), 4)
            return self.learn(model.log_joint(x, z).detach(), x, state)

        return replace(super().surrogate(model, x, rng, state), learn=learn)


@pytest.mark.parametrize(
    ("estimator", "evaluations"), [(NVIL(3), 3), (REBAR(2), 4), (LearnsByDrawsOfItsOwn(3), 3 + 4)], ids=str
)
def test_what_a_control_variate_learns_by_is_a_part_of_the_cost(estimator: Estimator, evaluations: int) -> None:
    problem = named_problem("enumerable-vae", 5)
    assert cost(problem, estimator, seconds=0.01)["evaluations"].value == evaluations
    assert measure(problem, estimator, replicates=16).evaluations == evaluations
    (made,) = decompose(replace(problem, minibatch=lambda generator: problem.x), [estimator], minibatches=4)
    assert made.evaluations == evaluations


@pytest.mark.parametrize("word", ["nvil", "rebar"])
def test_a_step_of_learning_costs_more_than_the_estimate_alone(word: str) -> None:
    problem, estimator = named_problem("enumerable-vae", 5), parse(word)
    state = initial_state(estimator, problem.model, problem.x, 0)
    all_groups = trainable(problem.model, state)

    def operations(parameters: Parameters) -> int:
        with FlopCounterMode(display=False) as counter:
            ascent(estimator, problem.model, problem.x, Rng(0, 0), state, parameters)
        found: int = counter.get_total_flops()
        return found

    assert operations(all_groups) > operations(estimated(estimator, state, all_groups))


def test_the_interval_of_a_time_covers_also_when_multiplied() -> None:
    noise, held, products = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        time = _median(list(1 + 0.02 * noise.standard_normal(ROUNDS)))
        held += time.low <= 1 <= time.high
        product = widened(Value(1.0, 0.0, 1.0, 1.0), time.stderr / time.value)  # of a variance that is known
        products += time.value * product.low <= 1 <= time.value * product.high
    assert 0.96 < held / 2000 < 0.99
    assert 0.95 < products / 2000 < 0.995


@dataclass(frozen=True)
class ByVmap(Weighted):
    facts = Facts("by-vmap", family="test", objective="elbo")

    def surrogate(self, model: Any, x: Tensor, rng: Rng, state: State) -> Surrogate:
        q = model.guide(x)
        z = rng.sample(q, self.K)
        torch.func.vmap(lambda shift: model.log_joint(x, (z + shift) % 2))(torch.arange(4.0))
        return super().surrogate(model, x, rng, state)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(log_w) / len(log_w), score=log_w / len(log_w))


def test_evaluations_by_vmap_are_counted() -> None:
    problem = named_problem("enumerable-vae", 5)
    assert measure(problem, ByVmap(K=2), replicates=16, engine="loop").evaluations == 2 + 4 * 2


def test_the_problem_is_not_changed_and_what_it_lacks_is_a_sentence() -> None:
    problem = named_problem("gaussian-toy:units=3", 5)
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    cost(problem, parse("moving-average"), seconds=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in problem.model.state_dict().items())
    with pytest.raises(ValueError, match="dreg needs a reparameterisable guide; try rloo or vimco"):
        cost(named_problem("bernoulli-toy", 1), parse("dreg"))


def test_operations_are_those_of_the_matrix_products() -> None:
    found = cost(named_problem("digits-vae@init", 20), parse("sgvb-a"), seconds=0.01)
    encoder, decoder = [64 * 32, 32 * 16], [8 * 32, 32 * 64]
    products = 3 * sum(encoder + decoder) - encoder[0]  # forward, by the weights, by the inputs but the data
    counted = found["flops_per_second"].value * found["seconds_per_gradient"].value
    assert counted == pytest.approx(2 * 20 * products, rel=0.2)  # medians of a time and of its inverse

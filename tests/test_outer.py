"""Moments from factors against the gradients multiplied out, in float64."""

import pytest
import torch

from gradiometer.bench.moments import Accumulator
from gradiometer.bench.outer import Outer

SIZES = [(1, 7, 5), (1, 30, 40), (3, 7, 5), (8, 30, 40), (64, 6, 5)]  # rows, inputs, outputs


def factors(rows: int, wide: int, tall: int, replicates: int = 50, dtype: torch.dtype = torch.float64) -> Outer:
    generator = torch.Generator().manual_seed(rows + wide)
    inputs = torch.randn(replicates, rows, wide, generator=generator, dtype=torch.float64)
    cotangents = torch.randn(replicates, rows, tall, generator=generator, dtype=torch.float64) + 0.3
    return Outer(inputs.to(dtype), cotangents.to(dtype))


def multiplied_out(g: Outer) -> torch.Tensor:
    return torch.einsum("rno,rni->roi", g.cotangents.double(), g.inputs.double())


@pytest.mark.parametrize("size", SIZES)
def test_deviations_and_projections(size):
    g = factors(*size)
    dense = multiplied_out(g)
    pilot, direction = dense[:16].mean(0) + 0.1, torch.randn(dense.shape[1:], dtype=torch.float64)
    first, second = g.deviations(pilot)
    along, squared = g.projections(direction)
    torch.testing.assert_close(first, (dense - pilot).sum(0), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(second, ((dense - pilot) ** 2).sum(0), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(along, (dense * direction).sum((1, 2)), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(squared, dense.square().sum((1, 2)), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(g.dense(), dense, rtol=1e-12, atol=1e-12)


def test_two_calls_of_a_layer_add_up():
    g, h = factors(2, 7, 5), factors(3, 7, 5)
    torch.testing.assert_close((g + h).dense(), multiplied_out(g) + multiplied_out(h))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_mean_ten_thousand_times_the_noise_keeps_its_variance_in_float32(rows):
    generator = torch.Generator().manual_seed(0)
    replicates, wide, tall = 4096, 6, 5
    inputs = torch.ones(replicates, rows, wide) / rows
    noise = 1e-4 * torch.randn(replicates, rows, tall, generator=generator)
    noise[..., 2:] *= 1e4  # other output units are as noisy as their mean
    g = Outer(inputs, 1 + noise)
    accumulator = Accumulator(torch.Size((tall, wide)), 1, torch.float32, torch.device("cpu"))
    for start in range(0, replicates, 256):
        accumulator.fold(0, g[start : start + 256])
    found = accumulator.moments().pooled
    dense = multiplied_out(g).flatten(1)
    torch.testing.assert_close(torch.from_numpy(found.variance).flatten(), dense.var(0), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.from_numpy(found.mean).flatten(), dense.mean(0), rtol=1e-6, atol=0)
    naive = g.inputs.square().mean((0, 1)) * 0 + (g.dense() ** 2).mean(0) - g.dense().mean(0) ** 2
    assert (naive[:2].flatten().double() / dense.var(0)[:12] - 1).abs().max() > 0.5  # what the pilot is for


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mutation", ["noise", "scale", "dropped"])
def test_a_planted_mutation_is_seen(rows, mutation):
    g = factors(rows, 7, 5)
    dense = multiplied_out(g)
    pilot = dense.mean(0)
    inputs, cotangents = g.inputs.clone(), g.cotangents.clone()
    if mutation == "noise":
        inputs[17, 0, 3] += 1e-3
    elif mutation == "scale":
        cotangents *= 1 + 1e-6
    else:
        inputs, cotangents = inputs[:-1], cotangents[:-1]
    _, second = Outer(inputs, cotangents).deviations(pilot)
    assert not torch.allclose(second, ((dense - pilot) ** 2).sum(0), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 7, 5), (4, 30, 40), (20, 8, 5)])
def test_inputs_shared_by_all_replicates(size):
    rows, wide, tall = size
    alone, shared = factors(rows, wide, tall), factors(rows, wide, tall)
    shared = Outer(shared.inputs[:1], shared.cotangents)
    alone = Outer(shared.inputs.repeat(len(alone), 1, 1), alone.cotangents)
    dense = multiplied_out(alone)
    pilot, direction = dense[:16].mean(0) + 0.1, torch.randn(dense.shape[1:], dtype=torch.float64)
    for found, wanted in (
        (shared.dense(), dense),
        ((shared + shared).dense(), 2 * dense),
        (shared[3:9].dense(), dense[3:9]),
        (torch.stack(shared.deviations(pilot)), torch.stack([(dense - pilot).sum(0), ((dense - pilot) ** 2).sum(0)])),
        (shared.projections(direction)[0], (dense * direction).sum((1, 2))),
        (shared.projections(direction)[1], dense.square().sum((1, 2))),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_shared_inputs_whose_contributions_cancel_keep_their_variance_in_float32():
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(1, 6, 30, generator=generator), torch.randn(512, 3, 4, generator=generator)
    inputs = base.clone()
    inputs[:, 3:] = base[:, :3] + 1e-4 * base[:, 3:]  # rows in pairs, nearly equal, with opposite gradients
    g = Outer(inputs, torch.cat([noise, -noise], 1))
    pilot = torch.zeros(4, 30)
    _, second = g.deviations(pilot)
    torch.testing.assert_close(second.double(), multiplied_out(g).square().sum(0), rtol=2e-2, atol=0)

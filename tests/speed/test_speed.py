"""pytest-benchmark timings of the hot paths, for a developer's before and after; nothing here is judged by the clock."""

import pytest
import torch

from gradiometer.bench import Problem, measure
from gradiometer.bench.models.vae import PRESETS, VAE
from gradiometer.estimators import parse


@pytest.fixture(params=["digits", "burda-1"])
def problem(request):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VAE(PRESETS[request.param])
    return Problem(model, torch.bernoulli(torch.full((20, model.architecture.data), 0.3)))


@pytest.mark.parametrize("engine", ["rows", "loop"])
@pytest.mark.parametrize("word", ["sgvb-a", "rloo:K=8", "dreg:K=8", "nvi:K=4,levels=3"])
def test_measuring_64_replicates(benchmark, problem, word, engine):
    measured = benchmark.pedantic(
        measure, (problem, parse(word)), {"replicates": 64, "engine": engine}, rounds=3, warmup_rounds=1
    )
    assert measured.engine == engine

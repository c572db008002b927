"""pytest-benchmark timings of the hot paths, for a developer's before and after; nothing here is judged by the clock."""

import time
from functools import partial

import pytest
import torch

from gradiometer.bench import Problem, measure
from gradiometer.bench.measurement import measure_all
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


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("method", ["floor", "ours", "ghost", "loop", "twelve"])
def test_128_replicates_of_iwae(benchmark, problem, baselines, method):
    """One table for each size of problem, in which the ratios can be read."""
    benchmark.group = f"{len(problem.x[0])} pixels, B = 20, K = 8, 128 replicates"
    of = {
        "floor": partial(baselines.floor, problem, 8, 128),
        "ours": partial(measure, problem, baselines.named("iwae", 8), replicates=128),
        "ghost": partial(measure, problem, baselines.named("iwae", 8), replicates=128, engine="ghost"),
        "loop": partial(baselines.loop, problem, 8, 128),
        "twelve": partial(measure_all, problem, [baselines.named(w, 8) for w in baselines.TWELVE], replicates=128),
    }
    benchmark.pedantic(of[method], rounds=3, warmup_rounds=1)

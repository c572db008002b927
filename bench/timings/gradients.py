"""The engine's speed and memory, and the variances that its numbers must not drift from."""

from __future__ import annotations

import torch

from gradiometer.bench import Measurement, Problem, cost, measure
from gradiometer.bench.models.vae import PRESETS, VAE
from gradiometer.estimators import parse

WORDS = ["sgvb-a", "stl", "rloo:K=8", "iwae:K=8", "dreg:K=8", "vimco:K=8", "nvi:K=4,levels=3"]


def problem(preset: str, batch: int) -> Problem:
    """A fresh VAE and a minibatch of coin flips, the same in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VAE(PRESETS[preset])
    return Problem(model, torch.bernoulli(torch.full((batch, model.architecture.data), 0.3)))


class Measuring:
    """A whole measurement: set-up, replicates, error bars."""

    params = (WORDS, ["rows", "loop"])
    param_names = ("estimator", "engine")
    timeout = 300

    def setup(self, word: str, engine: str) -> None:
        """Build the problem outside the clock."""
        self.problem = problem("digits", 20)

    def run(self, word: str, engine: str) -> Measurement:
        """What is timed."""
        return measure(self.problem, parse(word), replicates=256, engine=engine)

    def time_measure(self, word: str, engine: str) -> None:
        """Seconds of a measurement of 256 replicates."""
        self.run(word, engine)

    def peakmem_measure(self, word: str, engine: str) -> None:
        """Memory of the process at its peak."""
        self.run(word, engine)

    def track_variance(self, word: str, engine: str) -> float:
        """Variance of the inference gradient; it moves only if the numbers do."""
        return self.run(word, engine).metrics("inference")["variance"].value

    track_variance.unit = "(nats / parameter)^2"  # type: ignore[attr-defined]


class Step:
    """One gradient of the MNIST-sized VAE, as a training step takes it."""

    params = WORDS
    param_names = ("estimator",)

    def setup(self, word: str) -> None:
        """Build the problem outside the clock."""
        self.problem = problem("burda-1", 20)

    def track_seconds(self, word: str) -> float:
        """Median seconds per gradient."""
        return cost(self.problem, parse(word))["seconds_per_gradient"].value

    def track_peak_memory(self, word: str) -> float:
        """Bytes that one gradient holds at most, in MiB."""
        return cost(self.problem, parse(word), seconds=0.01)["peak_memory"].value

    track_seconds.unit, track_peak_memory.unit = "s", "MiB"  # type: ignore[attr-defined]

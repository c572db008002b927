"""The engine's speed and memory, and the variances that its numbers must not drift from."""

from __future__ import annotations

from functools import partial

from gradiometer.bench import Measurement, cost, measure
from gradiometer.bench.measurement import measure_all
from gradiometer.bench.timings.baselines import TWELVE, floor, medians, named, problem
from gradiometer.estimators import parse

WORDS = ["sgvb-a", "stl", "rloo:K=8", "iwae:K=8", "dreg:K=8", "vimco:K=8", "nvi:K=4,levels=3"]
REPLICATES = 256


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
        return measure(self.problem, parse(word), replicates=REPLICATES, engine=engine)  # type: ignore[arg-type]

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


class Ratios:
    """A measurement against the floor; `ratios.py` prints this and more."""

    params = ([(20, 1), (1, 8)],)
    param_names = ("B, K",)
    timeout = 300

    def track_x_floor(self, sizes: tuple[int, int]) -> float:
        """On the MNIST-sized VAE."""
        B, K = sizes
        of, estimator = problem("burda-1", B), named("iwae", K)
        taken = medians(
            {
                "floor": partial(floor, of, K, 2 * REPLICATES),
                "ours": partial(measure, of, estimator, replicates=2 * REPLICATES),
            },
            rounds=3,
        )
        return taken["ours"] / taken["floor"]

    track_x_floor.unit = "x floor"  # type: ignore[attr-defined]


class Company:
    """Twelve estimators measured together against one of them alone."""

    timeout = 300

    def track_company(self) -> float:
        """On the small VAE."""
        of = problem("digits", 20)
        taken = medians(
            {
                "one": partial(measure, of, named("iwae", 8), replicates=REPLICATES),
                "twelve": partial(measure_all, of, [named(word, 8) for word in TWELVE], replicates=REPLICATES),
            },
            rounds=3,
        )
        return taken["twelve"] / taken["one"]

    track_company.unit = "x one alone"  # type: ignore[attr-defined]

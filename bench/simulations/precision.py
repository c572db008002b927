"""How many replicates a precision takes, against how many it must take: `python bench/simulations/precision.py`, a few minutes.

Writes precision.md and precision.json to results/statistics. The need is the number of replicates at which the true standard error
of the logarithm of a variance, times the normal point, is the asked half-width on its wider side; of several groups, that of
the neediest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

from gradiometer.bench.measurement import measure
from gradiometer.bench.models.toys import FunctionToy, GaussianToy
from gradiometer.bench.problems import Problem
from gradiometer.bench.simulations.coverage import percent
from gradiometer.bench.simulations.kept import keep
from gradiometer.bench.statistics import normal
from gradiometer.estimators.registry import parse

OFTEN, AT = 400, 512  # measurements that show the true error, and their replicates


@dataclass(frozen=True)
class Line:
    """What a precision took on one problem."""

    problem: str
    estimator: str
    precision: float
    first: int
    need: float
    median: float
    ninetieth: float
    met: float
    held: int
    intervals: int


def gaussian() -> Problem:
    generator = torch.Generator().manual_seed(0)
    toy = GaussianToy(5)
    x = torch.randn(5, 5, generator=generator)
    toy.place(x, 0.3, generator)
    return Problem(toy, x)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "function-toy, cosine": lambda: Problem(FunctionToy("cosine", k=2.0), torch.ones(1, 1)),
    "function-toy, exponential": lambda: Problem(FunctionToy("exponential", k=1.0), torch.ones(1, 1)),
    "gaussian-toy, 5 units": gaussian,
}


def lines(seeds: int) -> list[Line]:
    found = []
    for name, make in PROBLEMS.items():
        problem = make()
        for word in ("stl", "rloo:K=4") if "gaussian" in name else ("stl", "reinforce"):
            logs = [_logs(problem, word, seed) for seed in range(10**6, 10**6 + OFTEN)]
            error = {group: np.std([of[group] for of in logs]) * math.sqrt(AT) for group in logs[0]}
            truth = {group: math.log(np.mean(np.exp([of[group] for of in logs]))) for group in logs[0]}
            for precision, first in ((0.1, 64), (0.05, 64), (0.05, 512)):
                need = max((normal() * float(e) / math.log1p(precision)) ** 2 for e in error.values())
                found.append(_line(problem, name, word, precision, first, need, truth, seeds))
                click.echo(str(found[-1]))
    return found


def _logs(problem: Problem, word: str, seed: int) -> dict[str, float]:
    m = measure(problem, parse(word), replicates=AT, seed=seed, only=["variance"])
    values = {group: m.metrics(group)["variance"].value for group, members in m.groups.items() if members}
    return {group: math.log(value) for group, value in values.items() if value > 0}


def _line(
    problem: Problem,
    name: str,
    word: str,
    precision: float,
    first: int,
    need: float,
    truth: dict[str, float],
    seeds: int,
) -> Line:
    spent, met, held, intervals = [], 0, 0, 0
    for seed in range(seeds):
        m = measure(
            problem, parse(word), replicates=first, seed=seed, precision=precision, budget=10**6, only=["variance"]
        )
        spent.append(m.replicates / max(need, first))
        met += bool(m.precision_met)
        for group, log in truth.items():
            value = m.metrics(group)["variance"]
            held += math.log(value.low) <= log <= math.log(value.high)
            intervals += 1
    median, ninetieth = np.quantile(spent, [0.5, 0.9])
    return Line(name, word, precision, first, need, float(median), float(ninetieth), met / seeds, held, intervals)


def report(found: list[Line], seeds: int, about: str) -> str:
    head = [
        "# Replicates that a precision takes",
        "",
        f"{about}, {seeds} seeds a line.",
        "",
        "By `python bench/simulations/precision.py`. *need* are the replicates at which the true error gives the asked half-width;",
        "*spent* are those of the measurements, over the need (or over the first look, where that is more already). *coverage* is",
        "that of the reported 95 % intervals, at the look that stopped.",
        "",
        "| problem | estimator | precision | first look | need | spent, median | 90 % | met, % | coverage, % |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = [
        f"| {f.problem} | `{f.estimator}` | {100 * f.precision:.0f} % | {f.first} | {f.need:.0f} | {f.median:.2f} | "
        f"{f.ninetieth:.2f} | {100 * f.met:.0f} | {percent(f.held, f.intervals)} |"
        for f in found
    ]
    return "\n".join([*head, *rows, ""])


@click.command()
@click.option("--seeds", default=200, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/statistics"), show_default=True)
def main(seeds: int, out: Path) -> None:
    torch.set_num_threads(1)
    found = lines(seeds)
    keep(out, "precision", partial(report, found, seeds), {"lines": [asdict(line) for line in found]})


if __name__ == "__main__":
    main()

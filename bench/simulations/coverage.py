"""How often 95 % intervals hold the truth: `python bench/simulations/coverage.py`, about a quarter of an hour on one core.

Writes coverage.md and coverage.json to results/statistics. Gradients of known moments are handed to the harness where an engine's
would be, as passes, so that shards, accumulators, projections and metrics are those of a measurement.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import binomtest

from gradiometer.bench.folding import Folding
from gradiometer.bench.measured import Compared, Measurement, of_moments
from gradiometer.bench.models.toys import GaussianToy
from gradiometer.bench.moments import Array
from gradiometer.bench.problems import Problem
from gradiometer.bench.simulations.kept import keep
from gradiometer.bench.statistics import Value, ratio
from gradiometer.bench.tape import Part, Pass
from gradiometer.estimators.registry import parse

Draw = Callable[[np.random.Generator, int, int], Array]  # replicates, coordinates -> [R, P], of mean 0
CHUNK = 512
ANY = parse("sgvb-a")  # stands for the estimator; none of its code runs


@dataclass(frozen=True)
class Noise:
    """A distribution of one gradient's noise, with the variance of a coordinate."""

    draw: Draw
    variance: float = 1.0


def student(freedom: float) -> Noise:
    return Noise(lambda g, R, P: g.standard_t(freedom, (R, P)), freedom / (freedom - 2))


def common(g: np.random.Generator, R: int, P: int) -> Array:
    """Every pair of coordinates has correlation 0.64."""
    return 0.8 * g.standard_normal((R, 1)) + 0.6 * g.standard_normal((R, P))


def lognormal(width: float) -> Noise:
    mean, square = math.exp(width**2 / 2), math.exp(width**2)
    return Noise(lambda g, R, P: np.exp(width * g.standard_normal((R, P))) - mean, (square - 1) * square)


def mixture(part: float, scale: float) -> Noise:
    """All coordinates are so many times larger in a part of the replicates."""
    of = 1 - part + part * scale**2
    return Noise(
        lambda g, R, P: g.standard_normal((R, P)) * np.where(g.random((R, 1)) < part, scale, 1.0),
        of,
    )


def together(freedom: float) -> Noise:
    """Multivariate Student: the coordinates are large together."""
    return Noise(
        lambda g, R, P: g.standard_normal((R, P)) / np.sqrt(g.chisquare(freedom, (R, 1)) / freedom),
        freedom / (freedom - 2),
    )


LIGHT = {
    "normal": Noise(lambda g, R, P: g.standard_normal((R, P))),
    "uniform": Noise(lambda g, R, P: g.uniform(-1, 1, (R, P)), 1 / 3),
    "correlated": Noise(common),
}
LIGHT_TAILS = {"Laplace": Noise(lambda g, R, P: g.laplace(size=(R, P)), 2.0)} | {
    "exponential": Noise(lambda g, R, P: g.exponential(size=(R, P)) - 1),
    "normal squared": Noise(lambda g, R, P: g.standard_normal((R, P)) ** 2 - 1, 2.0),
}
TAILS = {
    "normal": LIGHT["normal"],
    "uniform": LIGHT["uniform"],
    **LIGHT_TAILS,
    "Student 3": student(3),
    "Student 4": student(4),
    "Student 5": student(5),
    "Student 6": student(6),
    "Student 4, together": together(4),
    "lognormal 0.5": lognormal(0.5),
    "lognormal 1": lognormal(1.0),
    "5 % times 5": mixture(0.05, 5),
    "1 % times 10": mixture(0.01, 10),
}
SIZES = ((1, 64), (1, 256), (10, 64), (10, 1024), (10, 4096), (300, 256))  # coordinates, replicates
HEAVY_SIZES = ((1, 256), (10, 256), (10, 1024), (10, 4096))
MEANS = {"zero": 0.0, "near": 1.5, "far": 30.0}  # in errors of the square, about
LOUD = 2.0  # of the fourth mean, in standard deviations of the whole gradient
SHARED = 0.9  # of the noise of the second estimator that is the first's


@dataclass
class Cell:
    """One situation: how many intervals held the truth, of how many, and how many were flagged."""

    noise: str
    coordinates: int
    replicates: int
    metric: str
    at: str
    held: int = 0
    trials: int = 0
    flagged: int = 0
    held_unflagged: int = 0
    without: int = 0  # trials without an interval
    truth: float = field(default=math.nan)

    def add(self, value: Value, truth: float, heavy: bool) -> None:
        self.truth = truth
        if math.isnan(value.low):
            self.without += 1
            return
        inside = value.low <= truth <= value.high
        self.trials += 1
        self.held += inside
        self.flagged += heavy
        self.held_unflagged += inside and not heavy


def measurement(gradients: Mapping[str, Array]) -> dict[str, Measurement]:
    """What is left of replicates ``[R, P]`` of several estimators on the same noise, as an engine hands them over."""
    R = len(next(iter(gradients.values())))
    P = {name: g.shape[1] for name, g in gradients.items()}
    parameters = [{"group": {name: torch.nn.Parameter(torch.empty(size))}} for name, size in P.items()]
    folding = Folding([ANY] * len(P), parameters, R)
    parts = [{name: Part(name, slice(0, size), torch.Size([size]))} for name, size in P.items()]
    tensors = {name: torch.from_numpy(g) for name, g in gradients.items()}
    for start in range(0, R, CHUNK):
        stop = min(start + CHUNK, R)
        folding.add(Pass({name: t[start:stop] for name, t in tensors.items()}, parts, None), range(start, stop))
    problem = Problem(GaussianToy(1), torch.zeros(1, 1))
    return {
        name: Measurement(
            problem,
            ANY,
            R,
            0,
            folding.moments(i),
            {"group": (name,)},
            folding.directions.projections(i),
            {},
            1.0,
            None,
            "rows",
            CHUNK,
            turns=folding.directions.turns(i),
        )
        for i, name in enumerate(P)
    }


def values_of(own: Array, reference: Array) -> tuple[dict[str, Value], bool]:
    """The metrics of an estimator, of its bias, and of its variance over the reference's; and whether its tails are heavy."""
    made = measurement({"own": own, "difference": own - reference, "reference": reference})
    m, difference, trusted = made["own"], made["difference"].moments, made["reference"].moments
    of = Compared(ANY, {"own": difference["difference"]}, {"own": trusted["reference"]})
    full = Measurement(**{**vars(m), "compared": {"group": of}})
    values = full.metrics("group")
    values["ratio of variances"] = ratio(values["variance"], of_moments("variance", [trusted["reference"]]))
    return values, full.tails("group") == "heavy"


def truths(noise: Noise, mean: Array, bias: Array) -> dict[str, float]:
    P, v = len(mean), noise.variance
    square = float(mean @ mean)
    own = float((mean + bias) @ (mean + bias))
    return {
        "variance": P * v,
        "ratio of variances": 1.0,
        "gradient_norm": math.sqrt(own),
        "snr_corrected": math.sqrt(own / P / v),
        "bias_squared": float(bias @ bias),
        "bias": math.sqrt(bias @ bias),
        "relative_bias": math.sqrt(bias @ bias / square) if square else math.nan,
        "mse": P * v + float(bias @ bias),
    }


def directional(noise: Noise, mean: Array, generator: np.random.Generator) -> float:
    """The truth along the true mean, by many replicates."""
    u, total, count = mean / np.linalg.norm(mean), 0.0, 0
    for _ in range(40):
        g = noise.draw(generator, 200_000 // len(mean), len(mean)) + mean
        along = g @ u
        total += float((np.abs(along) / np.sqrt((g**2).sum(1) - along**2)).sum())
        count += len(g)
    return total / count


def light(name: str, P: int, R: int, at: str, trials: int) -> list[Cell]:
    """Every metric on light tails: at a mean and a bias of zero, near zero, far from it, or loud."""
    noise, generator, scale = LIGHT[name], _generator(name, P, R, at), MEANS.get(at, LOUD)
    sign = np.where(np.arange(P) % 3, 1.0, -0.6)
    unit = sign / np.linalg.norm(sign) * P**0.25 * math.sqrt(noise.variance / R)  # about an error of the square
    if at == "loud":
        unit = sign / np.linalg.norm(sign) * math.sqrt(P * noise.variance)
    bias = scale * unit * math.sqrt(1 - SHARED**2)
    mean = scale * unit - bias
    known = truths(noise, mean, bias)
    if at in ("far", "loud"):
        known["snr"] = float(np.abs(mean + bias).mean()) / math.sqrt(noise.variance)
        if P >= 3:
            known["directional_snr"] = directional(noise, mean + bias, generator)
    if at == "loud":
        known = {name: known[name] for name in ("snr", "directional_snr") if name in known}
    cells = {m: Cell(name, P, R, m, at) for m in known}
    for _ in range(trials):
        own = noise.draw(generator, R, P)
        other = SHARED * own + math.sqrt(1 - SHARED**2) * noise.draw(generator, R, P)
        values, heavy = values_of(mean + bias + own, mean + other)
        for metric, cell in cells.items():
            if not math.isnan(known[metric]):
                cell.add(values[metric], known[metric], heavy)
    return [cell for cell in cells.values() if cell.trials or cell.without]


def tails(name: str, P: int, R: int, trials: int) -> list[Cell]:
    """Intervals of the variance on all tails, and which are flagged."""
    noise, generator, cell = TAILS[name], _generator(name, P, R, "tails"), Cell(name, P, R, "variance", "tails")
    for _ in range(trials):
        m = measurement({"own": noise.draw(generator, R, P)})["own"]
        cell.add(of_moments("variance", [m.moments["own"]]), P * noise.variance, m.tails("group") == "heavy")
    return [cell]


def _generator(*words: object) -> np.random.Generator:
    """Of each situation its own, so that it does not matter which others are simulated, nor in what order."""
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def tasks(trials: int) -> list[Callable[[], list[Cell]]]:
    return [
        *(partial(light, name, P, R, at, trials) for name in LIGHT for P, R in SIZES for at in (*MEANS, "loud")),
        *(partial(tails, name, P, R, trials) for name in TAILS for P, R in HEAVY_SIZES),
    ]


def interval(held: int, trials: int) -> tuple[float, float]:
    found = binomtest(held, trials).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def percent(held: int, trials: int) -> str:
    if not trials:
        return "-"
    low, high = interval(held, trials)
    return f"{100 * held / trials:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def report(cells: list[Cell], trials: int, about: str) -> str:
    lines = [
        "# Coverage of 95 % intervals",
        "",
        f"{about}, {trials} trials a line.",
        "",
        "By `python bench/simulations/coverage.py`: per cent of the intervals that hold the truth, bold outside of 93 to 97; the",
        "binomial error is about half a per cent (`coverage.json` has the counts). P coordinates, R replicates.",
        "",
        "## Light tails",
        "",
        "Mean and bias are zero, near zero (one and a half errors of their square), far from it (thirty), or loud (the mean is",
        "twice the standard deviation of the whole gradient). An interval holds a zero from one side only, which 97.5 % should. A",
        "number in brackets: the per cent of trials in which the metric has no interval, and says so; where most have none, the",
        "others are a choice of the unlucky, and are not shown.",
        "",
    ]
    of = [c for c in cells if c.at != "tails"]
    sizes = " | ".join(f"P {P}, R {R}" for P, R in SIZES)
    lines += [f"| metric | mean | noise | {sizes} |", "|---|---|---|" + "---:|" * len(SIZES)]
    for metric in dict.fromkeys(c.metric for c in of):
        for at in (*MEANS, "loud"):
            for noise in LIGHT:
                row = [c for c in of if (c.metric, c.at, c.noise) == (metric, at, noise)]
                by_size = {(c.coordinates, c.replicates): c for c in row}
                shown = " | ".join(_shown(by_size.get(size)) for size in SIZES)
                lines += [f"| `{metric}` | {at} | {noise} | {shown} |"] if row else []
    return "\n".join([*lines, *_of_tails([c for c in cells if c.at == "tails"])])


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.without > cell.trials:
        return f"- ({100 * cell.without / (cell.trials + cell.without):.0f})"
    held = 100 * cell.held / cell.trials
    shown = f"{held:.1f}" if 92.95 <= held < 97.05 else f"**{held:.1f}**"
    return shown + (f" ({100 * cell.without / (cell.trials + cell.without):.0f})" if cell.without else "")


def _of_tails(cells: list[Cell]) -> Iterator[str]:
    yield from (
        "",
        "## The variance on all tails",
        "",
        "*flagged* are the trials whose rows say `heavy`; *silent* those that miss the truth and are not flagged, which of light",
        "tails are 5 %. The others of a heavy tail are those that have not seen it: no flag can tell.",
        "",
        "| noise | P | R | coverage, % | flagged, % | coverage of the others, % | silent, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    )
    for c in cells:
        others = c.trials - c.flagged
        silent = 100 * (others - c.held_unflagged) / c.trials
        yield (
            f"| {c.noise} | {c.coordinates} | {c.replicates} | {percent(c.held, c.trials)} | "
            f"{100 * c.flagged / c.trials:.1f} | {percent(c.held_unflagged, others)} | {silent:.1f} |"
        )
    trials, flagged = sum(c.trials for c in cells), sum(c.flagged for c in cells)
    held = sum(c.held_unflagged for c in cells)
    yield f"\nOf all {trials - flagged} that are not flagged, {percent(held, trials - flagged)} % hold the truth.\n"


@click.command()
@click.option("--trials", default=2000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/statistics"), show_default=True)
def main(trials: int, out: Path) -> None:
    torch.set_num_threads(1)
    cells: list[Cell] = []
    for task in tasks(trials):
        for cell in task():
            cells.append(cell)
            click.echo(
                f"{cell.noise} {cell.coordinates} {cell.replicates} {cell.metric} {cell.at}: {cell.held}/{cell.trials}"
            )
    keep(out, "coverage", partial(report, cells, trials), {"cells": [asdict(cell) for cell in cells]})


if __name__ == "__main__":
    main()

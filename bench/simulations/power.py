"""How often the gate finds a mistake of a stated size, and how often it raises a false alarm: `python bench/simulations/power.py`.

Writes power.md and power.json to results/checks. Every line is measured on gradients of estimators of the catalogue, by the code
that `gradiometer check --level full` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import binomtest

from gradiometer.bench.checks import exact
from gradiometer.bench.checks.differences import at
from gradiometer.bench.checks.faults import scaled
from gradiometer.bench.checks.gate import LEVELS
from gradiometer.bench.checks.identities import experienced
from gradiometer.bench.checks.means import Layout, gradients
from gradiometer.bench.checks.targets import OBJECTIVES, target
from gradiometer.bench.checks.trials import Array, Schedule, Source, trial
from gradiometer.bench.checks.worlds import World, small, wide
from gradiometer.bench.gradients import trainable
from gradiometer.bench.simulations.kept import keep
from gradiometer.estimators.registry import parse

FULL = LEVELS["full"]
CLEAN = replace(LEVELS["quick"].schedule, alpha=0.05)  # of the false alarms, at a nominal 5 %
Fault = Callable[[Array, Layout], Array]  # gradients [n, P] -> gradients


@dataclass(frozen=True)
class Line:
    """One row of the table: how many of how many runs raised an alarm."""

    what: str
    against: str
    estimator: str
    alarms: int
    runs: int
    replicates: float

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.alarms, self.runs).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Bench:
    """A wide world, an estimator on it, and what its gradients are compared with."""

    world: World
    word: str
    trusted: str = ""

    def run(self, fault: Fault, schedule: Schedule, seed: int) -> tuple[bool, int]:
        estimator = parse(self.word)
        state = experienced(estimator, self.world)
        groups = {g: m for g, m in trainable(self.world.model, state).items() if g in self.world.model.groups}
        layout = Layout.of(groups)
        own = gradients(estimator, self.world, layout, state, seed)
        towards, reference = self._reference(layout, seed)
        verdict = trial(lambda r: fault(own(r), layout) - reference(r), layout.blocks, towards, schedule, seed)
        return verdict.found, verdict.replicates

    def _reference(self, layout: Layout, seed: int) -> tuple[Array, Source]:
        if self.trusted:
            trusted = parse(self.trusted)
            theirs = gradients(trusted, self.world, layout, experienced(trusted, self.world), seed)
            return theirs(range(1024)).mean(0), theirs
        name = parse(self.word).facts.objective_of("generative")
        wanted, _ = target(self.world, OBJECTIVES[name], parse(self.word).K if name == "iwelbo" else 1)
        flat = layout.flat(wanted)
        return flat, lambda r: flat[None]


def clean(g: Array, layout: Layout) -> Array:
    return g


def layer(factor: float) -> Fault:
    """One layer's scale, that of the encoder's last."""

    def fault(g: Array, layout: Layout) -> Array:
        found = g.copy()
        found[:, layout.columns["encoder.net.2.weight"]] *= factor
        return found

    return fault


def group(factor: float) -> Fault:
    def fault(g: Array, layout: Layout) -> Array:
        found = g.copy()
        found[:, layout.blocks["inference"]] *= factor
        return found

    return fault


def opposite(g: Array, layout: Layout) -> Array:
    """Biases of a fifth of a standard deviation in every coordinate, of alternating sign: their mean is zero."""
    return g + 0.2 * _std(g) * np.where(np.arange(g.shape[1]) % 2, -1.0, 1.0)


def single(g: Array, layout: Layout) -> Array:
    """Half a standard deviation in one coordinate of the thousand."""
    place = layout.columns["encoder.net.0.weight"].start + 137
    found = g.copy()
    found[:, place] += 0.5 * _std(g)[place]
    return found


def _std(g: Array) -> Array:
    """Each coordinate's, from the first replicates and then held, so that a bias is the same at every look."""
    return _held.setdefault(g.shape[1], g.std(0))


_held: dict[int, Array] = {}


def lines(runs: int, false_alarms: int) -> Iterator[Line]:
    binary, gaussian = wide()
    exactly = Bench(binary, "rloo:K=4")
    paired = Bench(gaussian, "dreg:K=8", "dreg:K=8")
    yield from _exact(1.01, "1 % scale error in one layer")
    yield _counted("1 % scale error in one layer", "itself, right, on the same noise", paired, layer(1.01), runs)
    yield _counted("5 % scale error in one group", "itself, right, on the same noise", paired, group(1.05), runs)
    for fault, what in (
        (opposite, "biases of +-0.2 sd that cancel on average"),
        (single, "a bias of 0.5 sd in one coordinate of 1000"),
    ):
        _held.clear()
        yield _counted(what, "the exact gradient", exactly, fault, runs)
        _held.clear()
        yield _counted(what, "sgvb-a:K=4 on the same noise", Bench(gaussian, "stl:K=4", "sgvb-a:K=4"), fault, runs)
    for bench, against, clean_runs in (
        (exactly, "the exact gradient", false_alarms),
        (Bench(binary, "reinforce"), "the exact gradient", false_alarms),
        (Bench(gaussian, "dreg:K=8", "iwae:K=8"), "iwae:K=8 on the same noise", runs),
    ):
        yield _counted("nothing: false alarms at a nominal 5 %", against, bench, clean, clean_runs, CLEAN)


def _exact(factor: float, what: str) -> Iterator[Line]:
    """Every layer of every small world, by exact comparison."""
    for word in ("rloo", "vimco", "sgvb-a", "stl", "dreg", "iwae"):
        alarms = runs = 0
        for world in small():
            estimator = at(parse(word), 2)
            if estimator is None or not world.admits(estimator):
                continue
            names = [n for m in trainable(world.model, experienced(estimator, world)).values() for n in m]
            for name in names:
                found = exact.claims(estimator, world, FULL.effort, scaled(name, factor))
                alarms += any(claim.holds is False for claim in found)
                runs += 1
        yield Line(what, "exact expectations", f"{word}:K=2", alarms, runs, 0)


def _counted(
    what: str, against: str, bench: Bench, fault: Fault, runs: int, schedule: Schedule = FULL.schedule
) -> Line:
    outcomes = [bench.run(fault, schedule, seed) for seed in range(runs)]
    spent = float(np.median([n for _, n in outcomes]))
    return Line(what, against, bench.word, sum(found for found, _ in outcomes), runs, spent)


def table(found: list[Line], about: str) -> str:
    """The lines as Markdown."""
    rows = [
        f"{about}. Alarms with exact 95 % binomial intervals.",
        "",
        "| mistake | compared with | estimator | alarms | share | median replicates |",
        "|---|---|---|---|---|---|",
    ]
    for line in found:
        low, high = line.interval
        spent = f"{line.replicates:.0f}" if line.replicates else "none"
        share = f"{line.alarms / line.runs:.3f} ({low:.3f} to {high:.3f})"
        rows.append(
            f"| {line.what} | {line.against} | `{line.estimator}` | {line.alarms} of {line.runs} | {share} | {spent} |"
        )
    return "\n".join(rows) + "\n"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/checks"), show_default=True)
@click.option("--runs", default=400, show_default=True, help="Of each mistake.")
@click.option("--false-alarms", default=1000, show_default=True, help="Clean runs of each estimator.")
def main(out: Path, runs: int, false_alarms: int) -> None:
    """Measure the power and the size of the gate's tests."""
    torch.set_num_threads(1)
    found = []
    for line in lines(runs, false_alarms):
        found.append(line)
        click.echo(f"{line.what}, {line.against}, {line.estimator}: {line.alarms} of {line.runs}")
    numbers = {"lines": [asdict(line) | {"interval": line.interval} for line in found]}
    keep(out, "power", partial(table, found), numbers)


if __name__ == "__main__":
    main()

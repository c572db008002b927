"""Every ratio that the measurement engine is judged by: `python bench/timings/ratios.py` prints them in four tables.

The methods of a table are timed in the same process, interleaved, in CPU seconds on one thread; medians over rounds, after one
call of each that is not timed. A measurement is timed whole: set-up, chunks, projections, moments. "wanted" is what a change
must keep, "aim" what would be better.

speed     a measurement, and one of squared norms alone (ghost), against the *floor*, a plain forward and backward pass of the
          same rows in big batches, and against the *loop* that a careful user writes: one replicate at a time, `autograd.grad`
          and `_foreach` sums of gradients and of their squares.
company   twelve estimators measured together against one of them alone, and against twelve loops. The loop is IWAE's, twelve
          times: loops by the estimators' own surrogates are slower, so this favours the loop.
backpack  the one job that BackPACK does too: sums of gradients and of their squares where a replicate is a row. Beside them, a
          measurement gives sixteen shards of both, projections, and so error bars.
memory    the most that a measurement holds above model and data, each in a process of its own.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from gradiometer.bench import measure
from gradiometer.bench.machine import describe
from gradiometer.bench.measurement import measure_all
from gradiometer.bench.timings import baselines
from gradiometer.bench.timings.baselines import by_backpack, extended, floor, loop, medians, noise_of_measure, problem
from gradiometer.estimators import Estimator, parse

PRESET = "burda-1"  # 784-200-200-50, tanh
TWELVE = ("sgvb-a", "stl", "reinforce", "rloo", "iwae", "dreg", "rws", "rws-dreg", "vimco", "vr:alpha=0.5")
TWELVE += ("ciwae:beta=0.5", "tvo")
SPEED: dict[
    tuple[int, int, int], tuple[float, ...]
] = {  # B, K, R: x floor wanted, its aim, x faster than the loop wanted
    (1, 1, 1000): (1.3, 1.1, 45),
    (1, 8, 1000): (1.7, 1.2, 8),
    (20, 1, 1000): (1.1, 0.9, 3.8),
    (20, 8, 1000): (1.2, 1.0, 1.25),
    (100, 1, 100): (1.0, 0.8, 1.6),
    (20, 64, 1000): (1.15, 1.0, 0.95),
}
COMPANY: dict[
    tuple[int, int, int], tuple[float | None, ...]
] = {  # B, K, R: x one alone wanted, x fewer than loops wanted
    (20, 8, 1000): (3, 4),
    (1, 64, 1000): (2.5, 8),
    (1, 8, 1000): (None, 10),
}
BACKPACK, BATCHES = 1000, (250, 500, 1000)  # replicates, and how many of them BackPACK takes at a time
AGREED = 1e-4  # relative difference of its second moments and ours
MEMORY, MIB_WANTED = (400, 1000, 4000, 10000), 120  # replicates, at B = 20 and K = 1

Columns = Mapping[str, str]
"""Formats of a table's columns by heading."""
Row = dict[str, Any]


def named(word: str, K: int) -> Estimator:
    """An estimator with so many particles."""
    return parse(f"{word}{',' if ':' in word else ':'}K={K}")


def speed(word: str, rounds: int) -> list[Row]:
    """A measurement against the floor and the loop."""
    shown = begin(
        f"speed: {word}",
        {"B": "d", "K": "d", "R": "d", "floor s": ".3f", "ours x floor": ".2f", "wanted <=": "g", "aim": "g"}
        | {"loop x ours": ".2f", "wanted >=": "g", "loop x floor": ".2f", "ghost x floor": ".2f"},
        rounds,
    )
    rows = []
    for (B, K, R), (slower, aim, faster) in SPEED.items():
        of, estimator = problem(PRESET, B), named(word, K)
        taken = medians(
            {
                "floor": partial(floor, of, K, R),
                "loop": partial(loop, of, K, R),
                "ours": partial(measure, of, estimator, replicates=R),
                "ghost": partial(measure, of, estimator, replicates=R, engine="ghost"),
            },
            rounds,
        )
        row = {"B": B, "K": K, "R": R, "floor s": taken["floor"], "wanted <=": slower, "aim": aim, "wanted >=": faster}
        row |= {f"{name} x floor": taken[name] / taken["floor"] for name in ("ours", "loop", "ghost")}
        rows.append(line(shown, row | {"loop x ours": taken["loop"] / taken["ours"], "seconds": taken}))
    return rows


def company(word: str, rounds: int) -> list[Row]:
    """Twelve estimators together against one alone, and against twelve loops."""
    shown = begin(
        "company: twelve estimators in one pass against iwae alone, and against iwae's loop twelve times",
        {"B": "d", "K": "d", "R": "d", "one s": ".3f", "twelve s": ".3f", "12 loops s": ".3f"}
        | {"x one": ".2f", "wanted <=": "g", "loops x ours": ".2f", "wanted >=": "g"},
        rounds,
    )
    rows = []
    for (B, K, R), (slower, faster) in COMPANY.items():
        of = problem(PRESET, B)
        taken = medians(
            {
                "one": partial(measure, of, named("iwae", K), replicates=R),
                "twelve": partial(measure_all, of, [named(w, K) for w in TWELVE], replicates=R),
                "loop": partial(loop, of, K, R),
            },
            rounds,
        )
        loops = len(TWELVE) * taken["loop"]
        row = {"B": B, "K": K, "R": R, "one s": taken["one"], "twelve s": taken["twelve"], "12 loops s": loops}
        row |= {"x one": taken["twelve"] / taken["one"], "loops x ours": loops / taken["twelve"], "seconds": taken}
        rows.append(line(shown, row | {"wanted <=": slower, "wanted >=": faster}))
    return rows


def backpack(word: str, rounds: int) -> list[Row]:
    """A measurement against BackPACK, in the batch size that is best for it."""
    columns = {"B": "d", "K": "d", "R": "d", "ours s": ".4f", "BackPACK s": ".4f", "its batch": "d"}
    columns |= {"ours x BackPACK": ".2f", "wanted <=": "g", "moments differ by": ".1e"}
    shown = begin("backpack: iwae, moments without shards, projections and error bars", columns, rounds)
    if not baselines.HAS_BACKPACK:
        click.echo("left out: BackPACK is not installed (pip install backpack-for-pytorch)")
        return []
    of, estimator = problem(PRESET, 1), named("iwae", 1)
    its = extended(of)
    difference = disagreement(of, estimator, by_backpack(its, BACKPACK, BATCHES[0], noise_of_measure(of, 1, BACKPACK)))
    if not difference < AGREED:
        raise click.ClickException(f"BackPACK's second moments differ from a measurement's by {difference:.1e}")
    methods = {f"BackPACK {each}": partial(by_backpack, its, BACKPACK, each) for each in BATCHES}
    taken = medians(methods | {"ours": partial(measure, of, estimator, replicates=BACKPACK)}, rounds)
    each = min(BATCHES, key=lambda each: taken[f"BackPACK {each}"])
    best = taken[f"BackPACK {each}"]
    row = {"B": 1, "K": 1, "R": BACKPACK, "ours s": taken["ours"], "BackPACK s": best, "its batch": each}
    row |= {"ours x BackPACK": taken["ours"] / best, "wanted <=": 1, "moments differ by": difference}
    return [line(shown, row | {"seconds": taken})]


def memory(word: str, rounds: int) -> list[Row]:
    """The most that a measurement holds, by the number of replicates."""
    columns = {"B": "d", "K": "d", "R": "d", "tensors MiB": ".1f", "x first": ".2f", "process MiB": ".1f"}
    shown = begin(f"memory: {word}, above model and data", columns | {"wanted <=": "g"}, 1)
    rows: list[Row] = []
    for R in MEMORY:
        asked = pickle.dumps((problem(PRESET, 20), named(word, 1), R))
        command = [sys.executable, str(Path(__file__).with_name("memory.py"))]
        held = json.loads(subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=True).stdout)
        first = rows[0]["tensors MiB"] if rows else held["tensors MiB"]
        row = {"B": 20, "K": 1, "R": R, **held, "x first": held["tensors MiB"] / first, "wanted <=": MIB_WANTED}
        rows.append(line(shown, row))
    return rows


PARTS = {"speed": speed, "company": company, "backpack": backpack, "memory": memory}


def disagreement(of: baselines.Problem, estimator: Estimator, moments: baselines.Moments) -> float:
    """The largest difference of second moments from a measurement's on the same noise, relative to each parameter's largest."""
    measured = measure(of, estimator, replicates=BACKPACK)
    found, n = [], measured.replicates
    for (name, _), second in zip(of.model.named_parameters(), moments[1], strict=True):
        ours = torch.as_tensor((n - 1) * measured.variance[name] + n * measured.mean[name] ** 2)
        found.append(float((second - ours).abs().max() / ours.max()))
    return max(found)


def begin(title: str, columns: Columns, rounds: int) -> Columns:
    """Say what a table is about and where it was made, and print its headings."""
    about = describe()
    click.echo(f"\n{title}\n{about['date']}, {about['machine']}, torch {about['torch']}, one thread, rounds: {rounds}")
    click.echo("".join(heading.rjust(width(heading)) for heading in columns))
    return columns


def line(columns: Columns, row: Row) -> Row:
    """Print a row at once: the next may take minutes."""
    cells = ("-" if row[name] is None else format(row[name], of) for name, of in columns.items())
    click.echo("".join(cell.rjust(width(heading)) for heading, cell in zip(columns, cells, strict=True)))
    return row


def width(heading: str) -> int:
    """Of a column."""
    return max(len(heading) + 2, 6)


def parts(context: click.Context, option: click.Parameter, words: str) -> Sequence[str]:
    """The names of parts, separated by commas."""
    asked = [word.strip() for word in words.split(",")]
    for word in asked:
        if word not in PARTS:
            raise click.BadParameter(f"no part is called {word!r}; there are {', '.join(PARTS)}")
    return asked


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of which medians are taken.")
@click.option("--estimator", "word", default="iwae", show_default=True, help="Measured for speed and memory.")
@click.option("--only", default=",".join(PARTS), show_default=True, callback=parts, help="The parts to print.")
@click.option("--json", "kept", type=click.Path(path_type=Path), metavar="FILE", help="Also write the medians here.")
def main(rounds: int, word: str, only: Sequence[str], kept: Path | None) -> None:
    """Print the ratios that the measurement engine is judged by."""
    torch.set_num_threads(1)
    found = {name: PARTS[name](word, rounds) for name in only}
    if kept is not None:
        about = describe() | {"threads": 1, "rounds": rounds, "estimator": word, "preset": PRESET}
        kept.write_text(json.dumps({"about": about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

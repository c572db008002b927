"""Every ratio that the measurement engine is judged by: `python bench/timings/ratios.py` prints them in four tables.

The methods of a table are timed in the same process, interleaved, in CPU seconds on one thread (on a graphics processor, by the
clock, until it has done what it was given); medians over rounds, after one call of each that is not timed. A measurement is timed
whole: set-up, chunks, projections, moments. "at most" and "at least" are wanted of the ratio on their left; "aim" would be better.

speed     a measurement, and one of squared norms alone (ghost), against the *floor*, a plain forward and backward pass of the
          same rows in big batches, and against the *loop* that a careful user writes: one replicate at a time, `autograd.grad`
          and `_foreach` sums of gradients and of their squares.
company   twelve estimators measured together against one of them alone, and against twelve loops. The loop is IWAE's, twelve
          times: loops by the estimators' own surrogates are slower, so this favours the loop.
backpack  the one job that BackPACK does too: sums of gradients and of their squares where a replicate is a row. Beside them, a
          measurement gives sixteen shards of both, projections, and so error bars. BackPACK takes the batch size best for it.
memory    the most that a measurement holds above model and data, each in a process of its own.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from gradiometer.bench import measure
from gradiometer.bench.arguments import has
from gradiometer.bench.machine import describe
from gradiometer.bench.measurement import measure_all
from gradiometer.bench.timings.baselines import (
    HAS_BACKPACK,
    TWELVE,
    by_backpack,
    disagreement,
    extended,
    floor,
    loop,
    medians,
    named,
    noise_of_measure,
    problem,
)
from gradiometer.estimators import parse

PRESET = "burda-1"  # 784-200-200-50, tanh
Sizes = tuple[int, int, int]
"""B, K, R."""
# x floor wanted, x floor aimed at, x faster than the loop wanted
SPEED: dict[Sizes, tuple[float | None, float | None, float | None]] = {
    (1, 1, 1000): (1.3, 1.1, 45),
    (1, 1, 10000): (None, None, None),  # what a measurement costs once is little of it
    (1, 8, 1000): (1.7, 1.2, 8),
    (20, 1, 1000): (1.1, 0.9, 3.8),
    (20, 8, 1000): (1.2, 1.0, 1.25),
    (100, 1, 100): (1.0, 0.8, 1.6),
    (20, 64, 1000): (1.15, 1.0, 0.95),
}
# x one alone wanted, x fewer than twelve loops wanted
COMPANY: dict[Sizes, tuple[float | None, float]] = {
    (20, 8, 1000): (3, 4),
    (1, 64, 1000): (2.5, 8),
    (1, 8, 1000): (None, 10),
}
BACKPACK, BATCHES = (1000, 4000), (250, 500, 1000)  # replicates, and how many of them BackPACK takes at a time
AGREED = 1e-4  # relative difference of its moments and ours
MEMORY, MIB_WANTED = (400, 1000, 4000, 10000), 120  # replicates, at B = 20 and K = 1

Columns = Mapping[str, str]
"""Formats of a table's columns by heading."""
Row = dict[str, Any]


def speed(word: str, rounds: int, device: str) -> list[Row]:
    """A measurement against the floor and the loop."""
    shown = begin(
        f"speed: {word}",
        {"B": "d", "K": "d", "R": "d", "floor s": ".3f", "ours/floor": ".2f", "at most": "g", "aim": "g"}
        | {"loop/ours": ".2f", "at least": "g", "loop/floor": ".2f", "ghost/floor": ".2f"},
        rounds,
        device,
    )
    rows = []
    for (B, K, R), (slower, aim, faster) in SPEED.items():
        of, estimator = problem(PRESET, B, device), named(word, K)
        methods: dict[str, Callable[[], object]] = {
            "floor": partial(floor, of, K, R),
            "loop": partial(loop, of, K, R),
            "ours": partial(measure, of, estimator, replicates=R, device=device),
        }
        if B * K <= 32:  # of more rows, inner products cost more than gradients
            methods["ghost"] = partial(measure, of, estimator, replicates=R, engine="ghost", device=device)
        taken = medians(methods, rounds, device)
        row: Row = {"B": B, "K": K, "R": R, "at most": slower, "aim": aim, "at least": faster, "seconds": taken}
        row |= {"floor s": taken["floor"], "loop/ours": taken["loop"] / taken["ours"]}
        row |= {
            f"{name}/floor": taken[name] / taken["floor"] if name in taken else None
            for name in ("ours", "loop", "ghost")
        }
        rows.append(line(shown, row))
    return rows


def company(word: str, rounds: int, device: str) -> list[Row]:
    """Twelve estimators together against one alone, and against twelve loops."""
    shown = begin(
        "company: twelve estimators in one pass against iwae alone, and against iwae's loop twelve times",
        {"B": "d", "K": "d", "R": "d", "one s": ".3f", "twelve s": ".3f", "12 loops s": ".3f"}
        | {"twelve/one": ".2f", "at most": "g", "loops/twelve": ".2f", "at least": "g"},
        rounds,
        device,
    )
    rows = []
    for (B, K, R), (slower, faster) in COMPANY.items():
        of = problem(PRESET, B, device)
        taken = medians(
            {
                "one": partial(measure, of, named("iwae", K), replicates=R, device=device),
                "twelve": partial(measure_all, of, [named(w, K) for w in TWELVE], replicates=R, device=device),
                "loop": partial(loop, of, K, R),
            },
            rounds,
            device,
        )
        loops = len(TWELVE) * taken["loop"]
        row: Row = {"B": B, "K": K, "R": R, "one s": taken["one"], "twelve s": taken["twelve"], "12 loops s": loops}
        row |= {"twelve/one": taken["twelve"] / taken["one"], "loops/twelve": loops / taken["twelve"]}
        rows.append(line(shown, row | {"at most": slower, "at least": faster, "seconds": taken}))
    return rows


def backpack(word: str, rounds: int, device: str) -> list[Row]:
    """A measurement against BackPACK, in the batch size that is best for it."""
    columns = {"B": "d", "K": "d", "R": "d", "ours s": ".4f", "BackPACK s": ".4f", "its batch": "d"}
    columns |= {"ours/BackPACK": ".2f", "at most": "g", "moments off by": ".1e"}
    shown = begin("backpack: iwae, moments without shards, projections and error bars", columns, rounds, device)
    if not HAS_BACKPACK:
        click.echo("left out: BackPACK is not installed (pip install backpack-for-pytorch)")
        return []
    return [line(shown, against_backpack(R, rounds, device)) for R in BACKPACK]


def against_backpack(R: int, rounds: int, device: str) -> Row:
    """One line of the table, if the moments agree."""
    of, estimator = problem(PRESET, 1, device), named("iwae", 1)
    ours = partial(measure, of, estimator, replicates=R, device=device)
    its, measured = extended(of), ours()
    difference = disagreement(measured, by_backpack(its, R, BATCHES[0], noise_of_measure(of, 1, R)))
    if not difference < AGREED:
        raise click.ClickException(f"BackPACK's moments differ from a measurement's by {difference:.1e}")
    methods = {f"BackPACK {each}": partial(by_backpack, its, R, each) for each in BATCHES}
    taken = medians(methods | {"ours": ours}, rounds, device)
    each = min(BATCHES, key=lambda each: taken[f"BackPACK {each}"])
    best = taken[f"BackPACK {each}"]
    row: Row = {"B": 1, "K": 1, "R": R, "ours s": taken["ours"], "BackPACK s": best, "its batch": each}
    row |= {"ours/BackPACK": taken["ours"] / best, "at most": 1, "moments off by": difference}
    return row | {"seconds": taken}


def memory(word: str, rounds: int, device: str) -> list[Row]:
    """The most that a measurement holds, by the number of replicates."""
    columns = {"B": "d", "K": "d", "R": "d", "tensors MiB": ".1f", "x first": ".2f", "process MiB": ".1f"}
    shown = begin(f"memory: {word}, above model and data", columns | {"at most": "g"}, 1, device)
    rows: list[Row] = []
    for R in MEMORY:
        asked = pickle.dumps((problem(PRESET, 20), named(word, 1), R, device))
        command = [sys.executable, str(Path(__file__).with_name("memory.py"))]
        held = json.loads(subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=True).stdout)
        first = rows[0]["tensors MiB"] if rows else held["tensors MiB"]
        row: Row = {"B": 20, "K": 1, "R": R, **held, "x first": held["tensors MiB"] / first, "at most": MIB_WANTED}
        rows.append(line(shown, row))
    return rows


PARTS = {"speed": speed, "company": company, "backpack": backpack, "memory": memory}


def begin(title: str, columns: Columns, rounds: int, device: str) -> Columns:
    """Say what a table is about and where it was made, and print its headings."""
    about = describe()
    where = (
        about["machine"] if device == "cpu" else f"{device} ({about.get('gpu', 'unknown')}) beside {about['machine']}"
    )
    click.echo(f"\n{title}\n{about['date']}, {where}, torch {about['torch']}, one thread, rounds: {rounds}")
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


def known(context: click.Context, option: click.Parameter, word: str) -> str:
    """An estimator's name."""
    try:
        parse(word)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return word


def parts(context: click.Context, option: click.Parameter, words: str) -> Sequence[str]:
    """The names of parts, separated by commas."""
    asked = [word.strip() for word in words.split(",")]
    for word in asked:
        if word not in PARTS:
            raise click.BadParameter(f"no part is called {word!r}; there are {', '.join(PARTS)}")
    return asked


def there(context: click.Context, option: click.Parameter, device: str) -> str:
    """A device that this machine has."""
    if not has(device):
        raise click.BadParameter(f"this machine has no device {device!r}")
    return device


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of which medians are taken.")
@click.option(
    "--estimator", "word", default="iwae", show_default=True, callback=known, help="Measured for speed and memory."
)
@click.option("--only", default=",".join(PARTS), show_default=True, callback=parts, help="The parts to print.")
@click.option("--device", default="cpu", show_default=True, callback=there, help="cpu, cuda or cuda:N.")
@click.option("--json", "kept", type=click.Path(path_type=Path), metavar="FILE", help="Also write the medians here.")
def main(rounds: int, word: str, only: Sequence[str], device: str, kept: Path | None) -> None:
    """Print the ratios that the measurement engine is judged by."""
    torch.set_num_threads(1)
    found = {name: PARTS[name](word, rounds, device) for name in only}
    if kept is not None:
        about = describe() | {"device": device, "threads": 1, "rounds": rounds, "estimator": word, "preset": PRESET}
        kept.write_text(json.dumps({"about": about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

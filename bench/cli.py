"""The command line: ``gradiometer list | check | run | measure | compare | report | data``. Heavy imports wait for the command."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from gradiometer.bench.console import Commands, Echo, Progress, screen, summarize
from gradiometer.bench.data.registry import nearest
from gradiometer.bench.errors import RequestError

THINGS = ("estimators", "problems", "suites", "metrics", "datasets")
PLUGIN = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE.py",
    help="A file of estimators to know beside ours; repeatable.",
)


ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "rows", "ghost", "loop"]),
    help="How replicates are made; auto if not given.",
)
PRECISION = click.option(
    "--precision", metavar="5%", help="Go on until every interval of a variance is this narrow on either side."
)
BUDGET = click.option(
    "--budget",
    metavar="N",
    type=click.IntRange(min=4),
    help="The most replicates a precision may take; 100 times the replicates if not given.",
)
FOLDER = click.Path(path_type=Path)
MEMORY = click.option(
    "--memory", metavar="2GB", help="What a measurement may take beside model and data; 2GiB if not given."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gradiometer", prog_name="gradiometer")
def main() -> None:
    """Measure Monte-Carlo gradient estimators: bias, variance, signal-to-noise ratio, cost, and the models they train."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of ASCII alone still gets its table
    logger = logging.getLogger("gradiometer")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(Echo())


@main.command("list")
@click.argument("what", metavar=f"[{'|'.join(THINGS)}]", required=False)
@PLUGIN
def list_(what: str | None, plugins: tuple[str, ...]) -> None:
    """Show what there is to measure."""
    if what and what not in THINGS:
        raise RequestError(f"nothing to list is called {what!r}{nearest(what, THINGS)}")
    _load(plugins)
    for thing in [what] if what else THINGS:
        if not what:
            click.secho(thing, bold=True)
        lines = list(_listed(thing))
        width = max(24, *(len(name) + 2 for name, _ in lines))
        for name, summary in lines:
            click.echo(f"{'' if what else '  '}{name:<{width}}{summary}")


@main.command()
@click.argument("suite", metavar="SUITE|FILE.toml")
@click.option("--out", type=FOLDER, help="Results folder; results/local/SUITE if not given.")
@click.option("--only", metavar="PATTERN", help="Only estimators or problems that match, as in 'iwae*'.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the suite; repeatable.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or several as in cuda:0,1.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Cells side by side, on each device; changes no row.",
)
@ENGINE
@PRECISION
@BUDGET
@MEMORY
@PLUGIN
def run(
    suite: str,
    out: Path | None,
    only: str | None,
    settings: tuple[str, ...],
    device: str,
    jobs: int,
    engine: str | None,
    precision: str | None,
    budget: int | None,
    memory: str | None,
    plugins: tuple[str, ...],
) -> None:
    """Run a suite; what is finished is kept, what failed is tried again.

    Exit status: 0 done, 1 some cells failed (they are listed), 2 the request is wrong.
    """
    from gradiometer.bench import runner, store
    from gradiometer.bench import suite as suites

    _load(plugins)
    devices = _devices(device)
    given = {"engine": engine, "precision": precision, "budget": budget, "memory": memory}
    own = {key: f"--{key}" for key, value in given.items() if value is not None}
    settings += tuple(f"{key}={given[key]}" for key in own)
    name, content = suites.read(suite, settings, own)
    kind = devices[0].partition(":")[0] if len(devices) > 1 else devices[0]
    cells = content.cells(kind, only)
    if not cells:
        raise RequestError(f"no cell of {name} matches --only {only!r}")
    folder = out or Path("results/local") / name
    store.open_for_writing(folder)
    if all(cell.lacking for cell, _ in cells):
        raise RequestError(cells[0][0].lacking)
    click.echo(f"{content.title}: {len(cells)} cells into {folder}")
    keys = [cell.key for cell, _ in cells]
    if only is not None:  # what the folder has of the rest of the suite stays part of it
        known = {*keys, *store.indexed(folder)}
        keys = [cell.key for cell, _ in content.cells(kind) if cell.key in known]
    earlier = {*store.indexed(folder)} - {*keys}
    store.write_index(folder, name, content.title, content.description, keys)
    if earlier:
        click.echo(
            f"{folder} also has {len(earlier)} finished cells of other settings: kept there, and reported no more",
            err=True,
        )
    with Progress(len(cells)) as tell, runner.interruptible():
        try:
            outcomes = runner.run(cells, folder, jobs=jobs, devices=devices, plugins=plugins, report=tell)
        except KeyboardInterrupt:
            click.echo("\ninterrupted; finished cells are kept, and the same command goes on from here", err=True)
            raise SystemExit(130) from None
    raise SystemExit(summarize(outcomes, folder))


@main.command()
@click.argument("problem")
@click.option(
    "-e", "--estimator", "words", multiple=True, required=True, metavar="WORD", help="As in dreg:K=8; repeatable."
)
@click.option("-m", "--metric", "metrics", multiple=True, metavar="NAME", help="Columns of the table; repeatable.")
@click.option("--replicates", type=click.IntRange(min=4), help="1024 if not given; of each of several minibatches 64.")
@click.option(
    "--minibatches",
    metavar="N",
    type=click.IntRange(min=4),
    help="Tell the estimator's variance from that of so many minibatches.",
)
@click.option("--tensors", is_flag=True, help="Also of each parameter tensor: its variance, and its share.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=20, show_default=True, help="Data points in the minibatch."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--reference", metavar="WORD", default="", help="The estimator whose mean gradient `cosine` refers to.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@ENGINE
@PRECISION
@BUDGET
@MEMORY
@click.option(
    "--settle",
    metavar="N",
    type=click.IntRange(min=0),
    help="Steps that averages, baselines and control variates learn in before they are frozen; 300 if not given.",
)
@click.option("--out", type=FOLDER, help="Also keep the rows in this folder.")
@PLUGIN
def measure(
    problem: str,
    words: tuple[str, ...],
    metrics: tuple[str, ...],
    replicates: int | None,
    minibatches: int | None,
    tensors: bool,
    batch: int,
    seed: int,
    reference: str,
    device: str,
    engine: str | None,
    precision: str | None,
    budget: int | None,
    memory: str | None,
    settle: int | None,
    out: Path | None,
    plugins: tuple[str, ...],
) -> None:
    """Compare estimators on one problem and print a table, value ± standard error per parameter group."""
    from gradiometer.bench.metrics import COST, METRICS, OF_COORDINATES

    for name in metrics:
        if name not in METRICS:
            raise RequestError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        if name.startswith("test_"):
            raise RequestError(f"{name} is measured along training: run a suite with a [[training]] block")
    from gradiometer.bench.cells import Cell
    from gradiometer.bench.named import parse_problem
    from gradiometer.bench.suite import Memory, Precision, amount, replicates_of

    _load(plugins)
    replicates = replicates or replicates_of(minibatches)
    if budget is not None and precision is None:
        raise RequestError("--budget is what a precision may take: give --precision, too")
    if budget is not None and budget < replicates:
        raise RequestError(f"--budget {budget} is less than the {replicates} replicates that are measured at first")
    if engine == "ghost" and (lacking := [name for name in metrics if name in OF_COORDINATES]):
        raise RequestError(f"--engine ghost keeps squared norms, which do not tell {lacking[0]}")
    (device,) = _devices(device, several=False)
    parse_problem(problem)
    if minibatches:
        asked: dict[str, object] = {f"the metric {name}": name != "variance" for name in metrics}
        asked |= {"--tensors": tensors, "--precision": precision, "--reference": reference}
        _must_have_minibatches(problem, batch, asked)
    estimators = [_word(word) for word in words]
    shared: dict[str, Any] = {"problem": problem, "batch": batch, "seed": seed, "device": device}
    of: dict[str, Any] = {"replicates": replicates, "metrics": metrics, "budget": budget, "engine": engine or "auto"}
    of |= {"reference": _word(reference) if reference else "", "minibatches": minibatches or 0, "tensors": tensors}
    of |= {"precision": amount("--precision", Precision, precision)} if precision else {}
    of |= {"memory": amount("--memory", Memory, memory)} if memory else {}
    of |= {"settle": settle} if settle is not None else {}
    cells = [Cell("gradient", estimator=word, **of, **shared) for word in estimators]
    if set(metrics) & set(COST) - {"evaluations", "variance_evaluations"}:
        cells += [Cell("cost", estimator=w, **shared) for w in estimators]
    _measure(cells, metrics, out)


@main.command()
@click.argument("words", nargs=-1, metavar="[WORD|FILE.py ...]")
@click.option("--all", "everything", is_flag=True, help="The whole catalogue.")
@click.option("--level", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Estimators side by side.")
@click.option("--out", type=FOLDER, help="Also write each card there, as text and as JSON.")
@PLUGIN
def check(
    words: tuple[str, ...], everything: bool, level: str, jobs: int, out: Path | None, plugins: tuple[str, ...]
) -> None:
    """Hold estimators to what they claim, and print a card for each.

    Exit status: 0 all passed, 1 a claim is broken or could not be tested, 2 the request is wrong.
    """
    _load(plugins)
    if everything == bool(words):
        raise RequestError(
            "name the estimators to check, or a file of them, or give --all" + (", not both" * everything)
        )
    from gradiometer.bench.checks import session, subjects

    chosen = subjects.everything() if everything else subjects.named(words)
    files = [*plugins, *(word for word in words if word.endswith(".py"))]
    raise SystemExit(
        session.run(chosen, "full" if level == "full" else "quick", jobs=jobs, out=out, plugins=files, say=click.echo)
    )


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option("--metric", default="variance", show_default=True)
@click.option("--baseline", required=True, metavar="WORD", help="The estimator that the others are divided by.")
def compare(folders: tuple[Path, ...], metric: str, baseline: str) -> None:
    """Say how each estimator compares with a baseline, with 95 % intervals; paired wherever both saw the same noise.

    Of several folders the first that has the baseline gives it. An estimator measured in several has a line for each, and
    its later ones are compared with its first, too: before and after. What may not be compared is refused in a sentence:
    other parameters, data or minibatch size, a redefined metric, other code under one word, times of other machines.
    """
    import pandas as pd

    from gradiometer.bench import store, terminal
    from gradiometer.bench.compare import ratios
    from gradiometer.bench.metrics import METRICS

    if metric not in METRICS:
        raise RequestError(f"unknown metric {metric!r}{nearest(metric, METRICS)}")
    rows = pd.concat([store.load(folder).assign(folder=str(folder)) for folder in folders], ignore_index=True)
    key = ["cell", "group", "tensor", "randomness", "metric", "step"]
    rows = rows.drop_duplicates(key)  # of a cell that several folders hold
    measured = set(rows["estimator"])
    if baseline not in measured and (canonical := _canonical(baseline)) in measured:
        baseline = canonical
    found = ratios(rows, metric, baseline)
    screen().print(terminal.verdicts(found, checked=bool(rows["checked"].any())))
    ok = rows[rows["status"] == "ok"]
    has = {*ok.loc[ok["estimator"] == baseline, "problem"]}  # of an unbiased one's error, too, which is its variance
    if without := sorted({*ok.loc[ok["metric"] == metric, "problem"]} - has):
        click.echo(f"left out, since {baseline} was not measured there: {', '.join(without)}", err=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--format", "formats", default="html,md,csv,tex,png", show_default=True, help="Also svg and pdf.")
def report(folder: Path, formats: str) -> None:
    """Write the tables, figures and report.html of a results folder into it."""
    from gradiometer.bench import report as reports
    from gradiometer.bench import store

    rows = store.load(folder)
    if rows.empty:
        raise RequestError(f"{folder} holds no finished cells yet: run the suite first")
    asked = [word.strip() for word in formats.split(",") if word.strip()]
    written = reports.write(rows, folder, asked, store.machine(folder), store.index(folder))
    count = f"{len(written)} file{'s' if len(written) != 1 else ''}"
    click.echo(f"{count}; open {folder / 'report.html'}" if "html" in formats else count)


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME ...]")
def data(names: tuple[str, ...]) -> None:
    """Fetch data sets and verify their checksums; all of them if none is named."""
    from gradiometer.bench.data import NAMES, fetch

    for name in names:
        if name not in NAMES:
            raise RequestError(f"unknown data set {name!r}{nearest(name, NAMES)}")
    refused = []
    for name in names or NAMES:
        try:
            for located in fetch(name):
                click.echo(f"{name}: {located}")
        except RequestError as error:
            refused.append(str(error))
            click.echo(f"{name}: {error}", err=True)
    raise SystemExit(1 if refused else 0)


def _listed(thing: str) -> Iterable[tuple[str, str]]:
    if thing == "metrics":
        from gradiometer.bench.metrics import METRICS

        return [(m.name, f"{m.label} [{m.unit}]") for m in METRICS.values()]
    if thing == "datasets":
        from gradiometer.bench.data import describe

        return [(row["name"], f"{row['images']} of {row['shape']}; {row['summary']}") for row in describe()]
    if thing == "estimators":
        from gradiometer.estimators.registry import catalogue

        try:
            known = catalogue()
        except ValueError as error:
            raise RequestError(str(error)) from None
        return [(name, _first_line(cls)) for name, cls in known.items()]
    if thing == "suites":
        from gradiometer.bench import suite as suites

        return [(name, suites.read(name)[1].title) for name in suites.names()]
    from gradiometer.bench.named import REFERENCES, TOYS

    trained = [(f"{name}@{{init,early,late}}", ref.summary) for name, ref in REFERENCES.items()]
    return trained + [(name, _first_line(toy)) for name, toy in TOYS.items()]


def _first_line(thing: Any) -> str:
    return ((thing.__doc__ or "").strip().splitlines() or [""])[0]


def _must_have_minibatches(problem: str, batch: int, asked: dict[str, object]) -> None:
    from gradiometer.bench.decomposition import minibatch
    from gradiometer.bench.named import named_problem
    from gradiometer.bench.suite import out_of_place

    if said := out_of_place(asked, "--minibatches"):
        raise RequestError(said)
    minibatch(named_problem(problem, batch), seed=0, number=0)


def _measure(cells: list[Any], metrics: tuple[str, ...], out: Path | None) -> None:
    from gradiometer.bench import breakdown, machine, store, terminal
    from gradiometer.bench.cells import attempt_together
    from gradiometer.bench.efficiency import with_products
    from gradiometer.bench.metrics import BIAS
    from gradiometer.bench.runner import companies

    if out is not None:
        store.open_for_writing(out)
        known = store.indexed(out, "measure")  # of comparisons before
        store.write_index(out, "measure", "One comparison", "", dict.fromkeys([*known, *(cell.key for cell in cells)]))
    made: dict[Any, list[dict[str, Any]]] = {}

    def keep(cell: Any, of_cell: list[dict[str, Any]]) -> None:
        made[cell] = of_cell
        if out is not None:
            store.write_cell(out, cell.key, of_cell, machine.describe())

    for cell in cells:
        if (reason := cell.reason_to_skip()) is not None:
            keep(cell, cell.without_numbers("skipped", reason))
    for group in companies([(cell, 0.0) for cell in cells if cell not in made]):
        together = [cell for cell, _ in group]
        for cell, (of_cell, _, _) in zip(together, attempt_together(together), strict=True):
            keep(cell, of_cell)
    rows = [row for cell in cells for row in made[cell]]
    console = screen()
    if {*metrics} & {*BIAS} and not {row["metric"] for row in rows} & {*BIAS}:
        named = cells[0].reference
        why = (
            f"none of these ascends the objective of {named} in a group where that is declared unbiased"
            if named
            else (
                "none of these is declared biased and has a trusted estimator of its objective here; name one by --reference"
            )
        )
        click.echo(f"no bias: {why}", err=True)
    table = with_products(store.frame(rows))
    if cells[0].minibatches:
        console.print(breakdown.by_source(table))
    else:
        shown = {"metrics": metrics} if metrics else {}
        console.print(terminal.comparison(table, width=console.width, **shown))
    if cells[0].tensors:
        console.print(breakdown.by_tensor(table))
    raise SystemExit(1 if (table["status"] == "failed").any() else 0)


def _canonical(word: str) -> str:
    """The word as rows have it, where it can be read: ``nvi:levels=2`` is stored as ``nvi`` if that is its default."""
    try:
        return _word(word)
    except (RequestError, ImportError):  # a stranger's estimator, or no torch here
        return word


def _word(word: str) -> str:
    from gradiometer.estimators.registry import parse

    try:
        return str(parse(word))
    except ValueError as error:
        raise RequestError(str(error)) from None


def _load(plugins: Iterable[str]) -> None:
    from gradiometer.estimators.registry import load_plugin

    for plugin in plugins:
        try:
            load_plugin(plugin)
        except ValueError as error:
            raise RequestError(str(error)) from None


def _devices(word: str, several: bool = True) -> list[str]:
    """The devices that a word like ``cuda:0,1`` names, which exist."""
    from gradiometer.bench.arguments import has

    first, *others = word.split(",")
    kind = first.partition(":")[0]
    devices = [first, *(other if ":" in other or not other.isdigit() else f"{kind}:{other}" for other in others)]
    if len(devices) > 1 and not several:
        raise RequestError(f"one comparison runs on one device, not on {word!r}: give several to `gradiometer run`")
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise RequestError(f"the devices {word!r} are not alike, so that rows would depend on which one a cell gets")
    if lacking := [device for device in devices if not has(device)]:
        raise RequestError(f"this machine has no device {lacking[0]!r}; --device cpu works everywhere")
    return devices


if __name__ == "__main__":
    main()

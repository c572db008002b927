"""Tables of estimators x metrics: which cells there are, which of them win, and what has to be said beneath."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pandas as pd

from gradiometer.bench import figures, selection
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.typeset import FRONT, Cell, Column, Line, Table
from gradiometer.bench.uncertain import shared_exponent

__all__ = ["Cell", "Column", "Line", "Table", "heading", "table_of", "tables", "unit_text"]

GRADIENT = ("variance", "snr", "directional_snr", "variance_seconds", "variance_evaluations")
VALUES = ("objective", "elbo", "iwelbo", "ess", "active_units")
COST = ("seconds_per_gradient", "peak_memory")
TRAINING = ("test_elbo", "test_iwelbo")
PARTS = {"estimator": "of the estimator", "minibatch": "of the minibatch", "both": "of both"}
BESIDE = ("bias", "mse", "rank")  # columns that stand beside a variance
_HEADINGS = {
    "variance": "variance",
    "bias": "bias",
    "mse": "MSE",
    "rank": "rank",
    "snr": "SNR",
    "snr_corrected": "SNR, floor removed",
    "directional_snr": "directional SNR",
    "cosine": "cosine",
    "elbo": "ELBO",
    "ess": "ESS",
    "variance_seconds": "variance × time",
    "variance_evaluations": "variance × evaluations",
}
RANKED = "Rank: the places that the data leave open, at 95 % for all pairs together, by "
WITHIN = "Variances and errors compete within one objective, since another has another gradient. Here these do: "
SEPARATED = (
    "Bold: alone in the first place of its column (by variances and errors, of its objective); where the data leave that open, "
    "nothing is bold."
)
UNRANKED = "Objectives of different estimators are different bounds, so their values are not ranked."
BARE = "A directional SNR without ± has no interval: the direction of its mean gradient is hardly known."
NONE_ACROSS = (
    "A directional SNR of –: a gradient had nothing across the direction (it was zero, say), and the ratio has no mean."
)
NEGATIVE = "A mean squared error is estimated without bias, and below zero where it is lost in its noise."
CLAIM = "that it is the gradient it claims to be rests on its own tests."
UNMET = "Less precise than asked, when the budget was spent: "
NONE_CHECKED = f"No estimator here has passed a check by the harness: of each, {CLAIM}"
SIGNS = {
    "‡": "at the floor: the interval reaches what a gradient of mean zero would show.",
    "†": f"has not passed a check by the harness: {CLAIM}",
    "§": "declared biased: a low variance is precision about a wrong value. It competes by its mean squared error alone.",
    "∝": "declared rescaled: its gradient and its variance have a factor of their own. It competes by ratios of signal to noise.",
    "ℓ": "learns beside the estimate: of one memory, frozen after some steps at these parameters (column settled of the rows); "
    "another seed's, or one of more steps, may be far from it, which no interval holds.",
    "¶": "heavy tails: the interval may be too short.",
    "★": "on the Pareto front of cost and error: nothing of its objective is better at both, and surely at one.",
}
UNKNOWN, RESCALED = "bias unknown", "own scale"
Places = dict[str, tuple[int, int]]
ADD_UP = "Of one gradient on a minibatch drawn anew: the two parts add up to both (law of total variance)."


def tables(rows: pd.DataFrame) -> list[Table]:
    """Every table of a report: per problem the values of the bounds, each group's gradient, its cost, and training.

    Args:
        rows: as the store yields them.

    Returns:
        Tables in reading order, those without any cell left out.
    """
    tidied = selection.tidy(rows)
    found = []
    for problem in selection.problem_order(tidied["problem"]):
        of_problem = tidied[tidied["problem"] == problem]
        measured = selection.measured(of_problem)
        for group in selection.group_order(measured["group"]):
            found.append(
                table_of(measured, GRADIENT, problem, group, f"gradient of the {selection.group_words(group)}")
            )
        found.append(table_of(measured, VALUES + COST, problem, "", "objective and cost"))
        found.append(table_of(figures.final(selection.training(of_problem)), TRAINING, problem, "", "after training"))
        found += _of_parts(of_problem, problem)
        missing = tuple(
            selection.unmeasured(of_problem)[["label", "status", "reason"]].itertuples(index=False, name=None)
        )
        if missing:
            found.append(Table(f"{problem}-unmeasured", f"{problem}: not measured", problem, "", (), (), (), missing))
    return _beneath([table for table in found if table is not None])


def heading(metric: str) -> str:
    """How a column is headed: short where `METRICS` has a whole sentence."""
    return _HEADINGS.get(metric) or (METRICS[metric].label if metric in METRICS else metric.replace("_", " "))


def objective_words(ascends: str) -> str:
    """How an objective is called."""
    name, _, settings = ascends.partition(":")
    return {"elbo": "ELBO", "iwelbo": f"{settings.removeprefix('K=')}-sample bound"}.get(name, name)


def unit_text(unit: str) -> str:
    """A unit as text: ``(nats / parameter)^2`` becomes ``(nats/parameter)²``, a pure number nothing."""
    return "" if unit == "1" else unit.replace(" / ", "/").replace("^2", "²")


def _beneath(found: list[Table]) -> list[Table]:
    """Hang what was not measured beneath its problem's first table."""
    kept: list[Table] = []
    for table in found:
        first = next((i for i, other in enumerate(kept) if other.problem == table.problem), None)
        if table.unmeasured and first is not None:
            kept[first] = replace(kept[first], unmeasured=table.unmeasured)
        else:
            kept.append(table)
    return kept


def table_of(rows: pd.DataFrame, metrics: tuple[str, ...], problem: str, group: str, title: str) -> Table | None:
    """A table of some metrics of one group (measured rows of one problem), or None where there are none."""
    of_group = rows[rows["group"] == group]
    wanted = of_group[of_group["metric"].isin(metrics)]
    if wanted.empty:
        return None
    shown, errors = _shown(of_group, metrics), selection.squared_errors(of_group)
    places = figures.ranks_by_objective(errors) if {"variance", "rank"} <= set(shown) and len(errors) > 1 else {}
    found = []
    for metric in shown:
        of_metric = of_group[of_group["metric"] == metric]
        if metric == "rank":
            found += [_ranks(places)] if places else []
        elif metric == "mse" and "rank" in shown:
            found.append(_mean_squared(of_group, errors, places))
        elif len(of_metric):
            ranked = None if metric not in ("variance", "bias") else places if "mse" not in shown else {}
            found.append(_column(metric, of_metric, ranked))
            if metric == "snr":
                found[-1] = _with_floor(*found[-1], of_group[of_group["metric"] == "snr_floor"])
            elif metric in FRONT:
                found[-1] = _with_front(*found[-1], rows[rows["group"].isin([group, ""])], FRONT[metric])
    return _table((problem, group, title), wanted, found)


def _of_parts(of_problem: pd.DataFrame, problem: str) -> Iterator[Table]:
    """Where the variance sits: in which tensors, and how much of it is the minibatch's, where rows say so."""
    shares = figures.shares(of_problem)
    for group in selection.group_order(shares["group"]):
        of = shares[shares["group"] == group]
        names = list(dict.fromkeys(of["tensor"]))
        first = {name.partition(".")[0] for name in names}
        prefix = first.pop() if len(first) == 1 < len(names) else ""
        found = [_column(f"share of {name}", of[of["tensor"] == name], {}) for name in names]
        found = [
            (replace(c, heading=n.removeprefix(f"{prefix}.")), by) for n, (c, by) in zip(names, found, strict=True)
        ]
        yield _table((problem, group, f"where the variance of the {selection.group_words(group)} sits"), of, found)
    parts = selection.parts(of_problem)
    parts = parts[parts["tensor"] == ""]
    for group in selection.group_order(parts["group"]):
        of = parts[parts["group"] == group]
        found = [
            _column(f"variance {words}", of[of["randomness"] == part], {})
            for part, words in PARTS.items()
            if (of["randomness"] == part).any()
        ]
        found = [(replace(c, heading=c.metric.removeprefix("variance ")), by) for c, by in found]
        table = _table((problem, group, f"variance of the {selection.group_words(group)} by its source"), of, found)
        yield replace(table, notes=(ADD_UP, *table.notes))


def _table(about: tuple[str, str, str], rows: pd.DataFrame, found: Sequence[tuple[Column, dict[str, Cell]]]) -> Table:
    """A table of columns, with a line for each label of the rows."""
    problem, group, title = about
    lines = tuple(
        Line(
            word.label,
            None if math.isnan(word.K) else int(word.K),
            word.evaluations,
            word.checked,
            tuple(cells.get(word.label) for _, cells in found),
        )
        for word in selection.records(selection.in_order(rows).drop_duplicates("label"))
    )
    columns = tuple(column for column, _ in found)
    table = Table(f"{problem}-{title.replace(' ', '-')}", f"{problem}: {title}", problem, group, columns, lines, ())
    return replace(table, notes=tuple(_notes(table, rows[rows["stderr"] > 0])))


def _shown(of_group: pd.DataFrame, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The columns: beside a variance the rank, and where a group may be biased its bias and mean squared error."""
    if "variance" not in metrics:
        return metrics
    biased = bool(of_group["biased"].any()) or of_group["metric"].isin(["bias", "mse"]).any()
    beside = ("variance", *(BESIDE if biased else BESIDE[-1:]))
    others = [metric for metric in metrics if metric not in beside]
    at = sum(metric not in beside for metric in metrics[: metrics.index("variance")])
    return (*others[:at], *beside, *others[at:])


def _column(metric: str, rows: pd.DataFrame, places: Places | None) -> tuple[Column, dict[str, Cell]]:
    """A column and its cells by label; bold is who is alone in the first place, by this column if no places are given."""
    known = rows[rows["value"].notna()]
    cells = {
        row.label: Cell(
            float(row.value),
            float(row.stderr),
            float(row.low),
            float(row.high),
            signs=("§" * row.biased + "∝" * row.rescaled + "ℓ" * (row.settled > 0) if metric in GRADIENT else "")
            + "¶" * (row.tails == "heavy" and metric in (*GRADIENT, "mse")),
        )
        for row in selection.records(known)
    }
    better = METRICS[metric].better if metric in METRICS and metric not in VALUES else ""
    if places is None:  # a biased estimator wins nothing by its noise, nor does one of another scale
        scaled = known["rescaled"] & (better == "lower")
        able = known[~known["biased"] & ~scaled]
        places = (
            figures.ranks_by_objective(able) if better == "lower" else figures.ranks(able, "higher") if better else {}
        )
    rivals = known[known["label"].isin(list(places))]
    if better != "higher":  # within one objective
        rivals = rivals[rivals.groupby("ascends")["label"].transform("size") > 1]
    if len(rivals) > 1:
        first = {label for label in rivals["label"] if places[label] == (1, 1)}
        cells |= {label: replace(cells[label], bold=True) for label in first}
    unit = unit_text(str(rows["unit"].iloc[0]))
    exponent = shared_exponent((cell.value, cell.stderr) for cell in cells.values())
    return Column(metric, heading(metric), unit, exponent, better), cells


def _mean_squared(of_group: pd.DataFrame, errors: pd.DataFrame, places: Places) -> tuple[Column, dict[str, Cell]]:
    """Mean squared errors, which are variances where nothing is biased; unknown where a bias was not measured."""
    scaled = dict.fromkeys(of_group.loc[of_group["rescaled"], "label"], RESCALED)
    unknown = set(of_group.loc[of_group["biased"] & (of_group["metric"] == "variance"), "label"]) - set(errors["label"])
    column, cells = _column("mse", errors, places) if len(errors) else (Column("mse", heading("mse"), ""), {})
    words = dict.fromkeys(unknown, UNKNOWN) | scaled
    return column, cells | {label: Cell(math.nan, words=said) for label, said in words.items()}


def _ranks(places: Places) -> tuple[Column, dict[str, Cell]]:
    cells = {
        label: Cell(first, math.nan, first, last, words=str(first) if first == last else f"{first}–{last}")
        for label, (first, last) in places.items()
    }
    return Column("rank", heading("rank"), ""), cells


def _with_floor(column: Column, cells: dict[str, Cell], of_floor: pd.DataFrame) -> tuple[Column, dict[str, Cell]]:
    """Say the floor in the heading where it is one, and mark cells whose interval reaches it."""
    floors = of_floor.set_index("label")["value"].dropna()
    if floors.nunique() == 1:
        column = replace(column, heading=f"{column.heading}, floor {floors.iloc[0]:.2g}")
    low = {label: cell for label, cell in cells.items() if label in floors and cell.low <= floors[label]}
    return column, cells | {label: replace(cell, signs=f"‡{cell.signs}", bold=False) for label, cell in low.items()}


def _with_front(
    column: Column, cells: dict[str, Cell], measured: pd.DataFrame, budget: str
) -> tuple[Column, dict[str, Cell]]:
    """Mark who lies on the Pareto front of this cost."""
    plane = figures.on_front(measured, budget)
    front = [label for label in plane.loc[plane["front"], "label"] if label in cells and len(plane) > 1]
    return column, cells | {label: replace(cells[label], signs=f"{cells[label].signs}★") for label in front}


def _errors(uncertain: pd.DataFrame) -> str:
    """What the errors of a table are over."""
    runs = set(uncertain["kind"]) == {"training"}
    counts = sorted(set(uncertain.loc[uncertain["kind"] != "cost", "replicates"].dropna().astype(int)))
    over = " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    minibatches = uncertain["minibatches"].max()
    each = f" of each of {minibatches:g} minibatches" if minibatches > 0 else ""
    return "± one standard error" + (f", from {over} {'seeds' if runs else 'replicates'}{each}." if counts else ".")


def _notes(table: Table, uncertain: pd.DataFrame) -> Iterable[str]:
    """What has to be said beneath a table."""
    yield _errors(uncertain)
    if unmet := ", ".join(dict.fromkeys(uncertain.loc[uncertain["precision_met"].eq(False), "label"])):
        yield f"{UNMET}{unmet}."
    shown = {column.metric for column in table.columns}
    if "rank" in shown:
        yield f"{RANKED}{'mean squared error' if 'mse' in shown else 'variance'}."
        competing = uncertain[uncertain["ascends"] != ""].groupby("ascends", sort=False)["label"].unique()
        if len(competing) > 1:
            said = (f"{', '.join(names)} ({objective_words(str(of))})" for of, names in competing.items())
            yield f"{WITHIN}{'; '.join(said)}."
    if any(column.better for column in table.columns):
        yield SEPARATED
    if "objective" in shown:
        yield UNRANKED
    of = {column.metric: [line.cells[i] for line in table.lines] for i, column in enumerate(table.columns)}
    if any(cell and math.isnan(cell.stderr) for cell in of.get("directional_snr", ())):
        yield BARE
    if not all(of.get("directional_snr", ())):
        yield NONE_ACROSS
    if any(cell and cell.value < 0 for cell in of.get("mse", ())):
        yield NEGATIVE
    signs = {sign for line in table.lines for cell in line.cells if cell for sign in cell.signs}
    yield from (f"{sign} {SIGNS[sign]}" for sign in SIGNS if sign in signs or (sign == "†" and table.marks_unchecked))
    if not any(line.checked for line in table.lines):
        yield NONE_CHECKED

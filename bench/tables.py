"""Tables of estimators x metrics: which cells there are, which of them win, and what has to be said beneath."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pandas as pd

from gradiometer.bench import selection
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.uncertain import Printed, exponent_of, printed, shared_exponent

__all__ = ["Cell", "Column", "Line", "Table", "heading", "table_of", "tables", "unit_text"]

GRADIENT = ("variance", "snr", "directional_snr", "variance_seconds", "variance_evaluations")
VALUES = ("objective", "elbo", "iwelbo", "ess", "active_units")
COST = ("seconds_per_gradient", "peak_memory")
TRAINING = ("test_elbo", "test_iwelbo")
_HEADINGS = {
    "variance": "variance",
    "snr": "SNR",
    "snr_corrected": "SNR, floor removed",
    "directional_snr": "directional SNR",
    "cosine": "cosine",
    "elbo": "ELBO",
    "ess": "ESS",
    "variance_seconds": "variance × time",
    "variance_evaluations": "variance × evaluations",
}
SEPARATED = (
    "Bold: best of its column, with a 95 % interval that overlaps no other; where intervals overlap, nothing is bold."
)
UNRANKED = "Objectives of different estimators are different bounds, so their values are not ranked."
CLAIM = "that it is the gradient it claims to be rests on its own tests."
UNMET = "Less precise than asked, when the budget was spent: "
AT_FLOOR = "at the floor: the interval reaches what a gradient of mean zero would show."


@dataclass(frozen=True)
class Column:
    """A metric of a table: its heading, its unit and the power of ten it is printed in (None: each cell its own)."""

    metric: str
    heading: str
    unit: str
    exponent: int | None = 0
    better: str = ""


@dataclass(frozen=True)
class Cell:
    """A value with its error and interval, and whether it wins its column or lies at its floor."""

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    bold: bool = False
    at_floor: bool = False

    def printed(self, column: Column) -> Printed:
        """The value as its column prints it; a shared power of ten stands in the heading instead."""
        if column.exponent is None:
            return printed(self.value, self.stderr, exponent_of(self.value, self.stderr))
        return replace(printed(self.value, self.stderr, column.exponent), exponent=0)


@dataclass(frozen=True)
class Line:
    """One estimator: its word, K, evaluations per datum and gradient, and a cell (or None) per column."""

    label: str
    K: int | None
    evaluations: float
    checked: bool
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """What a Markdown, LaTeX, CSV, HTML or terminal table shows, before any of them writes it."""

    name: str
    title: str
    problem: str
    group: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    unmeasured: tuple[tuple[str, str, str], ...] = ()  # (estimator, status, reason)

    @property
    def marks_unchecked(self) -> bool:
        """Whether unchecked lines carry a mark; where all are unchecked one note says so instead."""
        return any(line.checked for line in self.lines) and not all(line.checked for line in self.lines)


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
        found.append(table_of(_final(selection.training(of_problem)), TRAINING, problem, "", "after training"))
        missing = tuple(
            selection.unmeasured(of_problem)[["label", "status", "reason"]].itertuples(index=False, name=None)
        )
        if missing:
            found.append(Table(f"{problem}-unmeasured", f"{problem}: not measured", problem, "", (), (), (), missing))
    return _beneath([table for table in found if table is not None])


def heading(metric: str) -> str:
    """How a column is headed: short where `METRICS` has a whole sentence."""
    return _HEADINGS.get(metric) or (METRICS[metric].label if metric in METRICS else metric.replace("_", " "))


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
    wanted = rows[(rows["group"] == group) & rows["metric"].isin(metrics)]
    if wanted.empty:
        return None
    floors = rows[(rows["group"] == group) & (rows["metric"] == "snr_floor")].set_index("label")["value"]
    columns, cells = [], []
    for metric in metrics:
        if (wanted["metric"] == metric).any():
            of_metric = wanted[wanted["metric"] == metric].set_index("label")
            column, by_label = _column(metric, of_metric, ranked=metric not in VALUES)
            if metric == "snr":
                column, by_label = _with_floor(column, by_label, floors)
            columns.append(column)
            cells.append(by_label)
    words = selection.in_order(wanted).drop_duplicates("label")
    lines = tuple(
        Line(
            word.label,
            None if math.isnan(word.K) else int(word.K),
            word.evaluations,
            word.checked,
            tuple(by.get(word.label) for by in cells),
        )
        for word in selection.records(words)
    )
    table = Table(
        f"{problem}-{title.replace(' ', '-')}", f"{problem}: {title}", problem, group, tuple(columns), lines, ()
    )
    return replace(table, notes=tuple(_notes(table, wanted[wanted["stderr"] > 0])))


def _column(metric: str, of_metric: pd.DataFrame, *, ranked: bool) -> tuple[Column, dict[str, Cell]]:
    """A column and its cells by label; the winner is bold if its interval overlaps no other."""
    rows = selection.records(of_metric[of_metric["value"].notna()])
    cells = {row.Index: Cell(float(row.value), float(row.stderr), float(row.low), float(row.high)) for row in rows}
    better = METRICS[metric].better if metric in METRICS and ranked else ""
    unit = unit_text(str(of_metric["unit"].iloc[0]))
    exponent = shared_exponent((cell.value, cell.stderr) for cell in cells.values())
    if (best := _winner(cells, better)) is not None:
        cells[best] = replace(cells[best], bold=True)
    return Column(metric, heading(metric), unit, exponent, better), cells


def _winner(cells: dict[str, Cell], better: str) -> str | None:
    """The label whose interval lies wholly on the better side of every other, if there is one and something to beat."""
    known = {label: cell for label, cell in cells.items() if math.isfinite(cell.value)}
    if better not in ("lower", "higher") or len(known) < 2:
        return None
    sign = 1 if better == "lower" else -1
    best = min(known, key=lambda label: sign * known[label].value)
    worst_of_best = known[best].high if better == "lower" else known[best].low
    others = [cell.low if better == "lower" else cell.high for label, cell in known.items() if label != best]
    return best if all(sign * worst_of_best < sign * other for other in others) else None


def _with_floor(column: Column, cells: dict[str, Cell], floors: pd.Series) -> tuple[Column, dict[str, Cell]]:
    """Say the floor in the heading where it is one, and mark cells whose interval reaches it."""
    known = floors.dropna()
    if known.nunique() == 1:
        column = replace(column, heading=f"{column.heading}, floor {known.iloc[0]:.2g}")
    marked = {
        label: replace(cell, at_floor=True, bold=False) if label in known and cell.low <= known[label] else cell
        for label, cell in cells.items()
    }
    return column, marked


def _final(training: pd.DataFrame) -> pd.DataFrame:
    """The last step of every run as one row per estimator: mean over seeds, its standard error and t interval."""
    from gradiometer.bench.statistics import student

    last = training[training["step"] == training.groupby(["label", "seed", "metric"])["step"].transform("max")]
    found = []
    for _, runs in last.groupby(["label", "metric"], sort=False):
        n = len(runs)
        stderr = runs["value"].std() / math.sqrt(n) if n > 1 else math.nan
        half = student(n - 1) * stderr if n > 1 else math.nan
        mean = runs["value"].mean()
        found.append(runs.iloc[[0]].assign(value=mean, stderr=stderr, low=mean - half, high=mean + half, replicates=n))
    return pd.concat(found) if found else last


def _errors(uncertain: pd.DataFrame) -> str:
    """What the errors of a table are over."""
    runs = set(uncertain["kind"]) == {"training"}
    counts = sorted(set(uncertain.loc[uncertain["kind"] != "cost", "replicates"].dropna().astype(int)))
    over = " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    return "± one standard error" + (f", from {over} {'seeds' if runs else 'replicates'}." if counts else ".")


def _notes(table: Table, uncertain: pd.DataFrame) -> Iterable[str]:
    """What has to be said beneath a table."""
    yield _errors(uncertain)
    if unmet := ", ".join(dict.fromkeys(uncertain.loc[uncertain["precision_met"].eq(False), "label"])):
        yield f"{UNMET}{unmet}."
    if any(column.better for column in table.columns):
        yield SEPARATED
    if any(column.metric == "objective" for column in table.columns):
        yield UNRANKED
    if any(cell and cell.at_floor for line in table.lines for cell in line.cells):
        yield f"‡ {AT_FLOOR}"
    if table.marks_unchecked:
        yield f"† has not passed a check by the harness: {CLAIM}"
    elif not any(line.checked for line in table.lines):
        yield f"No estimator here has passed a check by the harness: of each, {CLAIM}"

"""Comparisons as tables for a terminal: groups side by side, or beneath each other where that is too wide; verdicts in words."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradiometer.bench import selection
from gradiometer.bench.compare import Ratio
from gradiometer.bench.errors import RequestError
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.tables import BESIDE, NONE_CHECKED, SIGNS, UNMET, table_of
from gradiometer.bench.typeset import Cell, Column, Line, Table, counts, unit_of

__all__ = ["SHOWN", "comparison", "verdicts"]

SHOWN = ("variance", "snr", "objective", "directional_snr", "seconds_per_gradient")
_UNBOUNDED = Console(width=10_000)


@dataclass(frozen=True)
class _Strip:
    """A metric of a group, down all estimators."""

    group: str
    column: Column
    cells: Mapping[str, Cell | None]


def comparison(rows: pd.DataFrame, *, metrics: Sequence[str] = SHOWN, width: int = 120) -> RichTable:
    """What `gradiometer measure` prints: value ± standard error of each metric, for every group and estimator.

    Args:
        rows: of one problem, as the store yields them or as a measurement's `rows()` leaves them.
        metrics: the columns, where measured; the last are left out if not all fit.
        width: columns of the terminal.

    Raises:
        RequestError: no metric is named.

    >>> row = {"problem": "toy", "estimator": "stl", "K": 1, "evaluations": 2.0, "group": "inference"}
    >>> row |= {"metric": "variance", "value": 0.1234, "stderr": 0.0012, "low": 0.121, "high": 0.126, "unit": "1"}
    >>> comparison(pd.DataFrame([row])).row_count
    1
    """
    tidied = selection.tidy(rows)
    measured = selection.measured(tidied)
    problem = ", ".join(selection.problem_order(tidied["problem"]))
    groups = ["", *selection.group_order(measured["group"])]
    found = [t for g in groups if (t := table_of(measured, tuple(metrics), problem, g, g)) is not None]
    lines = {line.label: line for table in reversed(found) for line in table.lines}
    strips = [
        _Strip(table.group, column, {line.label: line.cells[number] for line in table.lines})
        for table in found
        for number, column in enumerate(table.columns)
    ]
    for shown in range(len(metrics), 0, -1):
        wanted = {*metrics[:shown], *(BESIDE if "variance" in metrics[:shown] else ())}
        kept = [strip for strip in strips if strip.column.metric in wanted]
        for last, made in enumerate((_side_by_side(lines, kept), _beneath_each_other(lines, kept))):
            if (shown > 1 or not last) and made.__rich_measure__(_UNBOUNDED, _UNBOUNDED.options).maximum > width:
                continue
            made.title = Text(problem)
            left_out = dict.fromkeys(strip.column.heading for strip in strips if strip not in kept)
            made.caption = Text("\n".join(_notes(lines, found, left_out, selection.unmeasured(tidied))))
            return made
    raise RequestError("no metric to show: name at least one")


def verdicts(found: Sequence[Ratio], *, checked: bool = True) -> RichTable:
    """What `gradiometer compare` prints: a verdict on every estimator, a section per problem and group.

    Args:
        found: ratios of one metric.
        checked: whether any estimator has passed a check; if none has, that is said once.
    """
    made = _empty()
    made.add_column("", ratio=1)
    section = ("", "")
    for row in sorted(found, key=lambda r: [f.problem for f in found].index(r.problem)):
        if (row.problem, row.group) != section:
            section = (row.problem, row.group)
            made.add_section()
            made.add_row(Text(f"{row.problem} {row.group}".strip(), style="bold italic"))
        alike = [r for r in found if (r.problem, r.estimator) == (row.problem, row.estimator)]
        name = row.estimator + (f" in {row.folder}" if row.folder else "")
        for setting in ("B", "seed"):
            if len({getattr(r, setting) for r in alike}) > 1:
                name += f" [{setting} {getattr(row, setting)}]"
        made.add_row(Text(_folded(name)), str(row.K), f"{row.evaluations:g}", Text(row.verdict))
    made.title = Text(METRICS[found[0].metric].label)
    said = [
        "Brackets hold 95 % intervals, paired over the draws that both saw, but where noise is said to be independent: of "
        "another seed, number of replicates or K.",
        "Estimators may ascend different objectives: the ratio says more between two that ascend the same.",
    ]
    made.caption = Text("\n".join(said if checked else [*said, "No estimator here has been checked by the harness."]))
    return made


def _folded(name: str) -> str:
    """A long name on several lines, broken after commas and before words."""
    lines = [""]
    for piece in re.split(r"(?<=,)|(?= in | \[)", name):
        lines = [*lines[:-1], lines[-1] + piece] if len(lines[-1] + piece) <= 24 else [*lines, f"  {piece.strip()}"]
    return "\n".join(line for line in lines if line)


def _side_by_side(lines: Mapping[str, Line], strips: Sequence[_Strip]) -> RichTable:
    """A line per estimator; the columns of each group carry its name."""
    made = _empty()
    for strip in strips:
        made.add_column(_head(strip.column, strip.group), no_wrap=True)
    texts = [_aligned(strip.column, [strip.cells.get(label) for label in lines]) for strip in strips]
    for number, line in enumerate(lines.values()):
        made.add_row(_word(line, lines), *counts(line), *(column[number] for column in texts))
    return made


def _beneath_each_other(lines: Mapping[str, Line], strips: Sequence[_Strip]) -> RichTable:
    """A section per group and a line per estimator; a group's metrics share their columns with the other groups'."""
    made = _empty()
    columns: dict[str, Column] = {}
    many = Counter(strip.group for strip in strips)
    # a column printed in several powers of ten leaves them to its cells
    for strip in sorted(strips, key=lambda s: -many[s.group] if s.group else -len(strips)):
        column = columns.setdefault(strip.column.metric, strip.column)
        if column.exponent != strip.column.exponent:
            column = replace(column, exponent=None)
        if column.heading != strip.column.heading:  # floors differ
            column = replace(column, heading=column.heading.partition(",")[0])
        columns[column.metric] = column
    for column in columns.values():
        made.add_column(_head(column, ""))
    for group in dict.fromkeys(strip.group for strip in strips if strip.group):
        of_group = {strip.column.metric: strip.cells for strip in strips if strip.group in ("", group)}
        texts = [
            _aligned(column, [of_group.get(metric, {}).get(label) for label in lines])
            for metric, column in columns.items()
        ]
        made.add_section()
        made.add_row(Text(group, style="bold italic"))
        has = {label for strip in strips if strip.group == group for label, cell in strip.cells.items() if cell}
        for number, line in enumerate(lines.values()):
            if line.label not in has:
                continue
            made.add_row(_word(line, lines), *counts(line), *(column[number] for column in texts))
    return made


def _empty() -> RichTable:
    made = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), title_style="bold", caption_style="", caption_justify="left")
    made.add_column("estimator", no_wrap=True)
    made.add_column("K", justify="right", no_wrap=True)
    made.add_column("evalu-\nations", justify="right", no_wrap=True)
    return made


def _head(column: Column, group: str) -> Text:
    words = column.heading.replace(", floor", "\nfloor").replace("signal-to-noise ratio", "SNR")
    return Text("\n".join(part for part in (group, words, unit_of(column)) if part))


def _word(line: Line, lines: Mapping[str, Line]) -> Text:
    marked = not line.checked and any(other.checked for other in lines.values())
    return Text(line.label + (" †" if marked else ""))


def _aligned(column: Column, cells: Sequence[Cell | None]) -> list[Text]:
    """Cells with their decimal points beneath each other, and so, where digits agree, their ±."""
    shown = [cell.printed(column) if cell else None for cell in cells]
    whole = [part.value.partition(".")[0] if part else "" for part in shown]
    fraction = [part.value[len(w) :] if part else "" for part, w in zip(shown, whole, strict=True)]
    left, right = max(map(len, whole), default=0), max(map(len, fraction), default=0)
    powers = any(part and part.exponent for part in shown)
    texts = []
    for cell, part, w, f in zip(cells, shown, whole, fraction, strict=True):
        if cell is None or part is None:
            texts.append(Text(" " * (left - 1 + powers) + "–", style="dim"))
            continue
        body = f.ljust(right) + (f" ± {part.error}" if part.error else "")
        braced = bool(part.error and part.exponent)
        body = ("(" if braced else " " * powers) + w.rjust(left) + body + (")" if braced else "")
        text = (body + (f"e{part.exponent}" if part.exponent else "")).rstrip()
        texts.append(Text(text + (f" {cell.signs}" if cell.signs else ""), style="bold" if cell.bold else ""))
    return texts


def _notes(
    lines: Mapping[str, Line], found: Sequence[Table], left_out: Iterable[str], missing: pd.DataFrame
) -> Iterable[str]:
    """What stands beneath the table."""
    said = dict.fromkeys(note for table in found for note in table.notes)
    unmet = [word for note in said if UNMET in note for word in note.removeprefix(UNMET).removesuffix(".").split(", ")]
    told = {f"{sign} {words}" for sign, words in SIGNS.items()} | {NONE_CHECKED}
    yield from (note for note in said if note not in told and UNMET not in note)
    if unmet:
        yield f"{UNMET}{', '.join(dict.fromkeys(unmet))}."
    yield from (f"{sign} {words}" for sign, words in SIGNS.items() if sign != "†" and f"{sign} {words}" in said)
    if lines and not all(line.checked for line in lines.values()):
        some = any(line.checked for line in lines.values())
        yield "† not checked by the harness." if some else "No estimator here has been checked by the harness."
    if left_out := ", ".join(left_out):
        yield f"Left out, since this terminal is too narrow: {left_out}."
    yield from (
        f"{word} {status}: {reason}" for word, status, reason in missing[["label", "status", "reason"]].to_numpy()
    )

"""Rows to tables, figures and one HTML page that opens from a file."""

import base64
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from gradiometer.bench import atomic, plots, selection, tables, typeset
from gradiometer.bench.errors import RequestError
from gradiometer.bench.findings import findings
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.typeset import Table

__all__ = ["FORMATS", "write"]

FORMATS = ("html", "md", "tex", "csv", *plots.FORMATS)
_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
_SETTINGS = {
    "device": "Device",
    "dtype": "Precision",
    "threads": "Threads",
    "engine": "Engine",
    "B": "Minibatch",
    "replicates": "Replicates",
}


def write(
    rows: pd.DataFrame,
    out: Path,
    formats: Iterable[str],
    machine: Mapping[str, Any],
    suite: Mapping[str, Any] = MappingProxyType({}),
) -> list[Path]:
    """Write a report: `report.html`, `report.md`, `tables/*.tex|csv` and `figures/*.png|svg|pdf`, as asked.

    Args:
        rows: as the store yields them.
        out: the folder; it is made, and files of the same names are replaced.
        formats: of `FORMATS`.
        machine: what the rows were measured on, and when: names and values, one level of nesting.
        suite: its `title` and `description`, if it has them.

    Returns:
        The files written, in the order of `FORMATS`. The same rows give the same bytes.

    Raises:
        RequestError: a format is unknown, or there is nothing to report.

    >>> write(pd.DataFrame(), Path("somewhere"), {"htm"}, {})
    Traceback (most recent call last):
        ...
    gradiometer.bench.errors.RequestError: unknown report format 'htm': did you mean 'html'?
    """
    wanted = [form for form in FORMATS if form in _known(formats)]
    if rows.empty:
        raise RequestError("there are no rows to report: run a suite first, or name the folder that holds its results")
    tidied = selection.tidy(rows)
    figures = plots.plots(tidied) if {"html", *plots.FORMATS} & set(wanted) else []
    title = f"Gradient estimators compared: {suite['title']}" if suite.get("title") else _title(tidied)
    said = str(suite.get("description", "")).strip()
    said += "." if said and said[-1] not in ".!?:;" else ""
    lead = " ".join(filter(None, [said, _summary(tidied)]))
    found = tables.tables(tidied)
    contents = _Contents(title, lead, tidied, found, figures, findings(tidied), _facts(tidied, rows, machine))
    images = {form: {plot.name: plots.rendered(plot, form) for plot in figures} for form in _image_forms(wanted)}
    written = []
    for form in wanted:
        if form == "html":
            written.append(_put(out / "report.html", _html(contents, images["svg"]).encode()))
        elif form == "md":
            beside = next((image for image in ("svg", "png") if image in wanted), "")
            written.append(_put(out / "report.md", _markdown(contents, beside).encode()))
        elif form in ("tex", "csv"):
            text = {"tex": typeset.latex, "csv": typeset.csv}[form]
            for table in contents.tables:
                written.append(_put(out / "tables" / f"{typeset.stem(table.name)}.{form}", text(table).encode()))
        else:
            for name, image in images[form].items():
                written.append(_put(out / "figures" / f"{typeset.stem(name)}.{form}", image))
    return written


@dataclass(frozen=True)
class _Contents:
    """What every page of a report is made of."""

    title: str
    lead: str
    tidied: pd.DataFrame
    tables: list[Table]
    plots: list[plots.Plot]
    findings: dict[str, list[str]]
    facts: dict[str, str]


def _html(contents: _Contents, images: Mapping[str, bytes]) -> str:
    """The report as one page without any reference to the outside; all text of the rows is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "words": typeset.html_text,
        "counts": typeset.counts,
        "unit": lambda of: typeset.unit_of(of) if isinstance(of, typeset.Column) else tables.unit_text(of.unit),
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    problems: dict[str, list[Table]] = {}
    for table in contents.tables:
        if table.lines:
            problems.setdefault(table.problem, []).append(table)
    measured = set(contents.tidied["metric"])
    shown = {column.metric for table in contents.tables for column in table.columns}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=contents.title,
        summary=contents.lead,
        facts=contents.facts,
        findings=contents.findings,
        plots=[_embedded(plot, images[plot.name]) for plot in contents.plots],
        separated=tables.SEPARATED,
        problems=problems,
        cell_of=typeset.html_cell,
        unmeasured=selection.unmeasured(contents.tidied).to_dict("records"),
        metrics=[metric for name, metric in METRICS.items() if name in measured | shown],
    )


def _markdown(contents: _Contents, beside: str) -> str:
    """The report as one Markdown page; it shows the figures written beside it in a format, if any were."""
    parts = [f"# {contents.title}", contents.lead]
    for topic, sentences in contents.findings.items():
        parts += [f"**{topic.replace(' x ', ' × ')}**", "\n".join(f"* {sentence}" for sentence in sentences)]
    for plot in contents.plots if beside else []:
        parts.append(f"![{plot.title}](figures/{typeset.stem(plot.name)}.{beside})\n\n*{plot.title}.* {plot.caption}")
    parts += [typeset.markdown(table).strip() for table in contents.tables]
    parts += ["## What was run", "\n".join(f"* {name}: {value}" for name, value in contents.facts.items())]
    return "\n\n".join(parts) + "\n"


def _embedded(plot: plots.Plot, image: bytes) -> dict[str, object]:
    """A figure as the page holds it, 115 pixels to the inch."""
    width = round(115 * plot.figure.get_figwidth())
    return {"title": plot.title, "caption": plot.caption, "width": width, "svg": base64.b64encode(image).decode()}


def _known(formats: Iterable[str]) -> set[str]:
    asked = set(formats)
    for form in sorted(asked - set(FORMATS)):
        near = difflib.get_close_matches(form.lower().lstrip("."), FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FORMATS)}"
        raise RequestError(f"unknown report format {form!r}: {hint}")
    if not asked:
        raise RequestError(f"no report format is named: there are {', '.join(FORMATS)}")
    return asked


def _image_forms(wanted: list[str]) -> list[str]:
    return [form for form in plots.FORMATS if form in wanted or (form == "svg" and "html" in wanted)]


def _title(tidied: pd.DataFrame) -> str:
    suites = sorted(set(tidied["suite"]) - {""})
    return f"Gradient estimators compared: {', '.join(suites)}" if suites else "Gradient estimators compared"


def _summary(tidied: pd.DataFrame) -> str:
    """How much was measured, in a sentence."""
    measured = tidied[(tidied["status"] == "ok") & (tidied["metric"] != "")]
    states = tidied.drop_duplicates(["problem", "label", "status", "kind", "seed"])["status"].value_counts()
    parts = [
        _count(measured["label"].nunique(), "estimator"),
        "on " + _count(measured["problem"].nunique(), "problem"),
        *(f"{states[state]} {state}" for state in ("skipped", "failed") if states.get(state, 0)),
    ]
    return ", ".join([" ".join(parts[:2]), *parts[2:]]) + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _facts(tidied: pd.DataFrame, rows: pd.DataFrame, machine: Mapping[str, Any]) -> dict[str, str]:
    """What was run and on what, by name."""
    found = {
        "Suite": ", ".join(sorted(set(tidied["suite"]) - {""})),
        "Problems": ", ".join(selection.problem_order(tidied["problem"])),
        "Estimators": ", ".join(dict.fromkeys(selection.in_order(tidied)["label"])),
        "Seeds": ", ".join(sorted({str(seed) for seed in tidied["seed"]}, key=lambda seed: (len(seed), seed))),
    }
    for column, name in _SETTINGS.items():
        if column in rows:
            values = rows.loc[rows[column].notna() & (rows[column].astype(str) != ""), column].unique()
            found[name] = ", ".join(
                sorted({f"{v:g}" if isinstance(v, float) else str(v) for v in values}, key=lambda v: (len(v), v))
            )
    for name, value in machine.items():
        text = ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, Mapping) else str(value)
        found[name.replace("_", " ").capitalize()] = text
    return {name: text for name, text in found.items() if text}


def _put(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, content)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None
    return path

"""What a table holds, and how it is written: Markdown, LaTeX (booktabs), CSV and the pieces of an HTML page."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd
from markupsafe import Markup, escape

from gradiometer.bench.uncertain import SUPERSCRIPTS, Printed, exponent_of, printed

__all__ = ["Cell", "Column", "Line", "Table", "csv", "html_cell", "html_text", "latex", "markdown", "stem"]

NOTHING = "–"
FRONT = {"variance_seconds": "seconds", "variance_evaluations": "evaluations"}  # columns that mark the front of a cost
_SHRUNK = (
    "\\footnotesize\\setlength{\\tabcolsep}{3pt}\n"
    "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
)
_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_BACK = {superscript: plain for plain, superscript in ((chr(k), chr(v)) for k, v in SUPERSCRIPTS.items())}


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
    """A value with its error and interval, whether it wins its column, its `SIGNS`, and words if they stand in its place."""

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    bold: bool = False
    signs: str = ""
    words: str = ""

    def printed(self, column: Column) -> Printed:
        """The value as its column prints it; a shared power of ten stands in the heading instead."""
        if self.words:
            return Printed(self.words)
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


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown, right-aligned, with its notes beneath.

    >>> print(markdown(Table("t", "Toy", "toy", "", (), (Line("stl", 1, 2.0, True, ()),), ())))
    ### Toy
    <BLANKLINE>
    | estimator |   K | evaluations |
    | :-------- | --: | ----------: |
    | `stl`     |   1 |           2 |
    <BLANKLINE>
    """
    parts = [f"### {table.title}", ""]
    if table.lines:
        heads = ["estimator", "K", "evaluations", *(_head(column) for column in table.columns)]
        body = [
            [_word(table, line, "`{}`"), *counts(line), *(_markdown_cell(*pair) for pair in _pairs(table, line))]
            for line in table.lines
        ]
        body = [[text.replace("|", "\\|") for text in line] for line in body]
        widths = [max(3, *(len(text) for text in column)) for column in zip(heads, *body, strict=True)]
        rules = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
        padded = [
            [line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]
            for line in (heads, rules, *body)
        ]
        parts += [*("| " + " | ".join(line) + " |" for line in padded), ""]
    parts += [line for note in table.notes for line in (f"{note}", "")]
    if table.unmeasured:
        parts += [
            "Not measured:",
            "",
            *(f"* `{word}` {status}: {reason.replace('<', '&lt;')}" for word, status, reason in table.unmeasured),
            "",
        ]
    return "\n".join(parts)


def latex(table: Table) -> str:
    """A table as a LaTeX float for booktabs, by pandas' Styler; notes and what was not measured stand beneath."""
    heads = [("estimator", ""), ("$K$", ""), ("evaluations", "")]
    heads += [(_latex_text(column.heading), _latex_text(unit_of(column))) for column in table.columns]
    body = [
        [
            _latex_text(line.label + "†" * _marked(table, line)),
            *(_latex_text(c) for c in counts(line)),
        ]
        + [_latex_cell(*pair) for pair in _pairs(table, line)]
        for line in table.lines
    ]
    notes = [_latex_text(note) for note in table.notes]
    missing = [_latex_text(f"{word} {status}: {reason}.") for word, status, reason in table.unmeasured]
    beneath = "".join(
        f"\\par\\smallskip\\noindent{{\\footnotesize {text}}}\n" for text in (" ".join(notes), *missing) if text
    )
    if not table.lines:
        return beneath
    styler = pd.DataFrame(body, columns=pd.MultiIndex.from_tuples(heads)).style.hide(axis="index")
    text: str = styler.to_latex(
        hrules=True,
        column_format="l" + "r" * (len(heads) - 1),
        position="tb",
        position_float="centering",
        caption=_latex_text(table.title) + ".",
        label=f"tab:{stem(table.name)}",
    )
    text = text.replace(r"\begin{tabular}", _SHRUNK + r"\begin{tabular}").replace(r"\end{tabular}", r"\end{tabular}}")
    return "% needs \\usepackage{booktabs,graphicx}\n" + text.replace(r"\end{table}", beneath + r"\end{table}")


def csv(table: Table) -> str:
    """A table as comma-separated numbers, unrounded: value, standard error and 95 % interval of every metric, and its signs."""
    lines = []
    for line in table.lines:
        numbers: dict[str, object] = {"problem": table.problem, "group": table.group, "estimator": line.label}
        numbers |= {"K": line.K, "evaluations": line.evaluations, "checked": line.checked}
        signs = {sign for cell in line.cells if cell for sign in cell.signs}
        numbers |= {
            "biased": "§" in signs,
            "rescaled": "∝" in signs,
            "learned": "ℓ" in signs,
            "tails": "heavy" if "¶" in signs else "",
        }
        for column, cell in _pairs(table, line):
            unit = f" [{column.unit.replace('²', '^2')}]" if column.unit else ""
            numbers[f"{column.metric}{unit}"] = cell.value if cell else None
            for name in ("stderr", "low", "high"):
                numbers[f"{column.metric} {name}"] = getattr(cell, name) if cell else None
            if column.metric in FRONT:
                numbers[f"{column.metric} on front"] = cell is not None and "★" in cell.signs
            if column.metric == "snr":
                numbers["snr at floor"] = cell is not None and "‡" in cell.signs
            if column.better:
                numbers[f"{column.metric} alone first"] = cell is not None and cell.bold
        lines.append(numbers | {"status": "ok", "reason": ""})
    for word, status, reason in table.unmeasured:
        lines.append(
            {"problem": table.problem, "group": table.group, "estimator": word, "status": status, "reason": reason}
        )
    frame = pd.DataFrame(lines)
    frame["K"] = frame["K"].astype("Int64") if "K" in frame else None
    return frame.to_csv(index=False, lineterminator="\n")


def html_cell(column: Column, cell: Cell | None) -> Markup:
    """A cell's content, with real superscripts, the winner in bold."""
    if cell is None:
        return Markup(NOTHING)
    shown = cell.printed(column)
    text = escape(_body(shown, " ± "))
    if shown.exponent:
        text += Markup(" × 10<sup>{}</sup>").format(str(shown.exponent).replace("-", "−"))
    text = Markup("<b>{}</b>").format(text) if cell.bold else text
    return text + Markup("&thinsp;{}").format(cell.signs) if cell.signs else text


def html_text(text: str) -> Markup:
    """Text of ours with `code` and ``code`` between backticks as such; everything else escaped."""
    pieces = re.split(r"`+([^`]+)`+", re.sub(r"(?<=[ (])-(?=\d)", "−", text))
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if i % 2 else escape(piece) for i, piece in enumerate(pieces)
    )


def counts(line: Line) -> tuple[str, str]:
    """K and evaluations as they are printed."""
    return (
        NOTHING if line.K is None else str(line.K),
        NOTHING if line.evaluations != line.evaluations else f"{line.evaluations:g}",
    )


def stem(name: str) -> str:
    """A name as a file name: letters, digits, dots, dashes.

    >>> stem("digits-vae@late: gradient of phi")
    'digits-vae-late-gradient-of-phi'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "table"


def unit_of(column: Column) -> str:
    """A column's unit with the power of ten its numbers are printed in, "" for a pure number."""
    if column.unit == "s" and column.exponent in (-3, -6):
        return {-3: "ms", -6: "µs"}[column.exponent]
    power = f"10{str(column.exponent).translate(SUPERSCRIPTS)}" if column.exponent else ""
    return " ".join(part for part in (power, column.unit) if part)


def _pairs(table: Table, line: Line) -> Iterator[tuple[Column, Cell | None]]:
    return zip(table.columns, line.cells, strict=True)


def _marked(table: Table, line: Line) -> bool:
    return table.marks_unchecked and not line.checked


def _word(table: Table, line: Line, form: str = "{}") -> str:
    return form.format(line.label) + (" †" if _marked(table, line) else "")


def _head(column: Column) -> str:
    return column.heading + (f" [{unit_of(column)}]" if unit_of(column) else "")


def _body(shown: Printed, between: str) -> str:
    if not shown.error:
        return shown.value.replace("-", "−")
    body = f"{shown.value}{between}{shown.error}".replace("-", "−")
    return f"({body})" if shown.exponent else body


def _markdown_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    text = cell.printed(column).text
    return (f"**{text}**" if cell.bold else text) + (f" {cell.signs}" if cell.signs else "")


def _latex_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "--"
    shown = cell.printed(column)
    if cell.words:
        return _latex_text(cell.words)
    if shown.value in ("nan", "inf", "-inf"):
        return {"nan": "nan", "inf": r"$\infty$", "-inf": r"$-\infty$"}[shown.value]
    body = shown.value + (rf" \pm {shown.error}" if shown.error else "").replace("inf", r"\infty")
    body = rf"\mathbf{{{body}}}" if cell.bold else body
    if shown.exponent:
        body = (f"({body})" if shown.error else body) + rf" \times 10^{{{shown.exponent}}}"
    return f"${body}$" + _latex_text(cell.signs)


_LATEX = {character: f"\\{character}" for character in "{}#$%&_"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
_LATEX |= {"×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$", "≥": r"$\geq$", "<": "$<$", ">": "$>$", "|": "$|$"}
_LATEX |= {
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "★": r"$^\star$",
    "§": r"\textsuperscript{\S}",
    "∝": r"$^\propto$",
    "ℓ": r"$^\ell$",
}
_LATEX |= {"¶": r"\textsuperscript{\P}", "−": "$-$"}


def _latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped, superscripts as mathematics, `code` as typewriter."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    escaped = _SUPERSCRIPT.sub(lambda found: "$^{" + "".join(_BACK[c] for c in found.group()) + "}$", escaped)
    return re.sub(r"`+([^`]+)`+", r"\\texttt{\1}", escaped)

"""Reports: what tables, figures and findings say about rows whose truth is known; pages are safe and repeatable."""

import hashlib
import itertools
import math
import re
import subprocess
import sys
from decimal import Decimal
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradiometer.bench import canvas, figures, plots, report, selection, tables, terminal, typeset
from gradiometer.bench.errors import RequestError
from gradiometer.bench.findings import findings
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import Value
from gradiometer.bench.uncertain import format_interval, format_uncertain, printed, shared_exponent
from tests import synthetic

FEW = (
    "iwae:K=8",
    "dreg:K=8",
    "pathwise",
    "nvi:levels=4,K=8",
    "disarm",
    "iwae:K=16",
    "dreg:K=16",
    "iwae:K=32",
    "dreg:K=32",
)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return synthetic.rows()


@pytest.fixture(scope="module")
def few(rows: pd.DataFrame) -> pd.DataFrame:
    """Some estimators at two snapshots and on the toy, for what draws."""
    return rows[rows["estimator"].isin(FEW) & (rows["snapshot"] != "early")]


@pytest.fixture(scope="module")
def written(few: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report.write(few, out, {"html", "md", "tex", "csv", "svg"}, synthetic.MACHINE)
    return out


def bare(estimator: str, value: float, low: float, high: float, **columns: object) -> dict[str, object]:
    """A variance row as a bare measurement leaves it."""
    about = {"problem": "toy", "estimator": estimator, "family": "f", "K": 8, "evaluations": 8.0, "group": "inference"}
    numbers = {"value": value, "stderr": (high - low) / 4, "low": low, "high": high, "unit": "1"}
    return about | {"metric": "variance", "replicates": 64} | numbers | columns


def table(rows: pd.DataFrame, problem: str, words: str) -> tables.Table:
    found = [t for t in tables.tables(rows) if t.problem == problem and words in t.title]
    assert len(found) == 1, [t.title for t in tables.tables(rows)]
    return found[0]


# Numbers


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.12341, 0.00123, "0.1234 ± 0.0012"),
        (1.2345e-4, 5.04e-6, "(1.234 ± 0.050)e-4"),
        (9.999, 0.0996, "10.00 ± 0.10"),
        (-1234.0, 150.0, "(-1.23 ± 0.15)e3"),
        (0.003, 0.12, "0.00 ± 0.12"),
        (-0.00001, 0.12, "0.00 ± 0.12"),
        (64.0, 0.0, "64"),
        (100.0, 0.0, "100"),
        (0.1, 0.0, "0.1"),
        (2 / 3, math.nan, "0.6667"),
        (math.nan, 1.0, "nan"),
        (-math.inf, math.nan, "-inf"),
        (5.0, math.inf, "5.000 ± inf"),
        (5e-324, 5e-324, "(5.0 ± 5.0)e-324"),
        (1e22, 1e20, "(1.000 ± 0.010)e22"),
    ],
)
def test_numbers_are_printed_to_the_second_digit_of_their_error(value: float, stderr: float, text: str) -> None:
    assert format_uncertain(value, stderr) == text


def parsed(text: str) -> tuple[Decimal, Decimal]:
    """A value and its error back from `(1.23 ± 0.05)e-4`."""
    found = re.fullmatch(r"\(?(-?[\d.]+) ± ([\d.]+)(?:\)e(-?\d+))?", text)
    assert found, text
    power = Decimal(1).scaleb(int(found[3] or 0))
    return Decimal(found[1]) * power, Decimal(found[2]) * power


@given(
    st.floats(-1e200, 1e200).filter(lambda v: v == 0 or abs(v) > 1e-200),
    st.floats(1e-13, 1e13),
)
def test_a_printed_value_lies_within_its_error_and_reads_back(value: float, relative: float) -> None:
    stderr = (abs(value) or 1.0) * relative
    shown_value, shown_error = parsed(format_uncertain(value, stderr))
    assert len(shown_error.normalize().as_tuple().digits) <= 2
    assert abs(shown_error - Decimal(stderr)) <= Decimal(stderr) * Decimal("0.0501")
    assert abs(shown_value - Decimal(value)) <= shown_error * Decimal("0.0501")  # half a unit of the second digit
    assert parsed(format_uncertain(float(shown_value), float(shown_error))) == (shown_value, shown_error)


@given(st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-3, 0.5)), min_size=1, max_size=8))
def test_a_column_shares_one_power_of_ten_or_none(pairs: list[tuple[float, float]]) -> None:
    numbers = [(value, value * relative) for value, relative in pairs]
    shared = shared_exponent(numbers)
    widest = max(v for v, _ in numbers) / min(v for v, _ in numbers)
    assert shared is not None or widest > 100
    if shared is not None:
        assert shared % 3 == 0
        for value, stderr in numbers:
            shown = printed(value, stderr, shared)
            assert abs(Decimal(shown.value).scaleb(shared) - Decimal(value)) <= Decimal(stderr) * Decimal("0.06")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((12.3456, 11.8, 12.9), "12.3 (11.8 to 12.9)"),
        ((16398.0, 16270.0, 16520.0), "16400 (16270 to 16520)"),
        ((2.0, 2.0, 2.0), "2"),
    ],
)
def test_intervals_keep_the_digits_that_mean_something(numbers: tuple[float, float, float], text: str) -> None:
    assert format_interval(*numbers) == text


# Tables


def winners(*rows: dict[str, object]) -> list[str]:
    made = table(pd.DataFrame(rows), "toy", "inference")
    return [line.label for line in made.lines if line.cells[0] and line.cells[0].bold]


def test_a_winner_is_bold_only_where_its_interval_is_apart() -> None:
    assert winners(bare("a", 1.0, 0.9, 1.1), bare("b", 2.0, 1.8, 2.2)) == ["a"]
    assert winners(bare("a", 1.0, 0.9, 1.9), bare("b", 2.0, 1.8, 2.2)) == []
    assert winners(bare("a", 1.0, 0.9, 1.1), bare("b", 1.0, 0.9, 1.1), bare("c", 9.0, 8.0, 10.0)) == []
    assert winners(bare("a", 1.0, 0.9, 1.1)) == []


def test_the_better_side_is_the_metrics_own() -> None:
    assert winners(*(bare(*cell, metric="snr") for cell in (("a", 1.0, 0.9, 1.1), ("b", 2.0, 1.8, 2.2)))) == ["b"]


def test_an_snr_at_its_floor_is_marked_and_never_bold() -> None:
    shown = [bare("a", 0.026, 0.024, 0.028, metric="snr"), bare("b", 0.01, 0.009, 0.011, metric="snr")]
    floors = [bare(word, 0.025, 0.025, 0.025, metric="snr_floor") for word in "ab"]
    made = table(pd.DataFrame([*shown, *floors]), "toy", "inference")
    assert made.columns[0].heading == "SNR, floor 0.025"
    assert [(line.cells[0].signs, line.cells[0].bold) for line in made.lines if line.cells[0]] == [("‡", False)] * 2
    assert any(note.startswith("‡") for note in made.notes)


def test_unchecked_estimators_are_marked_unless_all_are() -> None:
    some = table(pd.DataFrame([bare("a", 1, 1, 1, checked=True), bare("b", 1, 1, 1)]), "toy", "inference")
    assert some.marks_unchecked
    assert re.search(r"\| `b` † +\|", typeset.markdown(some))
    assert re.search(r"\| `a` +\|", typeset.markdown(some))
    none = table(pd.DataFrame([bare("a", 1, 1, 1), bare("b", 1, 1, 1)]), "toy", "inference")
    assert "†" not in typeset.markdown(none)
    assert "No estimator here has passed" in typeset.markdown(none)


def test_cells_that_differ_in_a_setting_are_told_apart() -> None:
    made = table(pd.DataFrame([bare("a", 1, 1, 1, B=20), bare("a", 2, 2, 2, B=100)]), "toy", "inference")
    assert [line.label for line in made.lines] == ["a [B 100]", "a [B 20]"]
    seeds = table(pd.DataFrame([bare("a", 1, 1, 1, seed=0), bare("a", 2, 2, 2, seed=1)]), "toy", "inference")
    assert [line.label for line in seeds.lines] == ["a [seed 0]", "a [seed 1]"]


def test_where_two_suites_measured_the_same_more_replicates_count() -> None:
    made = table(pd.DataFrame([bare("a", 1, 1, 1), bare("a", 2, 2, 2, replicates=4096)]), "toy", "inference")
    assert [line.cells[0].value for line in made.lines if line.cells[0]] == [2]


def test_tables_hold_k_evaluations_cost_and_units(rows: pd.DataFrame) -> None:
    made = table(rows, "digits-vae@late", "inference")
    assert [column.metric for column in made.columns] == ["variance", "rank", *tables.GRADIENT[1:]]
    line = next(line for line in made.lines if line.label == "dreg:K=64")
    assert (line.K, line.evaluations) == (64, 64.0)
    head = typeset.markdown(made).splitlines()[2]
    assert "variance [(nats/parameter)²]" in head
    assert "K | evaluations" in head
    cost = table(rows, "digits-vae@late", "objective and cost")
    assert "time per gradient [ms]" in typeset.markdown(cost)
    assert not any(cell.bold for line in cost.lines for cell in line.cells[:3] if cell), "objectives are not ranked"


def test_what_was_not_measured_is_beneath_with_its_reason(rows: pd.DataFrame) -> None:
    first = next(t for t in tables.tables(rows) if t.problem == "digits-vae@late")
    text = typeset.markdown(first)
    assert "* `disarm` skipped: disarm needs a Bernoulli guide" in text
    assert "* `vr:alpha=0.5,K=8` failed: the gradient of 'encoder.0.weight' is not finite" in text
    assert "failed" in typeset.latex(first)
    assert set(pd.read_csv(StringIO(typeset.csv(first)))["status"]) == {"ok", "skipped", "failed"}


def test_csv_keeps_the_numbers_of_the_rows(rows: pd.DataFrame) -> None:
    read = pd.read_csv(StringIO(typeset.csv(table(rows, "digits-vae@late", "generative")))).set_index("estimator")
    of = rows[(rows["problem"] == "digits-vae@late") & (rows["group"] == "generative") & (rows["metric"] == "variance")]
    for row in of.itertuples():
        for column, value in (("variance [(nats/parameter)^2]", row.value), ("variance low", row.low)):
            assert read.loc[row.estimator, column] == value


def test_latex_is_booktabs_with_bold_winners_and_escaped_words(rows: pd.DataFrame) -> None:
    text = typeset.latex(table(rows, "digits-vae@late", "inference"))
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:digits-vae-late-gradient"):
        assert rule in text
    assert re.search(r"dreg:K=64 & 64 & 64 & \$\(\\mathbf\{\S+ \\pm \S+\}\) \\times 10\^\{-3\}\$", text)
    hostile = typeset.latex(table(pd.DataFrame([bare("a_b%&#{x}$^~\\", 1, 1, 1)]), "toy", "inference"))
    assert r"a\_b\%\&\#\{x\}\$\textasciicircum{}\textasciitilde{}\textbackslash{} &" in hostile


def test_what_is_not_a_number_is_a_dash_and_counts_fill_in() -> None:
    made = table(pd.DataFrame([bare("a", 1, 1, 1), bare("b", math.nan, 1, 1)]), "toy", "inference")
    assert re.search(r"`b` +\| +8 \| +8 \| +– \|", typeset.markdown(made))
    trained = bare("a", -20, -21, -19, metric="test_elbo", kind="training", group="", step=9.0, evaluations=math.nan)
    assert table(pd.DataFrame([bare("a", 1, 1, 1), trained]), "toy", "after training").lines[0].evaluations == 8


def test_training_tables_average_the_last_step_over_seeds(rows: pd.DataFrame) -> None:
    made = table(rows, "digits-vae", "after training")
    of = rows[(rows["metric"] == "test_iwelbo") & (rows["estimator"] == "rloo:K=8") & (rows["step"] == 3000)]["value"]
    cell = next(line for line in made.lines if line.label == "rloo:K=8").cells[1]
    assert len(of) == 3
    assert cell
    assert cell.value == pytest.approx(of.mean())
    assert cell.stderr == pytest.approx(of.std() / math.sqrt(3))
    assert cell.high - cell.value == pytest.approx(
        4.302653 * cell.stderr, rel=1e-6
    )  # Student's t, two degrees of freedom


# A terminal


@pytest.mark.parametrize("width", [80, 100, 120, 150, 170])
def test_a_comparison_fits_its_terminal(rows: pd.DataFrame, width: int) -> None:
    console = Console(width=width, file=StringIO(), legacy_windows=False)
    console.print(terminal.comparison(rows[rows["problem"] == "digits-vae@late"], width=width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.strip().startswith("dreg:K=64 ") for line in lines) in (1, 2), (
        "one line per group at most, none folded"
    )
    assert "…" not in text
    assert "disarm skipped" in text
    assert ("Left out" in text) == (width < 170)


def test_a_comparison_aligns_its_decimal_points() -> None:
    made = terminal.comparison(pd.DataFrame([bare("a", 123.4, 120.0, 126.0), bare("b", 1.234, 1.2, 1.26)]))
    console = Console(width=120, file=StringIO())
    console.print(made)
    lines = [line for line in console.file.getvalue().splitlines() if "±" in line and "standard" not in line]  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert len({line.index(".") for line in lines}) == 1


# Figures


def test_figure_data_hold_every_estimator_group_and_snapshot(rows: pd.DataFrame) -> None:
    found = figures.by_snapshot(rows, "snr")
    vae = found[found["model"] == "digits-vae"]
    assert len(vae) == len(synthetic.DIGITS) * 2 * 3
    assert np.allclose(found["floor"], synthetic.FLOOR)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()
    assert figures.by_snapshot(rows, "variance")["floor"].isna().all()


def test_only_series_with_three_k_are_drawn_against_k(rows: pd.DataFrame) -> None:
    found = figures.against_particles(rows)
    assert set(found["problem"]) == {"gaussian-toy"}
    assert set(found["series"]) == {"iwae", "dreg"}
    for _, line in found.groupby(["group", "series"]):
        assert line["K"].tolist() == list(synthetic.TOY_K)


@pytest.mark.parametrize("several", [False, True])
def test_the_variance_of_several_objectives_is_said_not_to_compete(few: pd.DataFrame, several: bool) -> None:
    made = plots.plots(few.assign(ascends=few["family"] if several else "elbo"))
    for plot in made:
        assert ("do not compete" in plot.caption) == (several and plot.name.startswith("variance-digits"))


def test_groups_of_few_estimators_get_no_panel(few: pd.DataFrame) -> None:
    own = few[(few["estimator"] == "nvi:levels=4,K=8") & (few["group"] == "inference")].assign(group="kernels")
    found = figures.by_snapshot(pd.concat([few, own]), "variance")
    vae = found[found["model"] == "digits-vae"]
    assert set(vae["group"]) == {"generative", "inference", "kernels"}
    assert figures.shared_groups(vae) == ["generative", "inference"]
    plot = next(plot for plot in plots.plots(pd.concat([few, own])) if plot.name == "variance-digits-vae")
    assert [axes.get_title() for axes in plot.figure.axes] == ["generative parameters", "inference parameters"]
    assert "(kernels parameters) is in the tables" in plot.caption
    assert table(pd.concat([few, own]), "digits-vae@late", "kernel parameters").lines


def test_series_keep_their_other_parameters() -> None:
    words = ("vr:alpha=0.5,K=8", "vr:K=8,alpha=0.5", "dreg:K=8", "stl")
    found = selection.tidy(pd.DataFrame([bare(word, 1, 1, 1) for word in words]))
    series = {"vr:alpha=0.5,K=8": "vr:alpha=0.5", "vr:K=8,alpha=0.5": "vr:alpha=0.5", "dreg:K=8": "dreg", "stl": "stl"}
    assert dict(found[["estimator", "series"]].to_numpy()) == series


def test_learning_curves_average_seeds_and_span_them(rows: pd.DataFrame) -> None:
    found = figures.learning_curves(rows, "test_elbo")
    at = found[(found["label"] == "pathwise") & (found["step"] == 1500)].iloc[0]
    of = rows[(rows["metric"] == "test_elbo") & (rows["estimator"] == "pathwise") & (rows["step"] == 1500)]
    assert at["value"] == pytest.approx(of["value"].mean())
    assert (at["low"], at["high"], at["seeds"]) == (of["value"].min(), of["value"].max(), 3)
    assert at["seconds"] == pytest.approx(of["seconds"].mean())


def test_the_pareto_front_is_what_nothing_beats_at_both_and_surely_at_one(rows: pd.DataFrame) -> None:
    found = figures.cost_plane(rows)
    assert len(found) == len(synthetic.DIGITS) * 2 * 3
    for _, points in found.groupby(["problem", "group"]):
        for a in points.itertuples():
            others = [b for b in points.itertuples() if b.Index != a.Index]
            surely = any(b.cost_high < a.cost_low and b.high < a.low for b in others)
            by_value = any(
                b.cost <= a.cost and b.value <= a.value and (b.cost, b.value) != (a.cost, a.value) for b in others
            )
            assert not (a.front and surely)
            assert a.front or by_value
            assert a.step != by_value
        assert points.loc[points["step"], "front"].all(), "what no value dominates nothing surely dominates"


def test_of_two_that_cannot_be_told_apart_both_are_on_the_front() -> None:
    seconds = {"metric": "seconds_per_gradient", "kind": "cost", "group": ""}

    def front(*errors: tuple[float, float, float], slow: float = 2.0) -> dict[str, tuple[bool, bool]]:
        times = [bare("fast", 1.0, 0.9, 1.1, **seconds), bare("slow", slow, slow - 0.1, slow + 0.1, **seconds)]
        measured = [bare(word, *error) for word, error in zip(("fast", "slow"), errors, strict=True)]
        found = figures.cost_plane(pd.DataFrame([*measured, *times]))
        return {label: (front, step) for label, front, step in found[["label", "front", "step"]].to_numpy()}

    assert front((5.0, 4.0, 6.0), (5.0, 4.0, 6.0)) == {"fast": (True, True), "slow": (False, False)}
    assert front((5.0, 4.0, 6.0), (5.5, 4.5, 6.5), slow=1.1) == {"fast": (True, True), "slow": (True, False)}
    assert front((5.0, 4.0, 6.0), (7.0, 6.5, 8.0)) == {"fast": (True, True), "slow": (False, False)}
    assert front((5.0, 4.0, 6.0), (7.0, 6.5, 8.0), slow=1.1) == {"fast": (True, True), "slow": (False, False)}
    assert front((5.0, 4.0, 6.0), (3.0, 2.5, 3.5)) == {"fast": (True, True), "slow": (True, True)}


def test_what_is_biased_by_an_unknown_amount_is_named_where_it_is_left_out() -> None:
    seconds = {"metric": "seconds_per_gradient", "kind": "cost", "group": ""}
    rows = [bare(word, value, value - 0.5, value + 0.5) for word, value in (("a", 3.0), ("b", 5.0))]
    rows += [bare(word, value, 0.9 * value, 1.1 * value, **seconds) for word, value in (("a", 2.0), ("b", 1.0))]
    hidden = [bare("rws", 1.0, 0.9, 1.1, biased=True), bare("rws", 1.0, 0.9, 1.1, **seconds)]
    known = bare("rws", 2.0, 1.9, 2.1, biased=True, metric="mse")

    def caption(rows: list[dict[str, object]]) -> str:
        return next(plot.caption for plot in plots.plots(pd.DataFrame(rows)) if plot.name == "cost-toy")

    said = "Left out, since biased by an amount that was not measured: rws (inference parameters)."
    assert said in caption(rows + hidden)
    assert "Left out" not in caption([*rows, *hidden, known])
    assert "Left out" not in caption(rows)
    scaled = [row | {"biased": False, "rescaled": True} for row in hidden]
    assert "Left out, since on a scale of its own: rws (inference parameters)." in caption(rows + scaled)


def test_the_front_is_one_of_evaluations_too_and_tables_mark_both(rows: pd.DataFrame) -> None:
    for budget, metric in (("seconds", "variance_seconds"), ("evaluations", "variance_evaluations")):
        found = figures.cost_plane(rows[rows["problem"] == "digits-vae@late"], budget)
        of = found[found["group"] == "inference"]
        made = table(rows, "digits-vae@late", "inference")
        number = [column.metric for column in made.columns].index(metric)
        cells = {line.label: line.cells[number] for line in made.lines}
        marked = {label for label, cell in cells.items() if cell and "★" in cell.signs}
        assert marked == set(of.loc[of["front"], "label"])
        assert 0 < len(marked) < len(of)
        read = pd.read_csv(StringIO(typeset.csv(made))).set_index("estimator")
        assert set(read.index[read[f"{metric} on front"].eq(True)]) == marked
    assert any(note.startswith("★ on the Pareto front") for note in made.notes)


# What carries a mark


def biased(*rows: dict[str, object], **columns: object) -> pd.DataFrame:
    """`good` and, quieter, `low`, which is declared biased; with further rows of its bias."""
    low = bare("low", 1.0, 0.9, 1.1, biased=True, **columns)
    return pd.DataFrame([bare("good", 2.0, 1.8, 2.2), low, *rows])


def mse(estimator: str, value: float, half: float, **columns: object) -> dict[str, object]:
    return bare(estimator, value, value - half, value + half, metric="mse", biased=True) | columns


def cells(made: tables.Table) -> dict[tuple[str, str], typeset.Cell | None]:
    return {
        (line.label, c.metric): cell for line in made.lines for c, cell in zip(made.columns, line.cells, strict=True)
    }


def test_a_biased_estimator_never_wins_by_its_variance() -> None:
    made = table(biased(), "toy", "inference")
    assert [column.metric for column in made.columns] == ["variance", "mse"]
    of = cells(made)
    assert not any(cell.bold for cell in of.values() if cell)
    assert of["low", "variance"].signs == "§"
    assert of["good", "variance"].signs == ""
    assert of["low", "mse"].words == "bias unknown"
    assert of["good", "mse"].value == 2.0
    assert any(note.startswith("§ declared biased") for note in made.notes)
    honest = table(biased().assign(biased=False), "toy", "inference")
    assert cells(honest)["low", "variance"].bold, "the negative control: were it not biased, it would win"
    assert not any("§" in note for note in honest.notes)


def test_the_winner_and_the_rank_are_by_mean_squared_error() -> None:
    bias = bare("low", 3.0, 2.9, 3.1, metric="bias", biased=True)
    made = table(biased(bias, mse("low", 10.0, 0.5)), "toy", "inference")
    assert [column.metric for column in made.columns] == ["variance", "bias", "mse", "rank"]
    of = cells(made)
    assert {key for key, cell in of.items() if cell and cell.bold} == {("good", "mse")}
    assert (of["good", "rank"].words, of["low", "rank"].words) == ("1", "2")
    assert of["low", "bias"].value == 3.0
    assert of["good", "bias"] is None
    better = cells(table(biased(bias, mse("low", 1.1, 0.1)), "toy", "inference"))
    assert {key for key, cell in better.items() if cell and cell.bold} == {("low", "mse")}, "little bias, less error"
    assert "by mean squared error." in " ".join(made.notes)


def test_a_rescaled_estimator_never_wins_by_its_variance() -> None:
    """A gradient of half the length has a quarter of the variance, and is no better for it."""
    snr = [bare("good", 1.0, 0.9, 1.1, metric="snr"), bare("low", 2.0, 1.9, 2.1, metric="snr", rescaled=True)]
    rows = biased(*snr).assign(biased=False)
    rows["rescaled"] = rows["estimator"] == "low"
    made = table(rows, "toy", "inference")
    of = cells(made)
    assert not of["low", "variance"].bold
    assert of["low", "variance"].signs == "∝"
    assert of["low", "snr"].bold, "a ratio of signal to noise has no scale"
    assert ("low", "rank") not in of or of["low", "rank"] is None
    assert any(note.startswith("∝ declared rescaled") for note in made.notes)
    beside = pd.concat([rows, pd.DataFrame([bare("low", 9.0, 8.0, 10.0, metric="mse", rescaled=True)])])
    assert cells(table(beside, "toy", "inference"))["low", "mse"].words == "own scale"
    pair = {"jackknife": shards(1.0, 0.01, -0.01, 0.005)}
    good, low = (
        bare("good", 1.0, 0.9, 1.1, **pair),
        bare("low", 0.1, 0.09, 0.11, jackknife=shards(0.1, 0.01, 0.01, -0.01)),
    )
    assert "`low` has the lowest variance" in findings(pd.DataFrame([good, low]))["Variance at equal K"][0]
    said = findings(pd.DataFrame([good, low | {"rescaled": True}]))
    assert "low" not in str(said)


def test_a_biased_estimator_wins_no_other_column_of_noise() -> None:
    snr = [bare("good", 1.0, 0.9, 1.1, metric="snr"), bare("low", 2.0, 1.9, 2.1, metric="snr", biased=True)]
    snr += [bare("other", 0.5, 0.4, 0.6, metric="snr")]
    of = cells(table(biased(*snr), "toy", "inference"))
    assert of["good", "snr"].bold
    assert not of["low", "snr"].bold


def test_ranks_are_intervals_where_the_data_leave_them_open() -> None:
    shown = [bare("a", 1.0, 0.9, 1.1), bare("b", 2.0, 1.7, 2.3), bare("c", 2.2, 1.9, 2.5), bare("d", 9.0, 8.0, 10.0)]
    made = table(pd.DataFrame(shown), "toy", "inference")
    of = cells(made)
    assert [of[word, "rank"].words for word in "abcd"] == ["1", "2–3", "2–3", "4"]
    assert [word for word in "abcd" if of[word, "variance"].bold] == ["a"]
    read = pd.read_csv(StringIO(typeset.csv(made))).set_index("estimator")
    assert (read.loc["b", "rank low"], read.loc["b", "rank high"]) == (2, 3)
    assert "2--3" in typeset.latex(made)


def test_ranks_winners_and_fronts_are_of_one_objective() -> None:
    ascend = {"a": "elbo", "b": "elbo", "c": "iwelbo:K=8", "d": "iwelbo:K=8", "e": "tvo:K=8"}
    variances = {
        "a": (1.0, 0.9, 1.1),
        "b": (2.0, 1.9, 2.1),
        "c": (5.0, 4.9, 5.1),
        "d": (4.0, 3.9, 4.1),
        "e": (0.5, 0.4, 0.6),
    }
    seconds = {"metric": "seconds_per_gradient", "kind": "cost", "group": ""}
    found = [bare(word, *value, ascends=ascend[word]) for word, value in variances.items()]
    found += [bare(word, 1.0, 0.9, 1.1, **seconds) for word in ascend]
    rows = pd.DataFrame(found)
    made = table(rows, "toy", "inference")
    of = cells(made)
    assert [of[word, "rank"].words for word in "abcde"] == ["1", "2", "2", "1", "1"]
    assert [of[word, "variance"].bold for word in "abcde"] == [True, False, False, True, False], "e has no rival"
    read = pd.read_csv(StringIO(typeset.csv(made))).set_index("estimator")
    assert list(read.index[read["variance alone first"]]) == ["a", "d"]
    assert any("a, b (ELBO); c, d (8-sample bound); e (tvo)" in note for note in made.notes)
    plane = figures.cost_plane(rows).set_index("label")
    assert plane["front"].to_dict() == {"a": True, "b": False, "c": False, "d": True, "e": False}


def test_ranks_are_paired_where_noise_is_shared_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def ranking(values: dict[str, Value], better: str) -> dict[str, tuple[int, int]]:
        asked.append((sorted(values), better))
        return dict.fromkeys(values, (1, len(values)))

    monkeypatch.setattr(figures.statistics, "ranking", ranking)
    shared = [bare(w, v, v - 0.1, v + 0.1, jackknife=shards(v, 0.1, -0.1, 0.02)) for w, v in (("a", 1.0), ("b", 2.0))]
    shared = [row | {"label": row["estimator"], "seed": 0, "B": 20, "digest": "d", "K": 8.0} for row in shared]
    assert figures.ranks(pd.DataFrame(shared), "lower") == {"a": (1, 2), "b": (1, 2)}
    assert asked == [(["a", "b"], "lower")]
    for change in ({"seed": 1}, {"replicates": 32}, {"jackknife": None}, {"digest": "e"}):
        assert figures.ranks(pd.DataFrame([shared[0], shared[1] | change]), "lower") == {"a": (1, 1), "b": (2, 2)}
    assert len(asked) == 1
    noiseless = shared[0] | {"label": "exact", "value": 0.0, "low": math.nan, "high": math.nan, "jackknife": None}
    found = figures.ranks(pd.DataFrame([*shared, noiseless]), "lower")
    assert found == {"exact": (1, 1), "a": (2, 3), "b": (2, 3)}


def test_common_noise_tells_ranks_apart_where_intervals_overlap() -> None:
    common = np.array([0.10, -0.10, 0.08, -0.07, 0.02, -0.03])
    quiet = bare("quiet", 1.0, 0.7, 1.4, jackknife=list(1 + common))
    loud = bare("loud", 1.2, 0.8, 1.7, jackknife=list(1.2 * (1 + common)))
    of = cells(table(pd.DataFrame([quiet, loud]), "toy", "inference"))
    assert (of["quiet", "rank"].words, of["loud", "rank"].words) == ("1", "2")
    assert of["quiet", "variance"].bold
    other = cells(table(pd.DataFrame([quiet, loud | {"replicates": 128}]), "toy", "inference"))
    assert other["quiet", "rank"].words == "1–2"


def test_mean_squared_errors_are_marked_and_explained() -> None:
    loud = bare("mine", 1.0, 0.9, 1.1, biased=True, tails="heavy")
    error = loud | {"metric": "mse", "value": -0.1, "low": -0.3, "high": 0.1}
    made = table(pd.DataFrame([bare("good", 2.0, 1.8, 2.2), loud, error]), "toy", "inference")
    assert cells(made)["mine", "mse"].signs == "¶"
    assert tables.NEGATIVE in made.notes
    assert tables.NEGATIVE not in table(pd.DataFrame([loud, error | {"value": 0.1}]), "toy", "inference").notes


def test_a_directional_ratio_without_an_interval_is_explained() -> None:
    rows = [bare("mine", 1.0, 0.9, 1.1), bare("mine", 0.1, math.nan, math.nan, metric="directional_snr")]
    rows[1]["stderr"] = math.nan
    assert tables.BARE in table(pd.DataFrame(rows), "toy", "inference").notes
    rows[1]["stderr"] = 0.01
    assert tables.BARE not in table(pd.DataFrame(rows), "toy", "inference").notes


def test_a_report_has_the_suites_own_words_and_the_formulas_of_what_it_shows(tmp_path: Path) -> None:
    rows = pd.DataFrame([*EVERY_MARK, bare("mine", 1.0, 0.9, 1.1, metric="bias", biased=True)])
    report.write(rows, tmp_path, {"html", "md"}, {}, {"title": "Mine & <b>", "description": "What it is for\n"})
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<h1>Gradient estimators compared: Mine &amp; &lt;b&gt;</h1>" in page
    assert "What it is for. " in page
    assert text.startswith("# Gradient estimators compared: Mine & <b>\n\nWhat it is for. ")
    assert all(f"<code>{name}</code>, version {METRICS[name].version}" in page for name in ("mse", "bias", "variance"))


EVERY_MARK = [
    bare("good", 2.0, 1.8, 2.2, checked=True),
    bare("mine", 1.0, 0.9, 1.1, biased=True, rescaled=True, tails="heavy"),
    bare("good", 1.0, 0.9, 1.1, checked=True, metric="seconds_per_gradient", kind="cost", group=""),
    bare("mine", 2.0, 1.9, 2.1, metric="seconds_per_gradient", kind="cost", group=""),
]


def test_every_writer_carries_every_mark() -> None:
    made = table(pd.DataFrame(EVERY_MARK), "toy", "inference")
    console = Console(width=140, file=StringIO())
    console.print(terminal.comparison(pd.DataFrame(EVERY_MARK), width=140))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (typeset.markdown(made), shown):
        line = next(line for line in text.splitlines() if "mine" in line)
        assert all(sign in line for sign in "†§∝¶")
        assert not any(sign in next(line for line in text.splitlines() if "good" in line) for sign in "†§∝¶")
        for note in ("† ", "§ declared biased", "∝ declared rescaled", "¶ heavy tails: the interval may be too short"):
            assert note in text
    tex = next(line for line in typeset.latex(made).splitlines() if "mine" in line)
    assert all(
        command in tex
        for command in (r"mine$^\dagger$", r"\textsuperscript{\S}", r"$^\propto$", r"\textsuperscript{\P}")
    )
    read = pd.read_csv(StringIO(typeset.csv(made))).set_index("estimator")
    assert read.loc["mine", ["checked", "biased", "rescaled", "tails"]].tolist() == [False, True, True, "heavy"]
    assert read.loc["good", ["checked", "biased", "rescaled"]].tolist() == [True, False, False]


def test_the_page_carries_every_mark(tmp_path: Path) -> None:
    report.write(pd.DataFrame(EVERY_MARK), tmp_path, {"html"}, {})
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="row">mine †</th>' in page
    assert '<th scope="row">good</th>' in page
    assert "1.000 ± 0.050&thinsp;§∝¶" in page


def words_of(plot: canvas.Plot) -> list[str]:
    """Everything that a figure writes."""
    from matplotlib.text import Text

    return [text.get_text() for text in plot.figure.findobj(Text) if text.get_text()]


def test_every_figure_marks_what_is_unchecked_biased_or_heavy() -> None:
    several: list[dict[str, object]] = []
    for word, about in (("good", {"checked": True}), ("mine", {"biased": True, "tails": "heavy"})):
        for K in (1, 2, 4):
            for metric in ("variance", "snr", "mse"):
                several.append(
                    bare(f"{word}:K={K}", 1 / K, 0.9 / K, 1.1 / K, metric=metric, K=K, evaluations=float(K), **about)
                )
            time = {"metric": "seconds_per_gradient", "kind": "cost", "group": ""}
            several.append(bare(f"{word}:K={K}", K, 0.9 * K, 1.1 * K, K=K, **time, **about))
            run = {"metric": "test_elbo", "kind": "training", "group": "", "unit": "nats"}
            several += [
                bare(f"{word}:K={K}", -20 + s, -21, -19, K=K, step=float(s), seed=0, **run, **about) for s in (0, 9)
            ]
    made = plots.plots(pd.DataFrame(several))
    assert {plot.name.partition("-")[0] for plot in made} == {"variance", "snr", "cost", "evaluations", "training"}
    for plot in made:
        marks = "†" if plot.name.startswith("training") else "†§¶"
        mine, good = ([text for text in words_of(plot) if text.startswith(word)] for word in ("mine", "good"))
        assert mine, plot.name
        assert all(text.endswith(f" {marks}") for text in mine), (plot.name, mine)
        assert good, plot.name
        assert not any(sign in text for text in good for sign in "†§¶")
        assert "† has not passed a check." in plot.caption
        assert ("§ declared biased" in plot.caption) == (marks != "†")
    none = plots.plots(pd.DataFrame(several).assign(checked=False, biased=False, tails=""))
    assert all("†" not in " ".join(words_of(plot)) for plot in none)
    assert all("No estimator here has passed a check." in plot.caption for plot in none)


def test_points_of_a_panel_carry_the_marks_of_its_group() -> None:
    rows = [
        bare(word, value, 0.9 * value, 1.1 * value, group=group, biased=word == "mine" and group == "inference")
        for word, value in (("good", 1.0), ("mine", 2.0))
        for group in ("generative", "inference")
    ]
    rows.append(bare("mine", 2.0, 1.9, 2.1, group="inference", metric="mse", biased=True))
    time = {"metric": "seconds_per_gradient", "kind": "cost", "group": ""}
    rows += [bare(word, value, 0.9 * value, 1.1 * value, **time) for word, value in (("good", 1.0), ("mine", 2.0))]
    plot = next(plot for plot in plots.plots(pd.DataFrame(rows)) if plot.name == "cost-toy")
    shown = {axes.get_title(): {text.get_text() for text in axes.texts} for axes in plot.figure.axes}
    assert "mine" in shown["generative parameters"]
    assert "mine §" in shown["inference parameters"]


# Parts of a variance


def parts(tensor: str = "", randomness: str = "estimator", **columns: object) -> dict[str, object]:
    return {"tensor": tensor, "randomness": randomness} | columns


def test_shares_of_tensors_add_up_and_are_paired() -> None:
    common = np.array([0.1, -0.1, 0.05, -0.05])
    rows = [
        bare("a", v, 0.9 * v, 1.1 * v, jackknife=list(v * (1 + common)), **parts(f"encoder.{name}"))
        for name, v in (("0.weight", 3.0), ("0.bias", 1.0))
    ]
    made = table(pd.DataFrame([bare("a", 4.0, 3.6, 4.4), *rows]), "toy", "where the variance")
    assert [(column.heading, column.unit) for column in made.columns] == [("0.bias", "%"), ("0.weight", "%")]
    (line,) = made.lines
    assert [cell.value for cell in line.cells if cell] == pytest.approx([25.0, 75.0])
    assert all(cell.stderr < 1e-9 for cell in line.cells if cell), "common noise cancels"
    gradient = table(pd.DataFrame([bare("a", 4.0, 3.6, 4.4), *rows]), "toy", "gradient of")
    assert [cell.value for cell in gradient.lines[0].cells if cell] == [4.0], "a tensor is not taken for its group"


def test_the_minibatchs_part_stands_beside_the_estimators() -> None:
    rows = [
        bare("a", v, 0.9 * v, 1.1 * v, minibatches=32, **parts(randomness=part))
        for part, v in (("estimator", 1.0), ("minibatch", 3.0), ("both", 4.0))
    ]
    made = table(pd.DataFrame([bare("a", 2.0, 1.8, 2.2), *rows]), "toy", "by its source")
    assert [column.heading for column in made.columns] == ["of the estimator", "of the minibatch", "of both"]
    assert [cell.value for cell in made.lines[0].cells if cell] == [1.0, 3.0, 4.0]
    assert tables.ADD_UP in made.notes
    assert (
        cells(table(pd.DataFrame([bare("a", 2.0, 1.8, 2.2), *rows]), "toy", "gradient of"))["a", "variance"].value
        == 2.0
    )
    alone = tables.tables(pd.DataFrame([bare("a", 2.0, 1.8, 2.2)]))
    assert not any("source" in made.title or "sits" in made.title for made in alone)


def test_looks_are_distinct_and_the_same_whatever_else_is_shown(rows: pd.DataFrame) -> None:
    from gradiometer.bench.palette import looks

    all_of = looks(selection.tidy(rows))
    assert len({(look.colour, look.marker) for look in all_of.values()}) == len(all_of)
    shuffled = looks(selection.tidy(rows.sample(frac=1, random_state=5)))
    assert shuffled == all_of


def test_labels_of_crowded_points_do_not_cover_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from gradiometer.bench.placement import place_labels

    figure = Figure(figsize=(5, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(0.5 + 0.01 * i, 0.5 + 0.005 * (-1) ** i) for i in range(8)]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    place_labels(axes, points, [f"estimator:K={i}" for i in range(8)])
    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the lines to the points
    assert len(boxes) == 8
    for a, b in itertools.combinations(boxes, 2):
        assert not (a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1)


def test_plots_say_what_they_measure_and_come_in_every_format(few: pd.DataFrame) -> None:
    made = {plot.name: plot for plot in plots.plots(few)}
    assert {"variance-digits-vae", "snr-digits-vae", "snr-against-K-gaussian-toy", "cost-digits-vae@late"} <= set(made)
    assert "evaluations-gaussian-toy" in made
    assert {"training-elbo-digits-vae", "training-iwelbo-digits-vae"} <= set(made)
    assert all(len(plot.title) > 20 and len(plot.caption) > 60 for plot in made.values())
    plot = made["snr-digits-vae"]
    png, pdf, svg = (plots.rendered(plot, form) for form in ("png", "pdf", "svg"))
    width = int.from_bytes(png[16:20])
    assert png.startswith(b"\x89PNG")
    assert width > 1000, "200 dots per inch"
    assert pdf.startswith(b"%PDF")
    assert b"</svg>" in svg
    assert b"<dc:date>" not in svg
    words = [text.get_text() for text in plot.figure.axes[0].get_yticklabels()]
    assert sorted(words) == ["dreg:K=8", "iwae:K=8", "nvi:levels=4,K=8 †", "pathwise"]


# Findings


def shards(value: float, *relative: float) -> list[float]:
    return [value * (1 + r) for r in relative]


def test_a_paired_ratio_is_found_where_single_intervals_overlap() -> None:
    """Both estimators' noise is common: their intervals overlap, their ratio's does not hold one."""
    common = np.array([0.10, -0.10, 0.08, -0.07, 0.02, -0.03])
    own = 0.001 * np.arange(6)
    quiet = bare("quiet", 1.0, 0.7, 1.4, jackknife=list(1 + common))
    loud = bare("loud", 1.2, 0.8, 1.7, jackknife=list(1.2 * (1 + common + own)))
    said = findings(pd.DataFrame([quiet, loud]))["Variance at equal K"]
    assert len(said) == 1
    found = re.fullmatch(
        r"toy, inference parameters, K = 8: `quiet` has the lowest variance\. "
        r"That of `loud` is ([\d.]+) \(([\d.]+) to ([\d.]+)\) times as large\.",
        said[0],
    )
    assert found, said
    logs = np.log(1.2 * (1 + common + own) / (1 + common))
    half = 2.570582 * math.sqrt(5 / 6 * ((logs - logs.mean()) ** 2).sum())  # Student's t, five degrees of freedom
    assert [float(v) for v in found.groups()] == pytest.approx(
        [1.2, 1.2 * math.exp(-half), 1.2 * math.exp(half)], abs=6e-4
    )


def test_a_ratio_that_may_be_one_is_not_called_a_win() -> None:
    a = bare("a", 1.0, 0.7, 1.4, jackknife=shards(1.0, 0.1, -0.1, 0.05, -0.05))
    b = bare("b", 1.02, 0.7, 1.4, jackknife=shards(1.02, -0.1, 0.1, -0.05, 0.05))
    assert "cannot be told apart" in findings(pd.DataFrame([a, b]))["Variance at equal K"][0]


def test_rows_without_shards_or_of_other_noise_are_not_paired() -> None:
    pair = shards(1.0, 0.01, -0.01, 0.0)
    a, b = bare("a", 1.0, 0.9, 1.1, jackknife=pair), bare("b", 2.0, 1.9, 2.1)
    assert findings(pd.DataFrame([a, b])) == {}
    assert findings(pd.DataFrame([a, b | {"jackknife": pair, "replicates": 128}])) == {}
    assert findings(pd.DataFrame([a | {"digest": "1"}, b | {"jackknife": pair, "digest": "2"}])) == {}
    assert findings(pd.DataFrame([a, b | {"jackknife": pair}])) != {}


def test_a_biased_estimator_is_judged_by_its_mean_squared_error_alone() -> None:
    pair = {"jackknife": shards(1.0, 0.01, -0.01, 0.005)}
    good, low = bare("good", 1.0, 0.9, 1.1, **pair), bare("low", 0.1, 0.09, 0.11, biased=True)
    low["jackknife"] = shards(0.1, 0.01, 0.01, -0.01)
    said = " ".join(sentence for topic in findings(pd.DataFrame([good, low])).values() for sentence in topic)
    assert "low" not in said, "its bias is unknown"
    error = low | {"metric": "mse", "value": 2.0, "jackknife": shards(2.0, 0.01, 0.0, -0.01)}
    said = findings(pd.DataFrame([good, low, error]))["Variance at equal K"][0]
    assert "`good` has the lowest mean squared error. That of `low` (biased) is 2.00" in said
    honest = findings(pd.DataFrame([good, low | {"biased": False}]))["Variance at equal K"][0]
    assert "`low` has the lowest variance" in honest


def test_findings_say_what_is_unchecked_and_what_has_heavy_tails() -> None:
    rows = [
        bare("a", 1.0, 0.9, 1.1, jackknife=shards(1.0, 0.01, -0.01, 0.005), checked=True),
        bare("b", 2.0, 1.8, 2.2, jackknife=shards(2.0, 0.01, 0.02, -0.01), tails="heavy"),
    ]
    found = findings(pd.DataFrame(rows))
    assert "That of `b` (unchecked, heavy tails) is" in found["Variance at equal K"][0]
    assert "Checks" not in found
    assert findings(pd.DataFrame(rows).assign(checked=False))["Checks"][0].startswith(
        "No estimator here has passed a check"
    )


def with_norms(word: str, K: int, variance: float, seed: int, **columns: object) -> list[dict[str, object]]:
    """Variance and norm of a mean gradient of two, at K evaluations."""
    noise = 0.01 * np.random.default_rng(seed).standard_normal((2, 16))
    about = {"K": K, "evaluations": float(K)} | columns
    quantities = zip(("variance", "gradient_norm"), (variance, 2.0), noise, strict=True)
    return [
        bare(f"{word}:K={K}", v, 0.9 * v, 1.1 * v, jackknife=list(v * (1 + n)), metric=m, **about)
        for m, v, n in quantities
    ]


def test_the_k_that_makes_the_most_of_a_budget_is_found() -> None:
    rows = [*with_norms("iwae", 8, 8.0, 0), *with_norms("iwae", 32, 4.0, 1)]
    (said,) = findings(pd.DataFrame(rows))["K at a fixed budget"]
    found = re.fullmatch(
        r"toy, inference parameters: `iwae`: K = 8 makes the most of a budget of evaluations "
        r"\(K = 32 needs ([\d.]+) \(([\d.]+) to ([\d.]+)\) times as many for the same relative error\)\.",
        said,
    )
    assert found, said
    assert float(found[1]) == pytest.approx(2.0, rel=0.05)
    assert float(found[2]) < float(found[1]) < float(found[3])
    more = [*with_norms("iwae", 8, 8.0, 0), *with_norms("iwae", 32, 1.0, 1)]
    assert "K = 32 makes the most" in findings(pd.DataFrame(more))["K at a fixed budget"][0]


def test_ks_that_make_as_much_of_a_budget_are_tied() -> None:
    rows = [*with_norms("iwae", 8, 8.0, 0), *with_norms("iwae", 16, 4.0, 1), *with_norms("iwae", 64, 4.0, 2)]
    (said,) = findings(pd.DataFrame(rows))["K at a fixed budget"]
    assert "K = 8 and 16 cannot be told apart in what they make of a budget of evaluations (K = 64 needs" in said
    alone = findings(pd.DataFrame(with_norms("iwae", 8, 8.0, 0)))
    assert "K at a fixed budget" not in alone


def test_a_bias_shrinks_with_no_budget() -> None:
    rows = [*with_norms("low", 8, 8.0, 0, biased=True), *with_norms("low", 32, 4.0, 1, biased=True)]
    assert "K at a fixed budget" not in findings(pd.DataFrame(rows))


def test_a_budget_of_seconds_is_the_machines() -> None:
    rows = [*with_norms("iwae", 8, 8.0, 0), *with_norms("iwae", 32, 4.0, 1)]
    time = {"metric": "seconds_per_gradient", "kind": "cost", "group": ""}
    rows += [bare(f"iwae:K={K}", 1.0, 0.99, 1.01, K=K, **time) for K in (8, 32)]
    said = findings(pd.DataFrame(rows))["K at a fixed budget"]
    assert len(said) == 2
    assert "K = 32 makes the most of a budget of seconds on this machine (K = 8 needs" in said[1]


def test_flips_and_slopes_are_found(rows: pd.DataFrame) -> None:
    said = findings(rows)
    flips = " ".join(said["Rankings that flip along training"])
    assert re.search(
        r"inference parameters: at @init the variance of `dreg:K=64` is 3\.1\d+ .* times that of `iwae:K=64`", flips
    )
    slopes = " ".join(said["SNR against K"])
    exponents = [float(found) for found in re.findall(r"`dreg`.*?K\^\(([\d.]+) ± .*?K\^\(([\d.]+) ±", slopes)[0]]
    assert exponents == pytest.approx([0.5, 0.5], abs=0.02)
    assert "not separated from `iwae:K=8`" in " ".join(said["The model after training"])


def test_no_flip_is_said_where_rankings_hold(rows: pd.DataFrame) -> None:
    steady = rows[rows["estimator"].isin(["reinforce:K=8", "rloo:K=8"])]
    assert "Rankings that flip along training" not in findings(steady)


# Pages


def test_the_page_is_self_contained_and_complete(written: Path, few: pd.DataFrame) -> None:
    page = (written / "report.html").read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert not re.search(r"https?://", page)
    assert page.count("data:image/svg+xml;base64,") == len(plots.plots(few))
    assert page.count("<table") == sum(bool(t.lines) for t in tables.tables(few)) + 1
    for words in (
        "Main findings",
        "jackknife",
        "2026-11-20",
        "torch 2.13.0",
        "iwae:K=8",
        "synthetic",
        "is the Monte-Carlo variance",
    ):
        assert words in page
    assert "Trace of the covariance of one gradient" in page, "definitions come from METRICS"


def test_hostile_words_are_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    hostile = [bare(evil, 1, 1, 1, suite=evil, problem=f"{evil}@late"), bare("b", 3, 2, 4, problem=f"{evil}@late")]
    hostile.append(bare("c", 1, 1, 1, metric="", status="failed", reason=f"{evil} | <b>", problem=f"{evil}@late"))
    report.write(pd.DataFrame(hostile), tmp_path, {"html", "md", "csv"}, {evil: evil, "versions": {evil: evil}})
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert page.count("<script>") == 1, "our own"
    assert all(path.parent in (tmp_path, tmp_path / "tables") for path in tmp_path.rglob("*.*")), (
        "names stay in the folder"
    )


def test_files_are_where_they_should_be(written: Path) -> None:
    assert (written / "tables" / "digits-vae-late-gradient-of-the-inference-parameters.tex").stat().st_size > 1000
    assert (written / "tables" / "digits-vae-late-gradient-of-the-inference-parameters.csv").stat().st_size > 1000
    text = (written / "report.md").read_text()
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert images
    assert all((written / image).stat().st_size > 5000 for image in images)


def digests(out: Path) -> dict[str, str]:
    found = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_the_same_rows_in_any_order_and_process_give_the_same_bytes(
    few: pd.DataFrame, written: Path, tmp_path: Path
) -> None:
    """Another order of the rows, another process, another hash seed."""
    few.sample(frac=1, random_state=7).to_pickle(tmp_path / "rows.pickle")
    script = (
        "import sys, pandas; from pathlib import Path; from gradiometer.bench import report\n"
        "from tests.synthetic import MACHINE\n"
        "rows, out = pandas.read_pickle(sys.argv[1]), Path(sys.argv[2])\n"
        "report.write(rows, out, {'html', 'md', 'tex', 'csv', 'svg'}, MACHINE)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "rows.pickle"), str(tmp_path / "again")]
    root = str(Path(__file__).parents[1])
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "12345", "PATH": "", "MPLBACKEND": "Agg"}, cwd=root)
    assert digests(tmp_path / "again") == digests(written)


def test_wrong_requests_are_answered_in_a_sentence(few: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"unknown report format 'htlm': did you mean 'html'\?"):
        report.write(few, tmp_path, {"htlm"}, {})
    with pytest.raises(RequestError, match="there are html, md, tex, csv, png, svg, pdf"):
        report.write(few, tmp_path, {"docx!"}, {})
    with pytest.raises(RequestError, match="no rows to report"):
        report.write(few.iloc[:0], tmp_path, {"html"}, {})
    assert not list(tmp_path.iterdir())


def test_a_run_without_any_result_still_reports_why(rows: pd.DataFrame, tmp_path: Path) -> None:
    report.write(rows[rows["status"] != "ok"], tmp_path, {"html", "md", "tex", "csv"}, {})
    for name in (
        "report.html",
        "report.md",
        "tables/digits-vae-late-unmeasured.tex",
        "tables/digits-vae-late-unmeasured.csv",
    ):
        assert "disarm needs a Bernoulli guide" in (tmp_path / name).read_text()


def test_importing_the_report_draws_nothing_yet() -> None:
    script = (
        "import sys, gradiometer.bench.report; print({'torch', 'seaborn', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""What every expert would look for first, in the committed rows of the quickstart; and figures that the rows still make."""

from io import StringIO
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from gradiometer.bench import report, store, tables, typeset
from gradiometer.bench.compare import ratios

FOLDER = Path(__file__).parents[1] / "results" / "quickstart"
SNAPSHOTS = ("init", "early", "late")


@pytest.fixture(scope="module")
def rows():
    return store.load(FOLDER)


def ratio(rows, problem, group, estimator, baseline, metric="variance"):
    found = ratios(rows[rows["problem"] == problem], metric, baseline)
    (one,) = (r for r in found if (r.group, r.estimator) == (group, estimator))
    assert one.paired
    return one.value


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_the_score_function_without_a_baseline_is_a_hundred_times_noisier(rows, snapshot):
    assert ratio(rows, f"digits-vae@{snapshot}", "inference", "reinforce:K=8", "rloo:K=8").low > 100


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
@pytest.mark.parametrize("K", ["", ":K=8"])
def test_sticking_the_landing_is_quieter(rows, snapshot, K):
    assert ratio(rows, f"digits-vae@{snapshot}", "inference", f"stl{K}", f"sgvb-a{K}").high < 1


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_the_closed_form_divergence_leaves_the_generative_mean_alone(rows, snapshot):
    of = rows[(rows["problem"] == f"digits-vae@{snapshot}") & (rows["group"] == "generative")]
    norms = of[of["metric"] == "gradient_norm"].set_index("estimator")
    a, b = norms.loc["sgvb-a"], norms.loc["sgvb-b"]
    assert a["low"] < b["value"] < a["high"]
    cosine = of[of["metric"] == "cosine"].set_index("estimator")
    assert cosine.loc["sgvb-b", "value"] == pytest.approx(cosine.loc["sgvb-a", "value"], rel=1e-4)


def test_with_more_particles_iwae_gets_worse_and_dreg_better(rows):
    of = rows[(rows["problem"] == "gaussian-toy") & (rows["group"] == "inference")].set_index(["metric", "estimator"])
    for word, falls in (("iwae", True), ("dreg", False)):
        snr = [of.loc[("snr", f"{word}:K={K}")] for K in (8, 32, 128)]
        floors = [of.loc[("snr_floor", f"{word}:K={K}"), "value"] for K in (8, 32, 128)]
        assert all(value["low"] > 1.5 * floor for value, floor in zip(snr, floors, strict=True))
        for before, after in pairwise(snr):
            assert after["high"] < before["low"] if falls else after["low"] > before["high"]


def test_evaluations_stand_beside_every_comparison(rows):
    compared = rows[rows["kind"].isin(["gradient", "cost"]) & (rows["status"] == "ok")]
    assert (compared["K"] >= 1).all()
    assert (compared["evaluations"] >= 1).all()
    absent = compared[compared["value"].isna()]
    # The softmax of two increments moves along one line, so no noise lies across its mean gradient.
    assert set(zip(absent["metric"], absent["group"], strict=True)) <= {("directional_snr", "path")}


def test_committed_tables_are_those_of_the_rows(rows, tmp_path):
    written = report.write(rows, tmp_path, {"csv", "md"}, store.machine(FOLDER), store.index(FOLDER))
    found = [path for path in written if path.suffix == ".csv"]
    assert found
    for path in found:
        assert path.read_bytes() == (FOLDER / path.relative_to(tmp_path)).read_bytes(), path.name


def test_csv_carries_the_signs_of_the_tables(rows: pd.DataFrame) -> None:
    columns = {"§": "biased", "ℓ": "learned", "‡": "snr at floor"}
    seen = set()
    for table in tables.tables(rows):
        if not table.lines:
            continue
        read = pd.read_csv(StringIO(typeset.csv(table)), keep_default_na=False)
        for line, (_, of) in zip(table.lines, read.iterrows(), strict=False):
            signs = {sign for cell in line.cells if cell for sign in cell.signs}
            seen |= signs
            assert {sign for sign, name in columns.items() if name in of and of[name] in (True, "True")} == signs & set(
                columns
            )
            bold = {column.metric for column, cell in zip(table.columns, line.cells, strict=True) if cell and cell.bold}
            assert {
                m.removesuffix(" alone first")
                for m in of.index
                if m.endswith("alone first") and of[m] in (True, "True")
            } == bold
    assert seen >= set(columns)

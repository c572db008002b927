"""The store: whole files or none, nothing executed, nothing lost, and no torch."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from gradiometer.bench import Problem, measure, measure_all, store
from gradiometer.bench.cli import main
from gradiometer.bench.errors import RequestError
from gradiometer.bench.models.toys import GaussianToy

MANIFEST = {"date": "2026-11-20", "torch": "2.13.0"}


def rows(**columns: Any) -> list[dict[str, Any]]:
    """Two rows of a gradient cell."""
    shared = {
        "kind": "gradient",
        "problem": "toy@late",
        "estimator": "iwae:K=2",
        "K": 2,
        "B": 3,
        "seed": 0,
        "status": "ok",
    }
    shared |= {"metric": "variance", "value": 2.0, "stderr": 0.1, "low": 1.8, "high": 2.2, "jackknife": [1.9, 2.1]}
    shared |= {"evaluations": 2.0, "device": "cpu", "version": 1, "replicates": 16}
    return [shared | {"group": group} | columns for group in ("generative", "inference")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished suite of two cells."""
    store.open_for_writing(tmp_path)
    store.write_index(tmp_path, "mine", "Mine", "", ["a" * 12, "b" * 12])
    store.write_cell(tmp_path, "a" * 12, rows(), MANIFEST)
    store.write_cell(tmp_path, "b" * 12, rows(estimator="stl", jackknife=None), MANIFEST | {"date": "2026-11-21"})
    return tmp_path


def test_rows_measured_in_python_are_reported_and_compared(tmp_path: Path) -> None:
    toy, folder = Problem(GaussianToy(units=2), torch.zeros(5, 2), name="mine"), tmp_path / "mine"
    store.keep([row for m in measure_all(toy, ["iwae:K=4", "dreg:K=4"], replicates=64) for row in m.rows()], folder)
    store.keep(measure(toy, "stl:K=4", replicates=64).rows(), folder)
    store.keep(measure(toy, "stl:K=4", replicates=128).rows(), folder)  # in the place of the one before
    rows = store.load(folder)
    assert rows.groupby("estimator")["replicates"].max().to_dict() == {"dreg:K=4": 64, "iwae:K=4": 64, "stl:K=4": 128}
    assert not rows.duplicated(["estimator", "group", "metric"]).any()
    done = CliRunner().invoke(main, ["compare", str(folder), "--baseline", "iwae:K=4"])
    assert done.exit_code == 0
    assert "the replicates of iwae:K=4" in " ".join(done.output.split())
    assert CliRunner().invoke(main, ["report", str(folder), "--format", "md"]).exit_code == 0
    assert "iwae:K=4" in (folder / "report.md").read_text(encoding="utf-8")
    store.write_index(tmp_path, "quickstart", "", "", [])
    with pytest.raises(RequestError, match="holds results of 'quickstart'"):
        store.keep([], tmp_path)


def test_rows_come_back_as_they_went_in(folder: Path) -> None:
    table = store.load(folder)
    stored = table[table["metric"] == "variance"]
    assert list(table.columns) == list(store.COLUMNS)
    assert list(stored["cell"]) == ["a" * 12] * 2 + ["b" * 12] * 2
    assert set(stored["suite"]) == {"mine"}
    assert list(stored["group"]) == ["generative", "inference"] * 2
    assert stored["jackknife"].iloc[0] == [1.9, 2.1]
    assert stored["jackknife"].iloc[2] is None
    assert list(stored["manifest"]) == ["2026-11-20"] * 2 + ["2026-11-21"] * 2


def test_rows_say_which_machine_they_were_made_on(folder: Path) -> None:
    store.write_cell(folder, "a" * 12, rows(), {"machine": "a processor", "gpu": "a card"})
    store.write_cell(folder, "b" * 12, rows(device="cuda:1"), {"machine": "a processor", "gpu": "a card"})
    table = store.load(folder)
    assert dict(table[["cell", "machine"]].to_numpy()) == {"a" * 12: "a processor", "b" * 12: "a card"}
    store.write_cell(folder, "b" * 12, rows(), MANIFEST)
    assert set(store.load(folder)["machine"]) == {"a processor", ""}, "an older record does not say"


def test_what_all_rows_share_is_written_once(folder: Path) -> None:
    record = json.loads((folder / "cells" / f"{'a' * 12}.json").read_text())
    assert record["rows"] == [{"group": "generative"}, {"group": "inference"}]
    assert record["shared"]["value"] == 2.0


def test_columns_have_their_types_whatever_is_absent(folder: Path) -> None:
    store.write_cell(
        folder, "b" * 12, [{"kind": "gradient", "problem": "toy", "estimator": "stl", "status": "skipped"}], {}
    )
    table = store.load(folder)
    numbers = [
        "value",
        "stderr",
        "low",
        "high",
        "step",
        "seconds",
        "K",
        "B",
        "evaluations",
        "seed",
        "replicates",
        "minibatches",
        "version",
    ]
    assert all(pd.api.types.is_numeric_dtype(table[name]) for name in numbers)
    assert table["checked"].dtype == bool
    assert not any(table[name].isna().any() for name in store.TEXT)
    skipped = table[table["status"] == "skipped"]
    assert len(skipped) == 1
    assert skipped["metric"].item() == ""
    assert math.isnan(skipped["value"].item())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_on_disk_and_nan_in_the_table(folder: Path, number: float) -> None:
    store.write_cell(folder, "a" * 12, rows(stderr=number, low=[number, {"deep": number}], high=1.0), MANIFEST)
    text = (folder / "cells" / f"{'a' * 12}.json").read_text()
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    found = record["shared"] | record["rows"][1]
    assert (found["stderr"], found["low"], found["high"]) == (None, [None, {"deep": None}], 1.0)
    store.write_cell(folder, "a" * 12, rows(stderr=number), MANIFEST)
    table = store.load(folder)
    assert math.isnan(table["stderr"].iloc[0])
    assert table["stderr"].dtype == float


def test_floats_come_back_to_the_last_bit(folder: Path) -> None:
    exact = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0]
    store.write_cell(folder, "a" * 12, rows(jackknife=exact), MANIFEST)
    found = store.load(folder)["jackknife"].iloc[0]
    assert [number.hex() for number in found] == [number.hex() for number in exact]


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_write_that_is_cut_short_leaves_what_was_there(
    folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "cells").iterdir()}

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes") if moment == "write" else (os, "replace")), kill)
        with pytest.raises(Killed):
            store.write_cell(folder, "a" * 12, rows(value=3.0), MANIFEST)
    assert {path.name: path.read_bytes() for path in (folder / "cells").iterdir()} == before


def test_a_reader_never_sees_half_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment the new file appears under its name it is whole."""
    seen = []
    replace = os.replace

    def look(source: Any, target: Any) -> None:
        json.loads(Path(source).read_text())
        seen.append(json.loads(Path(target).read_text())["shared"]["value"])  # the old one, until then
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    store.write_cell(folder, "a" * 12, rows(value=3.0), MANIFEST)
    assert seen == [2.0]
    assert store.read_cell(folder, "a" * 12)["shared"]["value"] == 3.0


def test_a_full_disk_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RequestError, match=r"aaa\.json cannot be written: No space left on device"):
        store.write_cell(folder, "a" * 12, rows(), MANIFEST)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match=r"cannot write results to .*: Not a directory; name another folder"):
            store.open_for_writing(place)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_is_refused_and_left_alone(folder: Path, version: object) -> None:
    path = folder / "cells" / f"{'a' * 12}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    before = path.read_bytes()
    with pytest.raises(RequestError, match=r"aaa\.json has schema version .* and this gradiometer reads version 1"):
        store.load(folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"schema_version": 1}', b'{"schema_version": 1, "rows": []}',
     b'{"schema_version": 1, "manifest": {}, "shared": {}, "rows": []}'],
)  # fmt: skip
def test_a_damaged_cell_is_missing_and_said_to_be(
    folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cells" / f"{'a' * 12}.json").write_bytes(content)
    with caplog.at_level(logging.INFO, "gradiometer"):
        table = store.load(folder)
    assert set(table["cell"]) == {"b" * 12}
    assert f"1 of 2 cells in {folder} are missing or damaged: run the suite again to add them" in caplog.text
    assert store.machine(folder)["date"] == "2026-11-21"


def test_whole_results_say_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gradiometer"):
        store.load(folder)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b'{"suite": "x", "cells": 3}', b'{"cells": []}']
)
def test_a_damaged_index_is_a_sentence(folder: Path, content: bytes) -> None:
    (folder / "suite.json").write_bytes(content)
    for reader in (store.load, store.machine):
        with pytest.raises(RequestError, match=r"suite\.json is damaged: run the suite again"):
            reader(folder)


def test_a_folder_without_results_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(RequestError, match="holds no results"):
            store.load(place)


def test_cells_of_an_earlier_run_are_kept_but_not_reported(folder: Path) -> None:
    store.write_index(folder, "mine", "Mine", "", ["b" * 12])
    assert set(store.load(folder)["cell"]) == {"b" * 12}
    assert store.read_cell(folder, "a" * 12) is not None
    assert store.machine(folder)["date"] == "2026-11-21"


def test_a_suite_without_any_finished_cell_is_an_empty_table(tmp_path: Path) -> None:
    store.open_for_writing(tmp_path)
    store.write_index(tmp_path, "mine", "Mine", "", ["c" * 12])
    assert list(store.load(tmp_path).columns) == list(store.COLUMNS)
    assert store.load(tmp_path).empty
    assert store.machine(tmp_path) == {}


def test_reading_and_comparing_import_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gradiometer.bench import store; from gradiometer.bench.compare import ratios\n"
        f"ratios(store.load(Path({str(folder)!r})), 'variance', 'stl')\n"
        "assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

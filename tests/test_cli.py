"""The command line: what newcomers type, right and wrong; one sentence and exit status 2 for what cannot be."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gradiometer.bench import store
from gradiometer.bench.data.catalogue import ENTRIES
from gradiometer.bench.named import named_problem

Command = Callable[..., Result]
Refusal = Callable[..., str]
pytestmark = pytest.mark.usefixtures("forgotten")
TOY = "gaussian-toy:units=2"
MEASURE = ("measure", TOY, "--batch", 3, "--replicates", 16)
MINE = '''"""A stranger's file."""

from dataclasses import dataclass

from gradiometer.estimators import Coefficients, Facts, Weighted, register


@register
@dataclass(frozen=True)
class Mine(Weighted):
    """Importance weights, flattened."""

    temperature: float = 2.0
    facts = Facts("mine", family="strangers", objective="iwelbo", needs=("rsample",))

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"mine needs temperature > 0, not {self.temperature}")

    def coefficients(self, log_w):
        w = (log_w / self.temperature).softmax(0)
        return Coefficients(generative=w, pathwise=w**2)
'''
SUITE = f"""title = "Mine"
[[gradient]]
problems = ["{TOY}"]
estimators = ["iwae:K=2", "mine:K=2"]
batch = 3
replicates = 16
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    return path


@pytest.fixture
def results(tmp_path: Path, gradiometer: Command) -> Path:
    assert gradiometer(*MEASURE, "-e", "iwae:K=2", "-e", "dreg:K=2", "--out", tmp_path / "results").exit_code == 0
    return tmp_path / "results"


# Wrong requests.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["run"], "Missing argument 'SUITE|FILE.toml'"),
        (["run", "quikstart"], "unknown suite 'quikstart'; did you mean 'quickstart'?"),
        (["run", "nowhere.toml"], "no suite file nowhere.toml"),
        (["run", "quickstart", "--jobs", "0"], "'--jobs': 0 is not in the range x>=1"),
        (["run", "quickstart", "--ouy", "x"], "run has no option --ouy; did you mean '--out'?"),
        (["run", "quickstart", "--only", "drge*"], "no cell of quickstart matches --only 'drge*'"),
        (["run", "quickstart", "--only", ""], "no cell of quickstart matches --only ''"),
        (["run", "quickstart", "--set", "replicats=8"], "--set: no key 'replicats'; did you mean 'replicates'?"),
        (["run", "quickstart", "--device", "gpu"], "this machine has no device 'gpu'; --device cpu works everywhere"),
        (["--versio"], "gradiometer has no option --versio; did you mean '--version'?"),
        (["run", "quickstart", "--memory", "10GBB"], "--memory: should be an amount of memory, as in 2GB or 512MiB"),
        (["run", "quickstart", "--set", "memory=10GBB"], "--set memory: should be an amount of memory"),
        (["list", "estimatrs"], "nothing to list is called 'estimatrs'; did you mean 'estimators'?"),
        (["list", "metrics", "--plugin", "nowhere.py"], "no plugin file "),
        (["data", "mnits"], "unknown data set 'mnits'; did you mean 'mnist'?"),
        (["report"], "Missing argument 'DIR'"),
        (["report", "nowhere"], "nowhere holds no results (no suite.json in it)"),
        (["compare", "nowhere", "--baseline", "iwae"], "nowhere holds no results"),
        (["compare", "nowhere"], "Missing option '--baseline'"),
        (["compare", "x", "--baseline", "iwae", "--metric", "varience"], "unknown metric 'varience'; did you mean 'variance'?"),
        (["measure", TOY], "Missing option '-e'"),
        (["measure", "-e", "dreg"], "Missing argument 'PROBLEM'"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_sentence(
    words: list[str], said: str, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-e", "drge"], "unknown estimator 'drge'; did you mean 'dreg'?"),
        (["-e", "DReG"], "unknown estimator 'DReG'; did you mean 'dreg'?"),
        (["-e", ""], "unknown estimator ''; known: ciwae, concrete, disarm, "),
        (["-e", "dreg:"], "'dreg:' ends in its colon: write dreg, or options after it, as in dreg:K=8"),
        (["-e", "dreg:K"], "'K' in dreg:K should read key=value"),
        (["-e", "dreg:K="], "K of dreg should be a whole number, not ''"),
        (["-e", "dreg:K=1.5"], "K of dreg should be a whole number, not '1.5'"),
        (["-e", "dreg:K=8,K=9"], "'K' is given twice in dreg:K=8,K=9"),
        (["-e", "dreg:K=8,"], "'' in dreg:K=8, should read key=value"),
        (["-e", "dreg:k=8"], "dreg has no option 'k'; did you mean 'K'?"),
        (["-e", "dreg:K=0"], "dreg needs K >= 1, not K=0"),
        (["-e", "rloo:K=1"], "rloo needs K >= 2, not K=1"),
        (["-e", "nvi:levels=1"], "nvi needs levels >= 2 (the guide and the posterior), not levels=1"),
        (["-e", "nvi:path=curved"], "path of nvi should be one of linear, learned, not 'curved'"),
        (["-e", "moving-average:decay=nan"], "moving-average needs 0 <= decay < 1, not decay=nan"),
        (["-e", "dreg", "-e", "drge"], "unknown estimator 'drge'"),
        (["-e", "dreg", "-m", "varience"], "unknown metric 'varience'; did you mean 'variance'?"),
        (["-e", "dreg", "-m", "test_elbo"], "test_elbo is measured along training: run a suite with a [[training]] block"),
        (["-e", "dreg", "--reference", "drge"], "unknown estimator 'drge'; did you mean 'dreg'?"),
        (["-e", "dreg", "--replicates", "3"], "'--replicates': 3 is not in the range x>=4"),
        (["-e", "dreg", "--replicates", "-8"], "'--replicates': -8 is not in the range x>=4"),
        (["-e", "dreg", "--replicates", "many"], "'--replicates': 'many' is not a valid integer"),
        (["-e", "dreg", "--batch", "0"], "'--batch': 0 is not in the range x>=1"),
        (["-e", "dreg", "--batch", "1025"], "gaussian-toy has 1024 data points, fewer than a batch of 1025"),
        (["-e", "dreg", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["-e", "dreg", "--seed", str(10**30)], "is not in the range"),
        (["-e", "dreg", "--device", "gpu"], "this machine has no device 'gpu'"),
        (["-e", "dreg", "--device", "cuda:99"], "this machine has no device 'cuda:99'"),
        (["-e", "dreg", "--device", "meta"], "this machine has no device 'meta'"),
        (["-e", "dreg", "--replicats", "8"], "measure has no option --replicats; did you mean '--replicates'?"),
        (["-e", "dreg", "digits-vae@late"], "Got unexpected extra argument (digits-vae@late)"),
    ],
)  # fmt: skip
def test_a_wrong_measurement_is_one_sentence(words: list[str], said: str, refusal: Refusal) -> None:
    assert said in refusal("measure", TOY, *words)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precision", "lots"], "--precision: should be a part of the value, as in 5% or 0.05, not 'lots'"),
        (["--precision", "500%"], "--precision: should be less than 1"),
        (["--precision", "-5%"], "--precision: should be more than 0"),
        (["--memory", "2XB"], "--memory: should be an amount of memory, as in 2GB or 512MiB, not '2XB'"),
        (["--memory", "3"], "--memory: should be at least 1048576"),
        (["--budget", "99"], "--budget is what a precision may take: give --precision, too"),
        (["--device", "cpu,cpu"], "one comparison runs on one device, not on 'cpu,cpu'"),
        (["--engine", "fast"], "'fast' is not one of 'auto', 'rows', 'ghost', 'loop'"),
    ],
)
def test_a_wrong_way_to_measure_is_one_sentence(options: list[str], said: str, refusal: Refusal) -> None:
    assert said in refusal("measure", "gaussian-toy:units=2", "-e", "iwae:K=2", *options)


def test_devices_that_are_not_alike_or_not_there_are_one_sentence(refusal: Refusal, tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text(
        'title = "Mine"\n[[gradient]]\nproblems = ["gaussian-toy:units=2"]\nestimators = ["iwae:K=2"]\n',
        encoding="utf-8",
    )
    assert "are not alike" in refusal("run", suite, "--device", "cpu,meta")
    assert "this machine has no device 'nothing'" in refusal("run", suite, "--device", "nothing")


def test_precision_is_told_by_the_table(gradiometer: Command) -> None:
    asked = ("measure", "gaussian-toy:units=2", "-e", "iwae:K=4", "-m", "variance", "--replicates", "32")
    met = gradiometer(*asked, "--precision", "20%")
    unmet = gradiometer(*asked, "--precision", "1%", "--budget", "64")
    assert met.exit_code == unmet.exit_code == 0
    assert "Less precise than asked, when the budget was spent: iwae:K=4." in unmet.stdout
    assert "from 64 replicates" in unmet.stdout
    assert "Less precise" not in met.stdout


def test_squared_norms_are_taken_where_a_trace_is_asked_for(gradiometer: Command, tmp_path: Path) -> None:
    asked = ("measure", "gaussian-toy:units=2", "-e", "iwae:K=4", "--batch", "3", "--replicates", "32")
    variances = {}
    for name, more in (("all", ()), ("trace", ("-m", "variance"))):
        assert gradiometer(*asked, *more, "--out", tmp_path / name).exit_code == 0
        rows = store.load(tmp_path / name)
        variances[name] = rows[rows["metric"] == "variance"].set_index("group")["value"]
        assert set(rows["engine"]) == {"ghost" if name == "trace" else "rows"}
        assert ("snr" in set(rows["metric"])) == (name == "all")
    assert (variances["trace"] / variances["all"] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("command", ["measure", "run"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    command: str, refusal: Refusal, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    words = [*MEASURE, "-e", "dreg"] if command == "measure" else ["run", "quickstart"]
    for place in ("file", "file/below"):
        said = refusal(*words, "--out", tmp_path / place)
        assert said == f"cannot write results to {tmp_path / place}: Not a directory; name another folder with --out"
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def broken(:\n", "cannot be loaded: SyntaxError: "),
        ("raise RuntimeError('first line\\nsecond line')\n", "cannot be loaded: RuntimeError: first line"),
        ("import sys\nsys.exit(0)\n", "cannot be loaded: SystemExit: 0"),
        ("import no_such_package\n", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"),
        (MINE.replace('"mine"', '"dreg"'), "cannot be loaded: ValueError: two estimators are called 'dreg'"),
        (MINE.replace("    facts = ", "    claims = "), "cannot be loaded: AttributeError: "),
        ("\0", "cannot be loaded: "),
    ],
)
@pytest.mark.parametrize("command", ["measure", "list"])
def test_a_plugin_that_cannot_be_loaded_is_one_sentence(
    command: str, content: str, said: str, refusal: Refusal, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.py"
    path.write_text(content, encoding="utf-8")
    words = [*MEASURE, "-e", "iwae"] if command == "measure" else ["list", "estimators"]
    found = refusal(*words, "--plugin", path)
    assert f"the plugin {path} {said}" in found


def test_a_plugin_that_is_no_python_file_is_one_sentence(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text(MINE)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert "is not a Python file" in refusal(*MEASURE, "-e", "iwae", "--plugin", tmp_path / "theirs.txt")
    assert "cannot be loaded: SyntaxError" in refusal(*MEASURE, "-e", "iwae", "--plugin", tmp_path / "binary.py")
    assert "no plugin file" in refusal(*MEASURE, "-e", "iwae", "--plugin", tmp_path)
    assert "no plugin file" in refusal(*MEASURE, "-e", "iwae", "--plugin", tmp_path / "nowhere.py")


def test_strangers_estimators_refuse_in_their_own_words(refusal: Refusal, mine: Path, tmp_path: Path) -> None:
    assert refusal(*MEASURE, "-e", "mine:temperature=0", "--plugin", mine) == "mine needs temperature > 0, not 0.0"
    odd = tmp_path / "odd.py"
    odd.write_text(MINE.replace('"mine"', '"odd"').replace("raise ValueError", "raise KeyError"))
    assert refusal(*MEASURE, "-e", "odd:temperature=0", "--plugin", odd).startswith(
        "odd:temperature=0 cannot be built: KeyError"
    )


def test_a_truncated_data_file_is_one_sentence_and_left_alone(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ENTRIES["mnist"].sources[0].files:
        path = tmp_path / "data" / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(100))[:60])
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    monkeypatch.setenv("GRADIOMETER_DATA", str(tmp_path / "data"))
    named_problem.cache_clear()
    said = refusal("measure", "mnist-vae@late", "-e", "stl", "--out", tmp_path / "out")
    assert "is damaged or another file: expected sha256" in said
    assert "GRADIOMETER_DATA" in said
    asked = tmp_path / "mine.toml"
    asked.write_text(SUITE.replace('"mine:K=2"', '"stl"').replace(TOY, "mnist-vae@late"))
    assert "is damaged or another file" in refusal("run", asked, "--out", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


def test_a_data_folder_that_is_none_is_one_sentence(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIOMETER_DATA", str(tmp_path / "nowhere"))
    named_problem.cache_clear()
    assert "nowhere, which is not a folder" in refusal("measure", "mnist-vae@late", "-e", "stl")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_results_are_one_sentence(results: Path, content: str, refusal: Refusal) -> None:
    (results / "suite.json").write_text(content)
    for words in (["report", results], ["compare", results, "--baseline", "iwae:K=2"]):
        assert "suite.json is damaged: run the suite again" in refusal(*words)


def test_a_damaged_cell_is_said_to_be_missing_and_the_others_are_reported(results: Path, gradiometer: Command) -> None:
    first = store.index(results)["cells"][0]
    (results / "cells" / f"{first}.json").write_text("{")
    result = gradiometer("report", results, "--format", "md")
    assert result.exit_code == 0
    assert f"1 of 2 cells in {results} are missing or damaged: run the suite again to add them" in result.stderr
    assert "dreg:K=2" in (results / "report.md").read_text()
    assert "iwae:K=2" not in (results / "report.md").read_text()


DAMAGE = {
    "a row that is none": lambda record: record["rows"].append(1),
    "a value in words": lambda record: record["rows"][0].update(value="much"),
    "a list for a value": lambda record: record["rows"][0].update(value=[1.0]),
    "a K in words": lambda record: record["shared"].update(K="eight"),
    "no estimator": lambda record: record["shared"].pop("estimator"),
    "shards in words": lambda record: record["rows"][0].update(jackknife=["a"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_cell_of_other_things_is_damaged(damage: str, results: Path, gradiometer: Command) -> None:
    path = results / "cells" / f"{store.index(results)['cells'][0]}.json"
    record = json.loads(path.read_text())
    DAMAGE[damage](record)
    path.write_text(json.dumps(record))
    result = gradiometer("report", results, "--format", "md")
    assert result.exit_code == 0
    assert "1 of 2 cells" in result.stderr


def test_a_date_that_is_a_number_is_read(results: Path, gradiometer: Command) -> None:
    for path in (results / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        record["manifest"]["date"] = 2026
        path.write_text(json.dumps(record))
    assert gradiometer("report", results, "--format", "md").exit_code == 0


def test_comparisons_add_up_in_one_folder(results: Path, gradiometer: Command, refusal: Refusal) -> None:
    assert gradiometer(*MEASURE, "-e", "stl", "--out", results).exit_code == 0
    assert set(store.load(results)["estimator"]) == {"iwae:K=2", "dreg:K=2", "stl"}
    store.write_index(results, "quickstart", "Quickstart", "", store.index(results)["cells"])
    said = refusal(*MEASURE, "-e", "stl", "--out", results)
    assert said == f"{results} holds results of 'quickstart': name another folder with --out"
    assert set(store.load(results)["suite"]) == {"quickstart"}


def test_a_report_that_cannot_be_written_is_one_sentence(results: Path, refusal: Refusal) -> None:
    (results / "tables").write_text("precious")
    assert "cannot be written: " in refusal("report", results, "--format", "csv")
    (results / "report.md").mkdir()
    assert "report.md cannot be written: " in refusal("report", results, "--format", "md")
    assert (results / "tables").read_text() == "precious"
    assert not list(results.glob(".report*"))


def test_what_is_measured_along_training_is_not_compared(results: Path, refusal: Refusal) -> None:
    path = results / "cells" / f"{store.index(results)['cells'][0]}.json"
    record = json.loads(path.read_text())
    record["shared"]["kind"] = "training"
    record["rows"] = [row | {"metric": "test_elbo"} for row in record["rows"][:1]]
    path.write_text(json.dumps(record))
    said = refusal("compare", results, "--baseline", "dreg:K=2", "--metric", "test_elbo")
    assert said.startswith("'test_elbo' was measured along training alone, which is not compared; these were: ")


def test_words_in_brackets_are_printed_as_they_are(gradiometer: Command, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(MINE.replace("w = (", "raise RuntimeError('x[/foo] and [red]y[a]')\n        w = ("))
    result = gradiometer(*MEASURE, "-e", "stl", "-e", "mine:K=2", "--plugin", path)
    assert result.exit_code == 1
    assert "stl" in result.stdout
    assert "x[/foo] and [red]y[a]" in result.stdout


def test_an_estimator_that_leaves_is_a_failed_row(gradiometer: Command, tmp_path: Path) -> None:
    path = tmp_path / "leaver.py"
    path.write_text("import sys\n" + MINE.replace("w = (", "sys.exit(3)\n        w = ("))
    result = gradiometer(*MEASURE, "-e", "stl", "-e", "mine:K=2", "--plugin", path)
    assert result.exit_code == 1
    assert "stl" in result.stdout
    assert "mine:K=2 failed: SystemExit: 3" in result.stdout
    checked = gradiometer("check", path)
    assert checked.exit_code == 1
    assert "SystemExit" in checked.stdout


def test_a_problem_too_large_for_memory_is_one_sentence(refusal: Refusal) -> None:
    said = refusal("measure", "gaussian-toy:units=1000000000", "-e", "stl")
    assert said == "gaussian-toy:units=1000000000 is too large for this machine's memory"


def test_a_terminal_of_ascii_gets_its_table() -> None:
    command = [sys.executable, "-m", "gradiometer.bench.cli", *map(str, MEASURE), "-e", "stl"]
    made = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr
    assert b"stl" in made.stdout


def test_an_interrupted_comparison_is_one_line(monkeypatch: pytest.MonkeyPatch, gradiometer: Command) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradiometer.bench.cells.attempt_together", interrupt)
    result = gradiometer(*MEASURE, "-e", "stl")
    assert (result.exit_code, result.stderr) == (130, "\ninterrupted\n")


def test_results_without_a_finished_cell_are_one_sentence(tmp_path: Path, gradiometer: Command) -> None:
    store.open_for_writing(tmp_path)
    store.write_index(tmp_path, "mine", "Mine", "", ["a" * 12])
    result = gradiometer("report", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("holds no finished cells yet: run the suite first")


def test_results_of_another_version_are_one_sentence(results: Path, refusal: Refusal) -> None:
    path = next((results / "cells").glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    assert "has schema version 2, and this gradiometer reads version 1" in refusal("report", results)


def test_comparisons_that_cannot_be_are_one_sentence(results: Path, refusal: Refusal) -> None:
    for baseline in ("iwae", "stl", ""):
        said = refusal("compare", results, "--baseline", baseline)
        assert said == f"the baseline {baseline!r} was not measured here; these were: dreg:K=2, iwae:K=2"
    assert "'peak_memory' was not measured here" in refusal(
        "compare", results, "--baseline", "iwae:K=2", "--metric", "peak_memory"
    )


def test_a_baseline_may_be_written_as_it_was_asked_for(results: Path, gradiometer: Command) -> None:
    assert gradiometer("compare", results, "--baseline", "iwae:K=02").exit_code == 0


def test_unknown_formats_are_one_sentence(results: Path, refusal: Refusal, gradiometer: Command) -> None:
    assert "unknown report format 'htm': did you mean 'html'?" in refusal("report", results, "--format", "htm")
    assert "no report format is named" in refusal("report", results, "--format", "")
    assert gradiometer("report", results, "--format", "md, csv").exit_code == 0


# Right requests.


def test_a_measurement_that_fails_is_a_row_and_exit_status_one(gradiometer: Command, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(MINE.replace("w = (log_w", "raise KeyError('weights')\n        w = (log_w"))
    result = gradiometer(*MEASURE, "-e", "mine", "-e", "iwae:K=2", "--plugin", broken, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "mine failed: KeyError: 'weights'" in " ".join(result.stdout.split())
    rows = store.load(tmp_path / "out")
    assert rows[rows["status"] == "failed"]["reason"].tolist() == ["KeyError: 'weights' (broken.py, line 22)"]
    assert {"mine", "iwae:K=2"} == set(rows["estimator"])


def test_more_particles_than_memory_is_a_failed_row(gradiometer: Command) -> None:
    result = gradiometer(*MEASURE, "-e", "iwae:K=999999999999", "-e", "stl")
    assert result.exit_code == 1
    assert "failed" in result.stdout


def test_as_few_replicates_as_are_allowed_are_measured(gradiometer: Command) -> None:
    for replicates in (4, 5, 6, 7):
        result = gradiometer("measure", TOY, "-e", "iwae:K=2", "--batch", 3, "--replicates", replicates)
        assert result.exit_code == 0, result.output


def test_a_pair_that_cannot_be_is_skipped_with_advice(gradiometer: Command) -> None:
    result = gradiometer("measure", "bernoulli-toy", "-e", "dreg", "-e", "rloo:K=2", "--batch", 1, "--replicates", 16)
    assert result.exit_code == 0
    assert "dreg:K=8 skipped: dreg needs a reparameterisable guide; try rloo or vimco" in " ".join(
        result.stdout.split()
    )


def test_words_are_read_as_they_are_printed(gradiometer: Command, tmp_path: Path) -> None:
    gradiometer(*MEASURE, "-e", "iwae:K=02", "-e", "stl:K=1", "--out", tmp_path / "out")
    assert list(dict.fromkeys(store.load(tmp_path / "out")["estimator"])) == ["iwae:K=2", "stl"]


def test_cost_metrics_are_measured_where_asked_for(gradiometer: Command, tmp_path: Path) -> None:
    words = ("-e", "iwae:K=2", "-m", "peak_memory", "-m", "variance_seconds", "--out", tmp_path / "out")
    assert gradiometer(*MEASURE, *words).exit_code == 0
    rows = store.load(tmp_path / "out")
    assert {"peak_memory", "variance_seconds", "variance_evaluations"} <= set(rows["metric"])


def test_a_strangers_file_is_measured_run_and_listed(gradiometer: Command, mine: Path, tmp_path: Path) -> None:
    assert gradiometer(*MEASURE, "-e", "mine:K=2,temperature=3", "-e", "iwae:K=2", "--plugin", mine).exit_code == 0
    asked = tmp_path / "suite.toml"
    asked.write_text(SUITE)
    result = gradiometer("run", asked, "--jobs", 2, "--plugin", mine, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path / "out")
    assert set(rows[rows["metric"] == "variance"]["estimator"]) == {"iwae:K=2", "mine:K=2"}
    assert set(rows[rows["estimator"] == "mine:K=2"]["family"]) == {"strangers"}
    listed = gradiometer("list", "estimators", "--plugin", mine)
    assert "mine                    Importance weights, flattened." in listed.stdout.splitlines()
    assert gradiometer("report", tmp_path / "out", "--format", "md").exit_code == 0
    compared = gradiometer("compare", tmp_path / "out", tmp_path / "out", "--baseline", "iwae:K=2")
    assert compared.exit_code == 0
    lines = [line for line in compared.stdout.splitlines() if line.strip().startswith("mine:K=2 ")]
    assert len(lines) == 2, compared.stdout  # one per group, though the folder is named twice


def test_a_suite_that_needs_a_plugin_says_what_is_unknown_without_it(refusal: Refusal, tmp_path: Path) -> None:
    asked = tmp_path / "suite.toml"
    asked.write_text(SUITE)
    assert "suite.toml, line 4: unknown estimator 'mine'" in refusal("run", asked, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("thing", ["estimators", "problems", "suites", "metrics", "datasets"])
def test_lists_name_what_there_is(thing: str, gradiometer: Command) -> None:
    known = {
        "estimators": "dreg",
        "problems": "digits-vae@{init,early,late}",
        "suites": "quickstart",
        "metrics": "snr",
        "datasets": "mnist",
    }
    lines = gradiometer("list", thing).stdout.splitlines()
    assert known[thing] in [line.split()[0] for line in lines]
    assert all(len(line.split()) > 1 for line in lines)
    assert set(lines) <= {line.strip() for line in gradiometer("list").stdout.splitlines()}


def test_help_and_version_answer_without_anything_heavy() -> None:
    code = (
        "import sys; from gradiometer.bench.cli import main\n"
        "try: main(sys.argv[1:], prog_name='gradiometer')\n"
        "finally: print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'pandas', 'scipy', 'sklearn',"
        " 'matplotlib', 'seaborn', 'rich', 'pydantic', 'pebble', 'jinja2'}), file=sys.stderr)"
    )
    for words in (["--help"], ["--version"], ["run", "--help"], ["measure", "-h"], ["rnu"], ["run"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines()[-1] == "", (words, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m gradiometer.bench.cli list metrics | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stderr == ""


def test_a_pipe_is_as_wide_as_columns_says(gradiometer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["measure", "gaussian-toy:units=2", "-e", "stl", "--replicates", 16, "-m"]
    metrics = [
        "variance",
        "-m",
        "snr",
        "-m",
        "snr_corrected",
        "-m",
        "directional_snr",
        "-m",
        "cosine",
        "-m",
        "pareto_k",
    ]
    narrow = gradiometer(*asked, *metrics).stdout
    monkeypatch.setenv("COLUMNS", "200")
    wide = gradiometer(*asked, *metrics).stdout
    assert max(map(len, narrow.splitlines())) <= 120
    assert "narrow" in narrow
    assert "narrow" not in wide

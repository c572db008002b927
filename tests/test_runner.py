"""Running suites: the same rows however they are run, nothing lost when a run is killed, failures as rows."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from gradiometer.bench import cells as cells_module
from gradiometer.bench import named, runner, store
from gradiometer.bench.cells import HARNESS, Cell, run_together
from gradiometer.bench.errors import RequestError
from gradiometer.bench.records import FLOORS
from gradiometer.bench.runner import companies, finished, run
from gradiometer.estimators.registry import load_plugin

Command = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("forgotten")
HEADER = """
import os, signal, time
from dataclasses import dataclass
from gradiometer.estimators import Coefficients, Facts, Weighted, register
"""
CLASS = """
@register
@dataclass(frozen=True)
class {title}(Weighted):
    facts = Facts("{name}", family="strangers", objective="iwelbo", needs=("rsample",))

    def coefficients(self, log_w):
        {body}
        w = log_w.softmax(0)
        return Coefficients(generative=w, pathwise=w)
"""
SUITE = """title = "Mine"
[[gradient]]
problems = ["gaussian-toy:units=2"]
estimators = [{words}]
batch = 3
replicates = 16
"""


def plugin(path: Path, **bodies: str) -> Path:
    """A file of estimators, each named after its keyword; `bodies` are statements that come before its weights."""
    classes = [CLASS.format(title=name.title(), name=name, body=body) for name, body in bodies.items()]
    path.write_text(HEADER + "\n".join(classes), encoding="utf-8")
    return path


def suite(path: Path, *words: str, more: str = "") -> Path:
    path.write_text(SUITE.format(words=", ".join(f'"{word}"' for word in words)) + more, encoding="utf-8")
    return path


def stored(folder: Path) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """What a folder's cells hold, by what they measured; without what may differ from run to run."""
    found = {}
    for path in (folder / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        about = record["shared"] | record["rows"][0]
        assert record["cell"] == path.stem
        del record["manifest"]
        if about["kind"] == "training":
            for row in (record["shared"], *record["rows"]):
                row.pop("seconds", None)
        if about["kind"] == "cost":
            for row in record["rows"]:
                for timing in ("value", "stderr", "low", "high", "jackknife"):
                    if row["metric"] != "peak_memory":
                        row.pop(timing, None)
        found[about["kind"], about["problem"], about["estimator"], about["seed"]] = record
    return found


TRAINING = """
[[training]]
problems = ["digits-vae"]
estimators = ["stl"]
seeds = [0, 1]
steps = 4
every = 2
[[cost]]
problems = ["gaussian-toy:units=2"]
estimators = ["iwae:K=2"]
seconds = 0.01
"""


def test_rows_are_the_same_bits_whatever_the_jobs_the_company_and_the_folder(
    tmp_path: Path, gradiometer: Command
) -> None:
    words = ("iwae:K=2", "rloo:K=3", "moving-average", "nvi:levels=2,K=2")
    many = suite(tmp_path / "many.toml", *words, more=TRAINING)
    few = suite(tmp_path / "few.toml", "rloo:K=3")
    mine = plugin(tmp_path / "mine.py", mine="")
    assert gradiometer("run", many, "--out", tmp_path / "one").exit_code == 0
    assert gradiometer("run", many, "--out", tmp_path / "two", "--jobs", 2, "--plugin", mine).exit_code == 0
    assert gradiometer("run", few, "--out", tmp_path / "alone").exit_code == 0
    one, two, alone = (stored(tmp_path / folder) for folder in ("one", "two", "alone"))
    assert len(one) == 7
    assert one == two
    assert alone == {key: one[key] for key in alone}
    assert one["training", "digits-vae", "stl", 0]["rows"] != one["training", "digits-vae", "stl", 1]["rows"]
    assert [row["step"] for row in one["training", "digits-vae", "stl", 0]["rows"]] == [0, 0, 2, 2, 4, 4]


def test_a_finished_suite_is_left_alone_and_said_to_be(tmp_path: Path, gradiometer: Command) -> None:
    asked = suite(tmp_path / "mine.toml", "iwae:K=2", "stl")
    gradiometer("run", asked, "--out", tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out" / "cells").iterdir()}
    again = gradiometer("run", asked, "--out", tmp_path / "out", "--jobs", 2)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-1] == "nothing to do: all 2 cells are finished"
    assert {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out" / "cells").iterdir()
    } == before
    changed = gradiometer("run", asked, "--out", tmp_path / "out", "--set", "replicates=8")
    assert "2 ok" in changed.stdout
    assert len(store.index(tmp_path / "out")["cells"]) == 2
    assert set(store.load(tmp_path / "out")["replicates"]) == {8}
    assert all(path.read_bytes() == content for path, (_, content) in before.items())


FAULTS = {
    "raising": 'raise KeyError("no weights here")',
    "nan": "log_w = log_w * float('nan')",
    "slow": "time.sleep(60)",
    "leaving": "os._exit(3)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


def test_cells_that_fail_are_rows_with_reasons_and_are_tried_again(tmp_path: Path, gradiometer: Command) -> None:
    strangers = plugin(tmp_path / "strangers.py", **FAULTS)
    block = SUITE.partition("\n")[2].format(words='"slow"') + "time_limit = 1.5\n"
    asked = suite(tmp_path / "mine.toml", *[name for name in FAULTS if name != "slow"], "iwae:K=2", more=block)
    result = gradiometer("run", asked, "--out", tmp_path / "out", "--plugin", strangers, "--jobs", 2)
    assert result.exit_code == 1
    rows = store.load(tmp_path / "out")
    failed = rows[rows["status"] == "failed"].set_index("estimator")
    assert set(failed.index) == set(FAULTS)
    assert set(failed["metric"]) == {""}
    assert failed.loc["raising", "reason"] == "KeyError: 'no weights here' (strangers.py, line 12)"
    assert "is not finite" in failed.loc["nan", "reason"]
    assert failed.loc["slow", "reason"] == "it took longer than its time limit of 1.5 s"
    assert failed.loc["leaving", "reason"] == "its process died (exit code 3)"
    assert failed.loc["killed", "reason"] == "its process was killed: out of memory, most likely"
    assert not rows[(rows["estimator"] == "iwae:K=2") & (rows["metric"] == "variance")].empty
    for name in FAULTS:
        assert f"failed: gradient of {name} on gaussian-toy:units=2: {failed.loc[name, 'reason']}" in result.stderr
    again = gradiometer("run", asked, "--out", tmp_path / "out", "--plugin", strangers, "--only", "raising")
    assert again.exit_code == 1
    assert "1 failed" in again.stdout


def test_a_failure_that_was_mended_is_a_result(
    tmp_path: Path, gradiometer: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = plugin(tmp_path / "flaky.py", flaky='assert os.environ.get("MENDED"), "not yet"')
    asked = suite(tmp_path / "mine.toml", "flaky", "iwae:K=2")
    assert gradiometer("run", asked, "--out", tmp_path / "out", "--plugin", flaky).exit_code == 1
    monkeypatch.setenv("MENDED", "1")
    result = gradiometer("run", asked, "--out", tmp_path / "out", "--plugin", flaky)
    assert result.exit_code == 0
    assert "1 kept, 1 ok" in result.stdout
    assert set(store.load(tmp_path / "out")["status"]) == {"ok"}


def test_pairs_that_cannot_be_are_rows_with_reasons(tmp_path: Path, gradiometer: Command) -> None:
    asked = tmp_path / "mine.toml"
    asked.write_text(
        'title = "t"\n[[gradient]]\nproblems = ["bernoulli-toy"]\nestimators = ["dreg", "rloo:K=2"]\nreplicates = 16\n'
        '[[cost]]\nproblems = ["bernoulli-toy"]\nestimators = ["dreg"]\nseconds = 0.01\n'
        '[[training]]\nproblems = ["digits-vae-bernoulli"]\nestimators = ["dreg"]\nsteps = 1\nevery = 1\n'
    )
    result = gradiometer("run", asked, "--out", tmp_path / "out")
    assert result.exit_code == 0
    rows = store.load(tmp_path / "out")
    skipped = rows[rows["status"] == "skipped"]
    assert sorted(skipped["kind"]) == ["cost", "gradient", "training"]
    assert set(skipped["reason"]) == {"dreg needs a reparameterisable guide; try rloo or vimco"}
    again = gradiometer("run", asked, "--out", tmp_path / "out")
    assert "nothing to do: all 4 cells are finished" in again.stdout


def test_a_plugin_that_workers_cannot_load_is_the_reason(tmp_path: Path, gradiometer: Command) -> None:
    shy = plugin(tmp_path / "shy.py", shy="")
    shy.write_text(
        shy.read_text() + "import multiprocessing\nassert multiprocessing.parent_process() is None, 'only here'\n"
    )
    result = gradiometer("run", suite(tmp_path / "mine.toml", "shy"), "--out", tmp_path / "out", "--plugin", shy)
    assert result.exit_code == 1
    assert "shy.py cannot be loaded: AssertionError: only here" in store.load(tmp_path / "out")["reason"].item()


# Killed in the middle.


def children(process: int) -> list[int]:
    """The processes below a process, not those that have ended."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def begun(command: list[object], **options: Any) -> subprocess.Popen[str]:
    """A command in a session of its own that hears an interrupt, though these tests may run in the background of a shell."""
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*map(str, command)],
        start_new_session=True,
        preexec_fn=hears,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc for the workers of a run")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_loses_at_most_the_cells_in_flight(
    tmp_path: Path, how: signal.Signals, gradiometer: Command
) -> None:
    patient = plugin(tmp_path / "patient.py", patient='time.sleep(float(os.environ.get("NAP", "0")))')
    words = ["iwae:K=2", "stl", "patient:K=3", "patient:K=4", "patient:K=5"]  # one pass would serve equal K
    asked = suite(tmp_path / "mine.toml", *words)
    command = [
        sys.executable,
        "-m",
        "gradiometer.bench.cli",
        "run",
        asked,
        "--out",
        tmp_path / "cut",
        "--plugin",
        patient,
    ]
    process = begun([*command, "--jobs", "2"], env=os.environ | {"NAP": "30"})
    folder = tmp_path / "cut" / "cells"
    wait_until(lambda: len(list(folder.glob("*.json"))) >= 2 or process.poll() is not None)
    workers = children(process.pid)
    assert workers
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal sends it: to the workers, too
    else:
        process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9}.get(how, 130)
    if how != signal.SIGKILL:
        assert said == "\ninterrupted; finished cells are kept, and the same command goes on from here\n"
    wait_until(
        lambda: not any(map(running, workers)), 45
    )  # in flight, a worker whose parent was killed ends its cell first
    kept = {path: path.read_bytes() for path in folder.glob("*.json")}
    assert len(kept) >= 2
    assert all(json.loads(content)["rows"] for content in kept.values())
    result = gradiometer("run", asked, "--out", tmp_path / "cut", "--plugin", patient)
    assert result.exit_code == 0, result.stderr
    assert f"{len(kept)} kept, {len(words) - len(kept)} ok" in result.stdout
    assert all(path.read_bytes() == content for path, content in kept.items())
    gradiometer("run", asked, "--out", tmp_path / "whole", "--plugin", patient)
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc for the workers of a run")
def test_an_interrupt_while_workers_start_is_one_line(tmp_path: Path) -> None:
    asked = suite(tmp_path / "mine.toml", "iwae:K=2", "stl")
    command = [sys.executable, "-m", "gradiometer.bench.cli", "run", asked, "--out", tmp_path / "out", "--jobs", "2"]
    process = begun(command)
    wait_until(
        lambda: len(children(process.pid)) >= 3 or process.poll() is not None
    )  # two, and what cleans up after them
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "\ninterrupted; finished cells are kept, and the same command goes on from here\n"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc for the workers of a run")
def test_an_interrupt_ends_checks_that_still_wait() -> None:
    words = ["stl", "sgvb-a", "sgvb-b", "rloo:K=4", "iwae:K=4", "dreg:K=4", "vimco:K=4", "rws:K=4"]
    process = begun([sys.executable, "-m", "gradiometer.bench.cli", "check", *words, "--jobs", "2"])
    assert process.stdout.readline().startswith("stl")
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    cards, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "interrupted"
    assert "rws" not in cards
    wait_until(lambda: not any(map(running, workers)), 30)


def test_a_part_run_again_leaves_the_rest_in_the_report(tmp_path: Path, gradiometer: Command) -> None:
    asked, out = suite(tmp_path / "mine.toml", "iwae:K=2", "stl", "dreg:K=2"), tmp_path / "out"
    assert gradiometer("run", asked, "--out", out, "--only", "stl").exit_code == 0
    assert set(store.load(out)["estimator"]) == {"stl"}
    assert gradiometer("run", asked, "--out", out).exit_code == 0
    whole = store.index(out)["cells"]
    assert gradiometer("run", asked, "--out", out, "--only", "dreg*").exit_code == 0
    assert store.index(out)["cells"] == whole
    other = suite(tmp_path / "other.toml", "iwae:K=2", "rloo:K=2")
    assert gradiometer("run", other, "--out", out, "--only", "rloo*").exit_code == 0
    assert set(store.load(out)["estimator"]) == {"iwae:K=2", "rloo:K=2"}  # of this suite alone


def test_a_problem_without_its_data_fails_alone(
    tmp_path: Path, gradiometer: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIOMETER_DATA", str(tmp_path / "nowhere"))
    named.named_problem.cache_clear()
    cells_module._lacking.cache_clear()
    asked, out = tmp_path / "mine.toml", tmp_path / "out"
    text = SUITE.format(words='"stl"').replace("units=2", 'units=2", "mnist-vae@late')
    asked.write_text(text + '[[training]]\nproblems = ["mnist-vae"]\nestimators = ["stl"]\nsteps = 2\nevery = 1\n')
    for _ in range(2):  # it is tried again
        result = gradiometer("run", asked, "--out", out)
        assert result.exit_code == 1
        assert "gradient of stl on mnist-vae@late: " in result.stderr
        assert "training of stl on mnist-vae" in result.stderr
        assert "nowhere" in result.stderr
    rows = store.load(out)
    assert (rows[rows["status"] == "ok"]["problem"] == "gaussian-toy:units=2").all()
    assert set(rows[rows["status"] == "failed"]["problem"]) == {"mnist-vae@late", "mnist-vae"}
    cells_module._lacking.cache_clear()
    alone = tmp_path / "alone.toml"
    alone.write_text(SUITE.format(words='"stl"').replace("gaussian-toy:units=2", "mnist-vae@late"))
    result = gradiometer("run", alone, "--out", tmp_path / "none")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    cells_module._lacking.cache_clear()


# Keys.


def key(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = "") -> str:
    """The key of a cell of an estimator in a file, in which `old` was replaced by `new`."""
    folder.mkdir()
    path = plugin(folder / "mine.py", mine="log_w = 1.5 * log_w  # warmer")
    path.write_text(path.read_text().replace(old, new) if old else path.read_text())
    return key_of(path)


def key_of(path: Path) -> str:
    from gradiometer.estimators import registry

    registry._REGISTRY.pop("mine", None)
    load_plugin(path)
    return Cell("gradient", "gaussian-toy:units=2", "mine", 3, replicates=16).key


def test_a_changed_estimator_is_another_cell_and_a_changed_comment_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key(tmp_path / "a", monkeypatch)
    assert key(tmp_path / "b", monkeypatch, "  # warmer", "      # much warmer, and spaced") == first
    assert key(tmp_path / "c", monkeypatch, "1.5", "1.6") != first
    assert key(tmp_path / "d", monkeypatch, "w = log_w.softmax(0)", "w = log_w.softmax(0) * 1") != first


def test_a_changed_helper_is_another_cell_and_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of one's own that a plugin imports, be it by another."""
    from gradiometer.bench import records
    from gradiometer.estimators import parse

    def of(factor: str) -> tuple[str, str]:
        folder = tmp_path / factor
        folder.mkdir()
        (folder / "deeper.py").write_text(f"FACTOR = {factor}\n\n\ndef scaled(w):\n    return FACTOR * w\n")
        (folder / "helper.py").write_text("from deeper import scaled\n\n\ndef weights(w):\n    return scaled(w)\n")
        monkeypatch.syspath_prepend(str(folder))
        for name in ("deeper", "helper"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        records.source_of.cache_clear()
        cells_module.source_of.cache_clear()
        path = Path(plugin(folder / "mine.py", mine="log_w = weights(log_w)"))
        path.write_text("from helper import weights\n" + path.read_text())
        made = key_of(path)
        return made, records.code_of(parse("mine"))

    first = of("1.5")
    assert all(one != other for one, other in zip(first, of("1.6"), strict=True))


def test_a_changed_base_in_another_file_is_another_cell(tmp_path: Path) -> None:
    from gradiometer.estimators import registry

    def derived(folder: Path, factor: str) -> str:
        folder.mkdir()
        for name in ("mine", "derived"):
            registry._REGISTRY.pop(name, None)
        load_plugin(plugin(folder / "base.py", mine=f"log_w = {factor} * log_w"))
        text = HEADER + "from gradiometer.estimators import catalogue\n@register\n@dataclass(frozen=True)\n"
        text += 'class Derived(catalogue()["mine"]):\n    facts = Facts("derived", family="f", needs=("rsample",))\n'
        (folder / "derived.py").write_text(text)
        load_plugin(folder / "derived.py")
        return Cell("gradient", "gaussian-toy:units=2", "derived", 3, replicates=16).key

    assert derived(tmp_path / "a", "1.5") == derived(tmp_path / "b", "1.5") != derived(tmp_path / "c", "1.6")


def test_every_field_and_everything_behind_a_number_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:

    base = {
        "kind": "gradient",
        "problem": "gaussian-toy:units=2",
        "estimator": "iwae:K=2",
        "batch": 3,
        "replicates": 16,
    }
    changes: list[dict[str, Any]] = [
        {}, {"kind": "cost"}, {"problem": "gaussian-toy:units=3"}, {"estimator": "iwae:K=3"}, {"batch": 4}, {"seed": 1},
        {"replicates": 32}, {"reference": "stl"}, {"reference": "rloo:K=2"}, {"engine": "loop"}, {"device": "cuda"},
        {"dtype": "float64"}, {"threads": 2}, {"settle": 10}, {"tensors": True}, {"minibatches": 4}, {"minibatches": 5},
        {"kind": "training", "problem": "digits-vae", "steps": 3, "every": 1},
        {"kind": "training", "problem": "digits-vae", "steps": 3, "every": 1, "seed": 1},
        {"kind": "training", "problem": "digits-vae", "steps": 3, "every": 1, "learning_rate": 0.1},
    ]  # fmt: skip
    keys = [Cell(**(base | change)).key for change in changes]
    assert len(set(keys)) == len(keys)
    assert Cell(**base).key == keys[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        assert Cell(**base).key != keys[0]
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "processor", lambda: "another machine")
        assert Cell(**base).key == keys[0]  # moments belong to no machine, seconds do
        assert Cell(**(base | changes[1])).key != keys[1]
    with monkeypatch.context() as patch:
        patch.setattr(named, "HELD_OUT", 16)
        assert Cell(**(base | changes[-2])).key != keys[-2]
    source = cells_module.source_of
    for module in (*FLOORS, *HARNESS):
        with monkeypatch.context() as patch:
            patch.setattr(
                cells_module, "source_of", lambda name, m=module: "changed" if name.endswith(m) else source(name)
            )
            assert Cell(**base).key != keys[0], module


def test_every_module_that_makes_numbers_is_in_the_key() -> None:
    """Whatever the measurement imports of ours, but what enters the key by what it yields."""
    by_yield = {
        "bench.atomic", "bench.arguments", "bench.errors", "bench.machine", "bench.records",  # words and files
        "bench.metrics",  # by its versions
        "bench.named", "bench.models.settings", "bench.data",  # by the hash of parameters and data
        "estimators.lazily", "estimators.registry",  # by the word and the class it stands for
    }  # fmt: skip
    code = (
        "import sys, gradiometer.bench.cells as cells\n"
        "print(*(name.removeprefix('gradiometer.') for name in sys.modules if name.startswith('gradiometer.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    imported = {name for name in found.stdout.split() if not name.startswith("bench.data.")}
    packages = {"bench", "estimators", "bench.models"}
    assert imported - packages - by_yield - set(FLOORS) - set(HARNESS) == set()
    assert set(HARNESS) <= imported


# Company: cells that one pass serves.


def test_company_is_decided_by_the_cells_alone() -> None:
    cells = [
        Cell("gradient", "gaussian-toy:units=2", word, 3, replicates=16)
        for word in ("iwae:K=2", "stl", "dreg:K=2", "sgvb-b")
    ]
    alone = [
        replace(cells[0], **change) for change in ({"engine": "loop"}, {"seed": 1}, {"batch": 4}, {"precision": 0.1})
    ]
    groups = companies([(cell, 60.0) for cell in (*cells, *alone)])
    words = [[(cell.estimator, cell.seed) for cell, _ in group] for group in groups]
    assert words[:3] == [[("iwae:K=2", 0), ("dreg:K=2", 0)], [("stl", 0)], [("sgvb-b", 0)]]
    assert all(len(group) == 1 for group in groups[3:])


def test_rows_of_company_are_those_of_separate_runs(tmp_path: Path) -> None:
    words = ("iwae:K=4", "dreg:K=4", "rloo:K=4", "vimco:K=4")
    cells = [Cell("gradient", "gaussian-toy:units=5", word, 3, replicates=64, dtype="float64") for word in words]
    together = run_together(cells)
    for cell, rows in zip(cells, together, strict=True):
        for one, other in zip(cell.run(), rows, strict=True):
            for name in ("value", "low", "high"):
                assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-12, nan_ok=True), (
                    cell.estimator,
                    one["metric"],
                )
            assert one | {"value": 0, "stderr": 0, "low": 0, "high": 0, "jackknife": 0} == (
                other | {"value": 0, "stderr": 0, "low": 0, "high": 0, "jackknife": 0}
            )


def test_decompositions_keep_company_and_resume(tmp_path: Path) -> None:
    words = ("iwae:K=2", "dreg:K=2", "stl")
    of = {"replicates": 8, "minibatches": 4}
    cells = [(Cell("gradient", "gaussian-toy:units=2", word, 3, **of), 60.0) for word in words]
    one = replace(cells[0][0], minibatches=0)
    assert [len(group) for group in companies([*cells, (one, 60.0)])] == [2, 1, 1]
    store.open_for_writing(tmp_path)
    assert {o.status for o in run(cells, tmp_path, jobs=2)} == {"ok"}
    assert {o.status for o in run(cells, tmp_path)} == {"kept"}
    for cell, _ in cells:
        rows = cell.run()
        assert [(row["group"], row["randomness"]) for row in rows] == [
            (group, part) for group in ("generative", "inference") for part in ("estimator", "minibatch", "both")
        ]
        assert {(row["minibatches"], row["replicates"], row["B"], row["kind"]) for row in rows} == {
            (4, 8, 3, "gradient")
        }


def test_the_minibatches_themselves_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        named.named_problem.cache_clear()
        cells_module._drawn.cache_clear()
        return Cell("gradient", "gaussian-toy:units=2", "stl", 3, replicates=8, minibatches=4).key

    before = key()
    with monkeypatch.context() as patch:
        patch.setattr(named, "_rows", lambda data, indices, generator: data[indices].flip(0))
        assert key() != before
    assert key() == before


def test_one_that_fails_leaves_its_company_alone(tmp_path: Path, gradiometer: Command) -> None:
    broken = plugin(
        tmp_path / "broken.py", broken='raise RuntimeError("no weights today")', dying="os._exit(3)", whole=""
    )
    for bad, reason in (
        ("broken", "no weights today (broken.py, line 12)"),
        ("dying", "its process died (exit code 3)"),
    ):
        asked = suite(tmp_path / f"{bad}.toml", "iwae:K=2", f"{bad}:K=2", "whole:K=2")
        result = gradiometer("run", asked, "--out", tmp_path / bad, "--plugin", broken)
        assert result.exit_code == 1
        rows = store.load(tmp_path / bad)
        status = rows.groupby("estimator")["status"].first()
        assert status.to_dict() == {"iwae:K=2": "ok", f"{bad}:K=2": "failed", "whole:K=2": "ok"}
        assert reason in set(rows["reason"])


def test_several_devices_change_no_row(tmp_path: Path) -> None:
    cells = [(Cell("gradient", "gaussian-toy:units=2", f"iwae:K={K}", 3, replicates=16), 60.0) for K in (2, 3, 4)]
    for name, devices in (("one", ["cpu"]), ("two", ["cpu", "cpu"])):
        store.open_for_writing(tmp_path / name)
        assert {o.status for o in run(cells, tmp_path / name, devices=devices)} == {"ok"}
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


# What is kept.


def test_only_finished_cells_are_kept(tmp_path: Path) -> None:
    cell = Cell("gradient", "gaussian-toy:units=2", "iwae:K=2", 3, replicates=16)
    store.open_for_writing(tmp_path)
    assert finished(tmp_path, cell.key) is None
    for status, kept in (("failed", None), ("skipped", "skipped")):
        store.write_cell(tmp_path, cell.key, cell.without_numbers(status, "why"), {})
        assert finished(tmp_path, cell.key) == kept
    store.write_cell(tmp_path, cell.key, cell.run(), {})
    assert finished(tmp_path, cell.key) == "ok"
    path = tmp_path / "cells" / f"{cell.key}.json"
    path.write_text(path.read_text()[:100])
    assert finished(tmp_path, cell.key) is None


def test_a_cell_whose_rows_cannot_be_written_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    from gradiometer.bench import runner

    cell = Cell("gradient", "gaussian-toy:units=2", "iwae:K=2", 3, replicates=16)
    with pytest.raises(RequestError, match=r"cells/\w+\.json cannot be written: No such file or directory"):
        runner.run([(cell, 60.0)], tmp_path / "gone")


@pytest.mark.parametrize("words", [[], ["", "two lines"], ["first\nsecond"]])
def test_a_reason_is_one_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("gradient", "gaussian-toy:units=2", "iwae:K=2", 3, replicates=16)

    def run(_: Cell) -> None:
        raise OSError(*words)

    monkeypatch.setattr(Cell, "run", run)
    rows, status, reason = cell.attempt()
    assert status == "failed"
    assert reason
    assert "\n" not in reason
    assert [row["reason"] for row in rows] == [reason]


def test_a_worker_takes_a_device_that_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in ("cpu", "cuda", "cuda:1"):
        runner.take(device)
    assert taken == [torch.device("cuda:1")]


@pytest.mark.parametrize("kind", ["cost", "training"])
def test_what_a_kind_does_not_read_is_not_in_its_key(kind: str) -> None:
    base = Cell("cost", "gaussian-toy:units=2", "stl", 3)
    base = base if kind == "cost" else Cell("training", "digits-vae", "stl", 3, steps=3, every=1)
    assert replace(base, settle=7, memory=2**20, precision=0.5).key == base.key != replace(base, seed=1).key


def test_times_of_another_graphics_processor_are_other_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for name in ("one card", "another"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        keys.append(Cell("cost", "gaussian-toy:units=2", "stl", 3, device="cuda").key)
    assert len(set(keys)) == 2

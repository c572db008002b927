"""What the README says is so."""

import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from gradiometer.bench.cli import main
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.suite import BLOCKS, Suite, read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = next(code for code in PYTHON if "measured = measure(" in code)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["snr"].low < names["snr"].value < names["snr"].high
    assert names["measured"].mean["encoder.weight"].shape == (5, 5)
    assert {row["metric"] for row in names["rows"]} >= {"variance", "snr", "elbo"}
    assert CliRunner().invoke(main, ["report", "results/local/mine", "--format", "md"]).exit_code == 0


def test_the_rows_of_a_folder_are_a_table(tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    exec(compile(next(code for code in PYTHON if "load(" in code), "README.md", "exec"), {})
    estimators, seeds, _, first, *_ = (tmp_path / "curves.csv").read_text(encoding="utf-8").splitlines()
    assert {"estimator", "dreg:K=8", "stl"} <= set(estimators.split(","))
    assert {"seed", "0", "2"} <= set(seeds.split(","))
    assert all(float(value) < 0 for value in first.split(",")[1:])


def test_the_estimator_of_the_readme_is_checked_and_measured_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plugin = tmp_path / "tempered.py"
    plugin.write_text(next(code for code in PYTHON if "class Tempered" in code), encoding="utf-8")
    result = CliRunner().invoke(main, ["check", str(plugin)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "biased as declared" in result.output
    words = ["-e", "tempered:temperature=4", "-e", "dreg:K=8"]
    asked = ["measure", "gaussian-toy", *words, "--replicates", "64", "--plugin", str(plugin)]
    result = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "tempered:K=8,temperature=4.0" in result.output


def test_the_suite_of_the_readme_is_one_with_every_kind_of_block(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    _, suite = read(str(tmp_path / "mine.toml"), ())
    kinds = [cell.kind for cell, _ in suite.cells()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"gradient": 18 + 2 + 3 + 2, "cost": 6, "training": 6}
    keys = {name for block in BLOCKS.values() for name in block.model_fields} | {*Suite.model_fields}
    section = README.partition("## Write a suite")[2].partition("## ")[0]
    assert {name for name in keys if not re.search(rf"\b{name}\b", section)} == set()


def test_every_metric_is_explained_and_no_other():
    section = README.split("## What it measures")[1].split("##")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(METRICS)


@pytest.mark.parametrize("environment", re.findall(r"tox run -e ([\w-]+)", README))
def test_every_tox_environment_exists(environment):
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    sections = " ".join(tox.sections())
    assert re.search(rf"testenv:{environment.removesuffix('-cpu')}\b", sections)
    if environment.endswith("-cpu"):
        assert f"testenv:{environment.removesuffix('-cpu')}{{,-cpu}}" in sections


def test_every_command_and_no_other_is_shown():
    shown = set(re.findall(r"^(?:\$ )?gradiometer (\w+)", README, re.MULTILINE))
    assert shown == set(main.commands)


def test_supported_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    assert "torch>=2.6" in project["dependencies"]
    assert "torch 2.6 or later" in README


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target

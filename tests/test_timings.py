"""The script of ratios: it runs from end to end, and times the same job in every column."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import away
import pytest
import torch
from click.testing import CliRunner, Result

from gradiometer import bench
from gradiometer.bench import measure
from gradiometer.bench.gradients import Counted

PARTS = ("speed", "company", "backpack", "memory")


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as the checkout has it, which no wheel ships, with small settings."""
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(Path(__file__).parents[1] / "bench")])
    script = import_module("gradiometer.bench.timings.ratios")
    monkeypatch.setattr(script, "PRESET", "digits")
    monkeypatch.setattr(script, "SPEED", {(1, 1, 32): (1.3, 1.1, 45), (3, 2, 20): (1.7, 1.2, 8)})
    monkeypatch.setattr(script, "COMPANY", {(3, 2, 20): (3, 4), (1, 2, 32): (None, 10)})
    monkeypatch.setattr(script, "BACKPACK", (64,))
    monkeypatch.setattr(script, "BATCHES", (16, 64))
    monkeypatch.setattr(script, "MEMORY", (32,))
    monkeypatch.setattr(script, "HAS_BACKPACK", False)
    monkeypatch.setattr(import_module("gradiometer.bench.timings.baselines"), "SHORTEST", 0)
    threads = torch.get_num_threads()
    yield script
    torch.set_num_threads(threads)


@pytest.fixture
def baselines(ratios: ModuleType) -> ModuleType:
    return import_module("gradiometer.bench.timings.baselines")


def run(ratios: ModuleType, *words: object) -> Result:
    return CliRunner().invoke(ratios.main, ["--rounds", "1", *map(str, words)], catch_exceptions=False)


def test_every_part_is_printed_and_kept(ratios: ModuleType, tmp_path: Path) -> None:
    done = run(ratios, "--json", tmp_path / "ratios.json")
    assert done.exit_code == 0, done.output
    for part in PARTS:
        assert f"\n{part}: " in done.output
    assert done.output.count(", one thread, rounds: 1\n") == len(PARTS)
    assert "left out: BackPACK is not installed" in done.output
    assert all(len(line) <= 100 for line in done.output.splitlines())
    kept = json.loads((tmp_path / "ratios.json").read_text())
    assert {"machine", "torch", "date", "rounds"} <= set(kept.pop("about"))
    assert {part: len(rows) for part, rows in kept.items()} == dict(zip(PARTS, (2, 2, 0, 1), strict=True))
    for part, names in (("speed", {"floor", "loop", "ours", "ghost"}), ("company", {"one", "twelve", "loop"})):
        for row in kept[part]:
            assert set(row["seconds"]) == names
            assert min(row["seconds"].values()) > 0
    row = kept["speed"][0]
    assert row["ours/floor"] * row["loop/ours"] == pytest.approx(row["loop/floor"])
    assert kept["memory"][0]["tensors MiB"] > 0
    assert kept["memory"][0]["process MiB"] >= 0


def test_headings_stand_over_their_columns(ratios: ModuleType) -> None:
    headings, *rows = run(ratios, "--only", "speed").output.splitlines()[3:]
    assert {len(row) for row in rows} == {len(headings)}
    assert len(rows) == 2


def test_other_estimators_and_one_part(ratios: ModuleType) -> None:
    done = run(ratios, "--only", "speed", "--estimator", "vr:alpha=0.3")
    assert "\nspeed: vr:alpha=0.3\n" in done.output
    assert "company" not in done.output


@pytest.mark.skipif(not away.KNOWN_TO_TORCH, reason="torch before 2.10 has no devices written in Python")
def test_another_device(ratios: ModuleType, tmp_path: Path) -> None:
    parts = "speed,company"  # memory is followed in another process, which does not know the device
    done = run(ratios, "--device", away.NAME, "--only", parts, "--json", tmp_path / "ratios.json")
    assert done.output.count(f", {away.NAME} (unknown) beside ") == 2
    assert json.loads((tmp_path / "ratios.json").read_text())["about"]["device"] == away.NAME


def test_a_device_that_is_not_there_is_refused(ratios: ModuleType) -> None:
    done = run(ratios, "--device", "cuda:99")
    assert done.exit_code == 2
    assert "this machine has no device 'cuda:99'" in done.output


def test_an_unknown_part_is_refused(ratios: ModuleType) -> None:
    done = run(ratios, "--only", "speed,size")
    assert done.exit_code == 2
    assert "no part is called 'size'; there are speed, company, backpack, memory" in done.output
    assert run(ratios, "--estimator", "iwea").exit_code == 2


@pytest.mark.parametrize("K", [1, 8])
def test_the_loop_gives_the_moments_of_a_measurement(baselines: ModuleType, K: int) -> None:
    of = baselines.problem("digits", 3)
    measured = measure(of, baselines.named("iwae", K), replicates=40)
    moments = baselines.loop(of, K, 40, baselines.noise_of_measure(of, K, 40))
    assert baselines.disagreement(measured, moments) < 1e-5
    assert baselines.disagreement(measured, baselines.loop(of, K, 40)) > 1e-2  # noise of its own
    first, second = moments
    assert baselines.disagreement(measured, (first, [1.001 * s for s in second])) > 5e-4


def test_the_loop_draws_noise_of_its_own_from_the_same_distribution(baselines: ModuleType) -> None:
    R, of = 2000, baselines.problem("digits", 1)
    measured = measure(of, baselines.named("iwae", 1), replicates=R)
    first, _ = baselines.loop(of, 1, R)
    for (name, _), total in zip(of.model.named_parameters(), first, strict=True):
        stderr = torch.as_tensor(2 * measured.variance[name] / R).sqrt()
        assert ((total / R - torch.as_tensor(measured.mean[name])).abs() <= 6 * stderr + 1e-6).all(), name


@pytest.mark.parametrize(("B", "K", "R"), [(20, 8, 1000), (1, 1, 100), (300, 64, 3)])
def test_the_floor_passes_as_many_rows(
    baselines: ModuleType, monkeypatch: pytest.MonkeyPatch, B: int, K: int, R: int
) -> None:
    of = baselines.problem("digits", B)
    counted = Counted(of.model)
    baselines.floor(SimpleNamespace(model=counted, x=of.x), K, R)
    assert counted.evaluations == B * K * R


def test_asv_tracks_ratios(baselines: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = import_module("gradiometer.bench.timings.gradients")
    monkeypatch.setattr(tracked, "problem", lambda preset, batch: baselines.problem("digits", min(batch, 2)))
    monkeypatch.setattr(tracked, "REPLICATES", 32)
    for sizes in tracked.Ratios.params[0]:
        assert tracked.Ratios().track_x_floor(sizes) > 0
    assert tracked.Company().track_company() > 0


def test_backpack_gives_the_moments_of_a_measurement(baselines: ModuleType) -> None:
    pytest.importorskip("backpack")
    of = baselines.problem("digits", 1)
    measured = measure(of, baselines.named("iwae", 1), replicates=40)
    its, noise = baselines.extended(of), baselines.noise_of_measure(of, 1, 40)
    for each in (16, 40):
        assert baselines.disagreement(measured, baselines.by_backpack(its, 40, each, noise)) < 1e-5


def test_backpack_is_timed(ratios: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("backpack")
    monkeypatch.setattr(ratios, "HAS_BACKPACK", True)
    run(ratios, "--only", "backpack", "--json", tmp_path / "ratios.json")
    (row,) = json.loads((tmp_path / "ratios.json").read_text())["backpack"]
    assert row["its batch"] in (16, 64)
    assert row["ours/BackPACK"] == pytest.approx(row["seconds"]["ours"] / row["BackPACK s"])

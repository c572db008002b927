"""Ratios and products: paired where the noise was the same, and honest where it was not."""

import io
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradiometer.bench import store
from gradiometer.bench.compare import ratios, table
from gradiometer.bench.efficiency import with_products
from gradiometer.bench.errors import RequestError
from gradiometer.bench.statistics import jackknife

SHARDS = 16


def row(estimator: str, value: float, noise: np.ndarray | None = None, **columns: Any) -> dict[str, Any]:
    """A row of a gradient cell whose shards deviate by `noise`."""
    without = value * (1 + (noise if noise is not None else np.zeros(SHARDS)))
    found = jackknife(value, list(without), positive=True)
    about = {"kind": "gradient", "problem": "vae@late", "estimator": estimator, "K": 8, "B": 20, "evaluations": 8.0}
    about |= {"seed": 0, "replicates": 1024, "digest": "d", "group": "inference", "metric": "variance", "version": 1}
    about |= {
        "device": "cpu",
        "status": "ok",
        "value": value,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
    }
    return about | {"jackknife": list(found.jackknife)} | columns


def noise(seed: int, scale: float = 0.01) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(SHARDS)


def test_common_noise_cancels_in_a_paired_ratio() -> None:
    shared = noise(0)
    found = ratios(store.frame([row("iwae", 4.0, shared), row("dreg", 2.0, shared)]), "variance", "iwae")
    assert [(r.estimator, r.paired) for r in found] == [("dreg", True)]
    assert found[0].value.value == pytest.approx(0.5)
    assert found[0].value.high - found[0].value.low < 1e-9


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("change", [{"seed": 1}, {"replicates": 2048}, {"jackknife": None}])
def test_other_noise_is_not_paired_and_its_error_is_that_of_both(change: dict[str, Any], swapped: bool) -> None:
    shared = noise(0)
    base, other = row("iwae", 4.0, shared), row("dreg", 2.0, shared)
    if swapped:
        base |= change
    else:
        other |= change
    (found,) = ratios(store.frame([base, other]), "variance", "iwae")
    relative = math.hypot(base["stderr"] / 4, other["stderr"] / 2)
    assert not found.paired
    assert found.value.stderr == pytest.approx(0.5 * relative)
    assert found.value.low < 0.5 < found.value.high
    assert math.log(found.value.high / 0.5) == pytest.approx(1.96 * relative)


def test_other_minibatch_sizes_are_compared_among_themselves() -> None:
    rows = [row(word, v, B=B, digest=f"batch {B}") for word, v in (("iwae", 4.0), ("dreg", 2.0)) for B in (1, 20)]
    found = ratios(store.frame(rows), "variance", "iwae")
    assert [r.value.value for r in found] == pytest.approx([0.5, 0.5])


def test_other_parameters_are_never_compared() -> None:
    with pytest.raises(RequestError, match=r"vae@late stands for different parameters or data .* rerun one"):
        ratios(store.frame([row("iwae", 4.0), row("dreg", 2.0, digest="other")]), "variance", "iwae")


def test_a_redefined_metric_is_never_compared() -> None:
    with pytest.raises(RequestError, match="variance was redefined between these results: rerun the older one"):
        ratios(store.frame([row("iwae", 4.0), row("dreg", 2.0, version=2)]), "variance", "iwae")


@pytest.mark.parametrize(
    ("metric", "baseline", "said"),
    [
        ("snr", "iwae", "'snr' was not measured here; these were: variance"),
        ("variance", "stl", "the baseline 'stl' was not measured here; these were: dreg, iwae"),
        ("variance", "", "the baseline '' was not measured here"),
    ],
)
def test_what_was_not_measured_is_named_with_what_was(metric: str, baseline: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ratios(store.frame([row("iwae", 4.0), row("dreg", 2.0)]), metric, baseline)


def test_ratios_of_what_is_not_positive_are_refused() -> None:
    with pytest.raises(RequestError, match="no problem has both 'iwae' and another estimator with a positive variance"):
        ratios(store.frame([row("iwae", -4.0), row("dreg", 2.0)]), "variance", "iwae")


def test_skipped_failed_and_training_rows_are_left_out() -> None:
    rows = [row("iwae", 4.0), row("dreg", 2.0), row("stl", 1.0, status="failed"), row("rws", 1.0, kind="training")]
    assert [r.estimator for r in ratios(store.frame(rows), "variance", "iwae")] == ["dreg"]


def test_the_table_has_k_evaluations_and_the_interval() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    rows = store.frame([row("iwae", 4.0, noise(0)), row("dreg", 2.0, noise(1))])
    console.print(table(ratios(rows, "variance", "iwae"), "variance", "iwae"))
    text = console.export_text()
    assert "relative to iwae" in text
    assert "vae@late inference" in text
    line = next(line for line in text.splitlines() if "dreg" in line)
    assert line.split()[:4] == ["dreg", "8", "8", "0.5"]
    assert "paired" in line


# Work-normalised variance.


def costs(seconds: float = 0.01, stderr: float = 0.001, **columns: Any) -> dict[str, Any]:
    return (
        row("dreg", seconds)
        | {"kind": "cost", "metric": "seconds_per_gradient", "group": "", "stderr": stderr}
        | columns
    )


def test_products_are_variance_times_cost_with_errors_in_quadrature() -> None:
    measured = row("dreg", 2.0, noise(0, 0.02))
    made = with_products(store.frame([measured, costs()])).set_index("metric")
    seconds, evaluations = made.loc["variance_seconds"], made.loc["variance_evaluations"]
    assert seconds["value"] == pytest.approx(0.02)
    relative = math.hypot(measured["stderr"] / 2.0, 0.1)
    assert seconds["stderr"] == pytest.approx(0.02 * relative)
    assert math.log(seconds["high"] / 0.02) == pytest.approx(1.959964 * relative, rel=1e-5)
    assert seconds["low"] * seconds["high"] == pytest.approx(0.02**2)
    assert evaluations["value"] == pytest.approx(16.0)
    assert evaluations["stderr"] == pytest.approx(8 * measured["stderr"])
    assert evaluations["jackknife"] == pytest.approx([8 * v for v in measured["jackknife"]])
    assert list(made["kind"]) == ["gradient", "cost", "cost", "cost"]
    assert set(made.loc[["variance_seconds", "variance_evaluations"], "group"]) == {"inference"}


@pytest.mark.parametrize("change", [{"problem": "other"}, {"estimator": "iwae"}, {"B": 1}, {"device": "cuda"}])
def test_costs_of_something_else_are_not_multiplied(change: dict[str, Any]) -> None:
    made = with_products(store.frame([row("dreg", 2.0), costs(**change)]))
    assert "variance_seconds" not in set(made["metric"])
    assert "variance_evaluations" in set(made["metric"])


def test_no_noise_at_all_has_a_product_without_an_interval() -> None:
    made = with_products(store.frame([row("dreg", 2.0) | {"value": 0.0, "stderr": math.nan}, costs()])).set_index(
        "metric"
    )
    assert made.loc["variance_seconds", "value"] == 0
    assert math.isnan(made.loc["variance_seconds", "stderr"])


def test_without_variances_there_is_nothing_to_multiply() -> None:
    rows = store.frame([costs()])
    pd.testing.assert_frame_equal(with_products(rows), rows)


def test_products_can_be_compared() -> None:
    shared = noise(0)
    rows = [row("dreg", 2.0, shared), row("iwae", 4.0, shared), costs(), costs(estimator="iwae", seconds=0.02)]
    (found,) = ratios(with_products(store.frame(rows)), "variance_seconds", "iwae")
    assert found.value.value == pytest.approx(0.25)

"""Ratios, verdicts and products: paired where the noise was the same, honest where it was not, refused where they say nothing."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from gradiometer.bench import Problem, measure, selection, store
from gradiometer.bench.cli import main
from gradiometer.bench.compare import Ratio, ratios
from gradiometer.bench.efficiency import front, times, with_products, work
from gradiometer.bench.errors import RequestError
from gradiometer.bench.models.toys import BernoulliToy, GaussianToy
from gradiometer.bench.statistics import Value, jackknife
from gradiometer.bench.terminal import verdicts
from gradiometer.estimators.noise import seeded

SHARDS = 16


def row(estimator: str, value: float, noise: np.ndarray | None = None, **columns: Any) -> dict[str, Any]:
    """A row of a gradient cell whose shards deviate by `noise`."""
    without = value * (1 + (noise if noise is not None else np.zeros(SHARDS)))
    found = jackknife(value, list(without), positive=True)
    about = {"kind": "gradient", "problem": "vae@late", "estimator": estimator, "K": 8, "B": 20, "evaluations": 8.0}
    about |= {"seed": 0, "replicates": 1024, "digest": "d", "group": "inference", "metric": "variance", "version": 1}
    about |= {"cell": f"cell of {estimator}", "checked": True, "biased": False, "rescaled": False}
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
    half = math.hypot(math.log(base["high"] / 4), math.log(other["high"] / 2))
    assert not found.paired
    assert found.value.stderr == pytest.approx(0.5 * relative)
    assert (found.value.low, found.value.high) == pytest.approx((0.5 * math.exp(-half), 0.5 * math.exp(half)))
    assert "independent noise" in found.verdict


def test_other_particles_draw_other_noise() -> None:
    """Shards of independent draws: the jackknife of the ratio is right, but nothing cancels."""
    rows = [row("iwae:K=8", 4.0, noise(0)), row("iwae:K=64", 2.0, noise(1), K=64)]
    (found,) = ratios(store.frame(rows), "variance", "iwae:K=8")
    assert not found.paired
    assert found.value.stderr / 0.5 == pytest.approx(math.hypot(*(r["stderr"] / r["value"] for r in rows)), rel=0.3)


def test_other_minibatch_sizes_are_compared_among_themselves() -> None:
    rows = [row(word, v, B=B, digest=f"batch {B}") for word, v in (("iwae", 4.0), ("dreg", 2.0)) for B in (1, 20)]
    found = ratios(store.frame(rows), "variance", "iwae")
    assert [r.value.value for r in found] == pytest.approx([0.5, 0.5])


# What is refused.


def in_folders(*folders: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of folders called a, b, ..."""
    return pd.concat(
        [store.frame(rows).assign(folder=name) for rows, name in zip(folders, "abc", strict=False)], ignore_index=True
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "other"}, r"vae@late stands for different parameters or data .* rerun one"),
        ({"version": 2}, "variance was redefined between these results: rerun the older one"),
        (
            {"B": 1},
            "dreg and iwae were measured on vae@late with minibatches of 1 and 20, whose gradients are not as noisy",
        ),
    ],
)
@pytest.mark.parametrize("metric", ["variance", "snr"])
def test_what_may_not_be_compared_is_refused(change: dict[str, Any], said: str, metric: str) -> None:
    rows = [row("iwae", 4.0, metric=metric), row("dreg", 2.0, metric=metric) | change]
    with pytest.raises(RequestError, match=said.replace("variance", metric)):
        ratios(store.frame(rows), metric, "iwae")
    assert ratios(store.frame([rows[0], row("dreg", 2.0, metric=metric)]), metric, "iwae")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": "slow"}, r"another machine \(slow and fast\): a cost belongs to its machine"),
        ({"device": "cuda"}, r"another device \(cuda and cpu\)"),
        ({"dtype": "float64"}, r"another precision \(float64 and float32\)"),
        ({"threads": 2}, r"another number of threads \(2 and 1\)"),
    ],
)
def test_costs_of_other_machines_are_refused_and_variances_are_not(change: dict[str, Any], said: str) -> None:
    about = {"machine": "fast", "device": "cpu", "dtype": "float32", "threads": 1, "group": "", "kind": "cost"}
    for metric in ("seconds_per_gradient", "peak_memory", "variance_seconds"):
        rows = [row(word, 2.0, noise(1), metric=metric, **about) for word in ("iwae", "dreg")]
        assert ratios(store.frame(rows), metric, "iwae")
        with pytest.raises(RequestError, match=said):
            ratios(store.frame([rows[0], rows[1] | change]), metric, "iwae")
    variances = [row(word, 2.0, noise(1), **about) | {"kind": "gradient"} for word in ("iwae", "dreg")]
    (found,) = ratios(store.frame([variances[0], variances[1] | change]), "variance", "iwae")
    assert found.paired, "noise is the same on every device"


def test_other_code_under_one_word_is_refused_by_its_name() -> None:
    before = [row("iwae", 4.0, code="1"), row("dreg", 2.0, code="2")]
    after = [row("dreg", 2.1, code="3", seed=1)]
    said = r"dreg is not the same code in these results \(2 in a and 3 in b\): rerun one"
    with pytest.raises(RequestError, match=said):
        ratios(in_folders(before, after), "variance", "iwae")
    assert ratios(in_folders(before, [after[0] | {"code": "2"}]), "variance", "iwae")
    assert ratios(in_folders(before, [after[0] | {"code": ""}]), "variance", "iwae"), "older rows do not say"


# Several folders.


def test_an_estimator_of_two_folders_is_compared_with_the_baseline_and_with_itself() -> None:
    before = [row("iwae", 4.0, noise(0)), row("dreg", 2.0, noise(0))]
    found = ratios(in_folders(before, [row("dreg", 1.0, noise(3), seed=1)]), "variance", "iwae")
    lines = {(r.estimator, r.folder, r.against, r.against_folder): (r.value.value, r.paired) for r in found}
    assert lines == {
        ("dreg", "a", "iwae", "a"): (pytest.approx(0.5), True),
        ("dreg", "b", "iwae", "a"): (pytest.approx(0.25), False),
        ("dreg", "b", "dreg", "a"): (pytest.approx(0.5), False),
    }
    assert found[-1].verdict.endswith("the replicates of dreg in a for the same error; independent noise")


def test_of_a_baseline_in_both_folders_the_first_counts() -> None:
    rows = [[row("iwae", v, noise(0)), row("dreg", 2.0, noise(0))] for v in (4.0, 8.0)]
    found = ratios(in_folders(*rows), "variance", "iwae")
    values = {(r.estimator, r.folder, r.against): r.value.value for r in found}
    assert values["iwae", "b", "iwae"] == pytest.approx(2.0)
    assert values["dreg", "b", "iwae"] == pytest.approx(0.5)
    assert values["dreg", "b", "dreg"] == pytest.approx(1.0)
    assert len(found) == 4


def test_each_seed_is_compared_with_its_own() -> None:
    rows = [
        row(word, v, noise(seed), seed=seed) for seed in (0, 1) for word, v in (("iwae", 4.0 + seed), ("dreg", 2.0))
    ]
    found = ratios(store.frame(rows), "variance", "iwae")
    assert [(r.seed, r.paired) for r in found] == [(0, True), (1, True)]
    assert [r.value.value for r in found] == pytest.approx([0.5, 0.4])


def test_parts_of_a_gradient_are_not_taken_for_it() -> None:
    rows = [row(word, v) for word, v in (("iwae", 4.0), ("dreg", 2.0))]
    rows += [
        row("dreg", 9.0, tensor="encoder.weight"),
        row("dreg", 9.0, minibatches=32.0),
        row("dreg", 9.0, randomness="both"),
    ]
    (found,) = ratios(store.frame(rows), "variance", "iwae")
    assert found.value.value == pytest.approx(0.5)
    assert (with_products(store.frame(rows))["metric"] == "variance_evaluations").sum() == 2


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


# Verdicts.


def verdict(metric: str = "variance", value: Value = Value(0.21, 0.01, 0.19, 0.23), **about: Any) -> str:
    shared = {"problem": "vae", "group": "", "estimator": "dreg", "against": "iwae", "K": 8, "B": 20, "seed": 0}
    return Ratio(**shared | {"metric": metric, "evaluations": 8.0, "value": value, "paired": True} | about).verdict


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("variance", "needs 0.21x [0.19, 0.23] the replicates of iwae for the same error"),
        ("variance_evaluations", "needs 0.21x [0.19, 0.23] the evaluations of iwae for the same error"),
        ("variance_seconds", "needs 0.21x [0.19, 0.23] the time of iwae on this machine for the same error"),
        ("snr", "has 0.21x [0.19, 0.23] the signal-to-noise ratio of iwae"),
        ("seconds_per_gradient", "has 0.21x [0.19, 0.23] the time per gradient of iwae"),
    ],
)
def test_a_verdict_is_in_words_of_its_metric(metric: str, said: str) -> None:
    assert verdict(metric) == said


def test_what_holds_one_is_no_verdict() -> None:
    assert verdict(value=Value(0.9, 0.1, 0.7, 1.1)) == "cannot be told from iwae: 0.9x [0.7, 1.1]"
    assert verdict(value=Value(0.9, 0.1, 0.8, 0.99)).startswith("needs 0.9x")
    assert verdict(value=Value(1.2, 0.1, 1.01, 1.4)).startswith("needs 1.2x")
    assert verdict(value=Value(1.0, 0.0, 1.0, 1.0)) == "has the same gradient variance as iwae"
    assert verdict(value=Value(1.0, 1e-5, 0.9999, 1.0001)) == "has the same gradient variance as iwae (to 0.1 %)"
    assert "no verdict" in verdict(value=Value(0.5))


def test_the_direction_is_that_of_the_values() -> None:
    """The noisier needs more replicates, whichever is the baseline."""
    rows = store.frame([row("loud", 4.0, noise(0)), row("quiet", 2.0, noise(1))])
    (quiet,) = ratios(rows, "variance", "loud")
    (loud,) = ratios(rows, "variance", "quiet")
    assert re.match(r"needs 0\.5x \[0\.4\d+, 0\.5\d+\] the replicates of loud", quiet.verdict)
    assert re.match(r"needs 2x \[1\.\d+, 2\.\d+\] the replicates of quiet", loud.verdict)


@pytest.mark.parametrize("whose", ["dreg", "iwae"])
def test_what_limits_a_verdict_is_said(whose: str) -> None:
    def said(change: dict[str, Any], *more: dict[str, Any]) -> str:
        rows = [
            row(word, v, noise(0)) | (change if word == whose else {}) for word, v in (("iwae", 4.0), ("dreg", 2.0))
        ]
        return ratios(store.frame([*rows, *more]), "variance", "iwae")[0].verdict

    assert said({"tails": "heavy"}).endswith(f"; heavy tails of {whose}: the interval is not to be trusted")
    assert said({"checked": False}).endswith(f"; {whose} has not passed a check")
    unknown = f"; {whose} is biased (by how much was not measured): replicates buy precision about a wrong value"
    assert said({"biased": True}).endswith(unknown)
    bias = row(whose, 0.3, metric="relative_bias", biased=True) | {"low": 0.25, "high": 0.35}
    assert f"{whose} is biased (by 0.3 [0.25, 0.35] of the mean gradient)" in said({"biased": True}, bias)
    assert said({"rescaled": True}).endswith(
        f"; {whose} has a scale of its own: compare ratios of signal to noise instead"
    )
    assert said({"rescaled": True}).startswith("has 0.5x")
    assert said({}).startswith("needs 0.5x")
    assert ";" not in said({})


def test_an_unbiased_estimators_mean_squared_error_is_its_variance() -> None:
    shared = noise(0)
    rows = [row("iwae", 4.0, shared), row("rws", 1.0, shared, biased=True), row("nvil", 1.0, shared, rescaled=True)]
    rows.append(row("rws", 8.0, shared, biased=True, metric="mse"))
    (found,) = ratios(store.frame(rows), "mse", "iwae")
    assert (found.estimator, found.metric) == ("rws", "mse")
    assert found.value.value == pytest.approx(2.0)
    assert found.paired


def test_where_nothing_is_checked_that_is_said_once() -> None:
    from rich.console import Console

    rows = store.frame([row("iwae", 4.0, noise(0), checked=False), row("dreg", 2.0, noise(1), checked=False)])
    (found,) = ratios(rows, "variance", "iwae")
    assert "check" not in found.verdict
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(verdicts([found], checked=False))
    assert "No estimator here has been checked" in console.export_text()


def test_the_table_has_k_evaluations_and_the_verdict() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    rows = store.frame([row("iwae", 4.0, noise(0)), row("dreg", 2.0, noise(0))])
    console.print(verdicts(ratios(rows, "variance", "iwae")))
    text = console.export_text()
    assert "vae@late inference" in text
    line = next(line for line in text.splitlines() if "dreg" in line)
    assert line.split()[:5] == ["dreg", "8", "8", "needs", "0.5x"]
    assert "independent noise" not in line
    assert "No estimator here" not in text


def test_the_command_refuses_in_one_sentence_and_names_folders(tmp_path: Path) -> None:
    for name, code in (("before", "1"), ("after", "2")):
        store.open_for_writing(tmp_path / name)
        cells = [row("iwae", 4.0, noise(0), code="0"), row("dreg", 2.0, noise(1), code=code)]
        keys = [f"{cell['estimator']}-{cell['code']}" for cell in cells]
        for key, cell in zip(keys, cells, strict=True):
            store.write_cell(
                tmp_path / name, key, [{n: v for n, v in cell.items() if n != "cell"}], {"machine": "fast"}
            )
        store.write_index(tmp_path / name, "mine", "", "", keys)
    asked = ["compare", str(tmp_path / "before"), str(tmp_path / "after"), "--baseline", "iwae"]
    refused = CliRunner().invoke(main, asked)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert (
        f"dreg is not the same code in these results (1 in {tmp_path / 'before'} and 2 in {tmp_path / 'after'})"
        in refused.stderr
    )
    alone = CliRunner().invoke(main, asked[:2] + asked[3:])
    assert alone.exit_code == 0
    assert "needs 0.5x" in alone.stdout


def test_problems_without_the_baseline_are_named(tmp_path: Path) -> None:
    store.open_for_writing(tmp_path)
    here = [row("iwae:K=8", 4.0, noise(0)), row("dreg", 2.0, noise(1))]
    there = [row("iwae:K=4", 4.0, noise(0), problem="vae@init"), row("dreg", 2.0, noise(1), problem="vae@init")]
    for number, cell in enumerate([*here, *there]):
        store.write_cell(tmp_path, f"c{number}", [{n: v for n, v in cell.items() if n != "cell"}], {"machine": "fast"})
    store.write_index(tmp_path, "mine", "", "", [f"c{number}" for number in range(4)])
    said = CliRunner().invoke(main, ["compare", str(tmp_path), "--baseline", "iwae"])
    assert said.exit_code == 0, said.stderr
    assert "needs 0.5x" in said.stdout
    assert said.stderr == "left out, since iwae:K=8 was not measured there: vae@init\n"


def test_a_baseline_whose_error_is_its_variance_is_not_said_to_lack(tmp_path: Path) -> None:
    store.open_for_writing(tmp_path)
    rows = [row("iwae:K=8", 4.0, noise(0)), row("rws", 8.0, noise(0), metric="mse", biased=True)]
    for number, cell in enumerate(rows):
        store.write_cell(tmp_path, f"c{number}", [{n: v for n, v in cell.items() if n != "cell"}], {"machine": "fast"})
    store.write_index(tmp_path, "mine", "", "", ["c0", "c1"])
    said = CliRunner().invoke(main, ["compare", str(tmp_path), "--baseline", "iwae", "--metric", "mse"])
    assert said.exit_code == 0, said.stderr
    assert "2x" in said.stdout
    assert said.stderr == ""


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
    half = math.hypot(math.log(measured["high"] / 2.0), 1.959964 * 0.1)
    assert math.log(seconds["high"] / 0.02) == pytest.approx(half, rel=1e-5)
    assert evaluations["high"] == pytest.approx(8 * measured["high"]), "a count has no error, so it adds none"
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


def test_the_error_of_a_time_is_in_the_ratio_though_no_shard_holds_it() -> None:
    shared = noise(0)
    rows = [
        row("dreg", 2.0, shared),
        row("iwae", 4.0, shared),
        costs(stderr=0.002),
        costs(estimator="iwae", stderr=0.0),
    ]
    (found,) = ratios(with_products(store.frame(rows)), "variance_seconds", "iwae")
    assert found.paired
    assert found.value.stderr / found.value.value == pytest.approx(0.2, rel=1e-6)
    assert math.log(found.value.high / 0.5) == pytest.approx(1.959964 * 0.2, rel=1e-5)


def test_the_front_is_what_nothing_beats_at_both_and_surely_at_one() -> None:
    def point(value: float, half: float = 0.0) -> Value:
        return Value(value, half / 2, value - half, value + half)

    costs = {"cheap": point(1), "dear": point(2), "as cheap": point(1.01, 0.05)}
    errors = {"cheap": point(2, 0.1), "dear": point(1, 0.1), "as cheap": point(5, 0.1)}
    assert front(costs, errors) == {"cheap", "dear"}, "its time overlaps, and its error is surely larger"
    assert front(costs | {"as cheap": point(0.99, 0.05)}, errors) == {"cheap", "dear", "as cheap"}
    assert front(costs, errors | {"as cheap": point(2.05, 0.1)}) == {"cheap", "dear", "as cheap"}, "both overlap"
    assert front(costs, errors | {"dear": point(1.95, 0.1)}) == {"cheap", "dear"}, "errors overlap"
    assert front(costs, errors | {"dear": point(2.05, 0.1)}) == {"cheap"}


def test_shards_of_the_same_noise_tell_errors_apart_where_intervals_overlap() -> None:
    shared, one = noise(0, 0.05), Value(1.0, 0.0, 1.0, 1.0)
    quiet, loud = (jackknife(v, list(v * (1 + shared)), positive=True) for v in (1.0, 1.1))
    assert quiet.high > loud.low
    assert front({"a": one, "b": one}, {"a": quiet, "b": loud}) == {"a"}
    bare = [Value(v.value, v.stderr, v.low, v.high) for v in (quiet, loud)]
    assert front({"a": one, "b": one}, dict(zip("ab", bare, strict=True))) == {"a", "b"}


with seeded(0):
    TOY = Problem(GaussianToy(units=2), torch.ones(3, 2), name="toy")


def test_variances_of_two_objectives_say_nothing_of_replicates() -> None:
    rows = [r for word in ("stl:K=4", "dreg:K=4", "iwae:K=4") for r in measure(TOY, word, replicates=256).rows()]
    verdicts = {
        r.estimator: r.verdict for r in ratios(store.frame(rows), "variance", "dreg:K=4") if r.group == "inference"
    }
    assert "the gradient variance of dreg:K=4" in verdicts["stl:K=4"]
    assert "stl:K=4 ascends elbo and dreg:K=4 iwelbo:K=4: compare ratios of signal to noise" in verdicts["stl:K=4"]
    assert "the replicates of dreg:K=4 for the same error" in verdicts["iwae:K=4"]
    assert "ascends" not in verdicts["iwae:K=4"]


def test_other_parameters_and_data_of_python_are_not_compared() -> None:
    with seeded(1):
        other = GaussianToy(units=2)
    for changed in (Problem(other, TOY.x, name="toy"), Problem(TOY.model, 2 * TOY.x, name="toy")):
        rows = [*measure(TOY, "iwae:K=4", replicates=64).rows(), *measure(changed, "dreg:K=4", replicates=64).rows()]
        with pytest.raises(RequestError, match=r"other parameters|data"):
            ratios(store.frame(rows), "variance", "iwae:K=4")


def test_what_learns_beside_is_of_one_memory() -> None:
    rows = [
        row
        for steps in (10, 20)
        for row in measure(
            Problem(BernoulliToy(), torch.ones(3, 1), name=f"toy {steps}"), "nvil", replicates=64, settle=steps
        ).rows()
    ]
    rows += [
        row
        for n in (10, 20)
        for row in measure(Problem(BernoulliToy(), torch.ones(3, 1), name=f"toy {n}"), "rloo:K=2", replicates=64).rows()
    ]
    found = [r for r in ratios(store.frame(rows), "snr", "rloo:K=2") if r.group == "inference"]
    assert ["after 10 steps" in r.verdict for r in found] == [True, False]
    assert ["after 20 steps" in r.verdict for r in found] == [False, True]
    assert {row["settled"] for row in rows} == {0, 10, 20}


def test_two_memories_of_one_estimator_are_two_lines() -> None:
    toy = Problem(BernoulliToy(), torch.ones(3, 1), name="toy")
    rows = [row for n in (10, 20) for row in measure(toy, "nvil", replicates=64, settle=n).rows()]
    rows = store.frame([*rows, *measure(toy, "rloo:K=2", replicates=64).rows()]).assign(status="ok")
    labels = set(selection.gradients(selection.tidy(rows))["label"])
    assert labels == {"nvil [settled 10]", "nvil [settled 20]", "rloo:K=2"}
    before, after = (rows[rows["settled"] == n].assign(folder=str(n)) for n in (10, 20))
    said = [r.verdict for r in ratios(pd.concat([before, after]), "snr", "nvil") if r.group == "inference"]
    assert len(said) == 1
    assert "after 20 and 10 steps" in said[0]


def test_the_work_for_a_relative_error_is_variance_times_cost_over_the_squared_norm() -> None:
    def measured(value: float, spread: np.ndarray) -> Value:
        return jackknife(value, list(value * (1 + spread)), positive=True)

    few = work(8, measured(3.0, noise(0)), measured(2.0, noise(1)), Value(8.0, 0.0, 8.0, 8.0))
    many = work(32, measured(0.6, noise(2)), measured(2.0, noise(3)), Value(32.0, 0.0, 32.0, 32.0))
    assert few is not None
    assert many is not None
    assert few.value.value == pytest.approx(6.0)
    ratio = times(few, many)
    assert ratio.value == pytest.approx(6.0 / 4.8)
    without = [
        (3 * (1 + a) / (1 + b) ** 2 * 2) / (0.6 * (1 + c) / (1 + d) ** 2 * 8)
        for a, b, c, d in zip(*map(noise, range(4)), strict=True)
    ]
    exact = jackknife(6.0 / 4.8, without, positive=True)
    assert (ratio.low, ratio.high) == pytest.approx((exact.low, exact.high))
    slow = work(8, measured(3.0, noise(0)), measured(2.0, noise(1)), Value(8.0, 0.8, 6.5, 9.8))
    assert slow is not None
    assert times(slow, many).high > 1.05 * ratio.high, "the error of the time"


def test_a_mean_gradient_that_is_lost_in_noise_has_no_relative_error() -> None:
    def measured(value: float, low: float) -> Value:
        return Value(value, 0.1, low, 2 * value, tuple(value + noise(0)))

    cost = Value(8.0, 0.0, 8.0, 8.0)
    assert work(8, measured(1.0, 0.5), measured(1.0, 0.5), cost) is not None
    assert work(8, measured(1.0, 0.5), measured(0.1, -0.1), cost) is None
    assert work(8, Value(1.0, 0.1, 0.8, 1.2), measured(1.0, 0.5), cost) is None

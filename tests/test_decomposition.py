"""The law of total variance: closed forms of a Gaussian toy, identities, and the calibration of its error bars."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from gradiometer.bench import store
from gradiometer.bench.decomposition import Decomposition, decompose, minibatch, minibatches_of
from gradiometer.bench.gradients import one, trainable
from gradiometer.bench.measurement import measure
from gradiometer.bench.models.toys import BernoulliToy, GaussianToy
from gradiometer.bench.named import named_problem
from gradiometer.bench.oneway import OneWay, parts_of
from gradiometer.bench.problems import Problem
from gradiometer.bench.statistics import Value, ratio
from gradiometer.bench.training import settled
from gradiometer.estimators import parse
from gradiometer.estimators.noise import Rng

D, N = 3, 12  # units, data points
S = (2 / 3) ** 0.5  # the guide's standard deviation
PARTS = ("estimator", "minibatch", "both")
# Of the inference gradient by the noise e of z = m + S e.
SLOPES = {"stl": 1 / S - 2 * S, "sgvb-a": -2 * S, "sgvb-b": -S}


def toy(B: int, seed: int = 0, minibatch: Callable[[torch.Generator], Tensor] | None = None) -> tuple[Problem, Tensor]:
    """A Gaussian toy at random parameters whose minibatches are B of N points, and the points."""
    generator = torch.Generator().manual_seed(seed)
    model, data = GaussianToy(D), 1 + torch.randn(N, D, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def drawn(generator: torch.Generator) -> Tensor:
        return data[torch.randperm(N, generator=generator)[:B]]

    return Problem(model, data[:B], minibatch=minibatch or drawn), data.double()


def spread(f: Tensor, B: int) -> float:
    """The trace of the covariance of the mean of `f [N, P]` over B points drawn without replacement."""
    return float((f - f.mean(0)).square().sum()) / N / B * (N - B) / (N - 1)


def exact(problem: Problem, data: Tensor, word: str, B: int, K: int = 1) -> dict[str, tuple[float, float]]:
    """The estimator's and the minibatch's part of each tensor's variance.

    With ``z = m + S e``, ``m = A x + b``: by mu the gradient is ``mean_i (z_i - mu)``, or its mean over z where the divergence
    is in closed form; by b it is ``mean_i (c_i + d e_i)`` with ``c = mu + x - 2 m``, and by A each term times ``x_i``.
    """
    A, b = (p.detach().double() for p in problem.model.encoder.parameters())
    mu = problem.model.mu.weight.detach().double().flatten()
    m = data @ A.T + b  # [N, D]
    c, noise = mu + data - 2 * m, SLOPES[word] ** 2 * D / (K * B)
    of_mu = 0.0 if word == "sgvb-b" else S**2 * D / (K * B)
    return {
        "mu.weight": (of_mu, spread(m, B)),
        "encoder.bias": (noise, spread(c, B)),
        "encoder.weight": (
            noise * float(data.square().sum(1).mean()),
            spread((c[:, :, None] * data[:, None]).flatten(1), B),
        ),
    }


def near(value: Value, wanted: float, errors: float = 4) -> bool:
    return abs(value.value - wanted) < errors * value.stderr


@pytest.mark.parametrize("word", ["stl", "sgvb-a", "sgvb-b", "stl:K=3"])
@pytest.mark.parametrize("B", [2, 5])
def test_parts_are_closed_forms(word: str, B: int) -> None:
    estimator, (problem, data) = parse(word), toy(B)
    (found,) = decompose(problem, [estimator], minibatches=256, replicates=16, dtype=torch.float64)
    of_tensor = exact(problem, data, estimator.facts.name, B, estimator.K)
    both = [sum(of_tensor[name][part] for name in ("encoder.weight", "encoder.bias")) for part in (0, 1)]
    wanted = {**of_tensor, "generative": of_tensor["mu.weight"], "inference": tuple(both)}
    for name, (by_noise, by_data) in wanted.items():
        parts = found.variances(name)
        assert parts["estimator"].stderr <= 0.12 * by_noise + 1e-25
        assert parts["minibatch"].stderr < 0.2 * by_data
        if by_noise == 0:
            assert parts["estimator"].value < 1e-25
        else:
            assert near(parts["estimator"], by_noise), name
        assert near(parts["minibatch"], by_data), name
        assert near(parts["both"], by_noise + by_data), name


def test_parts_add_up_to_the_last_digits() -> None:
    problem, _ = toy(3)
    for found in decompose(problem, [parse("iwae:K=3"), parse("rloo:K=3")], minibatches=20, replicates=8):
        for name in ("generative", "inference", "mu.weight", "encoder.bias"):
            of = found.variances(name)
            assert of["both"].value == pytest.approx(of["estimator"].value + of["minibatch"].value, rel=1e-12)
            sums = np.add(of["estimator"].jackknife, of["minibatch"].jackknife)
            assert of["both"].jackknife == pytest.approx(sums, rel=1e-12)
        for part in PARTS:
            tensors = sum(found.variances(f"encoder.{name}")[part].value for name in ("weight", "bias"))
            assert tensors == pytest.approx(found.variances("inference")[part].value, rel=1e-12)


@pytest.mark.parametrize("B", [1, 11])
def test_larger_batches_divide_the_minibatch_part_but_for_what_a_finite_data_set_leaves(B: int) -> None:
    problem, data = toy(B)
    _, of_one = exact(problem, data, "stl", 1)["mu.weight"]
    (found,) = decompose(problem, [parse("stl")], minibatches=200, replicates=8)
    part = found.variances("generative")["minibatch"]
    assert near(part, of_one / B * (N - B) / (N - 1))
    assert B == 1 or not near(part, of_one / B)


def test_all_of_the_data_are_no_minibatch() -> None:
    (whole,) = decompose(toy(N)[0], [parse("sgvb-b")], minibatches=8, replicates=4, dtype=torch.float64)
    assert abs(whole.variances("generative")["minibatch"].value) < 1e-25  # in whichever order they come


# Minibatches that are all the same.


def same(M: int, seed: int, replicates: int = 8, word: str = "stl") -> Decomposition:
    problem, data = toy(4)
    (found,) = decompose(
        replace(problem, minibatch=lambda _: data[:4].float()),
        [parse(word)],
        minibatches=M,
        replicates=replicates,
        seed=seed,
    )
    return found


def test_identical_minibatches_have_no_part() -> None:
    parts = [same(32, seed).variances("inference") for seed in range(24)]
    values = np.array([p["minibatch"].value for p in parts])
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean()) < 3 * error
    assert (values < 0).any()  # reported as they are
    assert sum(p["minibatch"].low <= 0 <= p["minibatch"].high for p in parts) >= 20
    uncorrected = values + np.array([p["estimator"].value for p in parts]) / 8  # the noise of eight replicates' mean
    assert uncorrected.mean() > 10 * error


def test_identical_minibatches_are_one_measurement_of_all_replicates() -> None:
    problem, data = toy(4)
    one = measure(Problem(problem.model, data[:4].float()), parse("stl"), replicates=256, seed=3)
    many = same(32, 3)
    for group in one.groups:  # same noise; within minibatches there is one replicate's degree of freedom less in each
        whole, of = one.metrics(group)["variance"].value, many.variances(group)
        between = of["minibatch"].value + of["estimator"].value / 8
        assert (32 * 7 * of["estimator"].value + 31 * 8 * between) / 255 == pytest.approx(whole, rel=1e-5)
    assert many.evaluations == one.evaluations == 1


# Noise.


def test_the_same_seed_gives_the_same_numbers_whatever_the_chunk_and_the_company() -> None:
    problem, _ = toy(3)
    words, asked = ["iwae:K=4", "dreg:K=4", "sgvb-b"], {"minibatches": 8, "replicates": 12}
    whole = decompose(problem, [parse(w) for w in words], dtype=torch.float64, **asked)
    for word, found in zip(words, whole, strict=True):
        for chunk in (None, 5):
            (alone,) = decompose(problem, [parse(word)], dtype=torch.float64, chunk=chunk, **asked)
            for group in ("generative", "inference"):
                for part in PARTS:
                    one, other = alone.variances(group)[part], found.variances(group)[part]
                    assert one.jackknife == pytest.approx(other.jackknife, rel=1e-9, abs=1e-18)
    (again,) = decompose(problem, [parse("sgvb-b")], dtype=torch.float64, **asked)
    (other,) = decompose(problem, [parse("sgvb-b")], dtype=torch.float64, seed=1, **asked)
    assert again.rows() == whole[2].rows()
    assert other.variances("generative")["minibatch"].value != again.variances("generative")["minibatch"].value


def test_more_minibatches_begin_with_the_same_ones() -> None:
    problem, _ = toy(2)
    few, many = (list(minibatches_of(problem, M, seed=5)) for M in (4, 9))
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert len({tuple(x.flatten().tolist()) for x in many}) > 6
    assert not torch.equal(few[0], next(iter(minibatches_of(problem, 4, seed=6))))


@pytest.mark.parametrize("engine", ["rows", "ghost", "loop"])
def test_engines_agree(engine: str) -> None:
    problem, _ = toy(3)
    asked = {"minibatches": 6, "replicates": 8, "dtype": torch.float64}
    (found,) = decompose(problem, [parse("dreg:K=2")], engine=engine, **asked)
    (usual,) = decompose(problem, [parse("dreg:K=2")], **asked)
    assert found.engine == engine
    for group in ("generative", "inference"):
        for part in PARTS:
            one, other = found.variances(group)[part], usual.variances(group)[part]
            assert one.value == pytest.approx(other.value, rel=1e-8)


class FreeGuide(nn.Module):
    """Whose guide has parameters outside layers, alone or beside a layer that sees the data."""

    groups = {"generative": ("decoder",), "inference": ("mean", "encoder")}  # noqa: RUF012

    def __init__(self, layers: bool) -> None:
        super().__init__()
        self.mean, self.decoder = nn.Parameter(torch.tensor([0.3, -0.4])), nn.Linear(2, D)
        self.encoder = nn.Linear(D, 2) if layers else None

    def guide(self, x: Tensor) -> Independent:
        mean = self.mean + (x.new_zeros(*x.shape[:-1], 2) if self.encoder is None else self.encoder(x))
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (x - self.decoder(z)).square().sum(-1) - 0.5 * z.square().sum(-1)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("engine", ["rows", "ghost"])
@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("word", ["sgvb-a", "iwae:K=3"])
def test_a_guide_of_free_parameters_keeps_its_noise(word: str, layers: bool, engine: str, chunk: int) -> None:
    torch.manual_seed(4)
    problem = Problem(FreeGuide(layers), torch.randn(3, D), minibatch=lambda g: torch.randn(3, D, generator=g))
    asked = {"minibatches": 4, "replicates": 8, "dtype": torch.float64}
    (found,), (slow,) = (decompose(problem, [parse(word)], engine=of, chunk=chunk, **asked) for of in (engine, "loop"))
    assert found.engine == engine
    for part in PARTS:
        one, other = found.variances("inference")[part], slow.variances("inference")[part]
        assert one.value == pytest.approx(other.value, rel=1e-8)
    assert found.variances("inference")["estimator"].value > 0


@pytest.mark.parametrize("word", ["dreg:K=3", "rloo:K=2", "sgvb-b", "nvi:levels=2,K=2"])
def test_the_engine_agrees_with_plain_autograd_and_a_textbook_analysis(word: str) -> None:
    """One replicate at a time on each minibatch, all gradients held: what the plan of the first minibatch makes of the others."""
    (problem, _), M, R = toy(3), 5, 6
    estimator, model = parse(word), problem.model.double()
    (found,) = decompose(problem, [estimator], minibatches=M, replicates=R, seed=2, dtype=torch.float64)
    settle = [minibatch(problem, 2, step, "settle").double() for step in range(300)]
    state = settled(estimator, model, problem.x.double(), 2, settle.__getitem__)
    groups = trainable(model, state)
    drawn: dict[str, list[list[Tensor]]] = {name: [] for of in groups.values() for name in of}
    for number, x in enumerate(minibatches_of(problem, M, 2)):
        rows = [one(estimator, model, x.double(), Rng(2, number * R + r), state, groups).gradients for r in range(R)]
        for name, of in drawn.items():
            of.append([row[name].flatten() for row in rows])
    for name, of in drawn.items():
        g = torch.stack([torch.stack(rows) for rows in of])  # [M, R, P]
        within, between = float(g.var(1).mean(0).sum()), float(g.mean(1).var(0).sum())
        parts = found.variances(name)
        assert parts["estimator"].value == pytest.approx(within, rel=1e-7, abs=1e-20), name
        assert parts["both"].value == pytest.approx(between + within * (1 - 1 / R), rel=1e-7, abs=1e-20), name


def test_ratios_are_paired() -> None:
    problem, _ = toy(2)
    words = [parse("iwae:K=8"), parse("dreg:K=8")]
    iwae, dreg = decompose(problem, words, minibatches=64, replicates=32)
    alone = decompose(problem, words[1:], minibatches=64, replicates=32, seed=9)[0]
    for part in ("minibatch", "both"):
        paired = ratio(dreg.variances("inference")[part], iwae.variances("inference")[part])
        apart = ratio(alone.variances("inference")[part], iwae.variances("inference")[part])
        assert paired.stderr / paired.value < 0.5 * apart.stderr / apart.value


# Error bars.


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    problem, data = toy(3)
    by_noise, by_data = exact(problem, data, "stl", 3)["mu.weight"]
    wanted = dict(zip(PARTS, (by_noise, by_data, by_noise + by_data), strict=True))
    held = dict.fromkeys(PARTS, 0)
    for seed in range(60):
        (found,) = decompose(problem, [parse("stl")], minibatches=16, replicates=4, seed=seed)
        for part, value in found.variances("generative").items():
            held[part] += value.low <= wanted[part] <= value.high
    assert min(held.values()) >= 60 * 0.95 - 4 * (60 * 0.95 * 0.05) ** 0.5, held


@pytest.mark.parametrize("M", [8, 20, 32, 100])
def test_the_analysis_of_variance_is_unbiased_and_its_error_right(M: int) -> None:
    """On Gaussian minibatch means: 5 coordinates of standard deviation 0.5, noise of variance 4 in R = 4 replicates."""
    generator, runs, R = np.random.default_rng(0), 400, 4
    found = []
    for _ in range(runs):
        between = OneWay(M, 5)
        means = 100 + 0.5 * generator.standard_normal((M, 5))
        replicates = means[:, None] + 2 * generator.standard_normal((M, R, 5))
        for number in range(M):
            between.add(number, replicates[number].mean(0), float(replicates[number].var(0, ddof=1).sum()))
        found.append(parts_of(between.traces(), R))
    for part, wanted in zip(PARTS, (20.0, 1.25, 21.25), strict=True):
        values = np.array([of[part].value for of in found])
        errors = np.array([of[part].stderr for of in found])
        assert abs(values.mean() - wanted) < 4 * values.std() / runs**0.5, part
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.2), part
        held = np.mean([of[part].low <= wanted <= of[part].high for of in found])
        assert held > 0.9, (part, held)


def test_a_large_mean_swallows_nothing() -> None:
    between = OneWay(8, 2)
    for number in range(8):
        between.add(number, np.array([1e9, 1e9 + 1e-3 * number]), 0.0)
    assert parts_of(between.traces(), 4)["minibatch"].value == pytest.approx(1e-6 * np.arange(8).var(ddof=1), rel=1e-3)


# What estimators remember.


def test_memory_is_settled_once_over_minibatches() -> None:
    seen: list[Tensor] = []

    def watched(generator: torch.Generator) -> Tensor:
        seen.append(data[torch.randperm(N, generator=generator)[:2]].float())
        return seen[-1]

    problem, data = toy(2)
    (found,) = decompose(
        replace(problem, minibatch=watched), [parse("moving-average:K=2")], minibatches=4, replicates=8
    )
    assert found.variances("inference")["estimator"].value > 0
    assert len(seen) == 300 + 4
    assert not any(torch.equal(x, y) for x, y in zip(seen[:4], seen[300:], strict=True))  # steps have their own


def test_what_an_estimator_learns_beside_the_model_is_a_group_too() -> None:
    (found,) = decompose(toy(2)[0], [parse("nvi:levels=2,K=2")], minibatches=4, replicates=8)
    assert set(found.groups) == {"generative", "inference", "kernels"}


# Wrong requests.


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"minibatches": 3}, "minibatches should be a whole number of at least 4, not 3"),
        ({"minibatches": 4, "replicates": 3}, "replicates should be a whole number of at least 4, not 3"),
    ],
)
def test_too_few_are_refused(asked: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decompose(toy(2)[0], [parse("stl")], **asked)


def test_a_problem_without_minibatches_is_refused() -> None:
    for problem in (Problem(BernoulliToy(), torch.ones(1, 1), name="mine"), named_problem("bernoulli-toy", 1)):
        with pytest.raises(ValueError, match=rf"{problem.name} has no minibatches but its own"):
            decompose(problem, [parse("rloo:K=2")], minibatches=4)


def test_minibatches_of_another_shape_are_refused() -> None:
    problem, _ = toy(2, minibatch=lambda generator: torch.ones(3, D))
    with pytest.raises(ValueError, match=r"a minibatch has shape \(3, 3\), not that of the problem's, \(2, 3\)"):
        decompose(problem, [parse("stl")], minibatches=4)


def test_what_the_problem_lacks_is_said() -> None:
    problem = replace(named_problem("bernoulli-toy", 1), minibatch=lambda _: torch.ones(1, 1))
    with pytest.raises(ValueError, match="needs a reparameterisable guide"):
        decompose(problem, [parse("dreg")], minibatches=4)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    problem, data = toy(2)
    broken = [data[:2].float(), data[2:4].float(), torch.full((2, D), torch.nan), data[:2].float()]
    drawn = iter(broken)
    with pytest.raises(RuntimeError, match=r"the gradient of '[\w.]+' is not finite on minibatch 2"):
        decompose(replace(problem, minibatch=lambda _: next(drawn)), [parse("iwae")], minibatches=4)


# The command line.

Command = Callable[..., Result]
MEASURE = ("measure", "gaussian-toy:units=2", "-e", "stl", "-e", "sgvb-b", "--batch", 3, "--replicates", 8)


def test_the_command_prints_parts_and_keeps_their_rows(gradiometer: Command, tmp_path: Path) -> None:
    result = gradiometer(*MEASURE, "--minibatches", 8, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Traces over 8 minibatches of 3 data points with 8 replicates each" in result.stdout
    rows = store.load(tmp_path)
    rows = rows[rows["metric"] != ""]
    assert set(rows["metric"]) == {"variance"}  # and no product with a cost: there is no such gradient
    assert sorted(rows.value_counts(["estimator", "group", "randomness"])) == [1] * 2 * 2 * 3
    assert set(rows["randomness"]) == set(PARTS)
    assert set(zip(rows["minibatches"], rows["replicates"], strict=True)) == {(8, 8)}
    of = rows[rows["estimator"] == "sgvb-b"].set_index(["group", "randomness"])["value"]
    assert of["generative", "estimator"] < 1e-6 * of["generative", "both"]
    assert f"{of['inference', 'minibatch']:.2f}"[:3] in result.stdout


def test_decompositions_stand_beside_ordinary_rows(gradiometer: Command, tmp_path: Path) -> None:
    asked = tmp_path / "mine.toml"
    asked.write_text(SUITE)
    result = gradiometer("run", asked, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path / "out")
    ordinary = rows[rows["minibatches"].isna()]
    assert set(ordinary["randomness"]) == {"estimator"}
    assert set(rows["minibatches"].dropna()) == {6}
    assert set(rows.loc[rows["minibatches"].notna(), "replicates"]) == {64}  # of each, if none is given
    alone = gradiometer(
        "measure", "gaussian-toy:units=2", "-e", "stl", "--batch", 3, "--replicates", 16, "--out", tmp_path / "one"
    )
    assert alone.exit_code == 0
    kept = store.load(tmp_path / "one").set_index(["group", "metric"])["value"]
    both = ordinary[(ordinary["tensor"] == "")].set_index(["group", "metric"])["value"]
    assert both.to_dict() == pytest.approx(kept.to_dict(), nan_ok=True)
    tensors = ordinary[(ordinary["tensor"] != "") & (ordinary["metric"] == "variance")]
    assert dict(tensors.groupby("group")["value"].sum()) == pytest.approx(
        {group: kept[group, "variance"] for group in ("generative", "inference")}
    )
    assert set(ordinary.loc[ordinary["tensor"] != "", "space"]) == {"tensor"}
    for words in (
        ["report", tmp_path / "out", "--format", "md,html"],
        ["compare", tmp_path / "out", "--baseline", "stl"],
    ):
        assert gradiometer(*words).exit_code in (0, 2)


SUITE = """title = "Mine"
[[gradient]]
problems = ["gaussian-toy:units=2"]
estimators = ["stl"]
batch = 3
replicates = 16
tensors = true
[[gradient]]
problems = ["gaussian-toy:units=2"]
estimators = ["stl"]
batch = 3
minibatches = 6
"""


def test_tensors_are_printed_with_their_shares(gradiometer: Command, tmp_path: Path) -> None:
    result = gradiometer(*MEASURE, "--tensors", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert sum(line[:1] == ["encoder.weight"] for line in lines) == 2
    (mu,) = (line for line in lines if line[:1] == ["mu.weight"] and "100" in line)  # the whole of its group
    assert mu[-3:] == ["100", "to", "100"]
    rows = store.load(tmp_path)
    assert set(rows.loc[rows["tensor"] == "mu.weight", "metric"]) >= {
        "variance",
        "snr",
        "snr_corrected",
        "gradient_norm",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minibatches", 3], "'--minibatches': 3 is not in the range x>=4"),
        (["--minibatches", 8, "-m", "snr"], "the metric snr goes with one minibatch: leave it out, or --minibatches"),
        (["--minibatches", 8, "--tensors"], "--tensors goes with one minibatch: leave it out, or --minibatches"),
        (["--minibatches", 8, "--precision", "5%"], "--precision goes with one minibatch"),
        (["--minibatches", 8, "--reference", "stl"], "--reference goes with one minibatch"),
        (["--minibatches", 8, "--batch", 1025], "gaussian-toy has 1024 data points, fewer than a batch of 1025"),
    ],
)
def test_a_wrong_decomposition_is_one_sentence(words: list, said: str, refusal: Callable[..., str]) -> None:
    assert said in refusal("measure", "gaussian-toy", "-e", "stl", *words)


@pytest.mark.parametrize("word", ["bernoulli-toy", "function-toy", "gaussian-toy:data=1"])
def test_one_data_point_has_no_minibatches(word: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    said = f"{word} has no minibatches but its own, so no part of the variance is theirs"
    assert refusal("measure", word, "-e", "rloo:K=2", "--batch", 1, "--minibatches", 8) == said
    asked = tmp_path / "mine.toml"
    asked.write_text(SUITE.replace("gaussian-toy:units=2", word).replace("batch = 3", "batch = 1"))
    assert refusal("run", asked, "--out", tmp_path / "out") == said

"""Named problems: the same snapshots for ever, one minibatch, and a hash that sees every change."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradiometer.bench import named
from gradiometer.bench.costs import cost
from gradiometer.bench.data import load
from gradiometer.bench.errors import RequestError
from gradiometer.bench.measurement import measure
from gradiometer.bench.models.toys import BernoulliToy, GaussianToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.named import REFERENCES, TOYS, named_problem, parse_problem
from gradiometer.bench.problems import Problem, active_units, reason_to_skip
from gradiometer.bench.problems import digest as digest_of
from gradiometer.estimators import parse

STEPS, EARLY = 100, 30


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Problems are remembered in a process; not from one test to the next."""
    named_problem.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    named_problem.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Reference runs of a few steps, and an empty cache; its folder of snapshots."""
    short = {n: replace(r, recipe=replace(r.recipe, steps=STEPS), early=EARLY) for n, r in REFERENCES.items()}
    monkeypatch.setattr(named, "REFERENCES", MappingProxyType(short))
    return elsewhere(monkeypatch, tmp_path / "cache")


def elsewhere(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    named_problem.cache_clear()
    return cache / "gradiometer" / "snapshots"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_reference_run_is_the_same_bytes_wherever_and_on_however_many_threads(
    quick: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, threads = named.train, []

    def watched(*arguments: Any) -> Any:
        threads.append(torch.get_num_threads())
        return train(*arguments)

    monkeypatch.setattr(named, "train", watched)
    torch.set_num_threads(2)
    torch.manual_seed(1)
    named_problem("digits-vae@late")
    assert torch.get_num_threads() == 2
    again = elsewhere(monkeypatch, tmp_path / "other")
    torch.set_num_threads(1)
    torch.manual_seed(2)
    named_problem("digits-vae@init")
    assert threads == [1, 1]  # so small a model may not show it
    first, second = contents(quick), contents(again)
    assert [name.partition("-vae@")[2][:5] for name in first] == ["early", "init-", "late-"]
    assert first == second


def test_training_leaves_the_global_noise_alone(quick: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    named_problem("digits-vae@late")
    assert torch.rand(1) == expected


def test_a_reference_run_is_trained_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = named_problem("digits-vae@late").about["digest"]
    named_problem.cache_clear()
    monkeypatch.setattr(named, "train", lambda *_: pytest.fail("trained again"))
    assert named_problem("digits-vae@late").about["digest"] == first
    named_problem("digits-vae@init")
    named_problem("digits-vae@early", 5)


def test_a_run_that_was_killed_is_trained_again_to_the_same_end(quick: Path) -> None:
    named_problem("digits-vae@late")
    before = contents(quick)
    for path in quick.glob("*@late*"):
        path.unlink()
    named_problem.cache_clear()
    named_problem("digits-vae@late")
    assert contents(quick) == before


def test_snapshots_are_the_steps_they_claim(quick: Path) -> None:
    """@early is where a run that stops there ends; the bound grows along the run."""
    model, dataset = named.fresh("digits-vae", 0)
    torch.set_num_threads(1)
    reference = named.REFERENCES["digits-vae"]
    recipe = replace(reference.recipe, steps=EARLY)
    for _ in named.train(model, parse(recipe.estimator), dataset, recipe):
        pass
    early = named_problem("digits-vae@early").model.state_dict()
    assert all(torch.equal(early[name], tensor) for name, tensor in model.state_dict().items())
    elbo = [
        measure(named_problem(f"digits-vae@{s}"), parse("sgvb-a"), replicates=32).values()["elbo"].value
        for s in ("init", "early", "late")
    ]
    assert elbo[0] < elbo[1] < elbo[2]


@pytest.mark.parametrize("name", ["digits-vae-bernoulli", "digits-vae-categorical", "digits-vae-two-layers"])
def test_other_guides_have_reference_runs_of_their_own(quick: Path, name: str) -> None:
    init, late = (named_problem(f"{name}@{s}").model.state_dict() for s in ("init", "late"))
    assert all(tensor.isfinite().all() for tensor in late.values())
    weights = [key for key in init if key.endswith("weight")]
    assert weights
    assert all(not torch.equal(init[key], late[key]) for key in weights)


def test_what_cannot_be_reparameterised_is_skipped_with_advice(quick: Path) -> None:
    problem = named_problem("digits-vae-bernoulli@init")
    assert reason_to_skip(problem, parse("rloo:K=2")) is None
    assert reason_to_skip(problem, parse("dreg")) == "dreg needs a reparameterisable guide; try rloo or vimco"
    assert reason_to_skip(named_problem("digits-vae@init"), parse("dreg")) is None


@pytest.mark.parametrize("content", [b"", b"not a snapshot", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_snapshot_is_named(quick: Path, content: bytes) -> None:
    named_problem("digits-vae@late")
    (path,) = quick.glob("*@late*")
    path.write_bytes(content)
    named_problem.cache_clear()
    with pytest.raises(
        RequestError, match=r"digits-vae@late-\w+\.safetensors is damaged: delete it to have it trained again"
    ):
        named_problem("digits-vae@late")


def test_a_cache_that_cannot_be_written_is_named(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    elsewhere(monkeypatch, tmp_path / "file")
    with pytest.raises(RequestError, match=r"cannot be written \(Not a directory\); XDG_CACHE_HOME moves the cache"):
        named_problem("digits-vae@init")


def test_snapshots_belong_to_everything_that_decides_them(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load("digits")
    reference = named.REFERENCES["digits-vae"]

    def path(**changes: object) -> Path:
        return named._path("digits-vae", "late", replace(reference, **changes), dataset)

    changed = [
        path(),
        path(recipe=replace(reference.recipe, steps=STEPS + 1)),
        path(recipe=replace(reference.recipe, seed=1)),
        path(recipe=replace(reference.recipe, estimator="stl")),
        path(recipe=replace(reference.recipe, learning_rate=1e-2)),
        path(early=EARLY + 1),
        path(preset="digits-binary"),
        named._path("digits-vae", "late", reference, replace(dataset, checksum="other")),
    ]
    monkeypatch.setattr(torch, "__version__", "0.0")
    changed.append(path())
    assert len(set(changed)) == len(changed)


def test_the_digest_sees_parameters_minibatch_and_held_out_data(quick: Path) -> None:
    problem = named_problem("digits-vae@late")
    digest = problem.about["digest"]
    seen = {
        digest,
        *(named_problem(w, b).about["digest"] for w, b in (("digits-vae@init", 20), ("digits-vae@late", 19))),
    }
    assert len(seen) == 3
    assert digest_of(problem.model, problem.x, problem.held_out) == digest
    assert digest_of(problem.model, problem.x, problem.held_out[:-1]) != digest
    (path,) = quick.glob("*@late*")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))  # one bit
    problem.model.load_state_dict(tensors)
    assert digest_of(problem.model, problem.x, problem.held_out) != digest


def test_the_minibatch_is_fixed_and_binary(quick: Path) -> None:
    problem = named_problem("digits-vae@late")
    named_problem.cache_clear()
    torch.manual_seed(5)
    again = named_problem("digits-vae@late")
    assert problem is not again
    assert torch.equal(problem.x, again.x)
    assert torch.equal(problem.held_out, again.held_out)
    assert torch.equal(problem.x, named_problem("digits-vae@init").x)
    assert problem.x.shape == (20, 64)
    assert set(problem.x.unique().tolist()) == {0.0, 1.0}
    assert len(problem.held_out) == 250
    assert not problem.model.training
    assert problem.about | {"digest": ""} == {
        "model": "digits-vae",
        "dataset": "digits",
        "snapshot": "late",
        "digest": "",
    }


def test_minibatches_are_drawn_from_the_data_without_replacement() -> None:
    problem = named_problem("gaussian-toy:units=2,data=7", 3)
    everything = {tuple(row.tolist()) for row in named_problem("gaussian-toy:units=2,data=7", 7).x}
    seen = set()
    for seed in range(20):
        x = problem.minibatch(torch.Generator().manual_seed(seed))
        rows = {tuple(row.tolist()) for row in x}
        assert x.shape == (3, 2)
        assert len(rows) == 3
        seen |= rows
    assert seen == everything
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(problem.minibatch(generator), problem.minibatch(generator))


def test_grey_levels_are_binarised_anew_with_every_minibatch(quick: Path) -> None:
    problem = named_problem("digits-vae@init", 1297)  # all of the data
    generator = torch.Generator().manual_seed(named.MINIBATCH_SEED)
    assert torch.equal(problem.minibatch(generator), problem.x)
    again = problem.minibatch(generator)
    assert set(again.unique().tolist()) == {0.0, 1.0}
    ink, other = (x.sum(1).sort().values for x in (problem.x, again))
    assert not torch.equal(ink, other)


@pytest.mark.parametrize("word", ["bernoulli-toy", "function-toy", "gaussian-toy:data=1"])
def test_one_data_point_makes_no_other_minibatch(word: str) -> None:
    assert named_problem(word, 1).minibatch is None


@pytest.mark.parametrize(
    ("word", "batch", "said"),
    [
        ("gaussian-toy:data=3", 4, "gaussian-toy has 3 data points, fewer than a batch of 4"),
        ("enumerable-vae", 65, "enumerable-vae has 64 data points, fewer than a batch of 65"),
        ("digits-vae@init", 1298, "digits-vae has 1297 data points, fewer than a batch of 1298"),
    ],
)
def test_a_batch_larger_than_the_data_is_refused(quick: Path, word: str, batch: int, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        named_problem(word, batch)
    assert len(named_problem(word, batch - 1).x) == batch - 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("", "unknown problem ''; known: digits-vae, "),
        ("@late", "unknown problem ''"),
        ("gausian-toy", "unknown problem 'gausian-toy'; did you mean 'gaussian-toy'?"),
        ("Digits-VAE@late", "unknown problem 'Digits-VAE'; did you mean 'digits-vae'?"),
        ("digits-vae", "write digits-vae@late (or @init, @early)"),
        ("digits-vae@lat", "digits-vae has no snapshot 'lat'; did you mean 'late'?"),
        ("digits-vae@", "digits-vae has no snapshot ''; known: init, early, late"),
        ("digits-vae@late@early", "digits-vae has no snapshot 'late@early'"),
        ("digits-vae:latent=3@late", "digits-vae has no options: leave out ':latent=3'"),
        ("digits-vae:@late", "'digits-vae:@late' has a colon and no option after it: leave it out"),
        ("gaussian-toy:", "'gaussian-toy:' has a colon and no option after it: leave it out"),
        ("gaussian-toy@late", "gaussian-toy is not trained, so it has no snapshot 'late': leave out '@late'"),
        ("gaussian-toy:unit=3", "gaussian-toy has no option 'unit'; did you mean 'units'?"),
        ("gaussian-toy:units=x", "units of gaussian-toy should be a whole number, not 'x'"),
        ("gaussian-toy:units=0", "gaussian-toy needs units >= 1, not 0"),
        ("gaussian-toy:units=-1", "gaussian-toy needs units >= 1, not -1"),
        ("gaussian-toy:data=0", "gaussian-toy needs data >= 1, not 0"),
        ("gaussian-toy:distance=nan", "gaussian-toy needs a finite distance, not nan"),
        ("gaussian-toy:units=3,units=3", "'units' is given twice in gaussian-toy:units=3,units=3"),
        ("gaussian-toy:units=3,", "'' in gaussian-toy:units=3, should read key=value"),
        ("bernoulli-toy:p0=inf", "bernoulli-toy needs a finite p0, not inf"),
        ("bernoulli-toy:logit=-inf", "bernoulli-toy needs a finite logit, not -inf"),
        ("function-toy:function=cubic", "function of function-toy should be one of quadratic, exponential, cosine"),
        ("function-toy:sigma=0", "function-toy needs a finite sigma > 0, not 0.0"),
        ("function-toy:sigma=nan", "function-toy needs a finite sigma > 0, not nan"),
        ("function-toy:k=inf", "function-toy needs a finite k, not inf"),
        ("function-toy:mu=inf", "function-toy needs a finite mu, not inf"),
        ("enumerable-vae:scale=nan", "enumerable-vae needs a finite scale, not nan"),
    ],
)
def test_a_wrong_word_is_a_sentence(word: str, said: str) -> None:
    for reader in (parse_problem, named_problem):
        with pytest.raises(RequestError) as refused:
            reader(word)
        assert said in str(refused.value)


def test_every_toy_is_known_and_the_same_every_time() -> None:
    for name in TOYS:
        problem = named_problem(name, 2)
        digest = problem.about["digest"]
        named_problem.cache_clear()
        torch.manual_seed(11)
        assert named_problem(name, 2).about["digest"] == digest
        assert problem.about["model"] == name
        assert problem.about["snapshot"] == ""
        assert problem.held_out is None


def test_options_of_toys_do_what_they_say() -> None:
    def digests(*words: str) -> int:
        return len({named_problem(word, 2).about["digest"] for word in words})

    assert named_problem("gaussian-toy:units=3,data=7", 7).x.shape == (7, 3)
    assert len(named_problem("gaussian-toy:units=3,data=7", 7).x) == 7
    assert digests("gaussian-toy", "gaussian-toy:distance=0.2", "gaussian-toy:units=3", "gaussian-toy:data=64") == 4
    assert digests("gaussian-toy", "gaussian-toy:units=20", "gaussian-toy:distance=0.1") == 1
    assert digests("enumerable-vae", "enumerable-vae:scale=0.5") == 2
    logit = named_problem("bernoulli-toy:logit=0.25", 1).model
    assert logit.guide(torch.ones(1, 1)).base_dist.logits.item() == pytest.approx(0.25)
    normal = named_problem("function-toy:function=cosine,mu=2,sigma=3", 1).model.guide(torch.ones(1, 1)).base_dist
    assert (normal.loc.item(), normal.scale.item()) == pytest.approx((2.0, 3.0))
    f = {f: named_problem(f"function-toy:function={f},k=2", 1).model for f in ("quadratic", "exponential", "cosine")}
    z, x = torch.tensor([[[0.3]]]), torch.ones(1, 1)
    values = [float((m.log_joint(x, z) - m.guide(x).log_prob(z)).detach().squeeze()) for m in f.values()]
    assert values == pytest.approx(
        [(0.3 - 2) ** 2, torch.tensor(-2 * 0.09).exp().item(), torch.tensor(0.6).cos().item()]
    )


def test_a_problem_holds_its_model_still() -> None:
    model = BernoulliToy()
    model.train()
    assert not Problem(model, torch.ones(1, 1)).model.training


def test_no_vae_of_that_name_is_a_sentence() -> None:
    with pytest.raises(RequestError, match=r"no VAE to train is called 'digit-vae'; did you mean 'digits-vae'\?"):
        named.fresh("digit-vae", 0)


def test_names_of_snapshots_in_the_cache_are_those_of_their_problem(quick: Path) -> None:
    named_problem("digits-vae@early")
    assert {path.name.partition("-vae@")[0] for path in quick.iterdir()} == {"digits"}
    assert not [name for name in os.listdir(quick) if name.endswith(".part")]


@pytest.mark.parametrize("batch", [0, -1])
def test_a_minibatch_has_data(batch: int) -> None:
    with pytest.raises(RequestError, match=f"a minibatch has at least one data point, not {batch}"):
        named_problem("gaussian-toy", batch)


@pytest.mark.parametrize("word", ["enumerable-vae", "gaussian-toy:units=3", "digits-vae@init"])
def test_a_problem_does_not_hang_on_the_default_precision(word: str) -> None:
    plain = named_problem(word, 4).about["digest"]
    named_problem.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert named_problem(word, 4).about["digest"] == plain
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_models_of_any_precision_and_with_state_of_their_own_are_problems() -> None:
    class Noted(GaussianToy):
        def get_extra_state(self) -> dict[str, int]:
            return {"epochs": 3}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    x = torch.zeros(3, 2)
    half, noted = (Problem(model, x) for model in (GaussianToy(units=2).bfloat16(), Noted(units=2)))
    assert measure(half, "iwae:K=2", replicates=16).engine == measure(noted, "iwae:K=2", replicates=16).engine == "rows"
    with torch.no_grad():
        half.model.mu.weight += 1
    assert Problem(half.model, x).about["digest"] != half.about["digest"]


def test_what_is_no_model_or_no_minibatch_is_a_sentence() -> None:
    toy = GaussianToy(units=2)
    with pytest.raises(ValueError, match="Linear is no latent-variable model: it has no guide"):
        Problem(nn.Linear(2, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x is a tensor \[B, \.\.\.\], not of type ndarray"):
        Problem(toy, torch.zeros(3, 2).numpy())
    for lacking in (
        SimpleNamespace(guide=toy.guide, log_joint=toy.log_joint, groups=toy.groups),
        toy.requires_grad_(False),
    ):
        with pytest.raises(ValueError, match="has no parameters to take gradients of: a model is an"):
            Problem(lacking, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("latent", "kind"), [((5,), "gaussian"), ((5, 3), "gaussian"), ((4,), "categorical"), ((4, 2), "bernoulli")]
)
def test_a_guide_that_sees_no_data_has_no_active_units(latent: tuple[int, ...], kind: str) -> None:
    between = (4,) if len(latent) > 1 else ()
    model = VAE(Architecture(data=6, hidden=(4,), latent=latent, between=between, kind=kind, classes=3))
    x = (torch.rand(500, 6) < 0.5).float()
    units = sum(latent)
    assert 0 <= active_units(model, x) <= units
    for parameter in model.encoder.parameters():
        parameter.data.zero_()
    assert active_units(model, x) == 0


def test_the_active_units_are_those_whose_means_follow_the_data() -> None:
    model, x = (
        VAE(Architecture(data=6, hidden=(), latent=(4,), kind="categorical", classes=3)),
        torch.eye(6).repeat(50, 1),
    )
    layer = next(m for m in model.encoder.modules() if isinstance(m, nn.Linear))
    for parameter in layer.parameters():
        parameter.data.zero_()
    layer.weight.data[3:6, 0] = torch.tensor([9.0, 0.0, 0.0])  # the second latent's classes, by the first pixel
    assert active_units(model, x) == 1


def test_a_word_stands_for_its_estimator() -> None:
    toy = Problem(GaussianToy(units=2), torch.zeros(3, 2))
    by_word = measure(toy, "iwae:K=2", replicates=16, reference="iwae:K=2")
    built = measure(toy, parse("iwae:K=2"), replicates=16, reference=parse("iwae:K=2"))
    assert by_word.estimator == built.estimator
    assert by_word.metrics("inference")["cosine"] == built.metrics("inference")["cosine"]
    assert cost(toy, "iwae:K=2", seconds=0.01)["evaluations"].value == 2
    with pytest.raises(ValueError, match="unknown estimator 'iwea'; did you mean 'iwae'"):
        measure(toy, "iwea")

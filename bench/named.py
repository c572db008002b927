"""Problems by name: ``digits-vae@late``, ``gaussian-toy:distance=0.5``; and the reference runs behind their snapshots.

A reference run is decided by what stands here: model, data, estimator, seed, optimiser, steps. Its snapshots are cached and
enter every cell's key by the hash of their parameters.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gradiometer.bench import atomic
from gradiometer.bench.data import Dataset, load
from gradiometer.bench.data.files import cache_folder
from gradiometer.bench.errors import RequestError
from gradiometer.bench.models.settings import TOYS
from gradiometer.bench.models.vae import PRESETS, VAE
from gradiometer.bench.problems import Problem
from gradiometer.bench.training import Recipe, train
from gradiometer.estimators.noise import seeded
from gradiometer.estimators.registry import configured, nearest, parse

log = logging.getLogger(__name__)
MINIBATCH_SEED = 0  # of the one minibatch a problem is measured on
HELD_OUT = 1000  # test images on which active units and bounds are computed


@dataclass(frozen=True)
class Reference:
    """A VAE and the run that trains it to the snapshots its problems are measured at."""

    preset: str
    dataset: str
    recipe: Recipe
    early: int
    summary: str

    @property
    def snapshots(self) -> dict[str, int]:
        """Steps of the reference run at each snapshot."""
        return {"init": 0, "early": self.early, "late": self.recipe.steps}


_DIGITS, _MNIST = Recipe("sgvb-a", steps=5000), Recipe("sgvb-a", steps=10_000)
_DIGITS_SCORE, _MNIST_SCORE = Recipe("rloo:K=8", steps=5000), Recipe("rloo:K=4", steps=10_000)
REFERENCES = MappingProxyType(
    {
        "digits-vae": Reference("digits", "digits", _DIGITS, 100, "64-32-8 Gaussian VAE"),
        "digits-vae-two-layers": Reference(
            "digits-two-layers", "digits", _DIGITS, 100, "two stochastic layers, 12 and 6"
        ),
        "digits-vae-bernoulli": Reference("digits-binary", "digits", _DIGITS_SCORE, 100, "16 Bernoulli latents"),
        "digits-vae-categorical": Reference(
            "digits-categorical", "digits", _DIGITS_SCORE, 100, "6 latents of 4 classes"
        ),
        "mnist-vae": Reference("burda-1", "mnist", _MNIST, 500, "784-200-200-50 of Burda et al."),
        "mnist-vae-two-layers": Reference("burda-2", "mnist", _MNIST, 500, "Burda et al.'s 100 and 50 latents"),
        "mnist-vae-linear": Reference(
            "disarm-linear", "mnist", _MNIST_SCORE, 500, "784-200 linear, Bernoulli, of the DisARM line"
        ),
        "mnist-vae-nonlinear": Reference(
            "disarm-nonlinear", "mnist", _MNIST_SCORE, 500, "784-200-200-200 LeakyReLU, Bernoulli, of the DisARM line"
        ),
        "fashion-vae": Reference("burda-1", "fashion-mnist", _MNIST, 500, "784-200-200-50 on Fashion-MNIST"),
        "static-mnist-vae": Reference("burda-1", "binarized-mnist", _MNIST, 500, "784-200-200-50, fixed binarisation"),
        "omniglot-vae": Reference("burda-1", "omniglot", _MNIST, 500, "784-200-200-50 on Omniglot"),
    }
)


@dataclass(frozen=True)
class Name:
    """A problem's word, taken apart."""

    word: str
    name: str
    settings: str
    snapshot: str


def parse_problem(word: str) -> Name:
    """Take a problem's word apart and check each part.

    Raises:
        RequestError: one sentence with the nearest valid word.
    """
    rest, at, snapshot = word.partition("@")
    name, colon, settings = rest.partition(":")
    if colon and not settings:
        raise RequestError(f"{word!r} has a colon and no option after it: leave it out")
    if name in TOYS:
        if at:
            raise RequestError(f"{name} is not trained, so it has no snapshot {snapshot!r}: leave out '@{snapshot}'")
        try:
            configured(TOYS[name], name, settings)
        except ValueError as error:
            said = str(error)
            raise RequestError(f"{name} {said}" if said.startswith("needs") else said) from None
        return Name(word, name, settings, "")
    if name not in REFERENCES:
        raise RequestError(f"unknown problem {name!r}{nearest(name, [*REFERENCES, *TOYS])}")
    if settings:
        raise RequestError(f"{name} has no options: leave out ':{settings}'")
    snapshots = list(REFERENCES[name].snapshots)
    if not at:
        raise RequestError(
            f"{name} is measured at a snapshot of its reference run: write {name}@late (or @init, @early)"
        )
    if snapshot not in snapshots:
        raise RequestError(f"{name} has no snapshot {snapshot!r}{nearest(snapshot, snapshots)}")
    return Name(word, name, settings, snapshot)


@contextmanager
def _in_single_precision() -> Iterator[None]:
    """While open, new parameters are float32, whatever torch's default is: a problem's name stands for the same numbers always."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@lru_cache(maxsize=8)
@_in_single_precision()
def named_problem(word: str, batch: int = 20) -> Problem:
    """The problem a word stands for; trains its reference run if no snapshot of it is cached.

    Raises:
        RequestError: an unknown word, or data that cannot be had.

    Example:
        >>> named_problem("gaussian-toy:units=3", batch=5).x.shape
        torch.Size([5, 3])
    """
    if batch < 1:
        raise RequestError(f"a minibatch has at least one data point, not {batch}")
    parts = parse_problem(word)
    take: Callable[[Tensor, torch.Generator], Tensor]
    if parts.name in TOYS:
        toy = configured(TOYS[parts.name], parts.name, parts.settings)
        try:
            model, data = toy.build()
        except (RuntimeError, MemoryError):
            raise RequestError(f"{word} is too large for this machine's memory") from None
        about = {"model": parts.name, "dataset": "synthetic", "snapshot": ""}
        x = data.repeat(batch, 1) if len(data) == 1 else data[:batch]
        size, held_out, take = len(data), None, partial(_rows, data)
    else:
        reference = REFERENCES[parts.name]
        model, dataset = fresh(parts.name, reference.recipe.seed)
        _restore(model, parts, reference, dataset)
        generator = torch.Generator().manual_seed(MINIBATCH_SEED)
        size, held_out, take = len(dataset.train), held_out_of(dataset), dataset.batch
        x = _drawn(take, size, batch, generator)
        about = {"model": parts.name, "dataset": dataset.name, "snapshot": parts.snapshot}
    if len(x) < batch:
        raise RequestError(f"{parts.name} has {len(x)} data points, fewer than a batch of {batch}")
    minibatch = partial(_drawn, take, size, batch) if size > 1 else None
    return Problem(model, x, word, held_out, about, minibatch)


def _drawn(
    take: Callable[[Tensor, torch.Generator], Tensor], size: int, batch: int, generator: torch.Generator
) -> Tensor:
    """A minibatch drawn without replacement, binarised anew where training does so."""
    return take(torch.randperm(size, generator=generator)[:batch], generator)


def _rows(data: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
    return data[indices]


@_in_single_precision()
def fresh(name: str, seed: int) -> tuple[VAE, Dataset]:
    """An untrained model of a named VAE, its initial parameters drawn with `seed`, and its data."""
    if name not in REFERENCES:
        raise RequestError(f"no VAE to train is called {name!r}{nearest(name, list(REFERENCES))}")
    reference = REFERENCES[name]
    dataset = load(reference.dataset)
    with seeded(seed):
        return _architecture(reference, dataset), dataset


def held_out_of(dataset: Dataset) -> Tensor:
    """The first `HELD_OUT` test images, binarised once."""
    indices = torch.arange(min(HELD_OUT, len(dataset.test)))
    return dataset.batch(indices, torch.Generator().manual_seed(MINIBATCH_SEED), "test")


def _architecture(reference: Reference, dataset: Dataset) -> VAE:
    return VAE(PRESETS[reference.preset], dataset.train.mean(0))


def _restore(model: nn.Module, parts: Name, reference: Reference, dataset: Dataset) -> None:
    """Give `model` the parameters of a snapshot."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _path(parts.name, parts.snapshot, reference, dataset)
    if not path.is_file():
        _run_reference(parts.name, reference, dataset)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        raise RequestError(f"the snapshot {path} is damaged: delete it to have it trained again") from None


def _path(name: str, snapshot: str, reference: Reference, dataset: Dataset) -> Path:
    decided = [asdict(reference), asdict(PRESETS[reference.preset]), dataset.checksum, torch.__version__]
    key = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder().parent / "snapshots" / f"{name}@{snapshot}-{key}.safetensors"


def _run_reference(name: str, reference: Reference, dataset: Dataset) -> None:
    """Train and publish all snapshots, on one thread, so that the machine's cores do not enter the numbers."""
    log.info("training the reference run of %s once: %d steps", name, reference.recipe.steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, _ = fresh(name, reference.recipe.seed)
        wanted = {step: snapshot for snapshot, step in reference.snapshots.items()}
        for step, _ in train(model, parse(reference.recipe.estimator), dataset, reference.recipe):
            if step in wanted:
                _publish(_path(name, wanted[step], reference, dataset), model.state_dict())
    finally:
        torch.set_num_threads(threads)


def _publish(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, save({n: t.contiguous() for n, t in tensors.items()}))
    except OSError as error:
        raise RequestError(
            f"the snapshot {path} cannot be written ({error.strerror}); XDG_CACHE_HOME moves the cache"
        ) from None

"""Suites: TOML files that say which estimators are measured on which problems, validated before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from gradiometer.bench.cells import Cell
from gradiometer.bench.complaints import line_of, sentence, words
from gradiometer.bench.errors import RequestError
from gradiometer.bench.metrics import COST, METRICS, OF_COORDINATES
from gradiometer.bench.named import REFERENCES, parse_problem
from gradiometer.bench.replicates import MEMORY
from gradiometer.bench.training import SETTLE
from gradiometer.estimators.registry import nearest, parse


def _estimator(word: str) -> str:
    return str(parse(word))


def _problem(word: str) -> str:
    return parse_problem(word).word


def _vae(word: str) -> str:
    if word not in REFERENCES:
        raise ValueError(f"no VAE to train is called {word!r}{nearest(word, list(REFERENCES))}")
    return word


def _metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}{nearest(name, list(METRICS))}")
    return name


def precision_of(value: object) -> object:
    """A relative precision: ``"5%"`` or 0.05."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"should be a part of the value, as in 5% or 0.05, not {value!r}") from None


def memory_of(value: object) -> object:
    """An amount of memory in bytes: ``"2GB"`` or a number."""
    try:
        return int(_BYTES.validate_python(value))
    except ValidationError:
        raise ValueError(f"should be an amount of memory, as in 2GB or 512MiB, not {value!r}") from None


def amount(option: str, kind: Any, value: str) -> Any:
    """The value of an option of the command line that a suite has a key for.

    Raises:
        RequestError: it is no such amount.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise RequestError(f"{option}: {words(error.errors()[0])}") from None


_BYTES = TypeAdapter(ByteSize)
EstimatorWord = Annotated[str, AfterValidator(_estimator)]
ProblemWord = Annotated[str, AfterValidator(_problem)]
VaeWord = Annotated[str, AfterValidator(_vae)]
Positive = Annotated[int, Field(ge=1)]
Some = Field(min_length=1)
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MetricName = Annotated[str, AfterValidator(_metric)]
Precision = Annotated[float, BeforeValidator(precision_of), Field(gt=0, lt=1)]
Memory = Annotated[int, BeforeValidator(memory_of), Field(ge=2**20)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Block(BaseModel):
    """One grid of cells."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    K: Annotated[list[Positive], Some] | None = None
    batch: Positive = 20
    time_limit: Amount = 3600.0  # seconds

    @model_validator(mode="after")
    def _particles_once(self) -> Block:
        for word in getattr(self, "estimators", []) if self.K else []:
            if any(setting.startswith("K=") for setting in word.partition(":")[2].split(",")):
                raise ValueError(f"K is given twice: by the key K and by the word {word!r}")
        return self

    def words(self, estimators: Sequence[str]) -> list[str]:
        """The estimators' canonical words, at each K if the block lists several."""
        if not self.K:
            return [str(parse(word)) for word in estimators]
        return [str(parse(f"{w}{',' if ':' in w else ':'}K={K}")) for K in self.K for w in estimators]


class GradientBlock(Block):
    """Moments of the gradient of each estimator on each problem."""

    problems: Annotated[list[ProblemWord], Some]
    estimators: Annotated[list[str], Some]
    replicates: Annotated[int, Field(ge=4)] | None = None  # 1024, or 64 of each of several minibatches
    minibatches: Annotated[int, Field(ge=4)] | None = None
    tensors: bool = False
    reference: EstimatorWord = ""
    engine: Literal["auto", "rows", "ghost", "loop"] = "auto"
    metrics: list[MetricName] = []
    precision: Precision | None = None
    budget: Annotated[int, Field(ge=4)] | None = None
    memory: Memory = MEMORY
    settle: Annotated[int, Field(ge=0)] = SETTLE
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _makes_sense(self) -> GradientBlock:
        if self.budget is not None and self.precision is None:
            raise ValueError("a budget is what a precision may take: give precision, too")
        if self.budget is not None and self.budget < self.replicates_at_first:
            raise ValueError(
                f"a budget of {self.budget} is less than the {self.replicates_at_first} replicates measured at first"
            )
        if self.engine == "ghost" and (lacking := [name for name in self.metrics if name in OF_COORDINATES]):
            raise ValueError(f"the engine ghost keeps squared norms, which do not tell {lacking[0]}")
        if elsewhere := [name for name in self.metrics if name in COST or name.startswith("test_")]:
            kind = "training" if elsewhere[0].startswith("test_") else "cost"
            raise ValueError(f"{elsewhere[0]} is no metric of a gradient: it is measured by a [[{kind}]] block")
        asked: dict[str, object] = {f"the metric {name}": name != "variance" for name in self.metrics}
        asked |= {"tensors": self.tensors, "precision": self.precision, "reference": self.reference}
        if self.minibatches and (said := out_of_place(asked)):
            raise ValueError(said)
        return self

    @property
    def replicates_at_first(self) -> int:
        """Of each minibatch where there are several."""
        return self.replicates or replicates_of(self.minibatches)


def replicates_of(minibatches: int | None) -> int:
    """Replicates where no number is given: of the one minibatch, or of each."""
    return 64 if minibatches else 1024


def out_of_place(asked: Mapping[str, object], minibatches: str = "minibatches") -> str | None:
    """Which of the keys that are set goes with measurements on one minibatch alone, in a sentence, or None."""
    key = next((name for name, value in asked.items() if value), None)
    return f"{key} goes with one minibatch: leave it out, or {minibatches}" if key else None


class CostBlock(Block):
    """Seconds and memory of one gradient."""

    problems: Annotated[list[ProblemWord], Some]
    estimators: Annotated[list[str], Some]
    seconds: Amount = 0.5


class TrainingBlock(Block):
    """Training runs, one per estimator and seed."""

    problems: Annotated[list[VaeWord], Some]
    estimators: Annotated[list[str], Some]
    seeds: Annotated[list[Seed], Some] = [0]
    batch: Positive = 100
    steps: Positive
    every: Positive
    learning_rate: Amount = 1e-3


BLOCKS: dict[str, type[Block]] = {"gradient": GradientBlock, "cost": CostBlock, "training": TrainingBlock}


class Suite(BaseModel):
    """What `gradiometer run` runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    title: str
    description: str = ""
    seed: Seed = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    gradient: list[GradientBlock] = []
    cost: list[CostBlock] = []
    training: list[TrainingBlock] = []

    def cells(self, device: str = "cpu", only: str | None = None) -> list[tuple[Cell, float]]:
        """The suite's cells, each once, with their time limits; `only` keeps estimators or problems that match a pattern."""
        found: dict[Cell, float] = {}
        for block, cell in self._grid(device):
            if only is None or fnmatch(cell.estimator, only) or fnmatch(cell.problem, only):
                found.setdefault(cell, block.time_limit)
        return list(found.items())

    def _grid(self, device: str) -> Iterator[tuple[Block, Cell]]:
        shared: dict[str, Any] = {"device": device, "threads": self.threads}
        for g in self.gradient:
            of: dict[str, Any] = {
                "replicates": g.replicates_at_first,
                "minibatches": g.minibatches or 0,
                "tensors": g.tensors,
                "reference": g.reference,
                "engine": g.engine,
                "metrics": tuple(g.metrics),
                "precision": g.precision,
                "budget": g.budget,
                "memory": g.memory,
                "settle": g.settle,
                "dtype": g.dtype,
            }
            for problem in g.problems:
                for word in g.words(g.estimators):
                    yield g, Cell("gradient", problem, word, g.batch, self.seed, **of, **shared)
        for t in self.training:
            of = {"steps": t.steps, "every": t.every, "learning_rate": t.learning_rate}
            for problem in t.problems:
                for word in t.words(t.estimators):
                    for seed in t.seeds:
                        yield t, Cell("training", problem, word, t.batch, self.seed + seed, **of, **shared)
        for c in self.cost:
            for problem in c.problems:
                for word in c.words(c.estimators):
                    yield c, Cell("cost", problem, word, c.batch, self.seed, seconds=c.seconds, **shared)


MODELS: dict[str, type[BaseModel]] = {**BLOCKS, "": Suite}


def names() -> list[str]:
    """The suites that come with the package."""
    folder = files("gradiometer.bench") / "suites"
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


def read(word: str, settings: Sequence[str] = (), options: Mapping[str, str] | None = None) -> tuple[str, Suite]:
    """The name and content of a suite of ours or of a TOML file.

    Args:
        word: ``quickstart``, or a path that ends in ``.toml``.
        settings: ``key=value`` from the command line, set in every block that has the key.
        options: how keys were given that have an option of their own, for messages.

    Raises:
        RequestError: all that is wrong, with file and line.
    """
    if word.endswith(".toml"):
        path = Path(word)
        if not path.is_file():
            raise RequestError(f"no suite file {path}")
        text, where, name = _text(path), str(path), path.stem
    elif word in names():
        text, where, name = (
            (files("gradiometer.bench") / "suites" / f"{word}.toml").read_text("utf-8"),
            f"{word}.toml",
            word,
        )
    else:
        raise RequestError(f"unknown suite {word!r}{nearest(word, names())} (a file of your own ends in .toml)")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{where} is not TOML: {error}") from None
    keys = [_override(content, setting) for setting in settings]
    given = {key: f"--set {key}" for key in keys} | dict(options or {})
    return name, validated(content, text, where, given)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not TOML: it is not text in UTF-8") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def validated(content: dict[str, Any], text: str, where: str, given: Mapping[str, str] = MappingProxyType({})) -> Suite:
    """The suite in parsed TOML `content`; `text`, `where` and how keys were `given` on the command line are for messages.

    Raises:
        RequestError: all that is wrong, with file and line.
    """
    try:
        suite = Suite.model_validate(content)
        for kind in ("gradient", "training", "cost"):
            for number, block in enumerate(getattr(suite, kind)):
                _words(block, (kind, number, "estimators"), text, where, given)
    except ValidationError as error:
        raise RequestError(
            "; ".join(dict.fromkeys(sentence(e, MODELS, text, where, given) for e in error.errors()))
        ) from None
    if not (suite.gradient or suite.cost or suite.training):
        raise RequestError(f"{where} asks for nothing: add a [[gradient]], [[training]] or [[cost]] block")
    return suite


def _words(block: Any, location: tuple[str | int, ...], text: str, where: str, given: Mapping[str, str]) -> None:
    for word in block.estimators:
        try:
            block.words([word])
        except ValueError as error:
            at = given.get("estimators") or f"{where}, line {line_of(location, text, word)}"
            raise RequestError(f"{at}: {error}") from None


def _override(content: dict[str, Any], setting: str) -> str:
    """Set a key in every block that can have it; returns the key."""
    key, equals, value = (part.strip() for part in setting.partition("="))
    if not equals:
        raise RequestError(f"--set {setting} should read key=value, as in --set replicates=256")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    of_suite = [field for field in Suite.model_fields if field not in BLOCKS]
    known = dict.fromkeys([*of_suite, *(field for model in BLOCKS.values() for field in model.model_fields)])
    if key not in known:
        raise RequestError(f"--set: no key {key!r}{nearest(key, list(known))}")
    hit = key in of_suite
    if hit:
        content[key] = parsed
    for kind, model in BLOCKS.items():
        blocks = content.get(kind, [])
        for block in blocks if key in model.model_fields and isinstance(blocks, list) else []:
            if isinstance(block, dict):
                block[key], hit = parsed, True
    if not hit:
        raise RequestError(f"--set {key}: no block of this suite has such a key")
    return key

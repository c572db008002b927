"""A cell is one measurement of a suite: what is asked, the key that everything behind its numbers hashes to, and its rows."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradiometer.bench.batched import together
from gradiometer.bench.bias import TRUSTED
from gradiometer.bench.costs import cost
from gradiometer.bench.decomposition import decompose, minibatches_of
from gradiometer.bench.errors import RequestError, place_of
from gradiometer.bench.machine import processor
from gradiometer.bench.measured import row_of
from gradiometer.bench.measurement import Engine, measure_all
from gradiometer.bench.metrics import METRICS
from gradiometer.bench.named import fresh, held_out_of, named_problem
from gradiometer.bench.problems import Problem, digest, reason_to_skip
from gradiometer.bench.records import FLOORS, code_of, modules_of, passed, source_of
from gradiometer.bench.replicates import MEMORY
from gradiometer.bench.statistics import jackknife
from gradiometer.bench.training import SETTLE, Recipe, train
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse
from gradiometer.estimators.weights import log_mean_exp

# What can change a number: these modules, the estimator's own and what its words name. Comments do not count.
HARNESS = (
    "bench.formulas", "bench.gradients", "bench.products", "bench.outer", "bench.calls", "bench.tape", "bench.batched",
    "bench.moments", "bench.accumulators", "bench.directions", "bench.folding", "bench.subject", "bench.objections",
    "bench.replicates", "bench.bias", "bench.tails", "bench.measured", "bench.measurement", "bench.training", "bench.costs",
    "bench.statistics", "bench.oneway", "bench.decomposition", "bench.problems", "bench.cells", "bench.models.layers",
    "bench.models.vae", "bench.models.toys", "bench.models.protocol",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "float64": torch.float64}
EVALUATION_PARTICLES = 64
READ_BY = {  # fields that one kind of cell reads, and no other
    "gradient": (
        "replicates", "reference", "engine", "metrics", "precision", "budget", "memory", "settle", "tensors", "minibatches",
    ),
    "cost": ("seconds",),
    "training": ("steps", "every", "learning_rate"),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement; every field that its kind reads can change its numbers.

    Of a gradient, `metrics` are those that must be among the rows (all if none is named); `precision`, `budget`, `memory`
    and `settle` are as `measure_all` takes them; `tensors` adds rows of single parameters. With `minibatches` its
    variance is decomposed, and `replicates` are those of each minibatch.
    """

    kind: Literal["gradient", "cost", "training"]
    problem: str
    estimator: str
    batch: int
    seed: int = 0
    replicates: int = 0
    reference: str = ""
    engine: Engine = "auto"
    metrics: tuple[str, ...] = ()
    precision: float | None = None
    budget: int | None = None
    memory: int = MEMORY
    settle: int = SETTLE
    tensors: bool = False
    minibatches: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    steps: int = 0
    every: int = 0
    learning_rate: float = 1e-3
    seconds: float = 0.5

    def __str__(self) -> str:
        at = f" seed {self.seed}" if self.kind == "training" else ""
        over = f" over {self.minibatches} minibatches" if self.minibatches else ""
        return f"{self.kind} of {self.estimator} on {self.problem}{at}{over}"

    @functools.cached_property
    def key(self) -> str:
        """The hash of everything that can change the cell's numbers."""
        unread = {name for kind, names in READ_BY.items() if kind != self.kind for name in names}
        fields = {name: value for name, value in asdict(self).items() if name not in unread}
        decided: dict[str, Any] = {"cell": fields, "torch": torch.__version__}
        words = [self.estimator, self.reference]
        if parse(self.estimator).facts.biased:  # and so compared with one of these
            words += [word for names in TRUSTED.values() for word in names]
        classes = [type(parse(word)) for word in words if word]
        harness = [f"gradiometer.{name}" for name in (*FLOORS, *HARNESS)]
        decided["sources"] = [source_of(module) for module in (*harness, *modules_of(classes))]
        decided["metrics"] = {name: metric.version for name, metric in METRICS.items()}
        if self.lacking:
            decided["problem"] = self.lacking
        elif self.kind == "training":
            model, dataset = fresh(self.problem, self.seed)
            decided["problem"] = [repr(model), dataset.checksum, digest(model, held_out_of(dataset))]
        else:
            decided["problem"] = named_problem(self.problem, self.batch).about["digest"]
        if self.minibatches and not self.lacking:
            decided["minibatches"] = _drawn(self.problem, self.batch, self.minibatches, self.seed)
        if self.kind in ("cost", "training"):  # seconds belong to a machine
            gpu = self.device.startswith("cuda")
            decided["machine"] = torch.cuda.get_device_name(self.device) if gpu else processor()
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def lacking(self) -> str:
        """Why there is no such problem on this machine: data that cannot be had, for one; "" if it is there."""
        return _lacking(self.kind, self.problem, self.batch)

    @functools.cached_property
    def company(self) -> Cell | None:
        """What cells have in common that one pass can serve; None for a cell that runs alone."""
        estimator = parse(self.estimator)
        if self.kind != "gradient" or self.engine == "loop" or not together([estimator]):
            return None
        return replace(self, estimator=f"K={estimator.K}")

    def run(self) -> list[dict[str, Any]]:
        """Measure, and return tidy rows.

        Raises:
            ValueError, Failure: there is no number; the message says why.
        """
        (rows,) = run_together([self])
        return rows

    def attempt(self) -> tuple[list[dict[str, Any]], str, str]:
        """The cell's rows, "ok" or "failed", and why: whatever it raises, a cell that fails is a row."""
        try:
            return self.run(), "ok", ""
        except (Exception, SystemExit) as error:  # an estimator's code may do anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if not isinstance(error, ValueError | RuntimeError):
                reason = f"{type(error).__name__}: {reason}"
            reason += place_of(error)
            return self.without_numbers("failed", reason), "failed", reason

    def about(self) -> dict[str, Any]:
        """The columns that every row of the cell shares, known before it runs."""
        estimator = parse(self.estimator)
        name, _, snapshot = self.problem.partition("@")
        return {
            "kind": self.kind,
            "problem": self.problem,
            "model": name.partition(":")[0],
            "snapshot": snapshot,
            "estimator": self.estimator,
            "code": code_of(estimator),
            "checked": passed(self.estimator, code_of(estimator)),
            "family": estimator.facts.family,
            "K": estimator.K,
            "B": self.batch,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
        }

    def without_numbers(self, status: str, reason: str) -> list[dict[str, Any]]:
        """The one row of a cell that was skipped or failed."""
        return [self.about() | {"metric": "", "status": status, "reason": reason}]

    def reason_to_skip(self) -> str | None:
        """Why this pair of problem and estimator cannot be measured, or None."""
        if self.kind == "training":
            model, dataset = fresh(self.problem, self.seed)
            return reason_to_skip(Problem(model, dataset.train[: self.batch]), parse(self.estimator))
        return reason_to_skip(named_problem(self.problem, self.batch), parse(self.estimator))


def run_together(cells: Sequence[Cell]) -> list[list[dict[str, Any]]]:
    """The rows of one cell, or of several that are company."""
    first = cells[0]
    torch.set_num_threads(first.threads)
    found = {"gradient": _gradients, "cost": _cost, "training": _training}[first.kind](cells)
    return [[cell.about() | row for row in rows] for cell, rows in zip(cells, found, strict=True)]


def attempt_together(cells: Sequence[Cell]) -> list[tuple[list[dict[str, Any]], str, str]]:
    """What `attempt` gives for each; one that fails does so alone, and the others go on."""
    if len(cells) > 1:
        with contextlib.suppress(Exception, SystemExit):
            return [(rows, "ok", "") for rows in run_together(cells)]
    return [cell.attempt() for cell in cells]


def _gradients(cells: Sequence[Cell]) -> list[list[dict[str, Any]]]:
    cell = cells[0]
    if cell.minibatches:
        return _decompositions(cells)
    measured = measure_all(
        named_problem(cell.problem, cell.batch),
        [parse(c.estimator) for c in cells],
        replicates=cell.replicates,
        seed=cell.seed,
        engine=cell.engine,
        device=cell.device,
        dtype=DTYPES[cell.dtype],
        reference=parse(cell.reference) if cell.reference else None,
        only=cell.metrics,
        precision=cell.precision,
        budget=cell.budget,
        memory=cell.memory,
        settle=cell.settle,
    )
    return [m.rows(tensors=cell.tensors) for m in measured]


def _decompositions(cells: Sequence[Cell]) -> list[list[dict[str, Any]]]:
    cell = cells[0]
    found = decompose(
        named_problem(cell.problem, cell.batch),
        [parse(c.estimator) for c in cells],
        minibatches=cell.minibatches,
        replicates=cell.replicates,
        seed=cell.seed,
        engine=cell.engine,
        device=cell.device,
        dtype=DTYPES[cell.dtype],
        memory=cell.memory,
        settle=cell.settle,
    )
    return [of.rows(tensors=cell.tensors) for of in found]


@functools.lru_cache(maxsize=64)
def _lacking(kind: str, problem: str, batch: int) -> str:
    try:
        if kind == "training":
            fresh(problem, 0)
        else:
            named_problem(problem, batch)
    except RequestError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=8)
def _drawn(problem: str, batch: int, minibatches: int, seed: int) -> str:
    """A hash of the minibatches themselves: whatever they are drawn from, and however."""
    found = hashlib.sha256()
    for x in minibatches_of(named_problem(problem, batch), minibatches, seed):
        found.update(x.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _cost(cells: Sequence[Cell]) -> list[list[dict[str, Any]]]:
    (cell,) = cells
    problem = named_problem(cell.problem, cell.batch)
    values = cost(
        problem, parse(cell.estimator), seed=cell.seed, device=cell.device, threads=cell.threads, seconds=cell.seconds
    )
    about = problem.about | {"engine": "step", "evaluations": values["evaluations"].value}
    return [[about | row_of(name, value) for name, value in values.items() if name != "evaluations"]]


def _training(cells: Sequence[Cell]) -> list[list[dict[str, Any]]]:
    (cell,) = cells
    model, dataset = fresh(cell.problem, cell.seed)
    model, x = model.to(cell.device), held_out_of(dataset).to(cell.device)
    estimator = parse(cell.estimator)
    recipe = Recipe(cell.estimator, cell.steps, cell.batch, cell.learning_rate, cell.seed)
    about = {"dataset": dataset.name, "engine": "step"}
    rows = []
    for step, seconds in train(model, estimator, dataset, recipe):
        if step % cell.every == 0 or step == cell.steps:
            at = about | {"step": step, "seconds": seconds}
            rows += [at | row_of(name, _over_data(values)) for name, values in _bounds(model, x, cell.seed).items()]
    return [rows]


def _bounds(model: Any, x: Tensor, seed: int) -> dict[str, Tensor]:
    """ELBO and K-sample bound of each datum, ``[N]``; the same noise at every step."""
    with torch.no_grad():
        guide = model.guide(x)
        z = Rng(seed, 0, "evaluate", x.device, block=1).sample(guide, EVALUATION_PARTICLES)
        log_w = model.log_joint(x, z) - guide.log_prob(z)  # [K, N]
        return {"test_elbo": log_w.mean(0), "test_iwelbo": log_mean_exp(log_w)}


def _over_data(values: Tensor) -> Any:
    """The mean over data with the error of having these data and no others."""
    parts = values.double().tensor_split(16)
    total, count = values.double().sum(), len(values)
    without = [float((total - part.sum()) / (count - len(part))) for part in parts]
    return jackknife(float(total / count), without, positive=False)

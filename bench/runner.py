"""Runs the cells of a suite: side by side where that cannot change a number, one at a time where seconds are the number."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path

from pebble import ProcessExpired

from gradiometer.bench import machine, store
from gradiometer.bench.cells import Cell, attempt_together
from gradiometer.bench.workers import pool, spared_by_interrupts
from gradiometer.estimators.registry import load_plugin

TIMED = ("cost", "training")  # kinds whose rows hold seconds: never beside another cell


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: "ok", "skipped", "failed", or "kept" if it was finished before."""

    cell: Cell
    status: str
    reason: str = ""
    seconds: float = 0.0


def run(
    cells: Sequence[tuple[Cell, float]],
    folder: Path,
    *,
    jobs: int = 1,
    devices: Sequence[str] = ("cpu",),
    plugins: Sequence[str] = (),
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the cells that are not finished in `folder`, writing each as it ends.

    Args:
        cells: with their time limits in seconds.
        folder: made by `store.open_for_writing`.
        jobs: processes for cells without timings; it changes no row.
        devices: where cells run, in turn, each with `jobs` processes; it changes no row, if they are alike.
        plugins: files of estimators, loaded in every process.
        report: called with each outcome as it is known.
    """
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        report(outcome)

    waiting = []
    for cell, limit in cells:
        if (status := finished(folder, cell.key)) is not None:
            tell(Outcome(cell, "kept", status))
        elif cell.lacking:
            store.write_cell(folder, cell.key, cell.without_numbers("failed", cell.lacking), machine.describe())
            tell(Outcome(cell, "failed", cell.lacking))
        elif (reason := cell.reason_to_skip()) is not None:
            store.write_cell(folder, cell.key, cell.without_numbers("skipped", reason), machine.describe())
            tell(Outcome(cell, "skipped", reason))
        else:
            waiting.append((cell, limit))
    for timed, workers in ((False, jobs), (True, 1)):
        groups = companies([(cell, limit) for cell, limit in waiting if (cell.kind in TIMED) == timed])
        while groups:
            groups = _run_groups(groups, folder, workers, devices, plugins, tell)
    return outcomes


Group = Sequence[tuple[Cell, float]]
"""Cells that one pass can serve, with their time limits."""


def companies(cells: Group) -> list[Group]:
    """The cells in groups, each of which is measured at once; which they are depends on nothing but the cells."""
    found: dict[Cell, list[tuple[Cell, float]]] = {}
    for cell, limit in cells:
        found.setdefault(cell.company or cell, []).append((cell, limit))
    return list(found.values())


def finished(folder: Path, key: str) -> str | None:
    """The status of a cell that need not run again; one that failed is tried again."""
    record = store.read_cell(folder, key)
    if record is None:
        return None
    status = str((record["shared"] | record["rows"][0]).get("status"))
    return None if status == "failed" else status


def _run_groups(
    groups: Sequence[Group],
    folder: Path,
    workers: int,
    devices: Sequence[str],
    plugins: Sequence[str],
    tell: Callable[[Outcome], None],
) -> list[Group]:
    """Run groups side by side; returns the cells, each alone, of those whose process died or took too long."""
    workers = min(workers, -(-len(groups) // len(devices)))
    again: list[Group] = []
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(pool(workers, take, device)) for device in devices]
        with spared_by_interrupts():
            pending: dict[Future[list[Outcome]], Group] = {}
            for number, group in enumerate(groups):
                limit, cells = sum(limit for _, limit in group), [cell for cell, _ in group]
                at = pools[number % len(pools)]
                pending[at.schedule(_work, args=(cells, folder, list(plugins)), timeout=limit)] = group
        for future in as_completed(pending):
            group, error = pending[future], future.exception()
            if error is None:
                for outcome in future.result():
                    tell(outcome)
            elif len(group) > 1:
                again += [[one] for one in group]
            else:
                tell(_failure(error, *group[0], folder))
    return again


def _failure(error: BaseException, cell: Cell, limit: float, folder: Path) -> Outcome:
    if isinstance(error, FutureTimeout):
        reason = f"it took longer than its time limit of {limit:g} s"
    elif isinstance(error, ProcessExpired):
        killed = error.exitcode == -signal.SIGKILL
        reason = (
            "its process was killed: out of memory, most likely"
            if killed
            else f"its process died (exit code {error.exitcode})"
        )
    else:  # the worker could not begin or not write, or all of them are gone
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    store.write_cell(folder, cell.key, cell.without_numbers("failed", reason), machine.describe())
    return Outcome(cell, "failed", reason)


def take(device: str) -> None:
    """Let what follows in this process run on a graphics processor, where one is named by its number."""
    if device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(torch.device(device))


def _work(cells: list[Cell], folder: Path, plugins: list[str]) -> list[Outcome]:
    """In a worker: run cells and publish what came of them."""
    began = time.perf_counter()
    for plugin in plugins:
        load_plugin(plugin)
    found = []
    for cell, (rows, status, reason) in zip(cells, attempt_together(cells), strict=True):
        store.write_cell(folder, cell.key, rows, machine.describe())
        found.append(Outcome(cell, status, reason, (time.perf_counter() - began) / len(cells)))
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that a scheduler's kill loses no finished cell and no worker lingers."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

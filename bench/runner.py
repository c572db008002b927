"""Runs the cells of a suite: side by side where that cannot change a number, one at a time where seconds are the number."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from gradiometer.bench import machine, store
from gradiometer.bench.cells import Cell
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
    plugins: Sequence[str] = (),
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the cells that are not finished in `folder`, writing each as it ends.

    Args:
        cells: with their time limits in seconds.
        folder: made by `store.open_for_writing`.
        jobs: processes for cells without timings; it changes no row.
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
        elif (reason := cell.reason_to_skip()) is not None:
            store.write_cell(folder, cell.key, cell.without_numbers("skipped", reason), machine.describe())
            tell(Outcome(cell, "skipped", reason))
        else:
            waiting.append((cell, limit))
    for timed, workers in ((False, jobs), (True, 1)):
        batch = [(cell, limit) for cell, limit in waiting if (cell.kind in TIMED) == timed]
        if batch:
            _run_batch(batch, folder, min(workers, len(batch)), plugins, tell)
    return outcomes


def finished(folder: Path, key: str) -> str | None:
    """The status of a cell that need not run again; one that failed is tried again."""
    record = store.read_cell(folder, key)
    if record is None:
        return None
    status = str((record["shared"] | record["rows"][0]).get("status"))
    return None if status == "failed" else status


def _run_batch(
    batch: list[tuple[Cell, float]], folder: Path, workers: int, plugins: Sequence[str], tell: Callable[[Outcome], None]
) -> None:
    pool = ProcessPool(workers, context=get_context("spawn"), initializer=_start)
    try:
        with _spared_by_interrupts():
            pending: dict[Future[Outcome], tuple[Cell, float]] = {
                pool.schedule(_work, args=(cell, folder, list(plugins)), timeout=limit): (cell, limit)
                for cell, limit in batch
            }
        for future in _as_completed(list(pending)):
            cell, limit = pending[future]
            tell(_outcome(future, cell, limit, folder))
        pool.close()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()


@contextlib.contextmanager
def _spared_by_interrupts() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C from their first moment, without a traceback while they import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _as_completed(futures: list[Future[Outcome]]) -> Iterator[Future[Outcome]]:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=0.5, return_when="FIRST_COMPLETED")
        yield from done


def _outcome(future: Future[Outcome], cell: Cell, limit: float, folder: Path) -> Outcome:
    try:
        return future.result()
    except FutureTimeout:
        reason = f"it took longer than its time limit of {limit:g} s"
    except ProcessExpired as error:
        killed = error.exitcode == -signal.SIGKILL
        reason = (
            "its process was killed: out of memory, most likely"
            if killed
            else f"its process died (exit code {error.exitcode})"
        )
    except Exception as error:  # the worker could not begin or not write, or all of them are gone
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    store.write_cell(folder, cell.key, cell.without_numbers("failed", reason), machine.describe())
    return Outcome(cell, "failed", reason)


def _start() -> None:
    """In a fresh worker: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(cell: Cell, folder: Path, plugins: list[str]) -> Outcome:
    """In a worker: run one cell and publish what came of it."""
    began = time.perf_counter()
    for plugin in plugins:
        load_plugin(plugin)
    rows, status, reason = cell.attempt()
    store.write_cell(folder, cell.key, rows, machine.describe())
    return Outcome(cell, status, reason, time.perf_counter() - began)


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

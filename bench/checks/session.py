"""A run of checks: cards printed as they come, written where asked, and remembered, so that rows know who has passed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from gradiometer.bench import machine, records, store
from gradiometer.bench.checks.card import Card
from gradiometer.bench.checks.gate import Level, check, failed
from gradiometer.bench.errors import RequestError
from gradiometer.bench.workers import pool, spared_by_interrupts
from gradiometer.estimators.base import Estimator
from gradiometer.estimators.registry import load_plugin


def run(
    estimators: Sequence[Estimator],
    level: Level,
    *,
    jobs: int = 1,
    out: Path | None = None,
    plugins: Sequence[str] = (),
    say: Callable[[str], object] = print,
) -> int:
    """Check every estimator; 0 if all passed, else 1.

    Args:
        jobs: processes side by side.
        out: a folder for cards, as text and as JSON.
        plugins: files to load in each process, before the estimators are known there.
        say: where a card goes.

    Raises:
        RequestError: the folder cannot be written.
    """
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot write cards to {out}: {error.strerror}") from None
    began, cards = time.perf_counter(), []
    for card in _cards(estimators, level, jobs, plugins):
        say(card.text() + "\n")
        cards.append(card)
        records.keep(card.word, card.code, card.passed)
        if out is not None:
            _write(out, card)
    say(_summary(cards, time.perf_counter() - began))
    return 0 if all(card.passed for card in cards) else 1


def _cards(estimators: Sequence[Estimator], level: Level, jobs: int, plugins: Sequence[str]) -> Iterator[Card]:
    if jobs == 1 or len(estimators) == 1:
        _begin(plugins)
        for estimator in estimators:
            yield check(estimator, level)
        return
    with pool(jobs, _begin, list(plugins)) as processes:
        with spared_by_interrupts():
            waiting = [processes.schedule(check, [estimator, level]) for estimator in estimators]
        for estimator, future in zip(estimators, waiting, strict=True):
            try:
                yield future.result()
            except Exception as error:  # the process died, or what it found cannot be sent
                yield failed(estimator, level, f"{type(error).__name__}: {error}")


def _begin(plugins: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for plugin in plugins:
        load_plugin(plugin)


def _write(folder: Path, card: Card) -> None:
    name = card.word.replace(":", "-").replace(",", "-").replace("=", "")
    store.publish(folder / f"{name}.json", card.as_dict() | {"machine": machine.describe()})
    (folder / f"{name}.txt").write_text(card.text() + "\n", encoding="utf-8")


def _summary(cards: Sequence[Card], seconds: float) -> str:
    broken = [card.word for card in cards if card.broken]
    unchecked = [card.word for card in cards if not card.broken and not card.passed]
    parts = [f"{sum(card.passed for card in cards)} of {len(cards)} passed in {seconds:.0f} s"]
    parts += [f"broken: {', '.join(broken)}"] if broken else []
    parts += [f"not checked: {', '.join(unchecked)}"] if unchecked else []
    return "; ".join(parts)

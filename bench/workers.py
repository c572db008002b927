"""Processes side by side that are gone when they are no longer wanted: after their work, or at once when it is broken off."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context, parent_process
from typing import Any

from pebble import ProcessPool

__all__ = ["pool", "spared_by_interrupts"]


@contextlib.contextmanager
def pool(workers: int, begin: Callable[..., object], *given: Any) -> Iterator[ProcessPool]:
    """Fresh processes, each of which calls ``begin(*given)`` first; what still waits when an error or Ctrl-C comes is not begun."""
    made = ProcessPool(workers, context=get_context("spawn"), initializer=_start, initargs=[begin, given])
    try:
        yield made
        made.close()
    except BaseException:
        made.stop()
        raise
    finally:
        made.join()


@contextlib.contextmanager
def spared_by_interrupts() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C from their first moment, without a traceback while they import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(begin: Callable[..., object], given: tuple[Any, ...]) -> None:
    """In a fresh process: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    begin(*given)

"""Which estimators have passed `gradiometer check`, by their code: one that was changed afterwards has not.

To read what is known needs no torch, so that a report knows of checks made after its rows were.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradiometer.bench.data.files import cache_folder

if TYPE_CHECKING:
    from gradiometer.estimators.base import Estimator

SHIPPED = Path(__file__).parent / "checks" / "passed.json"  # of the catalogue: {series: {"code": ...}}
FLOORS = ("noise", "weights", "base")


def series_of(word: str) -> str:
    """An estimator's word without its number of particles: what a check is of.

    >>> series_of("vr:alpha=2.0,K=64"), series_of("dreg:K=8"), series_of("stl")
    ('vr:alpha=2.0', 'dreg', 'stl')
    """
    name, _, settings = word.partition(":")
    kept = ",".join(setting for setting in settings.split(",") if setting and not setting.startswith("K="))
    return f"{name}:{kept}" if kept else name


def code_of(estimator: Estimator) -> str:
    """A hash of the estimator's module, of those it inherits from and of the floors below; comments and blank lines left out.

    Of the text, and not of the syntax tree as a cell's key has it: a tree's dump differs between versions of Python, and what is
    shipped as passed is for all of them.
    """
    from gradiometer.estimators.base import Estimator

    modules = [base.__module__ for base in type(estimator).__mro__ if issubclass(base, Estimator)]
    floors = [f"gradiometer.estimators.{name}" for name in FLOORS]
    parts = [_source(module) for module in dict.fromkeys([*modules, *floors])]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def passed(word: str, code: str) -> bool:
    """Whether this code has passed a check with the settings of this word, at any K; shipped with us, or on this machine."""
    series = series_of(word)
    return _shipped().get(series, {}).get("code") == code or _cached(series, code).is_file()


def keep(word: str, code: str, passes: bool) -> None:
    """Remember the outcome of a check on this machine; a cache that cannot be written is done without."""
    path = _cached(series_of(word), code)
    with contextlib.suppress(OSError):
        if not passes:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _cached(series: str, code: str) -> Path:
    return cache_folder().parent / "checks" / f"{series.replace(':', '-').replace(',', '-')}-{code}"


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    return json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}


@functools.cache
def _source(module: str) -> str:
    importlib.import_module(module)
    path = sys.modules[module].__file__
    assert path is not None
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))

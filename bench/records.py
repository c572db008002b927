"""Which estimators have passed `gradiometer check`, by their code: one that was changed afterwards has not."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gradiometer.bench.data.files import cache_folder
from gradiometer.estimators.base import Estimator

SHIPPED = Path(__file__).parent / "checks" / "passed.json"  # of the catalogue, written by `gradiometer check --all`
FLOORS = ("noise", "weights", "base")


def series_of(estimator: Estimator) -> str:
    """The estimator's word without its number of particles: what a check is of.

    >>> from gradiometer.estimators import parse
    >>> series_of(parse("vr:alpha=2,K=64")), series_of(parse("dreg"))
    ('vr:alpha=2.0', 'dreg')
    """
    own = [f for f in fields(estimator) if f.name != "K" and getattr(estimator, f.name) != f.default]
    settings = ",".join(f"{f.name}={getattr(estimator, f.name)}" for f in own)
    return f"{estimator.facts.name}:{settings}" if settings else estimator.facts.name


def code_of(estimator: Estimator) -> str:
    """A hash of the estimator's module, of those it inherits from and of the floors below; comments and blank lines left out."""
    modules = [base.__module__ for base in type(estimator).__mro__ if issubclass(base, Estimator)]
    floors = [f"gradiometer.estimators.{name}" for name in FLOORS]
    parts = [_source(module) for module in dict.fromkeys([*modules, *floors])]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def passed(estimator: Estimator) -> bool:
    """Whether this code has passed a check with these settings, at any K."""
    name, code = series_of(estimator), code_of(estimator)
    return _shipped().get(name, {}).get("code") == code or _cached(name, code).is_file()


def keep(estimator: Estimator, passes: bool) -> None:
    """Remember the outcome of a check on this machine."""
    path = _cached(series_of(estimator), code_of(estimator))
    if not passes:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _cached(name: str, code: str) -> Path:
    return cache_folder().parent / "checks" / f"{name.replace(':', '-').replace(',', '-')}-{code}"


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

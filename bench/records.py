"""Which estimators have passed `gradiometer check`, by their code: one that was changed afterwards has not.

To read what is known needs no torch, so that a report knows of checks made after its rows were.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import io
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradiometer.bench.data.files import cache_folder

if TYPE_CHECKING:
    from gradiometer.estimators.base import Estimator

SHIPPED = Path(__file__).parent / "checks" / "passed.json"  # of the catalogue: {series: {"code": ...}}
FLOORS = ("estimators.noise", "estimators.weights", "estimators.base")


def series_of(word: str) -> str:
    """An estimator's word without its number of particles: what a check is of.

    >>> series_of("vr:alpha=2.0,K=64"), series_of("dreg:K=8"), series_of("stl")
    ('vr:alpha=2.0', 'dreg', 'stl')
    """
    name, _, settings = word.partition(":")
    kept = ",".join(setting for setting in settings.split(",") if setting and not setting.startswith("K="))
    return f"{name}:{kept}" if kept else name


def code_of(estimator: Estimator) -> str:
    """A hash of the estimator's module, of those it inherits from and of the floors below, of their `code_alone`.

    Of the text, and not of the syntax tree: a tree's dump differs between versions of Python.
    """
    floors = [f"gradiometer.{name}" for name in FLOORS]
    parts = [source_of(module) for module in dict.fromkeys([*modules_of([type(estimator)]), *floors])]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def modules_of(classes: Iterable[type]) -> list[str]:
    """The modules of estimators and of those they inherit from, and of a person's own those that these import.

    Installed packages are told by their versions, not by their code.
    """
    from gradiometer.estimators.base import Estimator

    found = dict.fromkeys(base.__module__ for cls in classes for base in cls.__mro__ if issubclass(base, Estimator))
    waiting = list(found)
    while waiting:
        of = sys.modules.get(waiting.pop())
        if of is None or of.__name__.startswith("gradiometer."):
            continue
        names = {
            v.__name__ if isinstance(v, ModuleType) else str(getattr(v, "__module__", "")) for v in vars(of).values()
        }
        fresh = sorted(name for name in names if name not in found and _is_own(name))
        found |= dict.fromkeys(fresh)
        waiting += fresh
    return list(found)


def _is_own(module: str) -> bool:
    """Whether a module is a person's own code: a Python file outside of Python, of installed packages and of this one."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if not path or not path.endswith(".py") or module.startswith("gradiometer.") or module == "__main__":
        return False
    paths = sysconfig.get_paths()
    elsewhere = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(Path(path).is_relative_to(folder) for folder in elsewhere)


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
def source_of(module: str) -> str:
    """Its `code_alone`."""
    importlib.import_module(module)
    path = sys.modules[module].__file__
    assert path is not None
    return code_alone(Path(path).read_text(encoding="utf-8"))


def code_alone(source: str) -> str:
    """Python source without comments, docstrings and blank lines.

    >>> code_alone('def f() -> int:  # why' + chr(10) + '    "What it gives."' + chr(10) + '    return 1')
    'def f() -> int:\\n    return 1'
    """
    lines = source.split("\n")  # as tokens count them: other separators may stand in a string
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for string in docstrings(ast.parse(source)):
        assert string.end_lineno is not None
        lines[string.lineno - 1 : string.end_lineno] = [""] * (string.end_lineno - string.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def docstrings(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a syntax tree that are docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            yield node.body[0]

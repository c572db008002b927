"""Which estimators a command names: words, whole files of a stranger's, or the catalogue."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from gradiometer.bench.errors import RequestError
from gradiometer.estimators.base import Estimator, Facts
from gradiometer.estimators.registry import catalogue, configured, load_plugin, parse


def named(words: Sequence[str]) -> list[Estimator]:
    """The estimators of words (``dreg:K=4``) and of files (``mine.py``).

    Raises:
        RequestError: an unknown word, a file that cannot be loaded or holds no estimator, or one that cannot be built.
    """
    found: list[Estimator] = []
    for word in words:
        if word.endswith(".py"):
            found += _of_file(Path(word))
        elif Path(word).exists():
            raise RequestError(f"{word} is no Python file: name a file that ends in .py, or an estimator")
        else:
            try:
                found.append(parse(word))
            except ValueError as error:
                raise RequestError(str(error)) from None
    return found


def everything() -> list[Estimator]:
    """The catalogue at its defaults, and at the settings that change what an estimator claims."""
    try:
        known = catalogue()
    except ValueError as error:
        raise RequestError(str(error)) from None
    return [one for name, cls in known.items() for one in _with_variants(cls, name)]


def _of_file(path: Path) -> list[Estimator]:
    try:
        module = load_plugin(path)
    except ValueError as error:
        raise RequestError(str(error)) from None
    classes = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Estimator)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
    ]
    for cls in classes:
        if not isinstance(getattr(cls, "facts", None), Facts):
            raise RequestError(f"{cls.__name__} in {path} has no facts: facts = Facts(name, family=..., objective=...)")
        if "__dataclass_fields__" not in vars(cls):
            raise RequestError(f"{cls.__name__} in {path} is no dataclass: write @dataclass(frozen=True) above it")
    if not classes:
        raise RequestError(
            f"{path} defines no estimator: a dataclass that inherits Weighted or Estimator and has facts"
        )
    return [one for cls in classes for one in _with_variants(cls, cls.facts.name)]


def _with_variants(cls: type[Estimator], name: str) -> Iterator[Estimator]:
    try:
        yield cls()
    except Exception as error:
        missing = [f.name for f in fields(cls) if getattr(cls, f.name, None) is None]
        raise RequestError(f"{name} cannot be built with its defaults ({', '.join(missing) or error})") from None
    for settings in cls.facts.variants:
        try:
            yield configured(cls, name, settings)
        except ValueError as error:
            raise RequestError(f"{name} names {settings!r} among its variants, and {error}") from None


__all__ = ["everything", "named"]

"""From words to estimators: ``dreg:K=64``, ``nvi:levels=4,path=learned``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gradiometer.estimators.base import Estimator

_REGISTRY: dict[str, type[Estimator]] = {}
_STAIRS = {"lazily", "noise", "weights", "base", "registry"}
E = TypeVar("E", bound=type[Estimator])
T = TypeVar("T")


def register(cls: E) -> E:
    """Class decorator: make an estimator known by its ``facts.name``."""
    known = _REGISTRY.get(cls.facts.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"two estimators are called {cls.facts.name!r}: {known.__module__}.{known.__name__} and {cls.__name__}"
        )
    for field in fields(cls):
        if field.name in vars(cls) and field.name not in cls.__annotations__ and vars(cls)[field.name] != field.default:
            value = vars(cls)[field.name]
            raise ValueError(
                f"{cls.__name__} sets {field.name} = {value!r} without a type, which changes no default: write "
                f"{field.name}: {type(value).__name__} = {value!r}"
            )
    _REGISTRY[cls.facts.name] = cls
    return cls


def catalogue() -> dict[str, type[Estimator]]:
    """All known estimators by name: ours, and those of installed packages (entry points ``gradiometer.estimators``)."""
    package = importlib.import_module("gradiometer.estimators")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _STAIRS:
            importlib.import_module(f"gradiometer.estimators.{module.name}")
    for point in entry_points(group="gradiometer.estimators"):
        try:
            point.load()
        except Exception as error:
            raise ValueError(
                f"the estimators of the installed package {point.value} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    return dict(sorted(_REGISTRY.items()))


def load_plugin(path: str | Path) -> ModuleType:
    """Run a Python file so that the estimators it registers are known; its module."""
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"no plugin file {path}")
    # One name per path, so that a file loaded twice in a process is the same module.
    name = f"gradiometer_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"the plugin {path} cannot be loaded: {type(error).__name__}: {said}") from error
    return module


def parse(word: str | Estimator) -> Estimator:
    """The estimator a word stands for; one that is built already stands for itself.

    Raises:
        ValueError: one sentence that names the wrong part and the nearest valid word.

    Example:
        >>> parse("rloo:K=8")
        RLOO(K=8)
    """
    if isinstance(word, Estimator):
        return word
    if not isinstance(word, str):
        raise ValueError(f"an estimator is a word, as in 'dreg:K=8', or one that is built, not {word!r}")
    name, colon, settings = word.partition(":")
    if colon and not settings:
        raise ValueError(f"{word!r} ends in its colon: write {name}, or options after it, as in {name}:K=8")
    known = _REGISTRY if name in _REGISTRY else catalogue()
    if name not in known:
        raise ValueError(f"unknown estimator {name!r}{nearest(name, list(known))}")
    try:
        return configured(known[name], name, settings)
    except ValueError:
        raise
    except Exception as error:  # a stranger's class
        raise ValueError(f"{word} cannot be built: {type(error).__name__}: {error}") from error


def configured(cls: type[T], name: str, settings: str) -> T:
    """A dataclass built from ``key=value,key=value``; `name` is what messages call it.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or whatever the class itself refuses.
    """
    types, values = get_type_hints(cls), {}
    options = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for setting in settings.split(",") if settings else []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} in {name}:{settings} should read key=value")
        if key not in options:
            raise ValueError(f"{name} has no option {key!r}{nearest(key, options)}")
        if key in values:
            raise ValueError(f"{key!r} is given twice in {name}:{settings}")
        values[key] = _convert(text, types[key], f"{key} of {name}")
    return cls(**values)


def _convert(text: str, kind: object, what: str) -> object:
    if get_origin(kind) in (Union, UnionType):
        if text == "None" and NoneType in get_args(kind):
            return None
        kind = next(of for of in get_args(kind) if of is not NoneType)
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text not in choices:
            raise ValueError(f"{what} should be one of {', '.join(choices)}, not {text!r}")
        return choices[text]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{what} should be true or false, not {text!r}")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return int(text) if kind is int else float(text)
        except ValueError:
            raise ValueError(
                f"{what} should be {'a whole number' if kind is int else 'a number'}, not {text!r}"
            ) from None
    if kind is not str:
        raise ValueError(f"{what} cannot be given in a word, only in Python")
    return text


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    by_lower = {name.lower(): name for name in known}  # papers write DReG, and so do people
    matches = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else f"; known: {', '.join(known)}"

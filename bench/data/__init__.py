"""Data sets: digits (comes with scikit-learn), MNIST, Fashion-MNIST, binarized MNIST and Omniglot.

Names are imported when they are first used (PEP 562): listing data sets and fetching their files needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from gradiometer.bench.data.dataset import Dataset as Dataset
    from gradiometer.bench.data.dataset import binarize as binarize
    from gradiometer.bench.data.files import fetch as fetch
    from gradiometer.bench.data.loaders import load as load
    from gradiometer.bench.data.registry import NAMES as NAMES
    from gradiometer.bench.data.registry import describe as describe

_HOMES = {  # public name -> the module it lives in
    "NAMES": "registry",
    "Dataset": "dataset",
    "binarize": "dataset",
    "describe": "registry",
    "fetch": "files",
    "load": "loaders",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in, at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *_HOMES})

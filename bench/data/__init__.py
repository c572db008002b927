"""Data sets: digits (comes with scikit-learn), MNIST, Fashion-MNIST, binarized MNIST and Omniglot.

Names are imported when they are first used (PEP 562): listing data sets and fetching their files needs no torch.
"""

from typing import TYPE_CHECKING

from gradiometer.estimators.lazily import lazily

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
__getattr__, __dir__ = lazily(__name__, _HOMES)

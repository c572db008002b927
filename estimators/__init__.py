"""Gradient estimators, one file per family: small frozen dataclasses whose one method reads like the paper.

Names are imported when they are first used (PEP 562), so that importing this package does not wait for torch.
"""

if __name__ == "estimators":
    raise ImportError("import gradiometer.estimators, not estimators: install the checkout with `pip install -e .`")

from typing import TYPE_CHECKING

from gradiometer.estimators.lazily import lazily

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from gradiometer.estimators.base import Coefficients as Coefficients
    from gradiometer.estimators.base import Estimator as Estimator
    from gradiometer.estimators.base import Facts as Facts
    from gradiometer.estimators.base import State as State
    from gradiometer.estimators.base import Surrogate as Surrogate
    from gradiometer.estimators.base import Weighted as Weighted
    from gradiometer.estimators.noise import Rng as Rng
    from gradiometer.estimators.registry import catalogue as catalogue
    from gradiometer.estimators.registry import load_plugin as load_plugin
    from gradiometer.estimators.registry import parse as parse
    from gradiometer.estimators.registry import register as register

_HOMES = {  # public name -> the module it lives in
    "Coefficients": "base",
    "Estimator": "base",
    "Facts": "base",
    "Rng": "noise",
    "State": "base",
    "Surrogate": "base",
    "Weighted": "base",
    "catalogue": "registry",
    "load_plugin": "registry",
    "parse": "registry",
    "register": "registry",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazily(__name__, _HOMES)

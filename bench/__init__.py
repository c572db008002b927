"""The harness: problems held still, replicate moments, typed metrics, suites, the store and the report.

Names are imported when they are first used (PEP 562), so that `gradiometer --help` and `gradiometer report` never
wait for torch.
"""

if __name__ == "bench":
    raise ImportError("import gradiometer.bench, not bench: install the checkout with `pip install -e .`")

from typing import TYPE_CHECKING

from gradiometer.estimators.lazily import lazily

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from gradiometer.bench.costs import cost as cost
    from gradiometer.bench.decomposition import decompose as decompose
    from gradiometer.bench.errors import RequestError as RequestError
    from gradiometer.bench.measurement import Measurement as Measurement
    from gradiometer.bench.measurement import measure as measure
    from gradiometer.bench.measurement import measure_all as measure_all
    from gradiometer.bench.models.protocol import LatentVariableModel as LatentVariableModel
    from gradiometer.bench.named import named_problem as named_problem
    from gradiometer.bench.problems import Problem as Problem
    from gradiometer.bench.store import keep as keep
    from gradiometer.bench.store import load as load

_HOMES = {  # public name -> the module it lives in
    "LatentVariableModel": "models.protocol",
    "Measurement": "measurement",
    "Problem": "problems",
    "RequestError": "errors",
    "cost": "costs",
    "decompose": "decomposition",
    "keep": "store",
    "load": "store",
    "measure": "measurement",
    "measure_all": "measurement",
    "named_problem": "named",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazily(__name__, _HOMES)

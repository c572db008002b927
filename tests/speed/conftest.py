"""The checkout's own baselines: what is timed against the package is not shipped with it."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from gradiometer import bench


@pytest.fixture(scope="session")
def baselines() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "__path__", [*bench.__path__, str(Path(__file__).parents[2] / "bench")])
        yield import_module("gradiometer.bench.timings.baselines")

"""A cache of the tests' own, and the command line as tests call it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradiometer.bench.cli import main

Command = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Snapshots and downloads go to a folder that all of a session's processes share: a reference run is trained once."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        # matplotlib's list of fonts takes long to make, and is nobody's result
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if "MPLCONFIGDIR" not in os.environ and os.access(home, os.W_OK):
            patch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(shared))
        patch.delenv("COLUMNS", raising=False)  # the width of whoever runs them
        yield shared


@pytest.fixture
def gradiometer() -> Command:
    """`gradiometer(*words)` as on the command line; an exception that would be a traceback there is raised here."""

    def call(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def refusal(gradiometer: Command) -> Callable[..., str]:
    """The one sentence with which a command is refused, exit status 2."""

    def call(*words: object) -> str:
        result = gradiometer(*words)
        assert result.exit_code == 2, result.output
        assert result.stdout == "" or result.stdout.count("\n") == 1  # what was begun, at most
        assert result.stderr.startswith("gradiometer: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.endswith("\n")
        return result.stderr.removeprefix("gradiometer: ").strip()

    return call


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Estimators that a test registers are unknown after it."""
    from gradiometer.estimators import registry

    registry.catalogue()
    known = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(known)
    for name in [name for name in sys.modules if name.startswith("gradiometer_plugin_")]:
        del sys.modules[name]

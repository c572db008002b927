"""The house: what is packaged, which floor may import which, and what stays out of the quick commands."""

import ast
import doctest
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gradiometer.bench": ROOT / "bench", "gradiometer.estimators": ROOT / "estimators"}
NOT_SHIPPED = {"gradiometer.bench.timings", "gradiometer.bench.simulations"}  # run from the checkout

# The stairs, lowest step first. A module imports from the steps below its own, and from its own step; a package
# (models, data, checks ...) is one name. Estimator families need no mention: every other module of estimators/ is one.
# A module of bench/ that is not named here fails; a name that does not exist (yet) is tolerated.
ESTIMATOR_STAIRS = (
    {"lazily", "noise", "weights"},
    {"base"},
    {"registry"},
    {"(families)"},
)
BENCH_STAIRS = (
    {"atomic", "errors", "formulas"},
    {"data", "metrics", "statistics", "machine", "workers"},
    {"console", "records", "tails"},
    {"models", "products"},
    {"outer", "calls"},
    {"moments", "gradients"},
    {"accumulators", "tape"},
    {"batched", "directions", "folding"},
    {"subject"},
    {"problems", "training", "objections", "replicates"},
    {"arguments", "bias"},
    {"measured", "oneway"},
    {"measurement", "costs", "named", "decomposition"},
    {"cells"},
    {"suite", "complaints"},
    {"efficiency"},
    {"store"},
    {"runner", "compare"},
    {
        "selection",
        "uncertain",
        "palette",
        "placement",
        "canvas",
        "curves",
        "figures",
        "typeset",
        "tables",
        "terminal",
        "breakdown",
        "plots",
        "findings",
        "report",
    },
    {"checks"},
    {"cli"},
)


def _modules() -> dict[str, Path]:
    """Every module of the checkout by its full name, `gradiometer.bench.models.vae`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imports(module: str) -> set[str]:
    """What a module imports of ours, at the top or within functions; what only type checkers import is left out."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write the import in full, from gradiometer..."
            parent = node.module or ""
            inner = {f"{parent}.{alias.name}" for alias in node.names}
            names.update(name if name in MODULES else parent for name in inner)
    return {name for name in names if name.split(".")[0] == "gradiometer"}


def _step(module: str) -> tuple[int, str]:
    """The (step, name) of a module; a package's `__init__` counts as the top step, since it may lead anywhere."""
    package = ".".join(module.split(".")[:2])
    stairs = BENCH_STAIRS if package == "gradiometer.bench" else ESTIMATOR_STAIRS
    name = module.removeprefix(package).lstrip(".").split(".")[0]
    if name in ("", "timings", "simulations"):
        return len(stairs), name
    for step, names in enumerate(stairs):
        if name in names:
            return step, name
    if package == "gradiometer.estimators":
        return len(stairs) - 1, name
    pytest.fail(
        f"{MODULES[module].relative_to(ROOT)} stands on no stair: place {name!r} in BENCH_STAIRS of tests/test_house.py"
    )


def _outside(module: str, imported: str) -> str | None:
    """Why a module may not import another, in a sentence, or None."""
    where = f"{MODULES[module].relative_to(ROOT)} imports {imported}"
    if imported not in MODULES:
        return f"{where}, which does not exist"
    (step, name), (other_step, other_name) = _step(module), _step(imported)
    if module.startswith("gradiometer.bench"):
        if imported.startswith("gradiometer.estimators"):
            return None
        return f"{where}, up the stairs" if other_step > step else None
    if imported.startswith("gradiometer.bench"):
        return f"{where}: an estimator knows nothing of the harness"
    if step == 0:
        return f"{where}: floor 0 imports torch and the standard library only"
    if other_step > step or (other_step == step == len(ESTIMATOR_STAIRS) - 1 and other_name != name):
        return f"{where}, up the stairs or across to another family"
    return None


def test_packages_equal_the_tree() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    in_tree = {name for name, path in MODULES.items() if path.name == "__init__.py"} - NOT_SHIPPED
    assert len(declared) == len(set(declared)), "a package is listed twice in pyproject.toml"
    assert set(declared) == in_tree, "[tool.setuptools] packages in pyproject.toml must list the packages of the tree"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"these folders hold code but no __init__.py, so they would not be shipped: {missing}"


def test_no_name_stands_on_two_stairs() -> None:
    names = [name for step in BENCH_STAIRS for name in step]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_on_a_stair(module: str) -> None:
    _step(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_stairs(module: str) -> None:
    if module in FOLDERS:
        eager = _imports(module) - {"gradiometer.estimators.lazily"}
        assert not eager, f"{module} must import nothing of ours eagerly: use its lazy table"
        return
    faults = [fault for imported in sorted(_imports(module)) if (fault := _outside(module, imported))]
    assert not faults, "; ".join(faults)


def test_the_stairs_can_fail() -> None:
    """Negative controls: the rule itself must refuse what it is there to refuse."""
    assert _outside("gradiometer.estimators.noise", "gradiometer.estimators.weights")
    assert _outside("gradiometer.estimators.base", "gradiometer.estimators.score_function")
    assert _outside("gradiometer.estimators.score_function", "gradiometer.bench.errors")
    assert _outside("gradiometer.bench.errors", "gradiometer.bench")
    assert not _outside("gradiometer.estimators.score_function", "gradiometer.estimators.base")


@pytest.mark.parametrize("folder", ["bench", "estimators"])
def test_importing_a_folder_of_the_checkout_says_what_to_do(folder: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import gradiometer.{folder}, not {folder}: install the checkout with `pip install -e .`" in done.stderr


@pytest.mark.parametrize("package", FOLDERS)
def test_every_public_name_is_where_the_lazy_table_says(package: str) -> None:
    source = MODULES[package].read_text(encoding="utf-8")
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert f"import {name} as {name}" in source, f"{name} of {package} is missing under TYPE_CHECKING"
    with pytest.raises(AttributeError, match="has no attribute 'nothing_like_this'"):
        _ = module.nothing_like_this


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(tuple(NOT_SHIPPED))])
def test_examples_in_docstrings_run(module: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(import_module(module), optionflags=flags).failed == 0


def _imported_by(*arguments: str) -> set[str]:
    """The top-level packages that `python ARGUMENTS` imports, by its own import log."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr[-2000:]
    log = re.findall(r"^import time:.*\|\s*([\w.]+)$", done.stderr, flags=re.MULTILINE)
    assert log, "python -X importtime printed no import"
    return {name.split(".")[0] for name in log}


def _require(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")


def test_report_imports_no_torch() -> None:
    _require("gradiometer.bench.report")
    assert "torch" not in _imported_by("-c", "import gradiometer.bench.report")


def test_help_waits_for_nothing_heavy() -> None:
    _require("gradiometer.bench.cli")
    heavy = {"torch", "pandas", "seaborn", "matplotlib", "scipy", "sklearn"}
    assert not heavy & _imported_by("-m", "gradiometer.bench.cli", "--help")


def test_packages_import_nothing_heavy() -> None:
    imported = _imported_by("-c", "import gradiometer.bench, gradiometer.estimators")
    assert not {"torch", "numpy", "pandas"} & imported


def test_the_report_environment_asks_for_nothing_else_than_the_project() -> None:
    """tox's `report` lists its dependencies by hand, since it leaves torch out."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    section = (ROOT / "tox.ini").read_text().split("[testenv:report]")[1].split("deps =")[1].split("commands_pre")[0]
    listed = {line.strip() for line in section.splitlines() if line.strip()}
    assert listed - {"pip", "setuptools>=77"} <= declared
    assert not any(line.startswith("torch") for line in listed)

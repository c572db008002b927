"""Results on disk: one JSON file per cell, published atomically; reading them never executes code and needs no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradiometer.bench import atomic
from gradiometer.bench.errors import RequestError
from gradiometer.bench.records import passed

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
SCHEMA = 1
PYTHON = "python"  # the suite that rows are of which were measured there
COLUMNS = (
    "suite", "cell", "kind", "problem", "model", "dataset", "snapshot", "digest", "step", "seconds",
    "estimator", "code", "family", "K", "B", "evaluations", "seed", "settled", "device", "machine", "dtype", "threads", "engine",
    "chunk", "group", "ascends", "biased", "rescaled", "tensor", "metric", "reference", "space", "randomness", "reduction", "scale",
    "unit", "version", "value", "stderr", "low", "high", "replicates", "minibatches", "tails", "precision_met",
    "checked", "status", "reason", "manifest", "jackknife",
)  # fmt: skip
NUMBERS = frozenset(
    {"step", "seconds", "K", "B", "evaluations", "seed", "settled", "replicates", "minibatches", "version", "value", "stderr"}
    | {"low", "high"}
)  # fmt: skip
TEXT = (
    frozenset(COLUMNS) - NUMBERS - {"threads", "chunk", "precision_met", "checked", "biased", "rescaled", "jackknife"}
)


def open_for_writing(folder: Path) -> None:
    """Make sure that cells can be written.

    Raises:
        RequestError: the folder cannot be made or written to.
    """
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder / "cells", suffix=".part"):
            pass
    except OSError as error:
        raise RequestError(
            f"cannot write results to {folder}: {error.strerror}; name another folder with --out"
        ) from None


def publish(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees all of it or nothing, whenever the writer is killed.

    Raises:
        RequestError: the disk is full, or the folder is gone.
    """
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    try:
        atomic.write(path, f"{text}\n".encode())
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def write_cell(folder: Path, key: str, rows: list[dict[str, Any]], manifest: Mapping[str, str]) -> None:
    """Publish the rows of one cell with the machine and versions they were made on."""
    shared = {name: rows[0].get(name) for name in rows[0] if all(row.get(name) == rows[0][name] for row in rows)}
    own = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    content = {"schema_version": SCHEMA, "cell": key, "manifest": dict(manifest), "shared": shared, "rows": own}
    publish(folder / "cells" / f"{key}.json", content)


def keep(rows: Iterable[Mapping[str, Any]], folder: Path | str) -> None:
    """Keep the rows of measurements made in Python, so that `gradiometer report` and `compare` read the folder.

    Those that are there stay, but for the same estimator on a problem of the same name, minibatch size and seed.

    Raises:
        RequestError: the folder is a suite's, or cannot be written.
    """
    from gradiometer.bench.machine import describe

    folder = Path(folder)
    before = indexed(folder, PYTHON)
    open_for_writing(folder)
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        about = [str(row.get(name, "")) for name in ("kind", "problem", "estimator", "B", "seed", "minibatches")]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        cells.setdefault(key, []).append({"status": "ok", **row})
    for key, of_cell in cells.items():
        write_cell(folder, key, of_cell, describe())
    write_index(folder, PYTHON, folder.name, "Measured in Python", dict.fromkeys([*before, *cells]))


def read_cell(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a cell, or None if there is none, or a file that is no such record.

    Raises:
        RequestError: another version wrote it; it is left alone.
    """
    path = folder / "cells" / f"{key}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "schema_version" not in record:
        return None
    if record["schema_version"] != SCHEMA:
        raise RequestError(
            f"{path} has schema version {record['schema_version']}, and this gradiometer reads version {SCHEMA}: "
            "use the gradiometer that wrote it, or another folder"
        )
    parts = {"manifest": dict, "shared": dict, "rows": list}
    whole = all(isinstance(record.get(part), kind) for part, kind in parts.items()) and record["rows"]
    return record if whole and all(_sound(record["shared"], row) for row in record["rows"]) else None


def _sound(shared: Mapping[str, Any], row: Any) -> bool:
    """Whether the columns of a row hold what they should."""
    if not isinstance(row, dict):
        return False
    whole = {**shared, **row}
    numbers, texts = ([whole[name] for name in of if whole.get(name) is not None] for of in (NUMBERS, TEXT))
    left_out = whole.get("jackknife") or []
    return (
        bool(whole.get("estimator") and whole.get("problem"))
        and isinstance(left_out, list)
        and all(isinstance(value, int | float | None) for value in (*numbers, *left_out))
        and all(isinstance(value, str) for value in texts)
    )


def write_index(folder: Path, suite: str, title: str, description: str, keys: Iterable[str]) -> None:
    """Say which cells are the suite's as last asked for; others in the folder are kept for resuming, and not reported."""
    publish(folder / "suite.json", {"suite": suite, "title": title, "description": description, "cells": list(keys)})


def index(folder: Path) -> dict[str, Any]:
    """The suite's name, title, description and cells.

    Raises:
        RequestError: the folder holds no results.
    """
    path = folder / "suite.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(
            f"{folder} holds no results (no suite.json in it): name the folder that `gradiometer run` wrote"
        ) from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not (isinstance(found, dict) and isinstance(found.get("suite"), str) and isinstance(found.get("cells"), list)):
        raise RequestError(f"{path} is damaged: run the suite again to have it written anew; finished cells are kept")
    return found


def indexed(folder: Path, suite: str = "") -> list[str]:
    """The cells that a folder's index names; none if there is no index, or a damaged one.

    Raises:
        RequestError: it is another suite's than the one that is wanted, if one is.
    """
    try:
        found = index(folder)
    except RequestError:
        return []
    if suite and found["suite"] != suite:
        raise RequestError(f"{folder} holds results of {found['suite']!r}: name another folder with --out")
    return [str(key) for key in found["cells"]]


def load(folder: Path | str) -> pd.DataFrame:
    """All rows of a suite's finished cells, in the suite's order, one column per entry of `COLUMNS`.

    Raises:
        RequestError: the folder holds no results.
    """
    import pandas as pd

    from gradiometer.bench.efficiency import with_products

    folder = Path(folder)
    about = index(folder)
    rows: list[dict[str, Any]] = []
    missing = 0
    for key in about["cells"]:
        record = read_cell(folder, key)
        if record is None:
            missing += 1
        else:
            made_on = record["manifest"]
            known = {"suite": about["suite"], "cell": key, "manifest": str(made_on.get("date", ""))} | record["shared"]
            rows += [known | {"machine": _processor(known | row, made_on)} | row for row in record["rows"]]
    if missing:
        log.info(
            "%d of %d cells in %s are missing or damaged: run the suite again to add them",
            missing,
            len(about["cells"]),
            folder,
        )
    if not rows:
        return pd.DataFrame(columns=list(COLUMNS))
    table = frame(rows)
    made_by = pd.Series(zip(table["estimator"], table["code"], strict=True), table.index)
    since = {pair: bool(pair[1]) and passed(*pair) for pair in set(made_by)}
    table["checked"] |= made_by.map(since)  # checked after it was measured
    return with_products(table)


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table with every column present: absent words are empty, absent numbers NaN."""
    import pandas as pd

    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    for name in TEXT:
        table[name] = table[name].astype(object).where(table[name].notna(), "")
    for name in NUMBERS:
        table[name] = pd.to_numeric(table[name])
    for name in ("checked", "biased", "rescaled"):
        table[name] = table[name].astype(object).where(table[name].notna(), False).astype(bool)
    return table


def machine(folder: Path) -> dict[str, str]:
    """The machine and versions of the newest cell."""
    records = [record for key in index(folder)["cells"] if (record := read_cell(folder, key)) is not None]
    newest = max(records, key=lambda record: str(record["manifest"].get("date", "")), default=None)
    return dict(newest["manifest"]) if newest else {}


def _processor(row: Mapping[str, Any], manifest: Mapping[str, str]) -> str:
    """What a row was computed on: the GPU where its device is one, else the processor."""
    return manifest.get("gpu" if str(row.get("device", "")).startswith("cuda") else "machine", "")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not one becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""Results on disk: one JSON file per cell, published atomically; reading them never executes code and needs no torch."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradiometer.bench.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
COLUMNS = (
    "suite", "cell", "kind", "problem", "model", "dataset", "snapshot", "digest", "step", "seconds",
    "estimator", "family", "K", "B", "evaluations", "seed", "device", "dtype", "threads", "engine", "chunk",
    "group", "tensor", "metric", "space", "randomness", "reduction", "scale", "unit", "version",
    "value", "stderr", "low", "high", "replicates", "precision_met", "checked", "status", "reason", "manifest", "jackknife",
)  # fmt: skip
TEXT = frozenset(
    [
        "suite",
        "cell",
        "kind",
        "problem",
        "model",
        "dataset",
        "snapshot",
        "digest",
        "estimator",
        "family",
        "device",
        "dtype",
        "engine",
        "group",
        "tensor",
        "metric",
        "space",
        "randomness",
        "reduction",
        "scale",
        "unit",
        "status",
        "reason",
        "manifest",
    ]
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
    """Write JSON so that a reader sees all of it or nothing, whenever the writer is killed."""
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_cell(folder: Path, key: str, rows: list[dict[str, Any]], manifest: Mapping[str, str]) -> None:
    """Publish the rows of one cell with the machine and versions they were made on."""
    shared = {name: rows[0].get(name) for name in rows[0] if all(row.get(name) == rows[0][name] for row in rows)}
    own = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    content = {"schema_version": SCHEMA, "cell": key, "manifest": dict(manifest), "shared": shared, "rows": own}
    publish(folder / "cells" / f"{key}.json", content)


def read_cell(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a cell, or None if there is none, or none that this version reads."""
    try:
        record: dict[str, Any] = json.loads((folder / "cells" / f"{key}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record.get("schema_version") == SCHEMA else None


def write_index(folder: Path, suite: str, title: str, description: str, keys: Iterable[str]) -> None:
    """Say which cells are the suite's as last asked for; others in the folder are kept for resuming, and not reported."""
    publish(folder / "suite.json", {"suite": suite, "title": title, "description": description, "cells": list(keys)})


def index(folder: Path) -> dict[str, Any]:
    """The suite's name, title, description and cells.

    Raises:
        RequestError: the folder holds no results.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(
            f"{folder} holds no results (no suite.json in it): name the folder that `gradiometer run` wrote"
        ) from None
    except (json.JSONDecodeError, OSError) as error:
        raise RequestError(f"{folder / 'suite.json'} cannot be read: {error}") from None
    return found


def load(folder: Path) -> pd.DataFrame:
    """All rows of a suite's finished cells, in the suite's order, one column per entry of `COLUMNS`.

    Raises:
        RequestError: the folder holds no results.
    """
    import pandas as pd

    from gradiometer.bench.efficiency import with_products

    about = index(folder)
    rows: list[dict[str, Any]] = []
    for key in about["cells"]:
        record = read_cell(folder, key)
        if record is not None:
            shared = {"suite": about["suite"], "cell": key, "manifest": record["manifest"].get("date", "")} | record[
                "shared"
            ]
            rows += [shared | row for row in record["rows"]]
    return with_products(frame(rows)) if rows else pd.DataFrame(columns=list(COLUMNS))


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table with every column present: absent words are empty, absent numbers NaN."""
    import pandas as pd

    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    for name in TEXT:
        table[name] = table[name].astype(object).where(table[name].notna(), "")
    for name in (
        "value",
        "stderr",
        "low",
        "high",
        "step",
        "seconds",
        "K",
        "B",
        "evaluations",
        "seed",
        "replicates",
        "version",
    ):
        table[name] = pd.to_numeric(table[name])
    table["checked"] = table["checked"].astype(object).where(table["checked"].notna(), False).astype(bool)
    return table


def machine(folder: Path) -> dict[str, str]:
    """The machine and versions of the newest cell."""
    records = [record for key in index(folder)["cells"] if (record := read_cell(folder, key)) is not None]
    newest = max(records, key=lambda record: record["manifest"].get("date", ""), default=None)
    return dict(newest["manifest"]) if newest else {}


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not one becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

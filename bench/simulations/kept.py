"""What a simulation leaves: a report to read, and the numbers that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradiometer.bench import machine, store


def keep(folder: Path, name: str, report: Callable[[str], str], numbers: Mapping[str, Any]) -> None:
    """Write `name`.md, which `report` makes of where and when the numbers were, and `name`.json."""
    made = machine.describe()
    about = f"{made['date']}, {made['machine']}, torch {made['torch']}, one thread"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(report(about), encoding="utf-8")
    store.publish(folder / f"{name}.json", {"manifest": made, **numbers})

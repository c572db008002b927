"""The cards of the catalogue, and the list of what has passed: `python bench/simulations/cards.py`, or `tox run -e checks`.

Writes a card of every estimator to results/checks/cards, as text and as JSON, and what passed to bench/checks/passed.json, which is
shipped: an estimator whose code is changed afterwards is marked as unchecked in every table.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from gradiometer.bench import records
from gradiometer.bench.checks import session, subjects

ROOT = Path(__file__).parents[2]


@click.command()
@click.option("--level", type=click.Choice(["quick", "full"]), default="full", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True)
def main(level: str, jobs: int) -> None:
    """Check the catalogue and keep what is found."""
    folder = ROOT / "results" / "checks" / "cards"
    for old in folder.glob("*.*"):
        old.unlink()
    status = session.run(
        subjects.everything(), "full" if level == "full" else "quick", jobs=jobs, out=folder, say=click.echo
    )
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    passed = {
        records.series_of(card["word"]): {
            "code": card["code"],
            "level": card["level"],
            "date": card["machine"]["date"],
        }
        for card in cards
        if card["passed"]
    }
    shipped = ROOT / "bench" / "checks" / "passed.json"
    shipped.write_text(json.dumps(passed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    raise SystemExit(status)


if __name__ == "__main__":
    main()

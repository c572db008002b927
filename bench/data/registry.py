"""Names of data sets: what they stand for, and a table of them. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from gradiometer.bench.data.catalogue import EITHER, ENTRIES
from gradiometer.bench.data.entry import Entry
from gradiometer.bench.errors import RequestError

NAMES = ("digits", "mnist", "fashion-mnist", "binarized-mnist", "omniglot", "omniglot-burda", "omniglot-area28")


def candidates(name: str) -> tuple[Entry, ...]:
    """The data sets that a name stands for, the preferred first; more than one for ``omniglot`` only.

    Raises:
        RequestError: the name is unknown.
    """
    if name in EITHER:
        return tuple(ENTRIES[choice] for choice in EITHER[name])
    if name not in ENTRIES:
        raise RequestError(f"unknown data set {name!r}{nearest(name, NAMES)}")
    return (ENTRIES[name],)


def describe() -> list[dict[str, str]]:
    """A row per name, for people: name, images (train / valid / test), shape, binarization, summary, licence, citation.

    Example:
        >>> describe()[0]["images"]
        '1,297 / 250 / 250'
    """
    return [_row(name) for name in NAMES]


def _row(name: str) -> dict[str, str]:
    choices = candidates(name)
    entry = choices[0]
    either = len(choices) > 1
    return {
        "name": name,
        "images": " / ".join(f"{size:,}" for size in entry.sizes) if not either else "",
        "shape": "x".join(str(side) for side in entry.shape),
        "binarization": entry.modes[0],
        "summary": "whichever is at hand: " + ", else ".join(choice.name for choice in choices)
        if either
        else entry.summary,
        "licence": entry.licence if not either else "",
        "citation": entry.citation if not either else "",
    }


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    matches = get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"

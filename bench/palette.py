"""How estimators look: one colour and marker each, the same in every figure, distinct without colour vision."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

__all__ = ["Look", "looks"]

# Okabe & Ito (2008), without their yellow, which a white page swallows
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Look:
    """A colour, a marker and a line style, as matplotlib names them; its family's colour, if it is a shade of that."""

    colour: str
    marker: str
    line: str = "-"
    family: str = ""


def looks(tidied: pd.DataFrame) -> Mapping[str, Look]:
    """The look of every estimator by `series`, whatever its K.

    Up to eight series get a colour each. More share the colour of their family, in shades, and differ by marker.

    Args:
        tidied: rows with `series` and `family`, as `selection.tidy` returns them.
    """
    pairs = tidied.loc[tidied["series"] != "", ["family", "series"]].drop_duplicates("series")
    pairs = pairs.sort_values(["family", "series"])
    if len(pairs) <= len(_COLOURS):
        return {series: Look(_COLOURS[i], _MARKERS[i]) for i, series in enumerate(pairs["series"])}
    families = {family: _COLOURS[i % len(_COLOURS)] for i, family in enumerate(dict.fromkeys(pairs["family"]))}
    found: dict[str, Look] = {}
    for family, members in pairs.groupby("family"):
        for i, series in enumerate(members["series"]):
            shade = _shade(families[family], i, len(members))
            found[series] = Look(shade, _MARKERS[len(found) % len(_MARKERS)], _LINES[i % len(_LINES)], families[family])
    return found


def _shade(colour: str, number: int, of: int) -> str:
    """A shade of a colour, from darker to lighter."""
    towards, amount = (0.0, 0.45) if number < of / 2 else (1.0, 0.3)
    middle = (of - 1) / 2
    weight = amount * abs(number - middle) / middle if middle else 0.0
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 * ((1 - weight) * part + weight * towards)):02x}" for part in parts)

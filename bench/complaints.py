"""What is wrong with a suite, in a sentence: the key, the line, and what was meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from gradiometer.estimators.registry import nearest

_HEADER = re.compile(r"\s*\[\[?\s*[\w.]+\s*\]\]?\s*(#|$)")
_SHOULD = {  # what pydantic finds, in our words
    "list_type": "should be a list, in square brackets",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "string_type": "should be text, in quotes",
    "bool_type": "should be true or false",
    "too_short": "should not be empty",
    "greater_than": "should be more than {gt:g}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "literal_error": "should be {expected}",
}


def sentence(error: Any, models: Mapping[str, type[BaseModel]], text: str, where: str, given: Mapping[str, str]) -> str:
    """One of pydantic's findings as a sentence.

    Args:
        error: an entry of `ValidationError.errors()`.
        models: of each kind of block; "" for the whole.
        text, where: the file's content and name.
        given: how keys were set on the command line, which no line of the file is to blame for.
    """
    location: tuple[str | int, ...] = error["loc"]
    path, kind, value = ".".join(str(part) for part in location), str(error["type"]), error.get("input")
    if kind == "extra_forbidden":
        known = models.get(str(location[0]), models[""]) if len(location) > 1 else models[""]
        message = f"unknown key{nearest(str(location[-1]), list(known.model_fields))}"
    elif kind == "missing":
        message = "this key is missing"
    elif str(location[0]) in models and len(location) <= 2 and kind in ("list_type", "model_type"):
        message = f"should be a block: write [[{location[0]}]] on a line of its own"
    else:
        message = words(error)
    if how := next((given[str(part)] for part in location[:3] if part in given), None):
        return f"{how}: {message}"
    item = value if isinstance(location[-1], int) and len(location) > 2 else None
    return f"{where}, line {line_of(location, text, item)}: {path}: {message}"


def words(error: Any) -> str:
    """What one of pydantic's findings says of a value."""
    kind, value = str(error["type"]), error.get("input")
    if kind not in _SHOULD:
        return str(error["msg"].removeprefix("Value error, "))
    message = _SHOULD[kind].format(**error.get("ctx", {}))
    return message if isinstance(value, dict | list) else f"{message}, not {value!r}"


def line_of(location: Sequence[str | int], text: str, item: Any = None) -> int:
    """The line of a key that `tomllib` has lost: that of `item` in the key's list, the key's in its block, or the block's own."""
    lines = text.splitlines()
    start, stop = 0, len(lines)
    parts = list(location)
    if len(parts) >= 2 and isinstance(parts[1], int):
        headers = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{re.escape(str(parts[0]))}\s*\]\]", line)]
        if parts[1] < len(headers):
            start = headers[parts[1]]
            stop = next((i for i in range(start + 1, len(lines)) if _HEADER.match(lines[i])), len(lines))
            parts = parts[2:]
    for i in range(start, stop):
        if parts and re.match(rf"\s*(\[+\s*)?{re.escape(str(parts[0]))}\s*[=\]]", lines[i]):
            return _line_of_item(lines, i, stop, item) + 1
    return start + 1


def _line_of_item(lines: Sequence[str], start: int, stop: int, item: Any) -> int:
    """The first line of a key's value that holds `item`, or the key's own."""
    if item is None:
        return start
    shown = (
        rf"""["']{re.escape(item)}["']""" if isinstance(item, str) else rf"(?<![\w.]){re.escape(str(item))}(?![\w.])"
    )
    for i in range(start, stop):
        if i > start and re.match(r"\s*\w+\s*=", lines[i]):
            break
        if re.search(shown, lines[i]):
            return i
    return start

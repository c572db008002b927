"""What goes wrong in words: errors whose message is meant for the person who asked."""

import traceback
from pathlib import Path

__all__ = ["RequestError", "place_of"]


class RequestError(ValueError):
    """A request that cannot be carried out as it stands; its message is one sentence: what, where, what was meant.

    The command line prints the message without a traceback and exits with status 2.

    >>> raise RequestError("unknown metric 'varience' in suite.toml, line 7: did you mean 'variance'?")
    Traceback (most recent call last):
        ...
    gradiometer.bench.errors.RequestError: unknown metric 'varience' in suite.toml, line 7: did you mean 'variance'?
    """


def place_of(error: BaseException) -> str:
    """`` (mine.py, line 12)``, the innermost line of a person's own code that an error came from; "" if it came from none."""
    theirs = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0].startswith("gradiometer_plugin")
    ]
    return f" ({Path(theirs[-1][0]).name}, line {theirs[-1][1]})" if theirs else ""

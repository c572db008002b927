"""What goes wrong in words: errors whose message is meant for the person who asked."""

__all__ = ["RequestError"]


class RequestError(ValueError):
    """A request that cannot be carried out as it stands; its message is one sentence: what, where, what was meant.

    The command line prints the message without a traceback and exits with status 2.

    >>> raise RequestError("unknown metric 'varience' in suite.toml, line 7: did you mean 'variance'?")
    Traceback (most recent call last):
        ...
    gradiometer.bench.errors.RequestError: unknown metric 'varience' in suite.toml, line 7: did you mean 'variance'?
    """

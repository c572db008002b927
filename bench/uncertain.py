"""Numbers with errors as papers print them: the uncertainty to two significant digits, the value to the same place."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal

__all__ = ["Printed", "exponent_of", "format_interval", "format_uncertain", "printed", "shared_exponent"]

_EXACT = 1e-15  # an error this small relative to its value is below what float64 holds
_CONTEXT = Context(prec=400, rounding=ROUND_HALF_EVEN)  # plain notation of any float64
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Printed:
    """A value and its error, rounded, in units of ``10**exponent``; `error` is "" where there is none to print."""

    value: str
    error: str = ""
    exponent: int = 0

    @property
    def text(self) -> str:
        """As plain text: ``0.1234 ± 0.0012``, ``(1.23 ± 0.05)e-4``."""
        body = f"{self.value} ± {self.error}" if self.error else self.value
        if not self.exponent:
            return body
        return f"({body})e{self.exponent}" if self.error else f"{body}e{self.exponent}"


def format_uncertain(value: float, stderr: float) -> str:
    """A value and its standard error in one string, the error to two significant digits.

    Args:
        value: any float.
        stderr: its standard error; 0 means exact, nan unknown (either is left out).

    >>> format_uncertain(0.12341, 0.00123), format_uncertain(1.2345e-4, 5.04e-6)
    ('0.1234 ± 0.0012', '(1.234 ± 0.050)e-4')
    >>> format_uncertain(64, 0), format_uncertain(2 / 3, float("nan")), format_uncertain(float("inf"), 1.0)
    ('64', '0.6667', 'inf')
    """
    exponent = exponent_of(value, stderr)
    return printed(value, stderr, exponent if _unwieldy(value, stderr, exponent) else 0).text


def format_interval(value: float, low: float, high: float) -> str:
    """A value with its interval, to the digits that the interval's width leaves meaning.

    >>> format_interval(12.3456, 11.8, 12.9), format_interval(41234.0, 39900.0, 42600.0), format_interval(0.5, 0.5, 0.5)
    ('12.3 (11.8 to 12.9)', '41200 (39900 to 42600)', '0.5')
    """
    half = (high - low) / 2
    if not (math.isfinite(half) and half > 0):
        return f"{value:.3g}"
    place = _place(half) + (
        float(f"{half:.1e}"[:3]) >= 3
    )  # one digit of the half-width says enough, unless it is a 1 or 2
    shown = [_plain(Decimal(repr(float(v))), place) for v in (value, low, high)]
    return "{} ({} to {})".format(*shown)


def printed(value: float, stderr: float, exponent: int = 0) -> Printed:
    """Round a value to the second significant digit of its error, in units of ``10**exponent``.

    An exact value (error 0) keeps up to six significant digits, one with an unknown error (nan) four.
    """
    value, stderr = float(value), abs(float(stderr))
    if not math.isfinite(value):
        return Printed(str(value))
    number = Decimal(repr(value)).scaleb(-exponent, _CONTEXT)
    if stderr <= _EXACT * abs(value):
        return Printed(_shortest(_significant(number, 6)), "", exponent)
    if not math.isfinite(stderr):
        return Printed(_significant(number, 4), "" if math.isnan(stderr) else "inf", exponent)
    place = _place(stderr) - exponent
    return Printed(_plain(number, place), _plain(Decimal(repr(stderr)).scaleb(-exponent, _CONTEXT), place), exponent)


def exponent_of(value: float, stderr: float) -> int:
    """The power of ten of the larger of a value and its error, once rounded; 0 for what has none.

    >>> exponent_of(0.00123, 0.0001), exponent_of(0.0, 0.0), exponent_of(9.999, 0.2)
    (-3, 0, 1)
    """
    sizes = [abs(float(v)) for v in (value, stderr) if math.isfinite(v)]
    if not math.isfinite(value) or not sizes or max(sizes) == 0:
        return 0
    shown = printed(value, stderr)
    found = [Decimal(part) for part in (shown.value, shown.error or "0") if part != "inf"]
    return max((number.adjusted() for number in found if number), default=0)


def shared_exponent(numbers: Iterable[tuple[float, float]]) -> int | None:
    """The power of ten a column of (value, error) is best printed in: 0 for none, None for each cell its own.

    A column that spans at most three decades shares one, a multiple of three; a wider one cannot.

    >>> shared_exponent([(1.2, 0.1), (30.0, 2.0)]), shared_exponent([(2.1e-3, 1e-4), (4.2e-4, 1e-5)])
    (0, -3)
    >>> shared_exponent([(2.1e-6, 1e-7), (4.2, 0.1)]) is None
    True
    """
    pairs = [(v, s) for v, s in numbers if math.isfinite(v) and v]
    powers = [exponent_of(v, s) for v, s in pairs]
    if not any(_unwieldy(v, s, power) for (v, s), power in zip(pairs, powers, strict=True)):
        return 0
    return 3 * round(max(powers) / 3) if max(powers) - min(powers) <= 3 else None


def _unwieldy(value: float, stderr: float, exponent: int) -> bool:
    """Whether plain notation would count zeros, or print digits that mean nothing."""
    meaningless = math.isfinite(stderr) and stderr > _EXACT * abs(value) and _place(stderr) > 0
    return exponent < -2 or exponent > 5 or (meaningless and math.isfinite(value))


def _place(stderr: float) -> int:
    """The power of ten of an error's second significant digit, after rounding to two."""
    return int(f"{stderr:.1e}".partition("e")[2]) - 1


def _plain(number: Decimal, place: int) -> str:
    """A number rounded at a power of ten, without exponent, never "-0"."""
    rounded = number.quantize(Decimal(1).scaleb(place), context=_CONTEXT)
    return f"{rounded if rounded else abs(rounded):f}"


def _shortest(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _significant(number: Decimal, digits: int) -> str:
    if not number:
        return "0"
    rounded = Context(prec=digits, rounding=ROUND_HALF_EVEN).plus(number)
    return _plain(rounded, rounded.adjusted() - digits + 1)

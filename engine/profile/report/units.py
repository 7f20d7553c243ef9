"""Numbers as a reader wants them: three digits, and a unit that fits."""

from __future__ import annotations

from collections.abc import Callable

_THIN = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


def text(value: float | None, form: Callable[[float], str]) -> str:
    """A number in one of `UNITS`; a dash where there is none."""
    return "\N{EN DASH}" if value is None else form(value).replace("-", _MINUS)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _number(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        return _digits(value)
    return f"{value:.2e}".replace("e+0", "e").replace("e-0", "e-")


def _seconds(value: float) -> str:
    size = abs(value)
    for least, unit, scale in ((10800, "h", 3600), (600, "min", 60), (1, "s", 1), (1e-3, "ms", 1e-3)):
        if size >= least:
            return f"{_digits(value / scale)}{_THIN}{unit}"
    return f"{_digits(value / 1e-6)}{_THIN}µs" if size >= 1e-6 else f"0{_THIN}s"


def _share(value: float) -> str:
    percent = 100 * value
    if 0 < percent < 0.05:
        return f"< 0.1{_THIN}%"
    if 99.5 <= percent < 100:  # all is said of all alone
        return f"{min(percent, 99.9):.1f}{_THIN}%"
    return f"{percent:.0f}{_THIN}%" if percent >= 9.95 or percent == 0 else f"{percent:.1f}{_THIN}%"


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:,.0f}x"


def _usd(value: float) -> str:
    if value >= 0.1:
        return f"${value:,.2f}"
    return f"${_digits(value) if value >= 1e-7 else _number(value)}"


def _digits(value: float) -> str:
    """Three digits, or all of a larger whole number."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    places = 1 if size >= 10 else 2
    while 0 < size < 1:
        size, places = size * 10, places + 1
    return f"{value:.{places}f}"


UNITS: dict[str, Callable[[float], str]] = {
    "count": _count,
    "number": _number,
    "s": _seconds,
    "share": _share,
    "x": _times,
    "usd": _usd,
}

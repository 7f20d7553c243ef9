"""The exceptions of rollflow: few, and each says what was given, what is allowed and what to do.

Every message is one line of at most `LONGEST` characters that a terminal can show, whatever was given: `shown` quotes a
value, `said` an error of somebody else's code.
"""

import concurrent.futures
import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

LONGEST = 500  # characters of a message
QUOTED = 100  # characters of a value in a message


class RollflowError(Exception):
    """Base of every error that rollflow raises on purpose."""

    def __init__(self, *args: Any):
        super().__init__(*(line(arg, LONGEST) if isinstance(arg, str) else arg for arg in args))


class RequestError(RollflowError, ValueError):
    """A request, an option or an argument that cannot be honoured."""


class BudgetError(RequestError):
    """A budget below the smallest that the method can work with.

    Attributes:
        smallest: that budget.
        why: what it pays for.
    """

    def __init__(self, message: str, smallest: int = 1, why: str = ""):
        super().__init__(message)
        self.smallest, self.why = smallest, why


class ModelError(RollflowError):
    """A model folder or pipeline that cannot be used."""


class FunctionError(RollflowError):
    """What a user's own function raised; the original exception is the cause."""


class RewardUnavailable(RollflowError):
    """A reward raises it to be called again later."""


class Cancelled(RollflowError, concurrent.futures.CancelledError):
    """The request was cancelled."""


class Abandoned(Cancelled):
    """The engine was closed before the request was done."""


class EngineBusy(RollflowError):
    """Too many requests wait already; `seconds` is how long one more is expected to wait."""

    def __init__(self, message: str, seconds: float = 0.0):
        super().__init__(message, seconds)  # both: an error is made again from its arguments when it is unpickled
        self.seconds = seconds

    def __str__(self) -> str:
        return str(self.args[0])


class EngineClosed(RollflowError):
    """The engine takes no more work."""


class EngineDead(RollflowError):
    """The device failed for good."""


class OutOfTime(RollflowError, TimeoutError):
    """The time of a request ended before it had anything to show."""


def line(text: str, most: int) -> str:
    """`text` as one line of at most `most` characters: the middle is left out, and what cannot be shown is escaped."""
    if len(text) > 4 * most:  # the rest is left out in any case
        text = f"{text[: 2 * most]}{text[-2 * most :]}"
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    if len(text) <= most:
        return text
    end = (most - 3) // 3
    return f"{text[: most - 3 - end]}...{text[len(text) - end :]}"


def shown(value: object, most: int = QUOTED) -> str:
    """A value as a message quotes it: like `repr`, in one line of at most `most` characters; it never raises."""
    try:
        text = _QUOTES.repr(value)
        return line(text if isinstance(text, str) else _nameless(value), most)
    except Exception:  # of an object that misbehaves: there is still something to say
        return line(_nameless(value), most)


def said(error: BaseException) -> str:
    """The type and the message of an error that somebody else's code raised."""
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be shown"
    return line(f"{type(error).__name__}: {text}".removesuffix(": "), 200)


def told(error: BaseException) -> dict[str, Any]:
    """An error as JSON: its type's name and its message; of one that is not the package's, what both say."""
    if not isinstance(error, RollflowError):
        return {"type": "RollflowError", "message": said(error)}
    kind = RewardUnavailable if isinstance(error.__cause__, RewardUnavailable) else type(error)  # it may pass
    found: dict[str, Any] = {"type": kind.__name__, "message": str(error)}
    return found | ({"seconds": error.seconds} if isinstance(error, EngineBusy) else {})


def raised(error: Mapping[str, Any]) -> RollflowError:
    """The error that `told` wrote."""
    kind = globals().get(str(error.get("type")))
    message = str(error.get("message", shown(error)))
    if not (isinstance(kind, type) and issubclass(kind, RollflowError)):
        return RollflowError(message)
    return EngineBusy(message, float(error.get("seconds", 0.0))) if kind is EngineBusy else kind(message)


def titled(named: object) -> str:
    """The name of a function or of an object's class, as a message gives it."""
    try:
        name = getattr(named, "__name__", None)
    except Exception:
        name = None
    return line(name if isinstance(name, str) and name else type(named).__name__, 60)


def _nameless(value: object) -> str:
    return f"<{type(value).__name__}>"


class _Quotes(reprlib.Repr):
    """Looks at the beginning of long values alone; of arrays and tensors it shows the kind, of scalars the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, QUOTED, 4 * QUOTED
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 8

    def repr1(self, x: Any, level: int) -> str:
        kind = type(x)
        if kind in _LONG:  # a class of somebody else's may have the name of one of these
            return super().repr1(x, level)
        if isinstance(x, str) and len(x) > QUOTED:
            return self.repr_str(x, level)
        if isinstance(x, bytes | bytearray) and len(x) > QUOTED:
            return f"{bytes(x[:QUOTED])!r}..."
        if isinstance(x, int) and x.bit_length() > 256:  # Python itself refuses to write very long ones
            return f"an integer of {x.bit_length()} bits"
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and hasattr(x, "dtype"):
            return self._array(x, shape)
        return repr(x)

    def repr_str(self, x: str, level: int) -> str:
        return repr(x if len(x) <= QUOTED else f"{x[: QUOTED // 2]}...{x[-QUOTED // 4 :]}")

    def _array(self, x: Any, shape: tuple[int, ...]) -> str:
        if not shape:
            return repr(x)
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{type(x).__name__} of shape {[*islice(shape, 8)]} and type {dtype}"


_LONG = (list, tuple, dict, set, frozenset, str)
_QUOTES = _Quotes()

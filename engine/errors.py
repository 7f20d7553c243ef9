"""The exceptions of rollflow: few, and each says what was given, what is allowed and what to do."""

import concurrent.futures


class RollflowError(Exception):
    """Base of every error that rollflow raises on purpose."""


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

"""The exceptions of rollflow: few, and each says what was given, what is allowed and what to do."""


class RollflowError(Exception):
    """Base of every error that rollflow raises on purpose."""


class RequestError(RollflowError, ValueError):
    """A request, an option or an argument that cannot be honoured."""


class ModelError(RollflowError):
    """A model folder or pipeline that cannot be used."""

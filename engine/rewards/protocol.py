"""What a reward is, and what it may say of how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import FunctionError, RequestError, RewardUnavailable, RollflowError, line, said, shown, titled
from rollflow.values import flag, number, whole

RETRIES = 3  # of a reward that says nothing else
T = TypeVar("T")


@runtime_checkable
class Reward(Protocol):
    """Scores images for their prompts; higher is better.

    A reward is called by threads of the engine, one call at a time unless it says that it is concurrent; one that takes
    long (a service, say) holds up only the requests that it judges. It may also have these attributes, which `make`
    checks, and a plain function may have those from the fourth on:

    - `size: tuple[int, int] | None`, the only height and width that it can judge; requests for other sizes are refused;
    - `clips: bool`, whether it judges nothing but clips of two frames or more; requests for images are refused;
    - `held_out: Reward | None`, a second judge of the final image: a reward, a function or a name, whose own
      attributes `make` does not check: they are read when it is called;
    - `differentiable: bool`, whether its scores have gradients with respect to the images, for guided methods;
    - `concurrent: bool`, whether several threads (at most eight) may call it, or the methods of its object, at a time;
    - `timeout: float | None`, seconds that a call may take: one that takes longer fails its requests;
    - `retry_on: tuple[type[Exception], ...]`, errors after which it is called again later, beside `RewardUnavailable`;
    - `retries: int`, how often it is called again, by default 3;
    - `batch: int | None`, the most images of one call: more are judged in several;
    - `padded: bool`, by default True, whether a reproducible engine fills calls up with copies of an image, so that a
      network's scores do not depend on how many images there are; of what is paid by the image it is False.

    Attributes:
        name: what messages call it.
    """

    name: str

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the reward cannot judge this prompt; called before any work is done."""
        ...

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """Scores of images in [0, 1], one prompt a row, on any device."""
        ...


class FunctionReward(Reward):
    """A plain function `f(images, prompts) -> scores` as a reward that accepts every prompt.

    It is taken for differentiable if the function has the attribute `differentiable = True`.
    """

    def __init__(self, function: Callable[..., Tensor], name: str | None = None):
        self.function = function
        self.differentiable: bool = differentiable(function)
        self.name: str = name or titled(function)

    def check(self, prompt: str) -> None:
        """Accepts every prompt."""

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """The function's scores as a floating tensor; raises `RequestError` if they are not one number a row."""
        scores = torch.as_tensor(self.function(images, prompts))
        if scores.shape != (len(images),) or scores.is_complex():
            raise RequestError(
                f"the reward {self.name!r} returned {shown(scores)} for {len(images)} images: "
                f"it must return one score an image, shape ({len(images)},)"
            )
        return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def check(reward: Reward, prompt: str) -> None:
    """Asks a reward whether it can judge a prompt.

    Raises:
        RequestError: it cannot.
        FunctionError: its `check` raised something else, which is the cause.
    """
    asked(reward, lambda: reward.check(prompt), "check")


def title(reward: object) -> str:
    """What messages call a reward: by its name, or where that is none, by its function or its class."""
    try:
        name = getattr(reward, "name", None)
    except Exception:
        name = None
    return line(name, 60) if isinstance(name, str) and name else titled(reward)


def measures(reward: object) -> str:
    """What a reward measures: the first sentence of its docstring, "" without one."""
    text = " ".join((type(reward).__doc__ or "").strip().split("\n\n")[0].split())
    return text.split(". ")[0].split("; ")[0].rstrip(".").replace("`", "")


def asked(reward: object, ask: Callable[[], T], what: str = "an attribute") -> T:
    """What `ask` reads of a reward; raises `FunctionError` where it raises, with the error as the cause."""
    try:
        return ask()
    except RollflowError:
        raise
    except Exception as error:
        raise FunctionError(f"{what} of the reward {title(reward)} raised {said(error)}") from error


def _attribute(reward: object, name: str, default: Any = None) -> Any:
    """What a reward, or the function that it stands for, says."""
    said_by = reward.function if isinstance(reward, FunctionReward) else reward
    return asked(reward, lambda: getattr(said_by, name, default))


def size(reward: Reward) -> tuple[int, int] | None:
    """The only (height, width) that `reward` can judge, or None."""
    given = asked(reward, lambda: getattr(reward, "size", None))
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise RequestError(f"the reward {title(reward)} has size={shown(given)}: it must be (height, width), or None")
    height, width = (whole(f"size of the reward {title(reward)}", side, 1) for side in given)
    return height, width


def clips(reward: object) -> bool:
    """Whether a reward says that it judges clips of two frames or more alone."""
    given = asked(reward, lambda: getattr(reward, "clips", False))
    return flag(f"clips of the reward {title(reward)}", given)


def differentiable(reward: object) -> bool:
    """Whether a reward says that its scores have gradients with respect to the images."""
    return flag(
        f"differentiable of the reward {title(reward)}",
        asked(reward, lambda: getattr(reward, "differentiable", False)),
    )


def concurrent(reward: object) -> bool:
    """Whether a reward says that several threads may call it at a time."""
    return flag(f"concurrent of the reward {title(reward)}", _attribute(reward, "concurrent", False))


def timeout(reward: Reward) -> float | None:
    """Seconds that a call of `reward` may take, or None."""
    given = _attribute(reward, "timeout")
    if given is None:
        return None
    seconds = number(f"timeout of the reward {title(reward)}", given, 1e9)
    if seconds <= 0:
        raise RequestError(f"timeout of the reward {title(reward)}={shown(given)}: it must be above 0 seconds")
    return seconds


def retry_on(reward: Reward) -> tuple[type[BaseException], ...]:
    """The errors after which `reward` is called again."""
    given = _attribute(reward, "retry_on", ())
    kinds = given if isinstance(given, tuple | list) else (given,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise RequestError(
            f"retry_on of the reward {title(reward)}={shown(given)}: it must be a tuple of exception types"
        )
    return (RewardUnavailable, *kinds)


def batch(reward: object) -> int | None:
    """The most images that a call of `reward` may have, or None."""
    given = _attribute(reward, "batch")
    return None if given is None else whole(f"batch of the reward {title(reward)}", given, 1)


def padded(reward: object) -> bool:
    """Whether calls of `reward` may be filled up with copies of an image."""
    return flag(f"padded of the reward {title(reward)}", _attribute(reward, "padded", True))


def retries(reward: Reward) -> int:
    """How often `reward` is called again."""
    return whole(f"retries of the reward {title(reward)}", _attribute(reward, "retries", RETRIES), 0, 1000)


class Terms(NamedTuple):
    """How a reward is called: what it says of it, or the defaults, and then perhaps what is wrong with what it says."""

    timeout: float | None = None
    retry_on: tuple[type[BaseException], ...] = (RewardUnavailable,)
    retries: int = RETRIES
    concurrent: bool = False
    batch: int | None = None
    padded: bool = True
    fault: BaseException | None = None


_USUAL = Terms()


def terms(reward: Reward) -> Terms:
    """How `reward` is to be called; never raises."""
    declares = reward.function if isinstance(reward, FunctionReward) else reward
    try:
        if (
            getattr(declares, "timeout", None) is None
            and getattr(declares, "retry_on", ()) == ()
            and getattr(declares, "retries", RETRIES) == RETRIES
            and getattr(declares, "concurrent", False) is False
            and getattr(declares, "batch", None) is None
            and getattr(declares, "padded", True) is True
        ):
            return _USUAL  # nearly every reward: nothing is to be checked
        return Terms(
            timeout(reward), retry_on(reward), retries(reward), concurrent(reward), batch(reward), padded(reward)
        )
    except BaseException as error:  # they were as they should be at the door, and are not any more
        if isinstance(error, RollflowError):
            return Terms(fault=error)
        fault = FunctionError(f"an attribute of the reward {title(reward)} raised {said(error)}")
        fault.__cause__ = error
        return Terms(fault=fault)

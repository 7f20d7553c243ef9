"""What may differ from a recording, and what a replay with it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from rollflow.errors import RequestError, shown
from rollflow.whatif.dispatching import LEAST, POLICIES
from rollflow.whatif.measured import Curve, Measured, Size


@dataclass(frozen=True)
class Change:
    """What is different from the recording; None and 1 stand for nothing.

    Attributes:
        nfe: the budget of every request.
        prompts: how many requests there are; those recorded come in turns.
        rate: requests a second, which arrive by chance (a Poisson process).
        together: whether all of them come at once.
        bucket: the largest batch.
        lanes: batches on the device at a time.
        gpus: engines, each on a device of its own.
        dispatch: which of them a request goes to, of `rollflow.whatif.dispatching`: by default the one with the least
            to do.
        method: of every request, with its default options.
        forward, decode, reward, host: factors of seconds: 0.5 is twice as fast.
        rewards: factors of single terms, besides.
        seed: of arrivals and rewards.
    """

    nfe: int | None = None
    prompts: int | None = None
    rate: float | None = None
    together: bool = False
    bucket: int | None = None
    lanes: int | None = None
    gpus: int = 1
    dispatch: str = LEAST
    method: str | None = None
    forward: float = 1.0
    decode: float = 1.0
    reward: float = 1.0
    host: float = 1.0
    rewards: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nfe", "prompts", "bucket", "lanes", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}={value}: it must be at least 1")
        for name in ("forward", "decode", "reward", "host"):
            if not (0 <= getattr(self, name) < inf):
                raise RequestError(f"{name}={getattr(self, name)}: a factor of seconds must be at least 0")
        if self.rate is not None and not 0 < self.rate < inf:
            raise RequestError(f"rate={self.rate}: requests a second must be above 0")
        if self.dispatch not in POLICIES:
            raise RequestError(f"dispatch {shown(self.dispatch)}: choose one of {', '.join(POLICIES)}")

    def __str__(self) -> str:
        words = [f"{getattr(self, name)} {name}" for name in ("prompts", "lanes") if getattr(self, name) is not None]
        words += [f"{self.gpus} GPUs"] if self.gpus > 1 else []
        words += [f"dispatched {self.dispatch}"] if self.dispatch != LEAST else []
        words += [f"budget {self.nfe}"] if self.nfe is not None else []
        words += [f"{self.rate:g} requests/s"] if self.rate is not None else []
        words += ["all at once"] if self.together else []
        words += [f"batches of at most {self.bucket}"] if self.bucket is not None else []
        words += [f"method {self.method}"] if self.method is not None else []
        factors = {name: getattr(self, name) for name in ("forward", "decode", "reward", "host")} | {**self.rewards}
        words += [f"{name} {factor:g}x" for name, factor in factors.items() if factor != 1.0]
        return ", ".join(words) or "as recorded"


@dataclass(frozen=True)
class Predicted:
    """What a replay took.

    Attributes:
        seconds: from the first request's arrival to the last one's end.
        latencies: seconds of each request from its arrival to its end, in order of arrival.
        committed: evaluations that the searches were charged for; `executed`, what ran for them.
        batches: how many there were, and `occupancy`, which share of their places rows took.
        busy: seconds by stage, of all lanes and threads.
    """

    seconds: float
    latencies: tuple[float, ...]
    committed: int
    executed: int
    batches: int
    occupancy: float
    busy: Mapping[str, float]

    @property
    def nfe_per_second(self) -> float:
        """Committed evaluations a second."""
        return self.committed / self.seconds if self.seconds else 0.0

    def latency(self, share: float) -> float:
        """The quantile of the seconds of a request."""
        return float(np.quantile(self.latencies, share)) if self.latencies else 0.0

    def scaled(self, factor: float) -> Predicted:
        """With all seconds multiplied."""
        return replace(
            self, seconds=self.seconds * factor, latencies=tuple(one * factor for one in self.latencies),
            busy={name: seconds * factor for name, seconds in self.busy.items()},
        )  # fmt: skip


def changed(size: Size, change: Change) -> Size:
    """What batches of an image size cost then; raises `RequestError` where no batch size is left."""
    warmed = {
        bucket: seconds for bucket, seconds in size.warmed.items() if not change.bucket or bucket <= change.bucket
    }
    if not warmed:
        smallest = min(size.warmed)
        raise RequestError(f"batches of at most {change.bucket} rows: the smallest that was recorded is {smallest}")
    kind = next(iter(size.decode))
    ratio = {}
    for bucket in warmed:
        forward, decode = size.forward(bucket), size.decode[kind](bucket)
        whole = forward + decode
        ratio[bucket] = (change.forward * forward + change.decode * decode) / whole if whole else 1.0
    return replace(
        size,
        warmed={bucket: seconds * ratio[bucket] for bucket, seconds in warmed.items()},
        forward=_times(size.forward, change.forward),
        guided=_times(size.guided, change.forward),
        guided_decode=_times(size.guided_decode, change.decode),
        decode={name: _times(one, change.decode) for name, one in size.decode.items()},
        around=_times(size.around, change.host),
        images=size.images * change.host,
    )


def changed_rest(measured: Measured, change: Change) -> Measured:
    """What everything besides batches costs then."""
    factors = {term: change.reward * change.rewards.get(term, 1.0) for term in measured.rewards}
    return replace(
        measured,
        rewards={term: _times(one, factors[term]) for term, one in measured.rewards.items()},
        choose=measured.choose * change.host,
        decide=measured.decide * change.host,
        turnaround=measured.turnaround * change.host,
    )


def _times(one: Curve, factor: float) -> Curve:
    return Curve({size: seconds * factor for size, seconds in one.known.items()}, one.usual)

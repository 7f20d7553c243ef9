"""What passes between searches, the scheduler and the device: plain values, by way of the loop alone.

A search issues `Row`s, the device evaluates them in batches and answers with events. Nothing here refers to a search, a
plan or a pool, so that each of the three can be driven by a test without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rollflow.draw import Guide
from rollflow.models import Geometry
from rollflow.request import Kind as Kind
from rollflow.rewards import Reward
from rollflow.rewards.combined import Scale
from rollflow.sde import Step

Score = float | tuple[float, ...]  # of a reward, or of each term of a combined one
NONE = -1  # in place of a slot: no parent, or a row of padding


class Start(NamedTuple):
    """An image that a search starts from.

    Attributes:
        state: the clean state of it, `[token, channel]`.
        keep: 1 for the elements of a state that stay those of the image, 0 for others; None where none do.
        latents, latents_keep: the same of what is decoded.
    """

    state: Tensor
    keep: Tensor | None = None
    latents: Tensor | None = None
    latents_keep: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Brief:
    """What the device needs to know of a request, the same for all of its rows.

    Attributes:
        ticket: the request's number in its loop.
        prompt: what its images are judged for.
        geometry: their size.
        seed: of all its noise.
        guidance: embedded guidance scale.
        conditioning: what the model made of the prompt.
        reward: what judges its particles.
        latents: given initial noise `[n, token, channel]`, or None.
        start: the image that the search starts from, or None.
        company: what rows of one batch have in common besides their geometry; see `rollflow.models.Capabilities`.
        network_rows: how many rows of the network an evaluation takes.
        held_out: the second judge of its final image, which takes the place of the reward's own; or None.
    """

    ticket: int
    prompt: str
    geometry: Geometry
    seed: int
    guidance: float
    conditioning: Any
    reward: Reward
    latents: Tensor | None = None
    start: Start | None = None
    company: Hashable = None
    network_rows: int = 1
    held_out: Reward | None = None


class Mixture(NamedTuple):
    """The move "rotate" from the sum of several particles, or of the coarse band alone; see `rollflow.draw.Draw`."""

    slots: tuple[int, ...]
    coarse: bool


class Limit:
    """How many children of a draw can still be needed, as far as its search knows by now; read on any thread."""

    __slots__ = ("children",)

    def __init__(self, children: int):
        self.children = children


class Row(NamedTuple):
    """One row of a batch: advance `parent` by `step` (or sample the prior) and evaluate the child.

    Attributes:
        brief: whose row it is.
        number: which of the search's rows it is, in the order of issue.
        key: of the child's noise.
        parent: the parent's slot, `NONE` for a sample of the prior.
        slot: the child's slot.
        step: the coefficients of the way there.
        kind: why it runs.
        nfe: what it is charged.
        scored: whether the child is decoded and judged.
        ahead: whether it runs before it is known to be needed.
        given: which of the request's given latents it starts from, or None.
        mixture: what it starts from in place of one parent, or None.
        moved: whether the parent's velocity is moved by the gradient of its reward.
        guide: how the gradient of its own reward will move its children, or None.
        reach: of a guided row, `sigma^2 / alpha` at its time; 0 where there is nothing but noise.
        level: its point of the time grid; steps of a finish count on from the last.
        origin: the number of the row that made its parent, `NONE` for a sample of the prior.
        child: which child of its draw it is.
        limit: of its draw; None of a step of the finish.
        cached: whether it is evaluated from what was kept of its parent; see `rollflow.models.Capabilities.caches`.
    """

    brief: Brief
    number: int
    key: int
    parent: int
    slot: int
    step: Step
    kind: Kind = "committed"
    nfe: int = 1
    scored: bool = True
    ahead: bool = False
    given: int | None = None
    mixture: Mixture | None = None
    moved: bool = False
    guide: Guide | None = None
    reach: float = 0.0
    level: int = 0
    origin: int = NONE
    child: int = 0
    limit: Limit | None = None

    @property
    def wanted(self) -> bool:
        """Whether it is still to be judged: not if, by now, its search is over or an earlier child beat the bar."""
        return self.scored and (self.limit is None or self.child < self.limit.children)

    cached: bool = False

    @property
    def apart(self) -> bool:
        """Whether it runs in batches of its own kind: of guided rows, or of rows that are evaluated from a cache."""
        return self.cached or self.kind == "guided"


class Candidate(NamedTuple):
    """A particle that may become an image: its slot, the coefficients of its posterior mean, its point of the grid."""

    slot: int
    p: float
    q: float
    level: int


class Show(NamedTuple):
    """A search that is over: the best image of its candidates is to be made and judged.

    Attributes:
        brief: whose images they are.
        candidates: those that compete; the first is the one that the rewards so far favour.
        scales: mean and deviation of each normalised term of its reward.
    """

    brief: Brief
    candidates: tuple[Candidate, ...]
    scales: tuple[Scale, ...] = ()


class Outcome(NamedTuple):
    """The image of a search that is over: float32 and 8-bit pixels [3, height, width] on the CPU, and its scores.

    A clip has [frame, 3, height, width]. `terms` are the scores of the terms of a combined reward, in order.
    """

    pixels: Tensor
    rounded: Tensor
    reward: float
    held_out: float | None
    terms: tuple[float, ...] | None = None


class Free(NamedTuple):
    """A lane can take more work."""


class Landed(NamedTuple):
    """Rows were evaluated.

    Attributes:
        rows: which.
        scores: the reward of each, or of a combined reward one number a term; None for a row that was not judged.
        invalid: the numbers of guided rows whose gradient was no finite number, by ticket.
    """

    rows: Sequence[Row]
    scores: Sequence[Score | None]
    invalid: Sequence[tuple[int, int]] = ()


class Shown(NamedTuple):
    """Images of searches were made."""

    shows: Sequence[Show]
    outcomes: Sequence[Outcome]


class Failed(NamedTuple):
    """Work could not be done; each request that it belongs to has this error."""

    work: Sequence[Row] | Sequence[Show]
    error: BaseException


class Shrunk(NamedTuple):
    """A batch of this many rows, guided or plain ones, did not fit into the device's memory; smaller ones do."""

    geometry: Geometry
    rows: int
    guided: bool = False


class Began(NamedTuple):
    """A call of a reward that has a time limit began; with None for `seconds`, it is over.

    Attributes:
        call: see `rollflow.device.judge.Call`.
        seconds: how many it may take.
        turn: what is given up if it takes longer; see `rollflow.device.judges.Turn`.
    """

    call: Any
    seconds: float | None
    turn: Any


class Again(NamedTuple):
    """A call of a reward is to be made again after `seconds`."""

    call: Any
    seconds: float


class Rerun(NamedTuple):
    """Rows are to be run again after `seconds`: a reward was not available, for the `attempt`-th time."""

    rows: Sequence[Row]
    seconds: float
    attempt: int


class Done(NamedTuple):
    """Work that is not a batch was done on a lane: what was to happen with its result, and the result or the error."""

    then: Callable[[Any, BaseException | None], None]
    value: Any = None
    error: BaseException | None = None


Event = Free | Landed | Shown | Failed | Shrunk | Began | Again | Rerun | Done
Report = Callable[[Event], None]  # of any thread

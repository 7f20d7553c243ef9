"""What has to be kept of a search so that it can go on elsewhere: the scores of its evaluations, in order.

A method is deterministic given its rewards, and noise is a function of seed and place: everything else of a search
follows from these, see `rollflow.search.replay`.
"""

from __future__ import annotations

import json
from itertools import starmap
from typing import Any, NamedTuple

from rollflow.errors import RequestError, said

Score = float | tuple[float, ...]  # of a combined reward a number a term


class Entry(NamedTuple):
    """One committed evaluation, as `rollflow.Request`'s history has it.

    Attributes:
        kind: why it ran, see `rollflow.request.Record`.
        level: its point of the time grid.
        score: what the reward gave, of a combined one a number a term; None where it was not judged.
        invalid: whether a gradient was no finite number.
    """

    kind: str
    level: int
    score: Score | None = None
    invalid: bool = False


class Replay(NamedTuple):
    """Evaluations of a search from some place of its history on.

    Attributes:
        entries: one for each, in order.
        scales: mean and deviation of each normalised term of the reward, once they are known.
        nfe: the search's budget, once it is settled; 0 before.
        seconds: how long it has run.
        stopped: what ended it, if it is ending: its time, for instance, of which the entries say nothing.
        of: what kind of engine gave the scores, see `rollflow.Engine`.
    """

    entries: tuple[Entry, ...] = ()
    scales: tuple[tuple[float, float], ...] = ()
    nfe: int = 0
    seconds: float = 0.0
    stopped: str = ""
    of: str = ""


def written(replay: Replay) -> str:
    """As JSON; every number comes back as it was, with those that are not finite as Python's `json` has them."""
    entries, *rest = replay
    return json.dumps([*rest, entries], separators=(",", ":"))


def read(text: str) -> Replay:
    """What `written` wrote.

    Raises:
        RequestError: it is something else.
    """
    try:
        scales, nfe, seconds, stopped, of, entries = json.loads(text)
        normalised = tuple((float(mean), float(over)) for mean, over in scales)
        return Replay(tuple(starmap(_entry, entries)), normalised, int(nfe), float(seconds), str(stopped), str(of))
    except (ValueError, TypeError) as error:
        raise RequestError(f"a replay of {len(text)} characters: rollflow did not write it ({said(error)})") from error


def _entry(kind: object, level: Any, score: Any, invalid: object) -> Entry:
    own = None if score is None else tuple(map(float, score)) if isinstance(score, list | tuple) else float(score)
    return Entry(str(kind), int(level), own, bool(invalid))

"""What a prompt composes, in GenEval's manner: objects with their numbers and colours, and where they are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rollflow.errors import RequestError, shown
from rollflow.rewards import phrases

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = {  # as prompts say them, and GenEval calls them
    "left of": "left of",
    "right of": "right of",
    "on top of": "above",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "underneath": "below",
    "beneath": "below",
}
APART = 0.1  # share of the sizes of both boxes from which the distance of their centres counts


@dataclass(frozen=True)
class Thing:
    """Objects that a picture is to show.

    Attributes:
        name: of one of them, as a detector is asked for it.
        count: how many.
        colour: one of GenEval's ten, None for any.
        exact: whether more than `count` are too many.
    """

    name: str
    count: int = 1
    colour: str | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.colour is not None and self.colour not in COLOURS:
            raise RequestError(f"detect: colour={shown(self.colour)}: choose one of {', '.join(COLOURS)}")
        if self.count < 0 or not self.name.strip():
            raise RequestError(f"detect: {self}: it needs a name and a count of at least 0")


@dataclass(frozen=True)
class Scene:
    """What a picture is to show.

    Attributes:
        things: the objects.
        relations: (0, "left of", 1) says that the first thing is left of the second; also right of, above, below.
    """

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.things:
            raise RequestError("detect: a scene without things: it needs at least one")
        for one, relation, other in self.relations:
            if relation not in RELATIONS.values() or not {one, other} <= set(range(len(self.things))):
                raise RequestError(
                    f"detect: the relation {(one, relation, other)}: it must be one of left of, right of, above, below "
                    f"between the places of two things, 0 to {len(self.things) - 1}"
                )


@lru_cache(maxsize=4096)
def scene(prompt: str) -> Scene:
    """What a prompt in GenEval's manner asks for: "a photo of a red apple left of a green cup", "three dogs".

    A number is exact, an article says at least one.

    Raises:
        RequestError: it names no object after a number or an article.
    """
    groups, things, relations = phrases.groups(prompt), [], []
    for place, group in enumerate(groups):
        words = group.name.split()
        colour = next((word for word in words[:-1] if word in COLOURS), None)
        name = " ".join(word for i, word in enumerate(words) if i == len(words) - 1 or word != colour)
        things.append(Thing(name, group.count, colour, group.exact))
        said = next((relation for relation in RELATIONS if re.search(rf"\b{relation}\b", group.before)), None)
        if place and said:
            relations.append((place - 1, RELATIONS[said], place))
    if not things:
        raise RequestError(
            f"the reward detect checks the objects that a prompt names, and {shown(prompt)} names none after a number "
            "or an article: write it like 'a photo of a red apple left of two green cups', or choose another reward"
        )
    return Scene(tuple(things), tuple(relations))


def relations(one: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies as seen from another one, by GenEval's rule.

    The offset of the centres counts from a tenth of both sizes on; a direction holds if that is more than half of the
    whole offset.
    """
    offset = [(one[i] + one[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    free = [
        math.copysign(max(abs(offset[i]) - APART * (one[i + 2] - one[i] + other[i + 2] - other[i]), 0), offset[i])
        for i in (0, 1)
    ]
    if max(map(abs, free)) < 1e-3:
        return set()
    x, y = (each / math.hypot(*offset) for each in free)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}

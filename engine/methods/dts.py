"""DTS: a tree of particles, grown where the rewards at its leaves were high."""

from __future__ import annotations

import math

from rollflow.draw import Evaluated
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, number, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import route, trails


class Node:
    """A particle in the tree (the root: none yet), with what became of its descendants.

    It knows its children and not its parent: without cycles, particles give their memory back as soon as the tree goes.
    """

    def __init__(self, particle: Evaluated | None):
        self.particle = particle
        self.children: list[Node] = []
        self.visits = self.pending = self.leaves = 0
        self.log_sum = -math.inf  # of exp(r / temperature) over the leaves below

    @property
    def level(self) -> int:
        """Its point of the grid; -1 for the root."""
        return -1 if self.particle is None else self.particle.step


@method(branches=True)  # every particle joins the tree: it holds them all
def dts(nfe: int, steps: int, walks: int = 4, temperature: float = 0.5, exploration: float = 0.5) -> Search:
    """Diffusion tree search (Jain et al. 2025, arXiv 2506.20701): each walk descends from the root by upper confidence
    bounds on the soft value `temperature log mean exp(r / temperature)` of the leaves below, branches off where a node
    has fewer children than the square root of its visits, and follows the SDE from there to a leaf. Leaves alone are
    judged; every node of the walk joins the tree.

    Args:
        nfe: budget of function evaluations; what is left after whole walks pays for one of fewer, longer steps.
        steps: evaluations from the root to a leaf.
        walks: how many at the same time.
        temperature: of the soft value, in units of the reward; lower is greedier.
        exploration: weight of the bound against the value, which is scaled to [0, 1].

    Raises:
        RequestError: a bad option, or a budget that does not pay for one walk.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("walks", walks, 1)
    if number("temperature", temperature) <= 0 or number("exploration", exploration) < 0:
        raise RequestError(
            f"temperature={temperature!r}, exploration={exploration!r}: a temperature is above 0, exploration not below"
        )
    require("dts", nfe, steps, f"one walk of {steps} steps")
    return _search(nfe, steps, walks, temperature, exploration)


def _search(left: int, steps: int, at_once: int, temperature: float, exploration: float) -> Search:
    root, leaves = Node(None), list[Evaluated]()
    while left:
        ways, lengths = list[list[Node]](), list[int]()
        while left and len(ways) < at_once:
            ways.append(_descend(root, steps, temperature, exploration))
            lengths.append(min(left, steps - 1 - ways[-1][-1].level))
            left -= lengths[-1]
        routes = [_route(n, way[-1].level, steps) for n, way in zip(lengths, ways, strict=True)]
        walks = yield from trails([way[-1].particle for way in ways], routes)
        for way, particles in zip(ways, walks, strict=True):
            leaves.append(particles[-1])
            _join(way, particles, worth(particles[-1]) / temperature)
    return max(leaves, key=worth)


def _route(evaluations: int, level: int, steps: int) -> list[int]:
    return [0, *route(evaluations - 1, steps)] if level < 0 else route(evaluations, steps, level)


def _descend(root: Node, steps: int, temperature: float, exploration: float) -> list[Node]:
    """The nodes down to the one that the next walk branches off from; every node on the way counts a visit."""
    way = [root]
    while True:
        node = way[-1]
        node.visits += 1
        if len(node.children) + node.pending < math.sqrt(node.visits) or not node.children:
            node.pending += 1
            return way
        inner = [child for child in node.children if child.level < steps - 1]
        if not inner:
            node.pending += 1
            return way
        values = [temperature * (child.log_sum - math.log(max(1, child.leaves))) for child in inner]
        bounds = [
            value + exploration * math.sqrt(math.log(node.visits + 1) / (child.visits + 1))
            for child, value in zip(inner, _scaled(values), strict=True)
        ]
        way.append(inner[bounds.index(max(bounds))])


def _scaled(values: list[float]) -> list[float]:
    """Values brought to [0, 1]; one of minus infinity, where every leaf's reward was no number, to -1."""
    finite = [value for value in values if value > -math.inf]
    low, spread = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    return [-1.0 if value == -math.inf else (value - low) / spread if spread else 0.0 for value in values]


def _join(way: list[Node], particles: list[Evaluated], log_value: float) -> None:
    """Adds a walk below the last node of `way`, and its leaf's reward to every node from the root to the leaf."""
    way[-1].pending -= 1
    for particle in particles:
        child = Node(particle)
        way[-1].children.append(child)
        way = [*way, child]
    for node in way:
        node.leaves += 1
        node.log_sum = _log_add(node.log_sum, log_value)


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top if math.isinf(top) else top + math.log(math.exp(a - top) + math.exp(b - top))

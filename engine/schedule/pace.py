"""How fast requests go: what a time pays for, and how long the end of a search takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rollflow.models import Geometry
from rollflow.schedule.cost import CostModel

MEMORY = 0.5  # weight of the newest measurement
ASSUMED = 0.5  # share of the rate of bare batches that a search reaches, before one of its kind was measured


class Pace:
    """Evaluations a second, from measured batches at first and then from the requests that ended.

    Args:
        costs: what batches of a geometry cost, where that was measured.
        lanes: how many batches run side by side.
    """

    def __init__(self, costs: Mapping[Geometry, CostModel], lanes: Callable[[], int]):
        self._costs, self._lanes = costs, lanes
        self._rates: dict[tuple[str, Geometry], float] = {}  # of one request, were it alone
        self._endings: dict[Geometry, float] = {}

    def learn(self, method: str, geometry: Geometry, nfe: int, seconds: float, ending: float, company: int) -> None:
        """A request ended: what it spent in how long, how much of that came after its search, and how many ran."""
        key = (method, geometry)
        if seconds > ending and nfe:
            rate = company * nfe / (seconds - ending)
            self._rates[key] = _mixed(self._rates.get(key), rate)
        self._endings[geometry] = _mixed(self._endings.get(geometry), ending)

    def ending(self, geometry: Geometry, finish: int) -> float:
        """Seconds from the end of a search to its image, `finish` evaluations included."""
        cost = self._costs.get(geometry)
        batch = 0.0 if cost is None else min(cost.seconds.values())
        return finish * batch + self._endings.get(geometry, 2 * batch)

    def affordable(self, method: str, geometry: Geometry, seconds: float, finish: int, company: int) -> int | None:
        """How many evaluations fit into a time beside `company` other requests; None where nothing is known yet."""
        rate = self._rates.get((method, geometry), self.assumed(geometry))
        if rate is None:
            return None
        left = seconds - self.ending(geometry, finish)
        return max(1, int(left * rate / (1 + company)))

    def assumed(self, geometry: Geometry) -> float | None:
        """Evaluations a second by the measured costs of batches alone; None where nothing was measured."""
        cost = self._costs.get(geometry)
        if cost is None:
            return None
        return ASSUMED * self._lanes() * max(bucket / spent for bucket, spent in cost.seconds.items())


def _mixed(before: float | None, new: float) -> float:
    return new if before is None else MEMORY * new + (1 - MEMORY) * before

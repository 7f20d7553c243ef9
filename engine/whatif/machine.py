"""A machine on a simulated clock: tasks that wait for one another in lines and share processors.

A task takes its seconds when it has what it asks of its processor. Where more is asked than there is, every task of the
processor gets the same share of what it asks: so two lanes and a thread that judges slow each other down on two cores.
Of a task that asks for less than one unit, the rest of its time is waiting for something else, which nothing slows.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import inf

EPSILON = 1e-9  # seconds: what a clock that has run for weeks still tells apart


@dataclass(eq=False, slots=True)
class Task:
    """Something that takes time.

    Attributes:
        seconds: how long it takes alone.
        then: what follows at its end.
        line: tasks of one line run in order, as many at a time as the line is wide; None: it waits for nobody.
        processor: what it computes on.
        demand: of the processor's units, 0 of a task that only waits.
        stage: what its time is booked as.
    """

    seconds: float
    then: Callable[[], None]
    line: Hashable = None
    processor: str = "cpu"
    demand: float = 1.0
    stage: str = "host"
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.seconds


class Machine:
    """Runs tasks.

    Args:
        units: of each processor, such as cores of a CPU.
        widths: of lines that are wider than 1.

    Attributes:
        busy: seconds that tasks took, by stage; several at a time count each.
    """

    def __init__(self, units: Mapping[str, float], widths: Mapping[Hashable, int] | None = None):
        self._units, self._widths = units, widths or {}
        self._running: list[Task] = []
        self._lines: defaultdict[Hashable, deque[Task]] = defaultdict(deque)
        self._inside: defaultdict[Hashable, int] = defaultdict(int)
        self.busy: defaultdict[str, float] = defaultdict(float)

    def post(self, task: Task) -> None:
        """Starts a task, or lines it up."""
        if task.line is not None:
            if self._inside[task.line] >= self._widths.get(task.line, 1):
                self._lines[task.line].append(task)
                return
            self._inside[task.line] += 1
        self._running.append(task)

    @property
    def wait(self) -> float:
        """Seconds until the next task is over, if none is posted before; infinite where none runs."""
        return min((task.left / rate for task, rate in zip(self._running, self._rates(), strict=True)), default=inf)

    def advance(self, seconds: float) -> None:
        """Lets time pass, at most `wait`, and ends what is over by then."""
        over = []
        for task, rate in zip(self._running, self._rates(), strict=True):
            task.left -= seconds * rate
            self.busy[task.stage] += seconds
            if task.left <= EPSILON:
                over.append(task)
        for task in over:
            self._running.remove(task)
            if task.line is not None:
                self._inside[task.line] -= 1
                if line := self._lines[task.line]:
                    self._inside[task.line] += 1
                    self._running.append(line.popleft())
        for task in over:
            task.then()

    def _rates(self) -> list[float]:
        """How fast each task runs, of what it does alone."""
        asked: defaultdict[str, float] = defaultdict(float)
        for task in self._running:
            asked[task.processor] += task.demand
        slower = {name: max(1.0, demand / self._units[name]) for name, demand in asked.items()}
        return [1 / (1 + min(1.0, task.demand) * (slower[task.processor] - 1)) for task in self._running]

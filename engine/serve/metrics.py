"""What Prometheus reads: names and units by its conventions, and labels that are few, never an id or a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import generate_latest

from rollflow import __version__
from rollflow.serve.desk import Desk
from rollflow.serve.dispatcher import WINDOW

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)  # upper ends of the histograms' buckets

REFUSED = "Requests for searches or images that were not let in, whatever the status, by the code of the error."
ANSWERS = (
    "Answers by route and status. The route is a template such as /v1/searches/{id}; other: a path that leads nowhere. "
    "Connections beyond the limit are refused before this counts."
)
TOTAL = (
    "From when a search was handed in to its end, however it ended. Of one that went on after a restart, with the time "
    "between."
)
QUEUED = (
    "From when a search was handed in to its start. Of those without a result, and of those that went on after a "
    "restart, it is not known."
)
LIMIT = f"Searches that the workers which are ready take at a time, {WINDOW} each by default; more of them wait."
FREE = (
    "Slots of particles that are not in use, of the pools that there are: one is made when a size is first used, so "
    "that it is 0 before the first search."
)


class Metrics:
    """Counts what the front end sees, and asks the desk for the rest when it is read.

    Args:
        desk: runs the searches.
    """

    def __init__(self, desk: Desk):
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry}
        Info("rollflow_build", "What runs here.", **kept).info({"version": __version__})
        ProcessCollector(**kept)
        self._refused = Counter("rollflow_requests_refused", REFUSED, ["reason"], **kept)
        self._answers = Counter("rollflow_http_responses", ANSWERS, ["route", "status"], **kept)
        self._seconds = Histogram("rollflow_request_seconds", TOTAL, buckets=SECONDS, **kept)
        self._queued = Histogram("rollflow_request_queue_seconds", QUEUED, buckets=SECONDS, **kept)
        self._registry.register(_Held(desk))

    def over(self, seconds: float, queued: float | None) -> None:
        """Counts a search that has ended; `queued` is None where it is not known."""
        self._seconds.observe(seconds)
        if queued is not None:
            self._queued.observe(queued)

    def refused(self, reason: str | None) -> None:
        """Counts a request for searches or images that was not let in, by its error's code."""
        self._refused.labels(reason or "other").inc()

    def answered(self, route: str, status: int) -> None:
        """Counts an answer; the route is a template, never a path."""
        self._answers.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Held:
    """What the desk holds and has counted, each time that it is asked."""

    def __init__(self, desk: Desk):
        self._desk = desk

    def describe(self) -> list[Metric]:
        """Nothing: the desk is not asked before it has started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of metrics."""
        desk = self._desk
        now = desk.stats()
        gauges = {
            "rollflow_requests_running": ("Searches that an engine works on.", now.running),
            "rollflow_requests_waiting": ("Searches that wait to be let in.", now.queued),
            "rollflow_requests_running_limit": (LIMIT, now.limit),
            "rollflow_oldest_waiting_seconds": ("Since the oldest search that waits was handed in.", now.oldest),
            "rollflow_outstanding_nfe": ("Function evaluations that are left to run.", now.outstanding_nfe),
            "rollflow_nfe_per_second": ("Function evaluations a second, of the last ten.", now.nfe_per_second),
            "rollflow_batch_occupancy_ratio": ("Share of the rows of batches that were no padding.", now.occupancy),
            "rollflow_slots_free": (FREE, now.free),
            "rollflow_workers_alive": ("Workers that take searches.", sum(one.alive for one in now.workers)),
            "rollflow_ready": ("Whether it takes requests.", float(desk.ready and not desk.draining)),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(name, help, value)
        ended = CounterMetricFamily(
            "rollflow_requests", "Searches that are over, by how they ended.", labels=["status"]
        )
        for status in ("done", "failed", "cancelled"):
            ended.add_metric([status], now.ended.get(status, 0))
        yield ended
        spent = CounterMetricFamily("rollflow_nfe", "Function evaluations that ran, by kind.", labels=["kind"])
        for kind, count in now.nfe.items():
            spent.add_metric([kind], count)
        yield spent
        calls = SummaryMetricFamily("rollflow_reward_call_seconds", "Calls of rewards.", labels=["reward"])
        failed = CounterMetricFamily("rollflow_reward_errors", "Calls of rewards that failed.", labels=["reward"])
        for name, (count, seconds, errors) in _by_name(now.rewards).items():
            calls.add_metric([name], count, seconds)
            failed.add_metric([name], errors)
        yield calls
        yield failed


def _by_name(rewards: Any) -> dict[str, tuple[int, float, int]]:
    """Calls, seconds and errors of rewards by name alone: options are the clients' to choose, and without end."""
    found: dict[str, tuple[int, float, int]] = {}
    for title, one in rewards.items():
        name = title.partition(":")[0]
        name = name if name.isidentifier() else "expression"
        calls, seconds, errors = found.get(name, (0, 0.0, 0))
        found[name] = calls + one.calls, seconds + one.seconds, errors + one.errors
    return found

"""What Prometheus reads: names and units by its conventions, and labels that are few, never an id or a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import generate_latest

from rollflow.serve.desk import Desk

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)  # upper ends of the histograms' buckets


class Metrics:
    """Counts what the front end sees, and asks the desk for the rest when it is read.

    Args:
        desk: runs the searches.
    """

    def __init__(self, desk: Desk):
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry}
        self._refused = Counter("rollflow_requests_refused", "Requests that were not let in.", ["reason"], **kept)
        self._answers = Counter("rollflow_http_responses", "Answers, by their status.", ["status"], **kept)
        self._seconds = Histogram(
            "rollflow_request_seconds", "From when a search was handed in to its end.", buckets=SECONDS, **kept
        )
        self._queued = Histogram(
            "rollflow_request_queue_seconds", "From when a search was handed in to its start.", buckets=SECONDS, **kept
        )
        self._registry.register(_Held(desk))

    def over(self, seconds: float, queued: float | None) -> None:
        """Counts a search that has ended; `queued` is None where it is not known."""
        self._seconds.observe(seconds)
        if queued is not None:
            self._queued.observe(queued)

    def refused(self, reason: str) -> None:
        """Counts a request that was not let in, by its error's name."""
        self._refused.labels(reason).inc()

    def answered(self, status: int) -> None:
        """Counts an answer."""
        self._answers.labels(str(status)).inc()

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
            "rollflow_outstanding_nfe": ("Function evaluations that are left to run.", now.outstanding_nfe),
            "rollflow_nfe_per_second": ("Function evaluations a second, of the last ten.", now.nfe_per_second),
            "rollflow_batch_occupancy_ratio": ("Share of the rows of batches that were no padding.", now.occupancy),
            "rollflow_slots_free": ("Slots of particles that are not in use.", now.free),
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

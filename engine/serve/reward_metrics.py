"""What /metrics of a reward server shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rollflow.serve.scoring import Judged, Scorer


class RewardMetrics:
    """Counters and histograms of one server, by reward."""

    KIND = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        name = "rollflow_reward_server"
        self.answers = Counter(f"{name}_requests", "Calls by reward and status of HTTP.", ["reward", "status"], **made)
        self.images = Counter(f"{name}_images", "Images that were judged.", ["reward"], **made)
        self.errors = Counter(f"{name}_errors", "Calls of the reward that raised.", ["reward"], **made)
        self.rows = Histogram(
            f"{name}_batch_images", "Images of one call of the reward.", ["reward"],
            buckets=[2**i for i in range(10)], **made,
        )  # fmt: skip
        self.callers = Histogram(
            f"{name}_batch_requests", "Calls over HTTP that one call of the reward answers.", ["reward"],
            buckets=[2**i for i in range(8)], **made,
        )  # fmt: skip
        times = [0.001 * 2.5**i for i in range(13)]
        self.call_seconds = Histogram(
            f"{name}_reward_seconds", "One call of the reward.", ["reward"], buckets=times, **made
        )
        self.seconds = Histogram(
            f"{name}_request_seconds", "A call over HTTP, from its first byte to its answer.", ["reward"],
            buckets=times, **made,
        )  # fmt: skip

    def watch(self, scorers: Mapping[str, Scorer]) -> None:
        """Reads the queues whenever it is asked."""
        waiting = Gauge(
            "rollflow_reward_server_waiting_images", "Images that wait.", ["reward"], registry=self.registry
        )
        busy = Gauge(
            "rollflow_reward_server_busy_seconds", "Age of the oldest running call of the reward.", ["reward"],
            registry=self.registry,
        )  # fmt: skip
        for name, scorer in scorers.items():
            waiting.labels(name).set_function(partial(getattr, scorer, "waiting"))
            busy.labels(name).set_function(partial(getattr, scorer, "busy_seconds"))

    def judged(self, name: str) -> Callable[[Judged], None]:
        """Takes what a scorer tells."""

        def take(one: Judged) -> None:
            self.images.labels(name).inc(0 if one.failed else one.images)
            self.errors.labels(name).inc(one.failed)
            self.rows.labels(name).observe(one.images)
            self.callers.labels(name).observe(one.callers)
            self.call_seconds.labels(name).observe(one.seconds)

        return take

    def text(self) -> bytes:
        """All of them now, in the format `KIND`."""
        return generate_latest(self.registry)

"""Spans of searches for OpenTelemetry, where it is installed and a collector is named; elsewhere nothing.

A span goes from when a search was handed in to its end, below the client's own where the client sends `traceparent`.
Prompts are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rollflow import __version__
from rollflow.request import Request

COLLECTOR = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Tracing:
    """Makes spans by a tracer, if there is one.

    Args:
        provider: of OpenTelemetry; None: one that exports to `$OTEL_EXPORTER_OTLP_ENDPOINT`, where that is set and
            the extra `tracing` is installed.
    """

    def __init__(self, provider: Any = None):
        self._provider = _exporting() if provider is None else provider
        self._tracer = None if self._provider is None else self._provider.get_tracer("rollflow", __version__)

    def begin(self, request: Mapping[str, Any], parent: str | None) -> Any:
        """The span of a search, as `rollflow.wire` has it; None where there is no tracer."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({} if parent is None else {"traceparent": parent})
        about = {"rollflow.method": request.get("method", Request.method)}
        about |= {f"rollflow.{name}": request[name] for name in ("reward", "nfe", "seed") if name in request}
        return self._tracer.start_span("rollflow.search", context=context, kind=SpanKind.SERVER, attributes=about)

    def end(self, span: Any, status: str, result: Mapping[str, Any] | None, queued: float | None) -> None:
        """Ends a span with what came of its search; `queued` is seconds."""
        if span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        found: dict[str, Any] = {"status": status, "queue_seconds": queued}
        found |= {name: (result or {}).get(name) for name in ("executed_nfe", "stopped")}
        found["best_reward"] = (result or {}).get("reward")
        span.set_attributes({f"rollflow.{name}": value for name, value in found.items() if value is not None})
        if status == "failed":
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Sends what was not sent yet."""
        if self._provider is not None:
            self._provider.shutdown()


def _exporting() -> Any:
    if not os.environ.get(COLLECTOR):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    name = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "rollflow")}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider

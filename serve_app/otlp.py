"""Spans to a collector, by OTLP over HTTP. Only tracing.py imports this, and only where `otlp_endpoint` is set."""

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import serve_app
from serve_app.tracing import NONE, Facts, Span, Tracing, now_ns

SEND_EVERY_MS = 1000
SEND_WITHIN_S = 2.0
"""Retries included: so long a replica's end may wait for a collector that is away, and once more."""
_context = TraceContextTextMapPropagator()


class OtlpSpan(Span):
    """A span that is sent once it has ended."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        carrier: dict[str, str] = {}
        _context.inject(carrier, trace.set_span_in_context(span))
        self.traceparent = carrier.get("traceparent")

    def say(self, facts: Facts) -> None:
        """Add facts, under `wan_serve.`."""
        self._span.set_attributes({f"wan_serve.{name}": value for name, value in facts.items()})

    def end(self, *, failed: str | None = None) -> None:
        """It is over, now."""
        if self._span.is_recording():
            if failed is not None:
                self._span.set_status(trace.StatusCode.ERROR, failed)
            self._span.end()


class OtlpTracing(Tracing):
    """Sends spans to `{endpoint}/v1/traces`, in the background. A collector that is away costs spans, and nothing else.

    The provider is this object's own, not the process's: Ray Serve may have one for its requests.
    """

    def __init__(self, endpoint: str, part: str) -> None:
        resource = Resource.create(
            {"service.name": "wan-serve", "service.version": serve_app.__version__, "service.component": part}
        )
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_WITHIN_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=SEND_EVERY_MS))
        self._tracer = self._provider.get_tracer("wan-serve", serve_app.__version__)

    def begin(self, name: str, parent: str | None, *, at: float | None = None, facts: Facts = NONE) -> Span:
        """A span inside `parent`."""
        context = _context.extract({"traceparent": parent} if parent else {})
        span = OtlpSpan(self._tracer.start_span(name, context, start_time=now_ns(at)))
        span.say(facts)
        return span

    def close(self) -> None:
        """Send what is not sent yet."""
        self._provider.force_flush(1000)
        self._provider.shutdown()

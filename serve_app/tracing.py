"""Traces of jobs: one a job, with a span for each stage, over all the processes that work on it.

A job's record carries its trace's context (W3C `traceparent`), so that whoever takes the job up goes on with its trace. Without the
setting `otlp_endpoint` there are none: nothing here does anything, and OpenTelemetry is not imported.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serve_app.errors import WanServeError
from serve_app.settings import Settings

Facts = Mapping[str, str | int | float | bool]
NONE: Facts = {}


class Span:
    """Some work of a while; this one is not told to anybody."""

    traceparent: str | None = None
    """What spans inside it name as their parent."""

    def say(self, facts: Facts) -> None:
        """Add facts."""

    def end(self, *, failed: str | None = None) -> None:
        """It is over, now; `failed` says what went wrong. Once is enough, more do no harm."""


class Tracing:
    """Tells nobody."""

    @staticmethod
    def of(settings: Settings, part: str) -> "Tracing":
        """As the settings want it, for a part of the service (`Ingress`, ...). Raises WanServeError without wan-serve[tracing]."""
        if settings.otlp_endpoint is None:
            return Tracing()
        try:
            from serve_app.otlp import OtlpTracing
        except ImportError as error:
            raise WanServeError(
                f"otlp_endpoint is {settings.otlp_endpoint!r}, and OpenTelemetry is not installed here ({error})",
                hint="Run: pip install 'wan-serve[tracing]'",
            ) from error
        return OtlpTracing(settings.otlp_endpoint, part)

    def begin(self, name: str, parent: str | None, *, at: float | None = None, facts: Facts = NONE) -> Span:
        """A span inside `parent` (a traceparent; None: a trace of its own) that began now, or at Unix second `at`."""
        return Span()

    @contextmanager
    def span(self, name: str, parent: str | None, facts: Facts = NONE) -> Iterator[Span]:
        """A span for what is inside the block."""
        span = self.begin(name, parent, facts=facts)
        try:
            yield span
        except BaseException as error:
            span.end(failed=f"{type(error).__name__}: {error}")
            raise
        span.end()

    def close(self) -> None:
        """Send what is not sent yet; it blocks, a few seconds at most."""


class Stages:
    """A span whose work goes through stages, one after another."""

    def __init__(
        self, tracing: Tracing, name: str, parent: str | None = None, *, at: float | None = None, facts: Facts = NONE
    ) -> None:
        self._tracing = tracing
        self._whole = tracing.begin(name, parent, at=at, facts=facts)
        self._stage = Span()

    @property
    def traceparent(self) -> str | None:
        """Of the stage under way."""
        return self._stage.traceparent or self._whole.traceparent

    def enter(self, stage: str, *, at: float | None = None) -> None:
        """The stage before is over, and this one begins."""
        self._stage.end()
        self._stage = self._tracing.begin(stage, self._whole.traceparent, at=at)

    def end(self, *, failed: str | None = None, facts: Facts = NONE) -> None:
        """All is over; `failed` says what went wrong, in the stage under way."""
        self._stage.end(failed=failed)
        self._whole.say(facts)
        self._whole.end(failed=failed)


def now_ns(at: float | None) -> int:
    """Unix nanoseconds of `at`, or now."""
    return time.time_ns() if at is None else int(at * 1e9)

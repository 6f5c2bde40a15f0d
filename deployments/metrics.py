"""Every metric of the service, in one place. What each is for, and what to look at: docs/observability.md.

Ray exports them from each node with the prefix `ray_`, a counter with the suffix `_total`, and adds deployment, replica and
application. The sum of a histogram is made of its buckets' middles (Ray 2.60, open_telemetry_metric_recorder.py), so what an average
is to be taken of has a counter of its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from ray.serve import metrics as serve_metrics

LONGEST_S = (
    1.0,
    2.0,
    5.0,
    10.0,
    15.0,
    30.0,
    45.0,
    60.0,
    90.0,
    120.0,
    180.0,
    240.0,
    300.0,
    480.0,
    900.0,
    1800.0,
    3600.0,
    7200.0,
)
"""Buckets of what may take as long as a job: to twice `time_limit_s`'s default, with each preset's promise as a bound."""
SHORT_S = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 180.0, 600.0, 1800.0)
STEP_MS = (
    2.0,
    5.0,
    10.0,
    20.0,
    30.0,
    50.0,
    75.0,
    100.0,
    150.0,
    200.0,
    300.0,
    500.0,
    750.0,
    1e3,
    1.5e3,
    2e3,
    5e3,
    1e4,
    3e4,
)


@dataclass(frozen=True)
class Metric:
    """A metric of this name, which every process that writes it makes for itself when it first does."""

    name: str
    about: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names under which Prometheus finds it."""
        return (f"ray_{self.name}",)


@dataclass(frozen=True)
class Counter(Metric):
    """What only grows, until its process ends."""

    @property
    def exported(self) -> tuple[str, ...]:
        """With Prometheus' suffix."""
        return (f"ray_{self.name}_total",)

    def add(self, value: float = 1.0, **tags: str) -> None:
        """Count `value` more. Raises ValueError where a tag is missing."""
        if value > 0:
            self._made.inc(value, tags)

    def begin(self, **tags: str) -> None:
        """Say that there has been none yet: Prometheus sees the first one only as a change of what was there before."""
        self._made._record(0.0, tags)  # `inc` refuses 0 (Ray 2.60, util/metrics.py)

    @cached_property
    def _made(self) -> serve_metrics.Counter:
        return serve_metrics.Counter(self.name, self.about, self.tags)


@dataclass(frozen=True)
class Gauge(Metric):
    """What is so now."""

    def set(self, value: float, **tags: str) -> None:
        """Say what it is. Raises ValueError where a tag is missing."""
        self._made.set(value, tags)

    @cached_property
    def _made(self) -> serve_metrics.Gauge:
        return serve_metrics.Gauge(self.name, self.about, self.tags)


@dataclass(frozen=True)
class Histogram(Metric):
    """How often it was up to each of `buckets`."""

    buckets: tuple[float, ...] = field(default=LONGEST_S, kw_only=True)

    @property
    def exported(self) -> tuple[str, ...]:
        """The three series of a histogram."""
        return tuple(f"ray_{self.name}_{part}" for part in ("bucket", "count", "sum"))

    def observe(self, value: float, **tags: str) -> None:
        """Count one of `value`. Raises ValueError where a tag is missing."""
        self._made.observe(value, tags)

    @contextmanager
    def timed(self, **tags: str) -> Iterator[None]:
        """Count the seconds that the block takes, where it does not fail."""
        began = time.monotonic()
        yield
        self.observe(time.monotonic() - began, **tags)

    @cached_property
    def _made(self) -> serve_metrics.Histogram:
        return serve_metrics.Histogram(self.name, self.about, list(self.buckets), self.tags)


# ---- jobs, by the conductor that drove them to their end

JOBS = Counter("wan_serve_jobs", "Jobs that were driven to an end, by outcome.", ("type", "model", "outcome"))
JOBS_TOOK = Counter("wan_serve_jobs_took_seconds", "Seconds from submission to files.", ("type", "model"))
JOB_SECONDS = Histogram("wan_serve_job_seconds", "A job's seconds from submission to files.", ("type", "model"))
JOB_WAIT = Histogram("wan_serve_job_wait_seconds", "A job's seconds from submission to its first claim.", ("type", "model"))  # fmt: skip
DEADLINES = Counter("wan_serve_deadlines", "Jobs that succeeded, by whether in time.", ("type", "model", "kept"))
GPU_SECONDS = Counter("wan_serve_gpu_seconds", "Device seconds of ended jobs: billed or wasted.", ("type", "model", "use"))  # fmt: skip
JOBS_COST = Counter("wan_serve_jobs_cost", "The same, by gpu_price_per_hour.", ("type", "model", "use"))
FAILURES = Counter("wan_serve_failures", "What went wrong on the way, also where it was got over.", ("code", "then"))

# ---- the queue, by every conductor alike: take the maximum

QUEUE_JOBS = Gauge("wan_serve_queue_jobs", "Jobs that wait.", ("model",))
QUEUE_GPU_SECONDS = Gauge("wan_serve_queue_gpu_seconds", "Their work on the model's reference card.", ("model",))
RUNNING_JOBS = Gauge("wan_serve_running_jobs", "Jobs under a lease.", ("model",))
LATE_JOBS = Gauge("wan_serve_late_jobs", "Jobs that wait or run and are past their deadline.", ("model",))
REPLICAS = Gauge("wan_serve_replicas", "Generator replicas that report.", ("model",))

# ---- the job store, by Ingress, Conductor and Generator

UP = Gauge("wan_serve_up", "1 where the job store answers, else 0.")
STORE_OUTAGES = Counter("wan_serve_store_outages", "How often the job store went away.")

# ---- GPUs, by generator replicas

STEP = Histogram("wan_serve_step_milliseconds", "Device time of a denoising step.", ("model", "shape"), buckets=STEP_MS)
DECODE = Histogram("wan_serve_decode_seconds", "Device time of a clip's decode.", ("model", "shape"), buckets=SHORT_S)
COLD_START = Histogram("wan_serve_cold_start_seconds", "From a replica's start until it takes work.", ("model",))
GPU_BUSY = Counter("wan_serve_gpu_busy_seconds", "Seconds in which a replica's device worked.", ("model",))
GPU_HELD = Counter("wan_serve_gpu_held_seconds", "Seconds for which a replica has held its device.", ("model",))
REPLICAS_COST = Counter("wan_serve_replicas_cost", "The same, by gpu_price_per_hour.", ("model",))
PREEMPTIONS = Counter("wan_serve_preemptions", "How often a clip had to wait for another after it began.", ("model",))
PROMPT_EMBEDS = Counter("wan_serve_prompt_embeds", "Prompts, by whether their embeddings were there.", ("model", "cache"))  # fmt: skip
CHECKPOINTS = Counter("wan_serve_checkpoints", "Checkpoints that were written.", ("model",))
CHECKPOINT_FAILURES = Counter("wan_serve_checkpoint_failures", "Reads and writes of them that failed.", ("model",))

# ---- files, by finisher replicas

ENCODE = Histogram("wan_serve_encode_seconds", "Fetching, joining, upscaling, encoding, checking.", ("type",), buckets=SHORT_S)  # fmt: skip
UPLOAD = Histogram("wan_serve_upload_seconds", "Delivering a job's files.", ("type",), buckets=SHORT_S)

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

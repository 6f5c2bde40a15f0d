"""What happens after a failure: another try, another size, or the end. Pure: the conductor acts on the answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.errors import GpuOutOfMemory, LatentsNotFinite, ReplicaDraining, UnusableOutput, WanServeError
from serve_app.jobs.job import Job
from serve_app.jobs.presets import STABLE_RESOLUTION, UNSTABLE_RESOLUTION

MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class NextTry:
    """Try again after `delay_s` seconds; with `degraded`, at the stable size, for the reason that it gives."""

    delay_s: float
    counts: bool = True
    """Whether it uses up an attempt: a replica that drains is nobody's fault."""
    degraded: str | None = None

    @property
    def in_words(self) -> str:
        """For the job's story."""
        if self.degraded:
            return f"made again at {STABLE_RESOLUTION}"
        return f"tried again after {self.delay_s:.1f} s"


def next_try(
    error: WanServeError, job: Job, *, attempt: int, max_attempts: int, draw: Callable[[], float] = random.random
) -> NextTry | None:
    """What follows `error` in attempt `attempt` (from 1): another try, or None where the job has failed for good.

    832*480 is the less stable size: what fails there by its content or its memory is made again, once, at 640*480
    (DESIGN.md section 2). Else only retryable errors are tried again, at most `max_attempts` times in all, after
    1, 2, 4, ... seconds (30 at most), times a random 0.5 to 1.5 so that jobs which failed together do not return together.
    """
    unstable = job.spec.resolution == UNSTABLE_RESOLUTION and job.degraded is None
    if unstable and isinstance(error, (GpuOutOfMemory, LatentsNotFinite, UnusableOutput)):
        return NextTry(0.0, counts=False, degraded=f"{error.code} at {UNSTABLE_RESOLUTION}: {error.message}")
    if isinstance(error, ReplicaDraining):
        return NextTry(0.0, counts=False)
    if not error.retryable or attempt >= max_attempts:
        return None
    return NextTry(min(2.0 ** (attempt - 1), MAX_BACKOFF_S) * (0.5 + draw()))

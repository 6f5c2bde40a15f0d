"""Failures in the service's own vocabulary: Ray's, and a conductor's own."""

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from serve_app.errors import AttemptsExhausted, FramesLost, ReplicaLost, TimeLimitExceeded, WanServeError
from serve_app.jobs.job import Job


def translated(error: Exception) -> WanServeError:
    """Any failure in the one vocabulary: our own errors out of Ray's wrappers, dead actors and lost objects by name."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, WanServeError):
        return error
    if isinstance(error, ObjectLostError):
        return FramesLost("the replica that held the frames died before they were finished")
    if isinstance(error, RayActorError):
        return ReplicaLost(f"a replica died while it worked on the job ({type(error).__name__})")
    return WanServeError(f"{type(error).__name__}: {error}", hint="This is a defect; please report it with the log.")


def exhausted(job: Job, reason: str) -> AttemptsExhausted:
    """The job is given up, for what ended its last attempt."""
    return AttemptsExhausted(
        f"gave up after {job.attempts} attempts: {reason}",
        hint="The record's `failures` tell the story. Submit it again once the cause is known.",
    )


def too_long(limit_s: float) -> TimeLimitExceeded:
    """The job took longer than it may."""
    return TimeLimitExceeded(
        f"the job took longer than {limit_s:g} s", hint="Ask for less work, or raise the setting time_limit_s."
    )

"""Ray's failures in the service's own vocabulary."""

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from serve_app.errors import FramesLost, ReplicaLost, WanServeError


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

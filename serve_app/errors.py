"""The one error vocabulary: what HTTP, the store, webhooks and the command line all say when something is wrong.

Each error has a stable `code`, a `message` that names the value, a `hint` that says what to do, and `retryable`.
`http_status` is what the ingress answers when such an error ends a request.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, Field


class ErrorInfo(BaseModel):
    """An error as data: in an HTTP body, in a job's record, in an event."""

    code: str = Field(description="Stable, machine-readable name of the error.", examples=["invalid_value"])
    message: str = Field(
        description="What was wrong, with which value.", examples=["sample_steps is 0; it must be 1 to 100"]
    )
    param: str | None = Field(
        default=None, description="The request field at fault, if one is.", examples=["sample_steps"]
    )
    hint: str = Field(
        default="", description="What to do about it.", examples=["Leave sample_steps out to use the preset's."]
    )
    retryable: bool = Field(default=False, description="Whether the same request may succeed later.", examples=[False])


class WanServeError(Exception):
    """Base of all errors that a user or an operator is meant to read. Survives pickling between processes."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.hint))

    @property
    def info(self) -> ErrorInfo:
        """The error as data."""
        return ErrorInfo(
            code=self.code, message=self.message, param=self.param, hint=self.hint, retryable=self.retryable
        )


def _rebuild(kind: type[WanServeError], message: str, param: str | None, hint: str) -> WanServeError:
    return kind(message, param=param, hint=hint)


# ---- requests -------------------------------------------------------------------------------------------------------


class InvalidRequest(WanServeError):
    """A request that can never be accepted as it stands."""

    code = "invalid_request"
    http_status = 422


class InvalidValue(InvalidRequest):
    """A known field with a value outside its limits."""

    code = "invalid_value"


class UnknownField(InvalidRequest):
    """A field that no version of the request has."""

    code = "unknown_field"


class UnknownJobType(InvalidRequest):
    """A job type that is not one of the presets."""

    code = "unknown_job_type"


class InvalidJson(InvalidRequest):
    """A body that is not JSON."""

    code = "invalid_json"
    http_status = 400


class UnsupportedMediaType(InvalidRequest):
    """A body of another content type than JSON."""

    code = "unsupported_media_type"
    http_status = 415


class BodyTooLarge(InvalidRequest):
    """A body over `max_body_bytes`."""

    code = "body_too_large"
    http_status = 413


class Unauthorized(WanServeError):
    """No API key, or an unknown one, where `api_keys` are set."""

    code = "unauthorized"
    http_status = 401


class ContentRefused(WanServeError):
    """A prompt that the content policy refuses."""

    code = "content_refused"
    http_status = 403


class NotFound(WanServeError):
    """An address that names nothing."""

    code = "not_found"
    http_status = 404


class JobNotFound(NotFound):
    """No such job, or not this owner's."""

    code = "job_not_found"


class ArtifactNotFound(NotFound):
    """The job has no artifact of that name."""

    code = "artifact_not_found"


class RangeNotSatisfiable(InvalidRequest):
    """A `Range` header beyond the end of the file."""

    code = "range_not_satisfiable"
    http_status = 416


class MethodNotAllowed(WanServeError):
    """The address exists, the method does not."""

    code = "method_not_allowed"
    http_status = 405


class IdempotencyConflict(WanServeError):
    """An `Idempotency-Key` that stands for another request already."""

    code = "idempotency_conflict"
    http_status = 409


class JobGone(WanServeError):
    """The job that this `Idempotency-Key` made has been deleted since."""

    code = "job_gone"
    http_status = 410


class JobFinished(WanServeError):
    """A cancel that comes after the end."""

    code = "job_finished"
    http_status = 409


class JobNotFinished(WanServeError):
    """A delete that comes before the end."""

    code = "job_not_finished"
    http_status = 409


class QueueFull(WanServeError):
    """`max_queued_jobs` jobs are waiting already."""

    code = "queue_full"
    http_status = 429
    retryable = True


class StoreUnavailable(WanServeError):
    """The Redis-protocol server did not answer."""

    code = "store_unavailable"
    http_status = 503
    retryable = True


# ---- a job's life ---------------------------------------------------------------------------------------------------


class LeaseLost(WanServeError):
    """Another conductor drives the job now (or nobody may): the caller must stop and write nothing more."""

    code = "lease_lost"


class AttemptsExhausted(WanServeError):
    """The job was begun `max_attempts` times without coming any further."""

    code = "attempts_exhausted"


class TimeLimitExceeded(WanServeError):
    """The job ran past its time limit."""

    code = "time_limit_exceeded"


# ---- engine ---------------------------------------------------------------------------------------------------------


class EngineError(WanServeError):
    """A clip could not be generated."""

    code = "engine_error"


class ModelNotLoadable(EngineError):
    """`model` names nothing that `WanPipeline.from_pretrained` can load."""

    code = "model_not_loadable"


class GpuOutOfMemory(EngineError):
    """The clip did not fit the GPU's memory."""

    code = "gpu_out_of_memory"
    retryable = True


class LatentsNotFinite(EngineError):
    """NaN or infinity in the latents."""

    code = "latents_not_finite"


class ClipCancelled(EngineError):
    """The clip was cancelled; its GPU time has ended."""

    code = "clip_cancelled"


class ReplicaDraining(EngineError):
    """The replica is going away and hands its clips back."""

    code = "replica_draining"
    retryable = True


class ReplicaLost(EngineError):
    """The replica died while it held the clip."""

    code = "replica_lost"
    retryable = True


class FramesLost(ReplicaLost):
    """The replica that owned a clip's frames died before they were finished."""

    code = "frames_lost"


class CheckpointInvalid(EngineError):
    """A checkpoint is damaged, of another version, or of another clip."""

    code = "checkpoint_invalid"


class CheckpointUnavailable(EngineError):
    """The checkpoint store did not answer, or refused."""

    code = "checkpoint_unavailable"
    retryable = True


# ---- files ----------------------------------------------------------------------------------------------------------


class MediaError(WanServeError):
    """Frames could not be made into a file, or the file is not what was asked for."""

    code = "media_error"


class UnusableOutput(MediaError):
    """Frames that are all black, or a video in which nothing moves."""

    code = "unusable_output"


class EncodingFailed(MediaError):
    """FFmpeg could not encode the frames."""

    code = "encoding_failed"


class HardwareEncodingFailed(EncodingFailed):
    """A hardware encoder failed on a machine that will encode in software from now on."""

    code = "hardware_encoding_failed"
    retryable = True


class UpscalerUnusable(MediaError):
    """`upscale_model` names nothing that can upscale pictures."""

    code = "upscaler_unusable"


class StorageError(WanServeError):
    """The artifact store refused, for good."""

    code = "storage_error"


class StorageUnavailable(StorageError):
    """The artifact store did not answer, or answered 5xx."""

    code = "storage_unavailable"
    http_status = 503
    retryable = True


# ---- the client's side ----------------------------------------------------------------------------------------------


class ServiceUnreachable(WanServeError):
    """No wan-serve answered at the address."""

    code = "service_unreachable"
    retryable = True


class ServiceFailing(ServiceUnreachable):
    """The address answered 500, 502, 503 or 504 without an error of wan-serve's, as a proxy does whose service is away."""

    code = "service_failing"


class DownloadDamaged(WanServeError):
    """A downloaded file is not the one that the job's record describes."""

    code = "download_damaged"
    retryable = True


def error_from(info: ErrorInfo) -> WanServeError:
    """The exception that `info` was made from; of the base class where this version does not know its code."""
    kinds: list[type[WanServeError]] = [WanServeError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        if kind.code == info.code:
            return kind(info.message, param=info.param, hint=info.hint)
    return WanServeError(f"{info.code}: {info.message}", param=info.param, hint=info.hint)

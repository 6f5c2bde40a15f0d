"""The nouns of a job's life: spec, job, progress, artifact, event. Plain data, validated once, stored as JSON."""

import re
import secrets
import time
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import ErrorInfo
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, FPS, PRESETS, JobType, size_of
from serve_app.jobs.transitions import Transition


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class Stage(StrEnum):
    """What a running job is doing."""

    ENHANCING = "enhancing"
    GENERATING = "generating"
    FINISHING = "finishing"
    UPLOADING = "uploading"


class Shot(BaseModel):
    """One clip of a video, with every value resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(description="What it shows.", examples=["A red fox runs through fresh snow at dawn"])
    negative_prompt: str = Field(description="What to avoid.", examples=["blurry, low quality, watermark"])
    frames: int = Field(description="Frames before its transitions, at 16 a second.", examples=[80])
    sample_steps: int = Field(description="Denoising steps.", examples=[25])
    guidance_scale: float = Field(description="How strictly the prompt is followed.", examples=[6.0])
    sample_shift: float = Field(description="The noise scheduler's flow_shift.", examples=[2.0])
    seed: int = Field(description="Where the random numbers start.", examples=[42])


class JobSpec(BaseModel):
    """What was asked for, with every value resolved: the preset's where the request named none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: JobType
    prompt: str
    negative_prompt: str
    resolution: str
    video_length: int
    sample_steps: int
    guidance_scale: float
    sample_shift: float
    seed: int
    model: str = DEFAULT_MODEL_NAME
    """Which of the service's models makes it, by the name in the settings."""
    profile: str = "exact"
    motion_bucket_id: int | None = None
    shots: tuple[Shot, ...] = ()
    """The clips of a video that has several; empty: one clip, as the fields above say. `video_length` is the whole's."""
    transitions: tuple[Transition, ...] = ()
    """Between each shot and the next."""
    formats: tuple[str, ...] = ("mp4",)
    """What a video is delivered as: names of VIDEO_FORMATS, one at least, and `contact_sheet`."""
    upscale: int | None = None
    """How many times as wide and as high the files are as what is generated: one of UPSCALES, or None for once."""

    @property
    def clips(self) -> tuple[Shot, ...]:
        """What is to be generated, in order: one shot or many."""
        return self.shots or (
            Shot(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                frames=self.video_length,
                sample_steps=self.sample_steps,
                guidance_scale=self.guidance_scale,
                sample_shift=self.sample_shift,
                seed=self.seed,
            ),
        )

    @property
    def width(self) -> int:
        """Pixels."""
        return size_of(self.resolution)[0]

    @property
    def height(self) -> int:
        """Pixels."""
        return size_of(self.resolution)[1]

    @property
    def fps(self) -> int:
        """Frames a second; Wan 2.1 knows one rate."""
        return FPS

    @property
    def is_image(self) -> bool:
        """Whether the job delivers a PNG. The job type decides, not the number of frames."""
        return PRESETS[self.type].is_image


class StageProgress(BaseModel):
    """How far a stage is that has no steps: finishing counts frames that are upscaled and encoded, uploading bytes."""

    unit: Literal["frames", "bytes"] = Field(description="What is counted.", examples=["frames"])
    done: int = Field(description="So many are done.", examples=[24])
    total: int = Field(description="Of so many.", examples=[81])


class Progress(BaseModel):
    """How far a running job is. Steps count over all its clips and are reported when the device has done them."""

    step: int = Field(default=0, description="Denoising steps done.", examples=[12])
    steps: int = Field(default=0, description="Denoising steps in all.", examples=[25])
    eta_s: float | None = Field(
        default=None,
        description="Seconds left of the stage under way, from the measured pace of this job; null until known.",
        examples=[8.5],
    )
    stage: StageProgress | None = Field(
        default=None,
        description="How far the stage under way is, where it is not generating.",
        examples=[{"unit": "frames", "done": 24, "total": 81}],
    )


class Artifact(BaseModel):
    """A delivered file."""

    name: str = Field(description="File name, unique within the job.", examples=["video.mp4"])
    content_type: str = Field(description="Media type.", examples=["video/mp4"])
    size_bytes: int = Field(description="Size of the file in bytes.", examples=[482133])
    width: int | None = Field(default=None, description="Pixels.", examples=[640])
    height: int | None = Field(default=None, description="Pixels.", examples=[480])
    frames: int | None = Field(default=None, description="Number of frames (videos).", examples=[41])
    fps: float | None = Field(default=None, description="Frames a second (videos).", examples=[16.0])
    duration_s: float | None = Field(default=None, description="Length in seconds (videos).", examples=[2.5625])
    codec: str | None = Field(default=None, description="Codec as FFmpeg names it.", examples=["h264"])
    sha256: str = Field(description="SHA-256 of the file, hexadecimal.", examples=["9f86d081884c7d65"])


class Delivered(BaseModel):
    """What a finisher made of a job's frames: the files, and the receipt that is one of them."""

    artifacts: list[Artifact]
    receipt: dict[str, Any]


class Failure(BaseModel):
    """Something that went wrong on the way, whether or not the job got over it."""

    at: float = Field(description="Unix seconds.", examples=[1795378472.3])
    stage: Stage | None = Field(description="What the job was doing.", examples=["generating"])
    attempt: int = Field(description="Which attempt it was, counted from the last new checkpoint.", examples=[1])
    code: str = Field(description="The error's code.", examples=["replica_lost"])
    message: str = Field(description="What happened.", examples=["a replica died while it worked on the job"])
    then: str = Field(description="What the service did about it.", examples=["tried again after 1.3 s"])


MAX_FAILURES = 20
"""How many failures a record keeps: the newest."""


class WebhookState(StrEnum):
    """How far the delivery of a job's webhook is."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Webhook(BaseModel):
    """Whom to tell that a job has ended, and whether that is done."""

    url: str = Field(description="Where it goes.", examples=["https://example.com/hooks/wan"])
    state: WebhookState = Field(
        default=WebhookState.PENDING,
        description="pending until the job has ended and the receiver has answered 2xx; failed once it was given up.",
        examples=["delivered"],
    )
    attempts: int = Field(default=0, description="Attempts to deliver it.", examples=[1])
    last_error: str | None = Field(
        default=None, description="What went wrong in the last attempt.", examples=["HTTP 503"]
    )


class Job(BaseModel):
    """A job's record, as the store keeps it. Times are Unix seconds."""

    id: str
    owner: str
    spec: JobSpec
    status: JobStatus = JobStatus.QUEUED
    stage: Stage | None = None
    progress: Progress = Field(default_factory=Progress)
    created_at: float
    deadline: float
    started_at: float | None = None
    finished_at: float | None = None
    estimated_gpu_s: float = 0.0
    """GPU-seconds that the cost model expects for the whole job on the reference card."""
    gpu_s: float = 0.0
    """GPU-seconds that led to the artifacts, or to the moment of a cancel: what is billed."""
    wasted_gpu_s: float = 0.0
    """GPU-seconds that were lost with replicas, since their last checkpoint. Nobody is billed for them."""
    attempts: int = 0
    """How often it was begun: by a conductor, or after a failure."""
    setbacks: dict[int, int] = Field(default_factory=dict)
    """For each clip, by index: attempts that failed since its last new checkpoint. `max_attempts` is their budget."""
    lost_conductors: int = 0
    """Conductors that fell silent while they drove it, since its last new checkpoint: hardly ever the job's fault."""
    fencing_token: int = 0
    """Grows with each claim; names the folder of the artifacts that count."""
    cancel_requested: bool = False
    degraded: str | None = None
    artifacts: list[Artifact] = Field(default_factory=list)
    receipt: dict[str, Any] | None = None
    error: ErrorInfo | None = None
    failures: list[Failure] = Field(default_factory=list)
    """The story of what went wrong, oldest first."""
    webhook: Webhook | None = None
    traceparent: str | None = None
    """Its trace's context (W3C Trace Context), where jobs are traced."""


class JobEvent(BaseModel):
    """Something that happened to a job. `id` grows within a job; a reader that names the last one misses none."""

    id: str
    name: str
    data: dict[str, Any]


FINAL_EVENTS = frozenset(status.value for status in JobStatus if status.is_final)


JOB_ID = re.compile(r"[0-9a-f]{28}")


def new_job_id() -> str:
    """An id that sorts by time: 48 bits of Unix milliseconds, then 64 random bits, in hexadecimal (28 characters)."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


def drawn_at(job_id: str) -> float:
    """Unix seconds at which `new_job_id` drew this id."""
    return int(job_id[:12], 16) / 1000

"""What goes over HTTP, in both directions. Pydantic only, so the client and the command line share these types."""

from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict

from serve_app.errors import ErrorInfo
from serve_app.jobs.job import Artifact, Failure, Job, JobStatus, Progress, Shot, Stage, Webhook
from serve_app.jobs.presets import (
    CONTACT_SHEET,
    FPS,
    MAX_CLIP_S,
    MAX_FRAMES,
    MAX_GUIDANCE_SCALE,
    MAX_MOTION_BUCKET_ID,
    MAX_SAMPLE_SHIFT,
    MAX_SEED,
    MAX_STEPS,
    PRESETS,
    PROFILES,
    RESOLUTIONS,
    UPSCALES,
    VIDEO_FORMATS,
    JobType,
    Preset,
)
from serve_app.jobs.receipt import UNTRAINED_NOTICE
from serve_app.jobs.transitions import DEFAULT_TRANSITION_S, KINDS, MAX_TRANSITION_S, Transition
from serve_app.webhooks.address import MAX_URL_CHARS

# ---- requests -------------------------------------------------------------------------------------------------------
# Their shape is checked here and their limits in admit.py, once for every way in; the limits that these types name are
# for the reader of the OpenAPI page. Strict: "25" is no number of steps, and true is not 1.

Text = Annotated[str, Strict()]
TypeName = Annotated[str, Strict(), Field(json_schema_extra={"enum": [type.value for type in JobType]})]
Prompt = Annotated[str, Strict(), Field(json_schema_extra={"minLength": 1})]
Resolution = Annotated[
    str,
    Strict(),
    Field(json_schema_extra={"enum": [size.replace("*", sign) for size in RESOLUTIONS for sign in "*xX"]}),
]
VideoLength = Annotated[int, Strict(), Field(json_schema_extra={"enum": list(range(1, MAX_FRAMES + 1, 4))})]
SampleSteps = Annotated[int, Strict(), Field(json_schema_extra={"minimum": 1, "maximum": MAX_STEPS})]
GuidanceScale = Annotated[float, Strict(), Field(json_schema_extra={"minimum": 0, "maximum": MAX_GUIDANCE_SCALE})]
SampleShift = Annotated[float, Strict(), Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_SAMPLE_SHIFT})]
Seed = Annotated[int, Strict(), Field(json_schema_extra={"minimum": 0, "maximum": MAX_SEED})]
MotionBucketId = Annotated[int, Strict(), Field(json_schema_extra={"minimum": 0, "maximum": MAX_MOTION_BUCKET_ID})]
WebhookUrl = Annotated[
    str, Strict(), Field(json_schema_extra={"format": "uri", "pattern": "^https?://", "maxLength": MAX_URL_CHARS})
]
Profile = Annotated[str, Strict(), Field(json_schema_extra={"enum": list(PROFILES)})]
Seconds = Annotated[float, Strict(), Field(json_schema_extra={"exclusiveMinimum": 0})]
ShotSeconds = Annotated[float, Strict(), Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_CLIP_S})]
FormatName = Annotated[str, Strict(), Field(json_schema_extra={"enum": [*VIDEO_FORMATS, CONTACT_SHEET]})]
Upscale = Annotated[int, Strict(), Field(json_schema_extra={"enum": list(UPSCALES)})]
TransitionKind = Annotated[str, Strict(), Field(json_schema_extra={"enum": list(KINDS)})]
TransitionSeconds = Annotated[
    float, Strict(), Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_TRANSITION_S})
]


class TransitionRequest(BaseModel):
    """How one shot becomes the next."""

    model_config = ConfigDict(extra="forbid")

    kind: TransitionKind = Field(
        default=KINDS[0], description="crossfade, cut, or a name of FFmpeg's xfade filter.", examples=["fadeblack"]
    )
    seconds: TransitionSeconds | None = Field(
        default=None,
        description=f"How long the two shots overlap, above 0 and at most {MAX_TRANSITION_S:g}; left out: "
        f"{DEFAULT_TRANSITION_S:g}. A cut has none.",
        examples=[0.5],
    )


class ShotRequest(BaseModel):
    """One clip of a video. What it leaves out is as the job has it; its seed, the job's plus its index."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt = Field(description="What to show, in words.", examples=["A red fox runs through fresh snow"])
    seconds: ShotSeconds | None = Field(
        default=None,
        description=f"Length before its transitions, up to {MAX_CLIP_S:g}. Left out: the preset's.",
        examples=[5.0],
    )
    negative_prompt: Text | None = Field(default=None, description="What to avoid.", examples=["blurry"])
    sample_steps: SampleSteps | None = Field(
        default=None, description=f"Denoising steps, 1 to {MAX_STEPS}.", examples=[25]
    )
    guidance_scale: GuidanceScale | None = Field(
        default=None, description=f"How strictly to follow the prompt, 0 to {MAX_GUIDANCE_SCALE:g}.", examples=[6.0]
    )
    sample_shift: SampleShift | None = Field(
        default=None,
        description=f"The noise scheduler's flow_shift, above 0 and at most {MAX_SAMPLE_SHIFT:g}.",
        examples=[2.0],
    )
    seed: Seed | None = Field(default=None, description="Where the random numbers start, 0 to 2^63-1.", examples=[42])
    transition: TransitionRequest | None = Field(
        default=None, description="How it becomes the next one. Left out: the job's.", examples=[{"kind": "cut"}]
    )


class JobRequest(BaseModel):
    """What to make. The job type brings a value for everything but the prompt."""

    model_config = ConfigDict(extra="forbid")

    type: TypeName = Field(
        description="The preset: image_fast, image_high, video_fast or video_high. GET /v1/presets shows their values.",
        examples=["video_fast"],
    )
    prompt: Prompt | None = Field(
        default=None,
        description="What to show, in words. Not blank, no control characters, by default 2,000 characters at most. Left out "
        "only where `shots` have their own.",
        examples=["A red fox runs through fresh snow at dawn, side view, soft light"],
    )
    seconds: Seconds | None = Field(
        default=None,
        description="Length of the video, exact to the frame, by default 60 at most; instead of video_length. Over "
        f"{MAX_CLIP_S:g} it is made of several clips of the same prompt, which are independent: a transition joins them.",
        examples=[12.0],
    )
    shots: list[ShotRequest] | None = Field(
        default=None,
        description="A video of several clips with a prompt each, in order; instead of prompt, seconds and video_length.",
        examples=[None],
    )
    transition: TransitionRequest | None = Field(
        default=None,
        description=f"Between the clips of a video that has several. Left out: a crossfade of {DEFAULT_TRANSITION_S:g} s.",
        examples=[{"kind": "crossfade", "seconds": 0.5}],
    )
    negative_prompt: Text | None = Field(
        default=None,
        description="What to avoid. Left out: the service's default. An empty text: nothing.",
        examples=["blurry, low quality, watermark"],
    )
    resolution: Resolution | None = Field(
        default=None,
        description="Width and height in pixels, as 640*480 or 640x480. 832*480 is the less stable size.",
        examples=["640*480"],
    )
    video_length: VideoLength | None = Field(
        default=None,
        description=f"Frames, at {FPS} a second: 1 to {MAX_FRAMES}, of the form 4k+1. An image has exactly 1.",
        examples=[41],
    )
    sample_steps: SampleSteps | None = Field(
        default=None, description=f"Denoising steps, 1 to {MAX_STEPS}.", examples=[25]
    )
    guidance_scale: GuidanceScale | None = Field(
        default=None, description=f"How strictly to follow the prompt, 0 to {MAX_GUIDANCE_SCALE:g}.", examples=[6.0]
    )
    sample_shift: SampleShift | None = Field(
        default=None,
        description=f"The noise scheduler's flow_shift, above 0 and at most {MAX_SAMPLE_SHIFT:g}.",
        examples=[2.0],
    )
    seed: Seed | None = Field(
        default=None,
        description="Where the random numbers start, 0 to 2^63-1: the same job with the same seed gives the same "
        "picture. Left out: drawn, and told in the answer.",
        examples=[42],
    )
    motion_bucket_id: MotionBucketId | None = Field(
        default=None,
        description=f"For old clients: accepted (0 to {MAX_MOTION_BUCKET_ID}) and recorded, but without effect, since "
        "Wan has no such input.",
        examples=[127],
    )
    profile: Profile | None = Field(
        default=None,
        description="How the model is run. exact: the same mathematics as diffusers. balanced and turbo are not yet "
        "available.",
        examples=["exact"],
    )
    formats: list[FormatName] | None = Field(
        default=None,
        description="What a video is delivered as: mp4 (H.264), h265, av1, webm (VP9), gif and webp (small previews), each once, "
        "and contact_sheet (a JPEG of frames, besides). Left out: mp4.",
        examples=[["mp4", "gif"]],
    )
    upscale: Upscale | None = Field(
        default=None,
        description="Makes the files 2 or 4 times as wide and as high as what is generated, by a super-resolution network. Only "
        "where the service has one.",
        examples=[None],
    )
    webhook_url: WebhookUrl | None = Field(
        default=None,
        description="Where to POST the job once it has ended, signed by the Standard Webhooks specification; an https "
        "address on the public internet. Only where the service has a webhook secret for you.",
        examples=["https://example.com/hooks/wan"],
    )


class JobListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=20, ge=1, le=100, description="Jobs on a page.", examples=[20])
    cursor: str | None = Field(
        default=None, description="`next_cursor` of the page before.", examples=["0199f2f0a1b2c3d4e5f60718293a"]
    )
    status: JobStatus | None = Field(default=None, description="Only jobs of this status.", examples=["running"])
    type: JobType | None = Field(default=None, description="Only jobs of this type.", examples=["video_fast"])


# ---- answers --------------------------------------------------------------------------------------------------------


class ArtifactView(Artifact):
    """A delivered file, and where to fetch it."""

    url: str = Field(
        description="Path of the file on this service (it may redirect to a signed URL).",
        examples=["/v1/jobs/0199f2f0a1b2c3d4e5f60718293a/artifacts/video.mp4"],
    )


class JobLinks(BaseModel):
    """Paths, on this service, of what can be done with a job."""

    job: str = Field(description="This record.", examples=["/v1/jobs/0199f2f0a1b2c3d4e5f60718293a"])
    events: str = Field(
        description="Its server-sent events.", examples=["/v1/jobs/0199f2f0a1b2c3d4e5f60718293a/events"]
    )
    cancel: str = Field(
        description="POST here to cancel it.", examples=["/v1/jobs/0199f2f0a1b2c3d4e5f60718293a/cancel"]
    )


class JobView(BaseModel):
    """A job as its owner sees it. Times are ISO 8601 in UTC."""

    id: str = Field(
        description="Name of the job; ids sort by time of submission.", examples=["0199f2f0a1b2c3d4e5f60718293a"]
    )
    type: JobType = Field(description="The preset.", examples=["video_fast"])
    status: JobStatus = Field(
        description="queued, then running, then succeeded, failed or cancelled.", examples=["running"]
    )
    stage: Stage | None = Field(description="What a running job is doing.", examples=["generating"])
    progress: Progress = Field(description="How far it is.", examples=[{"step": 12, "steps": 25, "eta_s": 8.5}])
    cancel_requested: bool = Field(description="Whether it will stop at its next step.", examples=[False])

    prompt: str = Field(description="As it was asked for.", examples=["A red fox runs through fresh snow at dawn"])
    negative_prompt: str = Field(description="What to avoid.", examples=["blurry, low quality, watermark"])
    resolution: str = Field(description="Width*height in pixels.", examples=["640*480"])
    video_length: int = Field(description="Frames, after transitions.", examples=[41])
    fps: int = Field(description="Frames a second.", examples=[FPS])
    seconds: float = Field(description="Length of the video, after transitions.", examples=[2.5625])
    sample_steps: int = Field(description="Denoising steps.", examples=[25])
    guidance_scale: float = Field(description="How strictly the prompt is followed.", examples=[6.0])
    sample_shift: float = Field(description="The noise scheduler's flow_shift.", examples=[2.0])
    seed: int = Field(description="Where the random numbers start.", examples=[42])
    shots: tuple[Shot, ...] = Field(description="The clips of a video that has several.", examples=[[]])
    transitions: tuple[Transition, ...] = Field(description="Between each shot and the next.", examples=[[]])
    formats: tuple[str, ...] = Field(description="What a video is delivered as.", examples=[["mp4"]])
    upscale: int | None = Field(
        description="How many times as wide and as high the files are as `resolution` says.", examples=[None]
    )
    motion_bucket_id: int | None = Field(description="Recorded for old clients, without effect.", examples=[None])
    model: str = Field(description="Which of the service's models makes it.", examples=["wan-1.3b"])
    profile: str = Field(description="How the model is run.", examples=["exact"])

    created_at: datetime = Field(description="When it was accepted.", examples=["2026-11-16T09:30:00Z"])
    deadline: datetime = Field(
        description="When it is promised, on one idle reference card.", examples=["2026-11-16T09:34:00Z"]
    )
    started_at: datetime | None = Field(description="When work on it began.", examples=["2026-11-16T09:30:01Z"])
    finished_at: datetime | None = Field(description="When it ended.", examples=["2026-11-16T09:31:10Z"])

    estimated_gpu_s: float = Field(description="GPU-seconds expected on the reference card.", examples=[52.1])
    gpu_s: float = Field(description="GPU-seconds that led to the files: what counts for cost.", examples=[49.8])
    wasted_gpu_s: float = Field(
        description="GPU-seconds lost with replicas that died; nobody pays them.", examples=[0.0]
    )
    degraded: str | None = Field(description="What was made otherwise than asked for, and why.", examples=[None])
    artifacts: list[ArtifactView] = Field(description="The files, once it has succeeded.")
    receipt: dict[str, Any] | None = Field(
        description="What ran: model, revision, device, kernels, seed, steps, GPU-seconds.",
        examples=[{"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "trained": True, "seed": 42, "gpu_s": 49.8}],
    )
    notice: str | None = Field(
        description="Something that every reader must know, such as that the model is untrained.",
        examples=[UNTRAINED_NOTICE],
    )
    error: ErrorInfo | None = Field(description="Why it failed.", examples=[None])
    failures: list[Failure] = Field(
        description="What went wrong on the way, oldest first, whether or not the job got over it.", examples=[[]]
    )
    webhook: Webhook | None = Field(description="Whom it tells of its end, and whether that is done.")
    links: JobLinks = Field(description="Where to go from here.")

    @classmethod
    def of(cls, job: Job) -> Self:
        """The view of a record."""
        path = f"/v1/jobs/{job.id}"
        return cls(
            **job.spec.model_dump(),
            **job.model_dump(
                include={
                    "id",
                    "status",
                    "stage",
                    "progress",
                    "cancel_requested",
                    "estimated_gpu_s",
                    "gpu_s",
                    "wasted_gpu_s",
                    "degraded",
                }
            ),
            fps=job.spec.fps,
            seconds=job.spec.video_length / job.spec.fps,
            created_at=_utc(job.created_at),
            deadline=_utc(job.deadline),
            started_at=None if job.started_at is None else _utc(job.started_at),
            finished_at=None if job.finished_at is None else _utc(job.finished_at),
            artifacts=[
                ArtifactView(**artifact.model_dump(), url=f"{path}/artifacts/{artifact.name}")
                for artifact in job.artifacts
            ],
            receipt=job.receipt,
            notice=(job.receipt or {}).get("notice"),
            error=job.error,
            failures=job.failures,
            webhook=job.webhook,
            links=JobLinks(job=path, events=f"{path}/events", cancel=f"{path}/cancel"),
        )


def _utc(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


class JobPage(BaseModel):
    """Jobs, newest first."""

    data: list[JobView] = Field(description="The jobs of this page.")
    next_cursor: str | None = Field(
        description="Give it as `cursor` to read on; null on the last page.", examples=["0199f2f0a1b2c3d4e5f60718293a"]
    )


class PresetView(BaseModel):
    """What a job type stands for."""

    type: JobType = Field(description="Name of the preset.", examples=["video_fast"])
    resolution: str = Field(description="Width*height in pixels.", examples=["640*480"])
    video_length: int = Field(description="Frames.", examples=[41])
    fps: int = Field(description="Frames a second.", examples=[FPS])
    sample_steps: int = Field(description="Denoising steps.", examples=[25])
    guidance_scale: float = Field(description="How strictly the prompt is followed.", examples=[6.0])
    sample_shift: float = Field(description="The noise scheduler's flow_shift.", examples=[2.0])
    promised_s: tuple[int, int] = Field(
        description="Seconds from submission to file on one idle RTX 4090: usual, and at most (the deadline).",
        examples=[(120, 240)],
    )
    content_type: str = Field(description="Media type of the main artifact.", examples=["video/mp4"])

    @classmethod
    def of(cls, type: JobType, preset: Preset) -> Self:
        """The view of a preset."""
        return cls(
            type=type,
            resolution=preset.resolution,
            video_length=preset.video_length,
            fps=FPS,
            sample_steps=preset.sample_steps,
            guidance_scale=preset.guidance_scale,
            sample_shift=preset.sample_shift,
            promised_s=preset.promised_s,
            content_type="image/png" if preset.is_image else "video/mp4",
        )


class PresetList(BaseModel):
    """Every job type."""

    data: list[PresetView] = Field(description="The presets, from the quickest to the longest.")

    @classmethod
    def all(cls) -> Self:
        """Every preset."""
        return cls(data=[PresetView.of(type, preset) for type, preset in PRESETS.items()])


class Health(BaseModel):
    """The process is alive."""

    status: str = Field(description="Always ok.", examples=["ok"])
    version: str = Field(description="Version of wan-serve.", examples=["0.1.0"])


class Readiness(BaseModel):
    """The service can take jobs."""

    status: str = Field(description="Always ready; a service that is not answers 503.", examples=["ready"])
    generator_replicas: int = Field(
        description="Generator replicas that report. With scale to zero, none is no fault.", examples=[1]
    )
    queued_jobs: int = Field(description="Jobs that wait.", examples=[3])


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorInfo = Field(description="What was wrong, and what to do.")

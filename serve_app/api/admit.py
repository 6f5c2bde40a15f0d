"""The one guard of every way in: from a request to a job that may be queued, or an error that says why not.

Knows no HTTP. Limits and presets: DESIGN.md section 2.
"""

import secrets

from serve_app.api.limits import (
    either,
    formats_of,
    job_type_of,
    profile_of,
    prompt_of,
    resolution_of,
    sample_shift_of,
    text_of,
    upscale_of,
    video_length_of,
    within,
)
from serve_app.api.schemas import JobRequest
from serve_app.api.shots import clips_of_shots, cut_into_clips
from serve_app.errors import InvalidValue
from serve_app.jobs.job import Job, JobSpec, Webhook, new_job_id
from serve_app.jobs.plan import generated_frames
from serve_app.jobs.presets import (
    MAX_GUIDANCE_SCALE,
    MAX_MOTION_BUCKET_ID,
    MAX_SEED,
    MAX_STEPS,
    PRESETS,
    size_of,
)
from serve_app.safety.policy import check_prompt
from serve_app.scheduling.cost import ARCHITECTURES, CARDS, clip_gpu_s, deadline, upscale_s
from serve_app.settings import ModelSettings, Settings
from serve_app.webhooks.address import check_url

PROMISED_FOR = ModelSettings(architecture="1.3B", reference_card="RTX 4090")
"""What the presets' times are promised for (DESIGN.md section 2)."""


def admit(request: JobRequest, owner: str, settings: Settings, now: float) -> Job:
    """The job that `request` asks for, with every value resolved, its estimate and its deadline. `now`: Unix seconds.

    Draws the seed where the request names none. Raises `UnknownJobType`, `InvalidValue`, `ContentRefused`.
    """
    spec = _resolve(request, settings)
    # All shots as one text: what one of them names and another does to it belong together.
    prompts, negatives = ({getattr(clip, name): None for clip in spec.clips} for name in ("prompt", "negative_prompt"))
    check_prompt("\n".join(prompts), "\n".join(negatives))
    preset, model = PRESETS[spec.type], settings.models[spec.model]
    gpu_s = sum(_gpu_s(model, spec.resolution, generated_frames(clip.frames), clip.sample_steps) for clip in spec.clips)
    preset_gpu_s, promised_gpu_s = (
        _gpu_s(one, preset.resolution, preset.video_length, preset.sample_steps) for one in (model, PROMISED_FOR)
    )
    # What a larger model or a slower card needs longer for is promised for later.
    promised_s = preset.promised_s[1] * max(1.0, preset_gpu_s / promised_gpu_s)
    return Job(
        id=new_job_id(),
        owner=owner,
        spec=spec,
        created_at=now,
        deadline=deadline(now, promised_s, gpu_s, preset_gpu_s) + _upscale_s(spec, settings),
        estimated_gpu_s=gpu_s,
        webhook=None if request.webhook_url is None else _webhook(request.webhook_url, owner, settings),
    )


def _webhook(url: str, owner: str, settings: Settings) -> Webhook:
    if owner not in settings.webhook_secrets:
        raise InvalidValue(
            f"webhook_url is given, but webhooks are not enabled for {owner}",
            param="webhook_url",
            hint=f"Leave it out, or have the operator put a secret for {owner} into the setting webhook_secrets.",
        )
    return Webhook(url=check_url(url, allow_private=settings.webhook_allow_private))


def _gpu_s(model: ModelSettings, resolution: str, frames: int, steps: int) -> float:
    width, height = size_of(resolution)
    card, architecture = CARDS[model.reference_card], ARCHITECTURES[model.architecture]
    return clip_gpu_s(card, architecture, width=width, height=height, frames=frames, steps=steps)


def _upscale_s(spec: JobSpec, settings: Settings) -> float:
    """Seconds that the job's upscaling is expected to take. Raises InvalidValue where no job may take so long."""
    if spec.upscale is None:
        return 0.0
    size = {"width": spec.width, "height": spec.height, "frames": spec.video_length}
    seconds = upscale_s(**size, s_per_megapixel=settings.upscale_s_per_megapixel)
    if seconds > settings.time_limit_s:
        raise InvalidValue(
            f"upscaling {spec.video_length} frames of {spec.width}x{spec.height} would take about {seconds:.0f} s here; a job may "
            f"take {settings.time_limit_s:.0f} s",
            param="upscale",
            hint="Make it shorter, or leave upscale out.",
        )
    return seconds


def _resolve(request: JobRequest, settings: Settings) -> JobSpec:
    """Every value: the request's where it names one, else the preset's; then each within its limits."""
    job_type = job_type_of(request.type)
    preset = PRESETS[job_type]
    longest = settings.max_prompt_chars
    motion = request.motion_bucket_id
    spec = JobSpec(
        type=job_type,
        prompt="" if request.shots is not None else prompt_of("prompt", request.prompt, longest),
        negative_prompt=settings.default_negative_prompt
        if request.negative_prompt is None
        else text_of("negative_prompt", request.negative_prompt, longest),
        resolution=resolution_of(either(request.resolution, preset.resolution)),
        video_length=video_length_of(either(request.video_length, preset.video_length), job_type),
        sample_steps=within("sample_steps", either(request.sample_steps, preset.sample_steps), 1, MAX_STEPS),
        guidance_scale=within(
            "guidance_scale", either(request.guidance_scale, preset.guidance_scale), 0.0, MAX_GUIDANCE_SCALE
        ),
        sample_shift=sample_shift_of(either(request.sample_shift, preset.sample_shift)),
        seed=within("seed", either(request.seed, secrets.randbelow(MAX_SEED + 1)), 0, MAX_SEED),
        model=settings.model_of(job_type),
        profile=profile_of(either(request.profile, settings.profile_of(job_type))),
        motion_bucket_id=None if motion is None else within("motion_bucket_id", motion, 0, MAX_MOTION_BUCKET_ID),
        formats=formats_of(either(request.formats, ["mp4"]), job_type),
        upscale=None if request.upscale is None else upscale_of(request.upscale, settings.upscale_model),
    )
    if request.shots is None and request.seconds is None:
        return spec
    if spec.is_image:
        what = "shots" if request.shots is not None else "seconds"
        raise InvalidValue(f"{what} is given, but {job_type} makes a picture", param=what, hint="Choose a video type.")
    if request.shots is None:
        return cut_into_clips(request, spec, settings)
    return clips_of_shots(request, request.shots, spec, settings)

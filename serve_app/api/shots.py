"""A video of several clips: from `seconds` or `shots` of a request to shots, transitions and the exact length. Knows no HTTP."""

from typing import Any

from serve_app.api.limits import either, prompt_of, sample_shift_of, text_of, within
from serve_app.api.schemas import JobRequest, ShotRequest, TransitionRequest
from serve_app.errors import InvalidValue
from serve_app.jobs.job import JobSpec, Shot
from serve_app.jobs.plan import cut_evenly, frames_of
from serve_app.jobs.presets import (
    FPS,
    MAX_CLIP_S,
    MAX_GUIDANCE_SCALE,
    MAX_SEED,
    MAX_STEPS,
)
from serve_app.jobs.transitions import (
    CUT,
    DEFAULT_TRANSITION_S,
    KINDS,
    MAX_TRANSITION_S,
    Transition,
    stitched_frames,
)
from serve_app.settings import Settings


def cut_into_clips(request: JobRequest, spec: JobSpec, settings: Settings) -> JobSpec:
    """One prompt over `seconds`: one clip, or as many equal ones as it takes."""
    _alone("seconds", video_length=request.video_length)
    assert request.seconds is not None
    total = _frames("seconds", request.seconds, settings.max_video_s)
    joint = _transition("transition", request.transition)
    frames = cut_evenly(total, joint.frames)
    if len(frames) == 1:
        return spec.model_copy(update={"video_length": total})
    shots = [_shot(spec, i, frames=length) for i, length in enumerate(frames)]
    return _joined(spec, shots, [joint] * (len(shots) - 1), settings)


def clips_of_shots(request: JobRequest, asked: list[ShotRequest], spec: JobSpec, settings: Settings) -> JobSpec:
    """A clip for each shot, joined."""
    _alone("shots", prompt=request.prompt, seconds=request.seconds, video_length=request.video_length)
    if not 1 <= len(asked) <= settings.max_shots:
        raise InvalidValue(
            f"shots has {len(asked)} entries; it must have 1 to {settings.max_shots}",
            param="shots",
            hint="Make it several jobs, or fewer shots.",
        )
    shots, joints = [], []
    for i, shot in enumerate(asked):
        name, longest = f"shots[{i}]", settings.max_prompt_chars
        preset_s = spec.video_length / spec.fps
        named = {
            "prompt": prompt_of(f"{name}.prompt", shot.prompt, longest),
            "frames": _frames(f"{name}.seconds", either(shot.seconds, preset_s), MAX_CLIP_S),
        }
        if shot.negative_prompt is not None:
            named["negative_prompt"] = text_of(f"{name}.negative_prompt", shot.negative_prompt, longest)
        if shot.sample_steps is not None:
            named["sample_steps"] = within(f"{name}.sample_steps", shot.sample_steps, 1, MAX_STEPS)
        if shot.guidance_scale is not None:
            named["guidance_scale"] = within(f"{name}.guidance_scale", shot.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
        if shot.sample_shift is not None:
            named["sample_shift"] = sample_shift_of(shot.sample_shift, f"{name}.sample_shift")
        if shot.seed is not None:
            named["seed"] = within(f"{name}.seed", shot.seed, 0, MAX_SEED)
        shots.append(_shot(spec, i, **named))
        if i + 1 < len(asked):
            joints.append(_transition(f"{name}.transition", shot.transition or request.transition))
        elif shot.transition is not None:
            raise InvalidValue(
                f"{name}.transition leads nowhere: it is the last shot",
                param=f"{name}.transition",
                hint="Leave it out.",
            )
    return _joined(spec, shots, joints, settings)


def _shot(spec: JobSpec, index: int, **named: Any) -> Shot:
    """Shot `index`: as the job has it, but for what is named. Clips of one seed and prompt would be the same clip."""
    clip, seed = spec.clips[0], (spec.seed + index) % (MAX_SEED + 1)
    return clip.model_copy(update={"seed": seed, **named})


def _joined(spec: JobSpec, shots: list[Shot], joints: list[Transition], settings: Settings) -> JobSpec:
    total = stitched_frames([shot.frames for shot in shots], joints)
    if total > frames_of(settings.max_video_s):
        raise InvalidValue(
            f"the shots make {total / FPS:g} s; a video has {settings.max_video_s:g} s at most",
            param="shots",
            hint="Make it several jobs, or shorter.",
        )
    prompt = "\n".join(dict.fromkeys(shot.prompt for shot in shots))
    update = {"prompt": prompt, "shots": tuple(shots), "transitions": tuple(joints), "video_length": total}
    return spec.model_copy(update=update)


def _alone(param: str, **others: object) -> None:
    for name, value in others.items():
        if value is not None:
            raise InvalidValue(f"{param} and {name} are both given", param=name, hint=f"Leave {name} out.")


def _frames(param: str, seconds: float, most_s: float) -> int:
    if not 0 < seconds <= most_s or frames_of(seconds) < 1:
        raise InvalidValue(
            f"{param} is {seconds:g}; it must be at least a frame (1/{FPS}) and at most {most_s:g}",
            param=param,
            hint="A shot has 5 s at most; `seconds` of the job, or more shots, make longer videos."
            if most_s == MAX_CLIP_S
            else "Make it several jobs.",
        )
    return frames_of(seconds)


def _transition(param: str, asked: TransitionRequest | None) -> Transition:
    asked = asked or TransitionRequest()
    if asked.kind not in KINDS:
        raise InvalidValue(
            f"{param}.kind is {asked.kind[:60]!a}; it must be one of {', '.join(KINDS)}",
            param=f"{param}.kind",
            hint="Leave it out for a crossfade.",
        )
    if asked.kind == CUT.kind:
        _alone("a cut", **{f"{param}.seconds": asked.seconds})
        return CUT
    return Transition(
        kind=asked.kind,
        frames=_frames(f"{param}.seconds", either(asked.seconds, DEFAULT_TRANSITION_S), MAX_TRANSITION_S),
    )

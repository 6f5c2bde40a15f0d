"""The limits of each value that a request may name, with the error that says what was wrong. Knows no HTTP.

Each check takes the name of the parameter (`shots[2].seed`), for the error, and returns the value. DESIGN.md section 2.
"""

import re
import unicodedata
from typing import TypeVar

from serve_app.errors import InvalidValue, UnknownJobType
from serve_app.jobs.presets import (
    CONTACT_SHEET,
    MAX_FRAMES,
    MAX_SAMPLE_SHIFT,
    PLANNED_PROFILES,
    PRESETS,
    PROFILES,
    RESOLUTIONS,
    UPSCALES,
    VIDEO_FORMATS,
    JobType,
)

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
ALLOWED_CONTROLS = frozenset("\n\r\t")


def text_of(param: str, text: str, longest: int) -> str:
    """`text` if it is short enough and has no control characters. Raises `InvalidValue`."""
    if len(text) > longest:
        raise InvalidValue(
            f"{param} has {len(text)} characters; it must have {longest} at most",
            param=param,
            hint="Shorten it: the model reads 512 tokens.",
        )
    for place, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in ALLOWED_CONTROLS:
            raise InvalidValue(
                f"{param} has the control character U+{ord(character):04X} at position {place}",
                param=param,
                hint="Remove it; tabs and line breaks are fine.",
            )
    return text


def _not_blank(param: str, prompt: str) -> str:
    visible = (c for c in prompt if not c.isspace() and unicodedata.category(c) not in ("Cf", "Mn"))
    if next(visible, None) is None:
        raise InvalidValue(
            f"{param} is {prompt[:20]!a}, which is blank", param=param, hint="Say what to show, in words."
        )
    return prompt


def within(param: str, value: Number, lowest: Number, highest: Number) -> Number:
    """`value` if it lies within its limits, inclusive. Raises `InvalidValue`."""
    if not lowest <= value <= highest:  # written so that NaN fails too
        raise InvalidValue(
            f"{param} is {value}; it must be {lowest:g} to {highest}",
            param=param,
            hint="Leave it out to have one drawn." if param.endswith("seed") else "Leave it out to use the preset's.",
        )
    return value


def sample_shift_of(value: float, param: str = "sample_shift") -> float:
    """`value` if it is a `flow_shift`. Raises `InvalidValue`."""
    if not 0 < value <= MAX_SAMPLE_SHIFT:
        raise InvalidValue(
            f"{param} is {value}; it must be above 0 and at most {MAX_SAMPLE_SHIFT:g}",
            param=param,
            hint="Leave it out to use the preset's.",
        )
    return value


def resolution_of(text: str) -> str:
    """The resolution as `640*480`. Raises `InvalidValue`."""
    sizes = re.fullmatch(r"([0-9]{1,5})[*xX]([0-9]{1,5})", text)
    normal = f"{sizes[1]}*{sizes[2]}" if sizes else text
    if normal not in RESOLUTIONS:
        raise InvalidValue(
            f"resolution is {text[:60]!a}; it must be one of {', '.join(RESOLUTIONS)}",
            param="resolution",
            hint="Width comes first; 640x480 is understood as 640*480.",
        )
    return normal


def video_length_of(frames: int, job_type: JobType) -> int:
    """`frames` if the job type and the model can make so many. Raises `InvalidValue`."""
    if PRESETS[job_type].is_image and frames != 1:
        raise InvalidValue(
            f"video_length is {frames}; {job_type} makes exactly 1 frame",
            param="video_length",
            hint="Leave it out, or choose video_fast or video_high.",
        )
    if not 1 <= frames <= MAX_FRAMES or frames % 4 != 1:
        raise InvalidValue(
            f"video_length is {frames}; it must be 1 to {MAX_FRAMES} and of the form 4k+1",
            param="video_length",
            hint=f"The nearest that can be made is {_nearest_length(frames)}.",
        )
    return frames


def _nearest_length(frames: int) -> int:
    return min(range(1, MAX_FRAMES + 1, 4), key=lambda length: abs(length - frames))


def profile_of(name: str) -> str:
    """`name` if it is a profile. Raises `InvalidValue`."""
    if name in PLANNED_PROFILES:
        raise InvalidValue(f"profile {name} is not yet available", param="profile", hint="Leave it out, or use exact.")
    if name not in PROFILES:
        raise InvalidValue(
            f"profile is {name[:60]!a}; it must be one of {', '.join(PROFILES)}",
            param="profile",
            hint="Leave it out, or use exact.",
        )
    return name


def job_type_of(name: str) -> JobType:
    """The job type of that name. Raises `UnknownJobType`."""
    try:
        return JobType(name)
    except ValueError:
        raise UnknownJobType(
            f"type is {name[:60]!a}; it must be one of {', '.join(JobType)}",
            param="type",
            hint="GET /v1/presets shows what each of them stands for.",
        ) from None


def prompt_of(param: str, text: str | None, longest: int) -> str:
    """`text` if it is a prompt: there, not blank, and as `text_of`. Raises `InvalidValue`."""
    if text is None:
        raise InvalidValue(
            f"{param} is missing", param=param, hint=f"{param} is required, or `shots` with a prompt each."
        )
    return _not_blank(param, text_of(param, text, longest))


def either(value: Value | None, default: Value) -> Value:
    """`value`, or `default` where there is none."""
    return default if value is None else value


def formats_of(names: list[str], job_type: JobType) -> tuple[str, ...]:
    """`names` if a video of that type can be delivered so. Raises `InvalidValue`."""
    known = (*VIDEO_FORMATS, CONTACT_SHEET)
    for name in names:
        if name not in known:
            raise InvalidValue(
                f"formats has {name[:60]!a}; each must be one of {', '.join(known)}",
                param="formats",
                hint="Leave it out for mp4.",
            )
    if PRESETS[job_type].is_image:
        if names != ["mp4"]:
            raise InvalidValue(f"formats is given, but {job_type} makes a PNG", param="formats", hint="Leave it out.")
    elif len(set(names)) != len(names) or not set(names) & set(VIDEO_FORMATS):
        raise InvalidValue(
            f"formats is {', '.join(names) or 'empty'}; it must have a video format, and each only once",
            param="formats",
            hint="Leave it out for mp4.",
        )
    return tuple(names)


def upscale_of(factor: int, model: str | None) -> int:
    """`factor` if the service's upscaling `model` can do it. Raises `InvalidValue`."""
    if factor not in UPSCALES:
        raise InvalidValue(
            f"upscale is {factor}; it must be {' or '.join(map(str, UPSCALES))}",
            param="upscale",
            hint="Leave it out for files of the size that is generated.",
        )
    if model is None:
        raise InvalidValue(
            "upscale is given, but this service does not upscale",
            param="upscale",
            hint="Leave it out, or have the operator set upscale_model.",
        )
    return factor

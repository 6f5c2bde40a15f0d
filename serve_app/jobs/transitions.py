"""How one clip goes over into the next, and how long the whole becomes. Pure: plans and requests use it too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from serve_app.errors import InvalidValue

XFADE_KINDS = (
    "fade", "fadeblack", "fadewhite", "fadegrays", "fadefast", "fadeslow", "dissolve", "pixelize", "distance", "hblur",
    "wipeleft", "wiperight", "wipeup", "wipedown", "wipetl", "wipetr", "wipebl", "wipebr",
    "slideleft", "slideright", "slideup", "slidedown", "smoothleft", "smoothright", "smoothup", "smoothdown",
    "coverleft", "coverright", "coverup", "coverdown", "revealleft", "revealright", "revealup", "revealdown",
    "circlecrop", "rectcrop", "circleopen", "circleclose", "vertopen", "vertclose", "horzopen", "horzclose",
    "diagtl", "diagtr", "diagbl", "diagbr", "radial", "hlslice", "hrslice", "vuslice", "vdslice",
    "hlwind", "hrwind", "vuwind", "vdwind", "squeezeh", "squeezev", "zoomin",
)  # fmt: skip
"""The transitions of FFmpeg's `xfade` filter, under its names (https://ffmpeg.org/ffmpeg-filters.html#xfade)."""

KINDS = ("crossfade", "cut", *XFADE_KINDS)
"""All kinds of transition; the first is the default."""
DEFAULT_TRANSITION_S = 0.5
MAX_TRANSITION_S = 2.0


@dataclass(frozen=True)
class Transition:
    """One joint of two clips. Raises InvalidValue for what cannot be.

    The last `frames` frames of the one clip and the first of the next become `frames` frames in which both are seen.
    """

    kind: Annotated[str, Field(description="crossfade, cut, or a name of FFmpeg's xfade.", examples=["crossfade"])] = (
        "crossfade"
    )
    frames: Annotated[int, Field(description="Frames that the two clips share; 0 for a cut.", examples=[8])] = 8
    """8 are half a second at Wan's 16 frames a second."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidValue(
                f"transition is {self.kind!r}, which is not known",
                param="transition",
                hint=f"One of {', '.join(KINDS)}.",
            )
        if (self.kind == "cut") != (self.frames == 0) or self.frames < 0:
            raise InvalidValue(
                f"a {self.kind} of {self.frames} frames cannot be made",
                param="transition",
                hint="A cut has 0 frames, every other transition 1 or more.",
            )


CUT = Transition("cut", 0)


def stitched_frames(clip_frames: Sequence[int], joints: Sequence[Transition]) -> int:
    """How many frames clips of these lengths have together, once `joints[i]` joins clip i with clip i + 1.

    Raises InvalidValue where the joints are not one fewer than the clips, or a clip is shorter than its two overlaps.
    """
    if len(joints) != len(clip_frames) - 1:
        raise InvalidValue(
            f"{len(clip_frames)} clips have {len(clip_frames) - 1} joints, not {len(joints)}", param="transition"
        )
    for index, frames in enumerate(clip_frames):
        check_overlaps(index, frames, *joints[max(index - 1, 0) : index + 1])
    return sum(clip_frames) - sum(joint.frames for joint in joints)


def check_overlaps(index: int, frames: int, *joints: Transition) -> None:
    """Raise InvalidValue unless clip number `index` of `frames` frames is long enough for the `joints` at its ends.

    No frame may be in two transitions: the picture would show three clips at once.
    """
    if frames < (needed := sum(joint.frames for joint in joints)):
        raise InvalidValue(
            f"clip {index} has {frames} frames; the transitions at its ends take {needed}",
            param="transition",
            hint="Make the transitions shorter or the clip longer.",
        )

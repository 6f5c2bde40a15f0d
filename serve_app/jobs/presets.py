"""The four job types as named presets, and the limits of the 1.3B model. Source: DESIGN.md section 2."""

from dataclasses import dataclass
from enum import StrEnum

FPS = 16
MAX_FRAMES = 81
"""5 s at 16 fps, the longest clip that Wan 2.1 T2V 1.3B was trained for (81 = 4·20 + 1)."""
MAX_CLIP_S = MAX_FRAMES / FPS
MAX_STEPS = 100
MAX_GUIDANCE_SCALE = 20.0
MAX_SAMPLE_SHIFT = 20.0
MAX_SEED = 2**63 - 1
MAX_MOTION_BUCKET_ID = 255
"""The range that Stable Video Diffusion's clients send; Wan has no such input, so it is only recorded."""
RESOLUTIONS = ("640*480", "832*480", "480*640")
STABLE_RESOLUTION = "640*480"
UNSTABLE_RESOLUTION = "832*480"
"""The size where the 1.3B model sometimes fails; such a clip is made again at the stable one."""
CONTACT_SHEET = "contact_sheet"
VIDEO_FORMATS = ("mp4", "h265", "av1", "webm", "gif", "webp")
"""What a video can be delivered as (serve_app/media/formats.py); gif and webp are small previews."""
UPSCALES = (2, 4)
"""How many times as wide and as high a job's files can be as what is generated."""
DEFAULT_MODEL_NAME = "wan-1.3b"
"""What the model is called where the settings name none."""
PROFILES = ("exact",)
PLANNED_PROFILES = ("balanced", "turbo")


class JobType(StrEnum):
    """A named preset."""

    IMAGE_FAST = "image_fast"
    IMAGE_HIGH = "image_high"
    VIDEO_FAST = "video_fast"
    VIDEO_HIGH = "video_high"


@dataclass(frozen=True)
class Preset:
    """What a job type stands for. Promised times are seconds from submission on one idle RTX 4090."""

    resolution: str
    video_length: int
    sample_steps: int
    guidance_scale: float
    sample_shift: float
    promised_s: tuple[int, int]

    @property
    def is_image(self) -> bool:
        """Whether the artifact is a PNG (one frame) rather than an MP4."""
        return self.video_length == 1


PRESETS: dict[JobType, Preset] = {
    JobType.IMAGE_FAST: Preset("640*480", 1, 25, 6.0, 2.0, (15, 30)),
    JobType.IMAGE_HIGH: Preset("832*480", 1, 40, 7.0, 2.0, (45, 90)),
    JobType.VIDEO_FAST: Preset("640*480", 41, 25, 6.0, 2.0, (120, 240)),
    JobType.VIDEO_HIGH: Preset("640*480", 81, 40, 7.0, 2.0, (240, 480)),
}


def size_of(resolution: str) -> tuple[int, int]:
    """(width, height) in pixels of a resolution such as `640*480`."""
    width, height = resolution.split("*")
    return int(width), int(height)

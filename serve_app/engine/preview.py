"""Running previews: the first frame of what a clip would be if it ended now, as a small JPEG."""

import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from serve_app.engine.alive import AliveClips
from serve_app.engine.clip import Preview
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.failures import DeviceFault
from serve_app.engine.in_flight import InFlight, Unit
from serve_app.engine.memory import DeviceMemory
from serve_app.engine.model_runner import ModelRunner

_log = logging.getLogger(__name__)

_LONGER_SIDE = 320
"""Pixels: enough to see what it becomes, about 10 kB."""
_QUALITY = 75


class Previews:
    """Sends a picture every `every_steps` steps of a clip that somebody listens to.

    `post` hands a function to the engine's thread: JPEGs are packed in another.
    """

    def __init__(
        self,
        every_steps: int,
        *,
        clips: AliveClips,
        in_flight: InFlight,
        runner: ModelRunner,
        memory: DeviceMemory,
        fault: DeviceFault,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._every_steps = every_steps
        self._clips = clips
        self._in_flight = in_flight
        self._runner = runner
        self._memory = memory
        self._fault = fault
        self._post = post
        self._packing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="preview")

    def after_step(self, clip: ClipState) -> None:
        """Launch a picture of the clip as it is, if one is due; one that fails harms nothing but itself."""
        due = clip.listened and clip.phase is Phase.DENOISE and clip.launched_steps % self._every_steps == 0
        if not due or not self._memory.has_room_for_preview(clip.request):
            return
        try:
            with torch.inference_mode(), DeviceSpan(self._runner.device) as span:
                picture = launch_preview(clip, self._runner)
            self._in_flight.add(Unit(clip, None, span, preview=(clip.launched_steps, picture)))
            return
        except Exception as error:
            self._fault.note(error)
            _log.warning("clip %s: no previews any more: %s: %s", clip.request.clip_id, type(error).__name__, error)
        clip.listened = False
        self._memory.free_cache()

    def send(self, clip: ClipState, step: int, picture: torch.Tensor) -> None:
        """Pack a picture that the device has finished (uint8 RGB [height, width, 3] on the host), and tell the clip's owner."""
        self._packing.submit(self._pack, clip, step, picture)

    def close(self) -> None:
        """Finish what is being packed."""
        self._packing.shutdown()

    def _pack(self, clip: ClipState, step: int, picture: torch.Tensor) -> None:
        jpeg = to_jpeg(picture.numpy())

        def show() -> None:
            if clip in self._clips and clip.ending is None:
                self._clips.tell(clip, Preview(clip.request.clip_id, step, jpeg))

        self._post(show)


def launch_preview(clip: ClipState, runner: ModelRunner) -> torch.Tensor:
    """Decode the first latent frame of the clean latents that the last step predicted.

    Returns uint8 RGB [height, width, 3] on the host, valid once the device has done the launched work. The clip itself is left
    as it is: the decode is that of a one-frame clip of its own, with its own VAE cache.
    """
    assert clip.solver is not None
    single = ClipState(replace(clip.request, frames=1), _nobody, arrived_at=0.0, last_ran_at=0.0, phase=Phase.DECODE)
    single.latents = clip.solver.last_x0[:, :, :1]
    runner.decode_latent_frame(single)
    assert single.decode is not None
    return single.decode.frames[0]


def to_jpeg(frame: np.ndarray) -> bytes:
    """`frame` (uint8 RGB [height, width, 3]) as a JPEG, its longer side at most 320 pixels."""
    picture = Image.fromarray(frame)
    picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _nobody(_event: object) -> None:
    """The one-frame clip has no listener."""

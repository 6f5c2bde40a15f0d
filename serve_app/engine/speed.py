"""What a clip still costs on this device: a first guess from the cost table, then what steps and decodes really took."""

from dataclasses import dataclass, field

import torch

from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState
from serve_app.scheduling.cost import CARDS, Architecture, Card

_WEIGHT = 0.2
"""Weight of the newest measurement in a running mean: about the last ten count."""

_Shape = tuple[int, int, int, bool]


class Speed:
    """Seconds of a step and of a decode, by clip shape (width, height, frames, guided)."""

    def __init__(self, card: Card, architecture: Architecture) -> None:
        self._card = card
        self._architecture = architecture
        self._steps = _Measured()
        self._decodes = _Measured()

    def step_s(self, request: ClipRequest) -> float:
        """Seconds of one denoising step."""
        return self._steps.seconds(_shape(request), self._guess_step_s(request))

    def decode_s(self, request: ClipRequest) -> float:
        """Seconds to decode one latent frame."""
        return self._decodes.seconds(_shape(request), self._guess_decode_s(request))

    def measured_s(self, request: ClipRequest, *, decode: bool) -> float:
        """Seconds of a step, or of decoding a latent frame, as measured; 0 while no such clip has had one."""
        return (self._decodes if decode else self._steps).mean_s.get(_shape(request), 0.0)

    def remaining_s(self, clip: ClipState) -> float:
        """Seconds that the clip still needs of the device, decode included."""
        steps = clip.request.steps - clip.finished_steps
        latent_frames = self._latent_frames(clip.request) - clip.decoded_latent_frames
        return steps * self.step_s(clip.request) + latent_frames * self.decode_s(clip.request)

    def saw_step(self, request: ClipRequest, seconds: float) -> None:
        """Learn from a finished step."""
        self._steps.learn(_shape(request), seconds, self._guess_step_s(request))

    def saw_decode(self, request: ClipRequest, seconds: float) -> None:
        """Learn from a decoded latent frame."""
        self._decodes.learn(_shape(request), seconds, self._guess_decode_s(request))

    def _guess_step_s(self, request: ClipRequest) -> float:
        branches = 2 if request.guidance_scale > 1.0 else 1
        flops = branches * self._architecture.forward_flops(request.width, request.height, request.frames)
        return flops / (self._card.tflops * 1e12)

    def _guess_decode_s(self, request: ClipRequest) -> float:
        pixels = request.width * request.height * request.frames
        return self._card.decode_s_per_megapixel * pixels / 1e6 / self._latent_frames(request)

    def _latent_frames(self, request: ClipRequest) -> int:
        return (request.frames - 1) // self._architecture.temporal_compression + 1


@dataclass
class _Measured:
    """Running means by shape; a shape that was never seen gets its guess, corrected as far as other guesses were wrong."""

    mean_s: dict[_Shape, float] = field(default_factory=dict)
    correction: float | None = None
    """Running mean of measured over guessed seconds, over all shapes."""

    def seconds(self, shape: _Shape, guess_s: float) -> float:
        return self.mean_s.get(shape, guess_s * (1.0 if self.correction is None else self.correction))

    def learn(self, shape: _Shape, measured_s: float, guess_s: float) -> None:
        self.mean_s[shape] = _toward(self.mean_s.get(shape), measured_s)
        self.correction = _toward(self.correction, measured_s / guess_s)


def card_of(device: torch.device) -> Card:
    """The table's card for this device; an unknown GPU counts as an RTX 4090 until it is measured."""
    if device.type == "cpu":
        return CARDS["CPU"]
    name = torch.cuda.get_device_name(device)
    return next((card for key, card in CARDS.items() if key in name), CARDS["RTX 4090"])


def _shape(request: ClipRequest) -> _Shape:
    return request.width, request.height, request.frames, request.guidance_scale > 1.0


def _toward(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _WEIGHT * (newest - mean)

"""Which clips may be on the device together, by memory.

The device runs one unit of work at a time. So what must fit is all that the clips on it hold between their units, plus the
largest amount that any one of them needs on top while it runs. A clip is asked about where that changes: when it enters the
device, and when it starts to decode (the VAE's cache of a video is larger than its whole denoising state).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.model_runner import ModelRunner
from serve_app.errors import GpuOutOfMemory
from serve_app.scheduling.cost import TEXT_TOKENS

_MARGIN_BYTES = 256 * 2**20
"""Of a GPU's free memory, left for fragmentation and for what libraries allocate beside torch."""
_TRIED_WITHIN = 2.0
"""What is over the limit by no more than this factor is tried alone, unless it was seen to run out of memory: a guess may be
wrong, and so may a measurement of a first run."""
_CACHED_FRAMES = 24
"""VAE decode, held between latent frames: full-size planes of `base_dim` channels, 2 for each causal convolution, the smaller
ones of lower levels counted by their size. Counted for Wan 2.1's decoder (2.7 GB for 640x480 in float32)."""
_BUSY_FRAMES = 24
"""VAE decode, on top while it runs: about 6 activations of 4 such planes each."""

_Shape = tuple[int, int, int, bool]


@dataclass(frozen=True)
class Need:
    """Bytes of device memory of one clip in one phase."""

    held: int
    """Between units."""
    peak: int
    """During a unit, what is held included."""
    ran_out: bool = False
    """`peak` is known to be no less: with one byte fewer the clip ran out of memory."""

    @property
    def on_top(self) -> int:
        """During a unit, beyond what is held."""
        return self.peak - self.held


class DeviceMemory:
    """Measured needs by clip shape and phase, and the decision who may enter.

    `limit_bytes` is what clips may use in all; None: what the GPU has free, and no limit on a CPU.
    """

    def __init__(self, runner: ModelRunner, limit_bytes: int | None = None) -> None:
        self._runner = runner
        self._device = runner.device
        self._limit_bytes = limit_bytes
        self._needs: dict[tuple[_Shape, Phase], Need] = {}

    def admit(self, clip: ClipState, others: Iterable[ClipState]) -> bool:
        """Whether `clip` may start what it needs next beside the `others` on the device. False: ask again when one is gone.

        Raises `GpuOutOfMemory`, with the sizes, if it would not fit alone.
        """
        others = list(others)
        capacity = self.capacity([clip, *others])
        if math.isinf(capacity):
            return True
        self._check_alone(clip, capacity)
        if not others:
            return True
        here = [self._now(other) for other in others]
        if clip.phase is Phase.DECODE:
            return _together([self.need(clip.request, Phase.DECODE), *here]) <= capacity
        entering = [self.need(clip.request, phase) for phase in (Phase.DENOISE, Phase.TEXT)]
        if _together([replace(entering[0], peak=max(need.peak for need in entering)), *here]) > capacity:
            return False
        # Each must be able to decode once no other does: so nobody who is let in waits for ever.
        everyone = [clip, *others]
        return all(
            _together([self.need(each.request, Phase.DECODE if each is last else Phase.DENOISE) for each in everyone])
            <= capacity
            for last in everyone
        )

    def has_room_for_preview(self, request: ClipRequest) -> bool:
        """Whether a single latent frame of this size can be decoded now, beside everything else."""
        return self.capacity(()) >= self.need(replace(request, frames=1), Phase.DECODE).peak

    def need(self, request: ClipRequest, phase: Phase) -> Need:
        """What a clip of this shape needs in `phase`: measured, or guessed from the architecture."""
        return self._needs.get((_shape(request), phase)) or self._guess(request, phase)

    @contextmanager
    def watch(self, clip: ClipState, phase: Phase) -> Iterator[None]:
        """Measure a unit that is launched inside the block. Torch counts memory as work is launched, so nothing waits."""
        held_before = held_bytes(clip)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            allocated = torch.cuda.memory_allocated(self._device)
        yield
        held = held_bytes(clip)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device) - allocated + held_before
        else:
            peak = max(held, held_before) + self._guess(clip.request, phase).on_top
        known = self._needs.get((_shape(clip.request), phase), Need(0, 0))
        # What a first run needs once, to compile or to time kernels, fades.
        peak = max(peak, known.peak - (known.peak - peak) // 4)
        self._needs[_shape(clip.request), phase] = Need(max(held, known.held), max(held, peak))

    def ran_out(self, clip: ClipState, phase: Phase, others: Iterable[ClipState]) -> None:
        """Learn from an out-of-memory error: the clip needs more than there was for it beside `others`."""
        there_was = self.capacity([clip, *others]) - sum(held_bytes(other) for other in others)
        if not math.isinf(there_was):
            held = self.need(clip.request, phase).held
            self._needs[_shape(clip.request), phase] = Need(held, max(held, int(there_was) + 1), ran_out=True)

    def capacity(self, clips: Iterable[ClipState]) -> float:
        """Bytes that there are for clips: what is free, and what `clips` hold now. inf where nothing limits."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        if self._device.type != "cuda":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + unused - _MARGIN_BYTES + sum(map(held_bytes, clips))

    def free_cache(self) -> None:
        """After a failure: give back what torch keeps for later."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _now(self, clip: ClipState) -> Need:
        """What a clip on the device needs in the phase it is in; at least what it holds."""
        need = self.need(clip.request, Phase.DENOISE if clip.decode is None else Phase.DECODE)
        more = max(0, held_bytes(clip) - need.held)
        return Need(need.held + more, need.peak + more)

    def _check_alone(self, clip: ClipState, capacity: float) -> None:
        request = clip.request
        for phase in (Phase.DECODE,) if clip.phase is Phase.DECODE else (Phase.TEXT, Phase.DENOISE, Phase.DECODE):
            need = self.need(request, phase)
            if need.peak > capacity * (1.0 if need.ran_out else _TRIED_WITHIN):
                raise GpuOutOfMemory(
                    f"clip {request.clip_id} ({request.width}x{request.height}, {request.frames} frames) needs "
                    f"{'at least' if need.ran_out else 'about'} {need.peak / 2**30:.3f} GiB in its {phase.value} phase, and the "
                    f"device has {capacity / 2**30:.3f} GiB for clips",
                    hint="Ask for a smaller size or fewer frames, or run on a card with more memory.",
                )

    def _guess(self, request: ClipRequest, phase: Phase) -> Need:
        """Fitted to what the 1.3B model was seen to need: 1.7 GiB on top of its weights for a step of 640x480x81 in bf16 with
        guidance branches one after the other, 3.9 GiB for its decode in bf16."""
        pipeline, architecture = self._runner.pipeline, self._runner.architecture
        transformer, vae = pipeline.transformer, pipeline.vae
        tokens = architecture.tokens(request.width, request.height, request.frames)
        latents = 4 * transformer.config.in_channels * tokens * math.prod(architecture.patch)
        branches = 2 if request.guidance_scale > 1.0 else 1
        embeds = branches * TEXT_TOKENS * transformer.config.text_dim * transformer.dtype.itemsize
        if phase is not Phase.DECODE:
            held = 4 * latents + embeds
            activations = (
                branches * tokens * (2 * architecture.ffn_dim + 12 * architecture.dim) * transformer.dtype.itemsize
            )
            return Need(held, held + activations)
        plane = (
            request.width
            * request.height
            // (vae.config.patch_size or 1) ** 2
            * vae.config.base_dim
            * vae.dtype.itemsize
        )
        # A picture's only latent frame makes one frame, not four, and fills half the cache.
        share = 1 if request.frames > 1 else 2
        held = 4 * latents + embeds + _CACHED_FRAMES // share * plane
        return Need(held, held + _BUSY_FRAMES // (4 if share == 2 else 1) * plane)


def held_bytes(clip: ClipState) -> int:
    """Bytes of the tensors that the clip holds on the device now."""
    tensors = [clip.latents, clip.prompt_embeds, clip.negative_prompt_embeds]
    if clip.solver is not None:
        tensors += clip.solver.state_tensors().values()
    if clip.decode is not None:
        tensors += [clip.decode.latents, *(entry for entry in clip.decode.cache if isinstance(entry, torch.Tensor))]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _together(needs: list[Need]) -> int:
    return sum(need.held for need in needs) + max(need.on_top for need in needs)


def enters(clip: ClipState) -> bool:
    """Whether the clip's next unit is one that memory must admit: its first, or the first of its decode."""
    return clip.phase is Phase.TEXT or (clip.phase is Phase.DECODE and clip.decode is None)


def _shape(request: ClipRequest) -> _Shape:
    return request.width, request.height, request.frames, request.guidance_scale > 1.0

"""Whose turn it is on the device: the policy's choice, of those that memory has room for, and who goes along with it."""

import time
from collections.abc import Sequence

from serve_app.engine.alive import AliveClips
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.memory import DeviceMemory, enters
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.speed import Speed
from serve_app.errors import GpuOutOfMemory
from serve_app.scheduling.steps import Runnable, StepPolicy


class Turns:
    """Asked at each step boundary; keeps nothing between two."""

    def __init__(
        self,
        policy: StepPolicy,
        clips: AliveClips,
        memory: DeviceMemory,
        runner: ModelRunner,
        speed: Speed,
    ) -> None:
        self.policy = policy
        self._clips = clips
        self._memory = memory
        self._runner = runner
        self._speed = speed

    def next(self) -> ClipState | None:
        """The clip to give the device to; None if nobody can use it now. One that can never have room fails meanwhile."""
        clip = self._first()
        return clip if clip is None or clip.phase is not Phase.DENOISE else self._joining(clip)

    def stepped_with(self, clip: ClipState) -> list[ClipState]:
        """`clip`, and those that share its next forward: of its shape, earliest deadline first."""
        others = [other for other in self._alike(clip) if other.phase is Phase.DENOISE]
        size = self._runner.clips_together(clip.request, waiting=1 + len(others))
        return [clip, *others[: size - 1]]

    def _first(self) -> ClipState | None:
        """The clip that the policy wants next, of those that memory has room for.

        While the policy's first choice waits for room, nobody comes to the device, so that no stream of small clips keeps it
        out; those that are there go on, and make room when they are done.
        """
        alive = self._clips.all()
        ready = [clip for clip in alive if clip.ready]
        if not ready:
            return None
        clip = self._pick(ready)
        while enters(clip):
            if self._admit(clip, [other for other in alive if other.latents is not None and other is not clip]):
                return clip
            if not clip.ready:
                return self._first()  # it is too big for this device, and has been told
            ready = [other for other in ready if other is not clip and other.phase is not Phase.TEXT]
            if not ready:
                # Whatever is under way may make room; if nothing is, trying is all that is left.
                return None if any(other.units_in_flight for other in alive) else clip
            clip = self._pick(ready)
        return clip

    def _joining(self, clip: ClipState) -> ClipState:
        """A clip that is still to begin, where `clip`'s next forward has a place for it and memory has room; else `clip`."""
        alike = self._alike(clip)
        here = [other for other in alike if other.phase is Phase.DENOISE]
        if self._runner.clips_together(clip.request, waiting=1 + len(alike)) <= 1 + len(here):
            return clip
        on_device = [other for other in self._clips.all() if other.latents is not None]
        return next((other for other in alike if other not in here and self._admit(other, on_device)), clip)

    def _alike(self, clip: ClipState) -> list[ClipState]:
        """Other clips that could share a forward with `clip`, now or after their text; earliest deadline first."""
        shape = self._runner.step_shape(clip.request)
        alike = [
            other
            for other in self._clips.all()
            if other is not clip
            and other.ready
            and other.phase in (Phase.TEXT, Phase.DENOISE)
            and self._runner.step_shape(other.request) == shape
        ]
        return sorted(alike, key=lambda other: other.request.deadline)

    def _admit(self, clip: ClipState, others: Sequence[ClipState]) -> bool:
        try:
            return self._memory.admit(clip, others)
        except GpuOutOfMemory as too_big:
            self._clips.fail(clip, too_big)
            return False

    def _pick(self, ready: Sequence[ClipState]) -> ClipState:
        chosen = self.policy.pick([self._as_runnable(clip) for clip in ready], time.time())
        return next(clip for clip in ready if clip.request.clip_id == chosen)

    def _as_runnable(self, clip: ClipState) -> Runnable:
        decoding = clip.phase is Phase.DECODE
        return Runnable(
            clip_id=clip.request.clip_id,
            deadline=clip.request.deadline,
            arrived_at=clip.arrived_at,
            last_ran_at=clip.last_ran_at,
            remaining_s=self._speed.remaining_s(clip),
            step_s=self._speed.decode_s(clip.request) if decoding else self._speed.step_s(clip.request),
            longest_step_s=self._speed.step_s(clip.request),
        )

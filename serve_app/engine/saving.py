"""Which clips are saved when, so that an engine that dies or drains loses little, whatever it has on the device."""

import math
import time
from collections.abc import Callable

import torch

from serve_app.engine.alive import AliveClips
from serve_app.engine.checkpointing import Checkpointing
from serve_app.engine.checkpoints import CheckpointHeader, CheckpointStore
from serve_app.engine.clip import CheckpointSaved, ClipRequest
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.in_flight import InFlight, Unit
from serve_app.engine.load import ModelSource
from serve_app.engine.snapshot import Snapshot, take_snapshot
from serve_app.engine.speed import Speed
from serve_app.errors import CheckpointUnavailable, ReplicaDraining

LOAD_LIMIT_S = 20.0
"""A store that has not answered by then is given up, and the clip starts at step 0."""


class Saving:
    """Saves clips so that all together never have much more than `every_s` of device time unsaved.

    Without a `store`, or with None for `every_s`, nothing is saved and nothing found. `post` hands a function to the engine's
    thread, which alone calls everything here but `answer_until`, `find` and `close`.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        every_s: float | None,
        *,
        source: ModelSource,
        clips: AliveClips,
        in_flight: InFlight,
        speed: Speed,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._clips = clips
        self._in_flight = in_flight
        self._speed = speed
        self._every_s = math.inf
        self.written = 0
        """Checkpoints that were written, since the start."""
        self._checkpointing: Checkpointing | None = None
        if store is not None and every_s is not None:
            self._every_s = every_s
            self._checkpointing = Checkpointing(store, source, post=post, written=self._written)

    @property
    def failures(self) -> int:
        """Snapshots, writes and reads that failed."""
        return self._checkpointing.failures if self._checkpointing else 0

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        if self._checkpointing is not None:
            self._checkpointing.close()

    # ---- a clip's way, in order

    def answer_until(self, request: ClipRequest) -> float | None:
        """`loading_until` of a new clip: None if it can have no checkpoint."""
        looks = self._checkpointing is not None and request.checkpoint_key is not None
        return time.monotonic() + LOAD_LIMIT_S if looks else None

    def find(self, clip: ClipState) -> None:
        """Look for the checkpoint of a clip that waits for it, behind the caller's back."""
        if self._checkpointing is not None and clip.request.checkpoint_key is not None:
            self._checkpointing.find(clip)

    def give_up_late_finds(self) -> None:
        """Let clips start at step 0 whose look into the store takes too long."""
        for clip in self._clips.all():
            if clip.loading_until is not None and time.monotonic() > clip.loading_until:
                assert self._checkpointing is not None
                self._checkpointing.give_up_finding(clip)

    def after_step(self, stepped: list[ClipState], span: DeviceSpan) -> list[Unit]:
        """Launch the snapshots that are due now that a step of `stepped` was launched, as part of that step's `span`."""
        taken = [(clip, self._take_snapshot(clip)) for clip in self._due(stepped)]
        return [Unit(clip, None, span, snapshot=snapshot, share=0.0) for clip, snapshot in taken if snapshot]

    def write(self, clip: ClipState, snapshot: Snapshot) -> None:
        """Send a snapshot that the device has finished on its way to the store."""
        assert self._checkpointing is not None
        clip.snapshot_gpu_s = clip.gpu_s
        self._checkpointing.write(clip, snapshot)

    def hand_back(self, device: torch.device, *, in_time: bool) -> None:
        """Draining: take a last snapshot of each clip; it ends when that is written, or when time is up."""
        owners = self._owners()
        for clip in self._clips.all():
            unsaved = clip.latents is not None and clip.launched_steps > clip.saved_step
            if clip.ending is not None or (in_time and (clip.handing_back or clip.phase is Phase.DONE)):
                continue
            if not (in_time and unsaved and clip in owners):
                self._clips.fail(clip, handed_back(clip))
                continue
            clip.handing_back = True
            if clip.snapshot_step == clip.launched_steps:
                continue  # on its way already
            with torch.inference_mode(), DeviceSpan(device) as span:
                snapshot = self._take_snapshot(clip)
            if snapshot is None:
                self._clips.fail(clip, handed_back(clip))
                continue
            self._in_flight.add(Unit(clip, None, span, snapshot=snapshot))

    def forget(self, clip: ClipState) -> None:
        """The clip was given up: write no more of it."""
        if self._checkpointing is not None and clip.request.checkpoint_key is not None:
            self._checkpointing.forget(clip.request.checkpoint_key)

    # ---- whom to save

    def _owners(self) -> list[ClipState]:
        """Clips whose checkpoints are their own to write: of two with one key, the one that came later took over."""
        if self._checkpointing is None:
            return []
        by_key = {clip.request.checkpoint_key: clip for clip in self._clips.all()}
        return [clip for key, clip in by_key.items() if key is not None]

    def _at_risk_s(self, clip: ClipState) -> float:
        """Device seconds that would have to be spent again if the engine died now, what is under way included."""
        under_way = clip.launched_steps - clip.finished_steps
        return clip.gpu_s - clip.snapshot_gpu_s + under_way * self._speed.step_s(clip.request)

    def _due(self, stepped: list[ClipState]) -> list[ClipState]:
        """Those of `stepped` that made their last step, and, most at risk first, as many as it takes to get below the limit.

        What a decode took counts too, though no snapshot can save it: the others leave it room.
        """
        owners = self._owners()
        due = [clip for clip in stepped if clip.phase is Phase.DECODE and clip in owners]
        at_risk_s = {clip: self._at_risk_s(clip) for clip in owners if clip.ending is None}
        total_s = sum(at_risk_s.values()) - sum(at_risk_s[clip] for clip in due)
        unsaved = [
            clip for clip in at_risk_s if clip.phase is Phase.DENOISE and clip.launched_steps > clip.snapshot_step
        ]
        for clip in sorted(unsaved, key=lambda clip: -at_risk_s[clip]):
            if total_s < self._every_s:
                break
            due.append(clip)
            total_s -= at_risk_s[clip]
        for clip in due:
            clip.snapshot_gpu_s += at_risk_s[clip]
        return due

    def _take_snapshot(self, clip: ClipState) -> Snapshot | None:
        """None if the host has no memory for it, or the device failed: the clip need not suffer, or will soon enough."""
        assert self._checkpointing is not None
        try:
            snapshot = take_snapshot(clip)
            clip.snapshot_step = snapshot.step
            return snapshot
        except Exception:
            self._checkpointing.note_failure(
                f"clip {clip.request.clip_id}: no snapshot after step {clip.launched_steps}"
            )
            return None

    def _written(self, clip: ClipState, header: CheckpointHeader, error: CheckpointUnavailable | None) -> None:
        """A checkpoint was written, or was not."""
        self.written += error is None
        if clip not in self._clips or clip.ending is not None:
            return
        if error is not None:
            clip.snapshot_step = clip.saved_step
        else:
            clip.saved_step = header.step
            self._clips.tell(clip, CheckpointSaved(clip.request.clip_id, header.step, header.gpu_s))
        if clip.handing_back and header.step == clip.launched_steps:
            self._clips.fail(clip, handed_back(clip))


def handed_back(clip: ClipState) -> ReplicaDraining:
    """What to tell of a clip that ends because its replica goes."""
    resumes = f"it can go on after step {clip.saved_step}" if clip.saved_step else "it starts again"
    return ReplicaDraining(f"clip {clip.request.clip_id}: the replica goes away before the clip is finished; {resumes}")

"""An engine without a model, for rehearsals: it takes the time that a card would, and its frames say so.

With it a cluster's scaling, routing and recovery can be watched on machines without GPUs, many replicas to a core. It obeys
the step policy as the real engine does, and has no checkpoints: a clip that loses its replica begins anew.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from PIL import Image, ImageDraw

from serve_app import __version__
from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipReceipt, ClipRequest, ClipStarted, StepDone
from serve_app.engine.loop import Loop
from serve_app.engine.report import ClipProgress, EngineCounts, EngineReport
from serve_app.errors import ClipCancelled, EngineError, ReplicaDraining, WanServeError
from serve_app.scheduling.cost import Architecture, Card, CostModel, Shape
from serve_app.scheduling.steps import Runnable, StepPolicy

LATENESS_S = 0.25
"""How late a step may begin after the one before it and still make up for that; more is taken for idle time."""


class _Phase(Enum):
    DENOISE = "denoise"
    DECODE = "decode"


@dataclass
class _Clip:
    request: ClipRequest
    on_event: Callable[[ClipEvent], object]
    arrived_at: float
    last_ran_at: float
    step_s: float
    decode_s: float
    latent_frames: int
    started: bool = False
    steps_done: int = 0
    decoded: int = 0
    cancelled: bool = False
    gpu_s: float = 0.0

    @property
    def phase(self) -> _Phase:
        return _Phase.DENOISE if self.steps_done < self.request.steps else _Phase.DECODE

    @property
    def next_s(self) -> float:
        return self.step_s if self.phase is _Phase.DENOISE else self.decode_s

    @property
    def remaining_s(self) -> float:
        steps_left = self.request.steps - self.steps_done
        return steps_left * self.step_s + (self.latent_frames - self.decoded) * self.decode_s


class PacedEngine:
    """Stands in for `Engine`: the same calls, the same events, no model and no device.

    A step sleeps as long as `card` takes for it by the cost model, divided by `speedup`.
    """

    def __init__(
        self, card: Card, architecture: Architecture, *, speedup: float = 1.0, policy: StepPolicy | None = None
    ) -> None:
        self._card, self._architecture, self._speedup = card, architecture, speedup
        self._costs = CostModel(card, architecture)
        self._policy = policy or StepPolicy()
        self._lock = threading.Lock()
        self._clips: dict[str, _Clip] = {}
        self._running: _Clip | None = None
        self._busy_s, self._preemptions = 0.0, 0
        self._refusing = False
        self._free_at = 0.0
        self._loop = Loop(self.step, self._step_failed, lambda: None)

    def submit(self, request: ClipRequest, on_event: Callable[[ClipEvent], object]) -> None:
        """As `Engine.submit`."""
        now = time.time()
        shape = Shape(request.width, request.height, request.frames, guided=request.guidance_scale > 1)
        clip = _Clip(
            request,
            on_event,
            arrived_at=now,
            last_ran_at=now,
            step_s=self._costs.step_s(shape) / self._speedup,
            decode_s=self._costs.decode_s(shape) / self._speedup,
            latent_frames=self._architecture.latent_frames(request.frames),
        )
        with self._lock:
            if self._refusing:
                raise ReplicaDraining(f"clip {request.clip_id}: the engine takes no more clips")
            if request.clip_id in self._clips:
                raise EngineError(f"clip {request.clip_id} is alive already")
            self._clips[request.clip_id] = clip
        self._loop.wake()

    def cancel(self, clip_id: str) -> None:
        """As `Engine.cancel`."""
        if clip := self._clips.get(clip_id):
            clip.cancelled = True
            self._loop.wake()

    def listen(self, clip_id: str, listening: bool) -> None:
        """There are no previews."""

    def drain(self, timeout_s: float) -> None:
        """Take no more clips and hand back those that are alive, at the next step boundary."""
        self._refusing = True
        self._loop.post(self._hand_back_all)
        give_up_at = time.monotonic() + timeout_s
        while self._clips and time.monotonic() < give_up_at:
            time.sleep(0.01)

    def report(self) -> EngineReport:
        """As `Engine.report`."""
        with self._lock:
            clips = sorted(self._clips.values(), key=lambda clip: clip.request.deadline)
        running = self._running
        return EngineReport(
            clips=tuple(_progress(clip) for clip in clips),
            running=_progress(running) if running in clips and running is not None else None,
            backlog_gpu_s=sum(clip.remaining_s for clip in clips),
            counts=EngineCounts(self._busy_s, self._preemptions),
        )

    def check(self) -> None:
        """Raise `EngineError` if its thread does not run."""
        if not self._loop.running:
            raise EngineError("the engine's thread is not running", hint="Replace this replica.")

    def start(self) -> None:
        """Run `step` in a thread of its own until `close`."""
        self._loop.start()

    def close(self) -> None:
        """Stop at the next step boundary and hand back the clips that are alive."""
        self._refusing = True
        self._loop.stop()
        self._hand_back_all()

    def step(self) -> bool:
        """Sleep through one unit of one clip's work. False if there was nothing to do."""
        self._loop.read_mail()
        with self._lock:
            clips = list(self._clips.values())
        for clip in [clip for clip in clips if clip.cancelled]:
            self._end(clip, ClipCancelled(f"clip {clip.request.clip_id} was cancelled"))
        clips = [clip for clip in clips if not clip.cancelled]
        if not clips:
            return False
        chosen = self._policy.pick([_runnable(clip) for clip in clips], time.time())
        self._run(next(clip for clip in clips if clip.request.clip_id == chosen))
        return True

    def _run(self, clip: _Clip) -> None:
        before, self._running, request = self._running, clip, clip.request
        if before is not None and before is not clip and before.request.clip_id in self._clips:
            self._preemptions += 1
        if not clip.started:
            clip.started = True
            clip.on_event(ClipStarted(request.clip_id))
        took_s, now = clip.next_s, time.time()
        # A sleep that was too long makes the next one shorter, so that the pace holds on a busy machine.
        self._free_at = (self._free_at if now - self._free_at < LATENESS_S else now) + took_s
        time.sleep(max(0.0, self._free_at - now))
        clip.last_ran_at = self._free_at
        clip.gpu_s += took_s
        self._busy_s += took_s
        if clip.phase is _Phase.DENOISE:
            clip.steps_done += 1
            eta_s = clip.remaining_s
            clip.on_event(StepDone(request.clip_id, clip.steps_done, request.steps, clip.gpu_s, eta_s, took_s))
            return
        clip.decoded += 1
        if clip.decoded == clip.latent_frames:
            with self._lock:
                self._clips.pop(request.clip_id, None)
            clip.on_event(ClipDone(request.clip_id, self._frames(request), self._receipt(clip)))

    def _end(self, clip: _Clip, error: WanServeError) -> None:
        with self._lock:
            self._clips.pop(clip.request.clip_id, None)
        clip.on_event(ClipFailed(clip.request.clip_id, error, clip.gpu_s))

    def _hand_back_all(self) -> None:
        for clip in list(self._clips.values()):
            self._end(clip, ReplicaDraining(f"clip {clip.request.clip_id} was handed back: the replica goes away"))

    def _step_failed(self, error: Exception) -> None:
        for clip in list(self._clips.values()):
            self._end(clip, EngineError(f"the paced engine failed: {error}"))

    def _frames(self, request: ClipRequest) -> np.ndarray:
        """Grey frames that say what they are, with a bar that moves: uint8 RGB [frames, height, width, 3]."""
        picture = Image.new("RGB", (request.width, request.height), (96, 96, 96))
        said = f"paced as {self._card.name}: no model ran"
        ImageDraw.Draw(picture).text((20, request.height // 2), said, fill=(240, 240, 240), font_size=24)
        frames = np.repeat(np.asarray(picture)[np.newaxis], request.frames, axis=0)
        for index, frame in enumerate(frames):
            frame[-20:, : 8 + index * request.width // 96] = 200
        return frames

    def _receipt(self, clip: _Clip) -> ClipReceipt:
        return ClipReceipt(
            model="none",
            model_revision=None,
            trained=False,
            paced=True,
            profile=clip.request.profile,
            device=f"paced as {self._card.name}, {self._speedup:g} times as fast",
            dtype="none",
            seed=clip.request.seed,
            steps=clip.request.steps,
            gpu_s=clip.gpu_s,
            step_ms=1000 * clip.step_s,
            decode_ms=1000 * clip.latent_frames * clip.decode_s,
            versions={"wan-serve": __version__},
        )


def _runnable(clip: _Clip) -> Runnable:
    return Runnable(
        clip_id=clip.request.clip_id,
        deadline=clip.request.deadline,
        arrived_at=clip.arrived_at,
        last_ran_at=clip.last_ran_at,
        remaining_s=clip.remaining_s,
        step_s=clip.next_s,
        longest_step_s=clip.step_s,
    )


def _progress(clip: _Clip) -> ClipProgress:
    return ClipProgress(
        clip_id=clip.request.clip_id,
        phase=clip.phase.value,
        step=clip.steps_done,
        steps=clip.request.steps,
        deadline=clip.request.deadline,
        gpu_s=clip.gpu_s,
        remaining_s=clip.remaining_s,
    )

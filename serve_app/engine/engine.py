"""The engine: many clips on one device, one step at a time.

`Engine.step` is the whole of it: pick a clip, launch one unit of its work (text, one denoising step, one latent frame of
decoding), and tell about work that the device has finished. One thread calls it; everything else may be called from any.
Whose turn it is stands in turns.py, the work itself in model_runner.py, what is saved when in saving.py.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from serve_app.engine.alive import AliveClips
from serve_app.engine.checkpoints import CheckpointStore
from serve_app.engine.checks import check_request
from serve_app.engine.clip import ClipDone, ClipEvent, ClipRequest, ClipStarted, StepDone
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.failures import DeviceFault, as_engine_error, not_finite
from serve_app.engine.in_flight import InFlight, Unit
from serve_app.engine.load import ModelSource, load_pipeline, pick_device
from serve_app.engine.loop import Loop
from serve_app.engine.memory import DeviceMemory
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.preview import Previews
from serve_app.engine.receipt import receipt_of
from serve_app.engine.report import EngineCounts, EngineReport, report_of
from serve_app.engine.saving import Saving, handed_back
from serve_app.engine.snapshot import restore
from serve_app.engine.speed import Speed, card_of
from serve_app.engine.text import TextEncoderPlace
from serve_app.engine.turns import Turns
from serve_app.errors import ClipCancelled, EngineError, GpuOutOfMemory, ReplicaLost
from serve_app.scheduling.steps import StepPolicy

_log = logging.getLogger(__name__)

_UNITS_IN_FLIGHT = 2
"""Units that may be launched and not finished: one runs and one waits, so that the device never idles between two."""
_LEAD_S = 0.03
"""So long before the device should be done with a unit the next is chosen and launched: late, so that a cancel or a picture
that arrives meanwhile waits for one step and not for two; early enough for the host to launch it."""
_LOOK_EVERY_S = 0.01
"""How often it is looked, meanwhile, whether the device is done before it should be."""


class Engine:
    """A model on a device, and the clips that share it.

    Loading happens here and blocks; it raises `ModelNotLoadable`, or `EngineError` where `device` does not exist.
    `device` is `auto`, `cuda` or `cpu`; the model runs in bfloat16 on a GPU and in float32 on a CPU, the VAE in `vae_dtype` if given.

    Clips with a `checkpoint_key` are saved to `checkpoints` after their last step, and often enough that an engine that dies
    loses about `checkpoint_every_s` of device time and a step, over all of them together; they are taken up again from there.
    Without a store, or with None, there are no checkpoints. Clips that somebody listens to give a preview every
    `preview_every_steps`. `memory_limit_bytes` is what clips may use of the device together (None: all that is free).

    `exact_bits` gives WanPipeline's latents to the bit, slowly; by default only a CPU does. `text_encoder_place` trades
    memory for time (text.py). Shapes like those of `warm_up` are made fast before this returns; it takes seconds for each,
    and any other shape runs uncompiled.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        device: str = "auto",
        policy: StepPolicy | None = None,
        checkpoints: CheckpointStore | None = None,
        checkpoint_every_s: float | None = 20.0,
        preview_every_steps: int = 5,
        memory_limit_bytes: int | None = None,
        exact_bits: bool | None = None,
        text_encoder_place: TextEncoderPlace = "offload",
        vae_dtype: torch.dtype | None = None,
        warm_up: Sequence[ClipRequest] = (),
    ) -> None:
        self.source = source
        device = pick_device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.runner = ModelRunner(
            load_pipeline(source, device, dtype, vae_dtype=vae_dtype or dtype),
            device,
            exact_bits=device == "cpu" if exact_bits is None else exact_bits,
            text_encoder_place=text_encoder_place,
        )
        self.runner.warm_up(warm_up)
        self.speed = Speed(card_of(self.runner.device), self.runner.architecture)
        self.memory = DeviceMemory(self.runner, memory_limit_bytes)
        self._clips, self._in_flight, self._fault = AliveClips(), InFlight(), DeviceFault()
        self._loop = Loop(self.step, self._step_failed, self._patience_s)
        self._turns = Turns(policy or StepPolicy(), self._clips, self.memory, self.runner, self.speed)
        self._saving = Saving(
            checkpoints,
            checkpoint_every_s,
            source=source,
            clips=self._clips,
            in_flight=self._in_flight,
            speed=self.speed,
            post=self._loop.post,
        )
        self._previews = Previews(
            preview_every_steps,
            clips=self._clips,
            in_flight=self._in_flight,
            runner=self.runner,
            memory=self.memory,
            fault=self._fault,
            post=self._loop.post,
        )
        self._running: ClipState | None = None
        self._busy_s, self._preemptions = 0.0, 0
        self._draining_until: float | None = None

    # ---- from any thread

    def submit(self, request: ClipRequest, on_event: Callable[[ClipEvent], object]) -> None:
        """Take a clip and return at once. `on_event` is called from the engine's thread (at the end, from that of
        `close`) and must return quickly.

        It gets `ClipStarted`, one `StepDone` for each step, `CheckpointSaved` and `Preview` where they are wanted, and in
        every case exactly one of `ClipDone` and `ClipFailed`, last. Where a checkpoint of its key is found, the clip goes on
        after the step of that. Raises `InvalidValue` for a clip that the model cannot make, `EngineError` for a `clip_id`
        that is alive, `ReplicaDraining` after `drain` or `close`.
        """
        architecture = self.runner.architecture
        check_request(
            request,
            size_multiple=self.runner.size_multiple,
            temporal_compression=architecture.temporal_compression,
        )
        now = time.time()
        answer_until = self._saving.answer_until(request)
        clip = ClipState(request, on_event, arrived_at=now, last_ran_at=now, loading_until=answer_until)
        self._clips.add(clip)
        self._saving.find(clip)
        self._loop.wake()

    def cancel(self, clip_id: str) -> None:
        """End a clip at the next step with `ClipFailed(ClipCancelled)`; a clip that is not alive is left alone."""
        if clip := self._clips.get(clip_id):
            clip.cancelled = True
            self._loop.wake()

    def listen(self, clip_id: str, listening: bool) -> None:
        """Start or stop the previews of a clip; one that is not alive is left alone."""
        if clip := self._clips.get(clip_id):
            clip.listened = listening

    def drain(self, timeout_s: float) -> None:
        """Take no more clips, and hand back those that are alive. Returns when all have ended.

        Each clip with a `checkpoint_key` is saved within one step and ends with `ClipFailed(ReplicaDraining)` when that is
        written, or after `timeout_s`; one without a key ends at once.
        """
        self._clips.refuse_more()
        self._draining_until = time.monotonic() + timeout_s
        self._loop.wake()
        if self._loop.started:
            self._clips.wait_until_none()
            told = threading.Event()
            self._loop.post(told.set)  # read when the engine's thread is done with the last clip's last event
            told.wait(timeout_s)
        while self._clips.all():
            if not self.step():
                time.sleep(0.001)

    def report(self) -> EngineReport:
        """The clips that are alive, what runs, and how much work is left."""
        alive = [clip for clip in self._clips.all() if clip.ending is None]
        text = self.runner.text
        counts = EngineCounts(self._busy_s, self._preemptions, text.reused, text.computed, self._saving.written)
        return report_of(alive, self._running, self.speed, self._saving.failures, counts)

    def check(self) -> None:
        """Raise `EngineError` if the engine can make no more clips: its device failed, or its thread does not run."""
        if self._fault.what is not None:
            raise EngineError(self._fault.what, hint="Replace this replica; its clips run again elsewhere.")
        if not self._loop.running:
            raise EngineError("the engine's thread is not running", hint="Replace this replica.")

    def start(self) -> None:
        """Run `step` in a thread named `engine` until `close`."""
        self._loop.start()

    def close(self) -> None:
        """Stop at the next step boundary; clips that are alive end with `ClipFailed(ReplicaDraining)`."""
        self._clips.refuse_more()
        self._loop.stop()
        self._hand_back_all()
        self._saving.close()
        self._previews.close()

    # ---- the engine's thread

    def step(self) -> bool:
        """One unit of device work. False if there was nothing to do."""
        self._loop.read_mail()
        self._saving.give_up_late_finds()
        self._end_cancelled()
        if self._draining_until is not None:
            self._saving.hand_back(self.runner.device, in_time=time.monotonic() < self._draining_until)
        self._settle(leave=_UNITS_IN_FLIGHT)
        if (early_s := self._in_flight.rest_s() - _LEAD_S) > 0:
            self._loop.pause(min(early_s, _LOOK_EVERY_S))
            return True
        if clip := self._turns.next():
            self._launch(clip)
            self._settle(leave=_UNITS_IN_FLIGHT - 1)
            return True
        if self._in_flight:
            self._settle(leave=len(self._in_flight) - 1)
            return True
        return False

    def _end_cancelled(self) -> None:
        for clip in self._clips.all():
            if clip.cancelled and clip.ending is None:
                self._clips.fail(clip, ClipCancelled(f"clip {clip.request.clip_id} was cancelled"))
                self._saving.forget(clip)

    def _launch(self, clip: ClipState) -> None:
        """Give the device one unit of the clip's work; whatever goes wrong ends this clip alone."""
        before, self._running = self._running, clip
        if clip.phase is Phase.TEXT:
            self._clips.tell(clip, _started(clip))
            if clip not in self._clips:
                return
        phase, failure = clip.phase, None
        clip.last_ran_at = time.time()
        try:
            with torch.inference_mode(), self.memory.watch(clip, phase), DeviceSpan(self.runner.device) as span:
                units = self._do(clip, phase, span)
        except Exception as error:
            self._fault.note(error)
            failure = as_engine_error(clip.request, phase, clip.launched_steps, error)
        if failure is None:
            self._in_flight.add(*units)
            if before is not None and before in self._clips and before.ready:
                self._preemptions += all(unit.clip is not before for unit in units)
            for stepped in [unit.clip for unit in units if unit.phase is Phase.DENOISE]:
                self._previews.after_step(stepped)
            return
        # Outside the except block: there the traceback still holds the tensors that are to be freed.
        if isinstance(failure, GpuOutOfMemory):
            self.memory.ran_out(clip, phase, [other for other in self._clips.all() if other is not clip])
        self._clips.fail(clip, failure)
        self.memory.free_cache()

    def _do(self, clip: ClipState, phase: Phase, span: DeviceSpan) -> list[Unit]:
        """Launch what the clip needs next; a step takes along other clips where that measured faster."""
        if phase is Phase.DENOISE:
            clips = self._turns.stepped_with(clip)
            for each in clips:
                each.last_ran_at = clip.last_ran_at
            finite = self.runner.denoise_step(clips)
            expected_s = len(clips) * self.speed.measured_s(clip.request, decode=False)
            steps = [
                Unit(each, phase, span, finite=its_finite, share=1 / len(clips), expected_s=expected_s)
                for each, its_finite in zip(clips, finite, strict=True)
            ]
            return steps + self._saving.after_step(clips, span)
        if phase is Phase.DECODE:
            self.runner.decode_latent_frame(clip)
            return [Unit(clip, phase, span, expected_s=self.speed.measured_s(clip.request, decode=True))]
        if clip.checkpoint is not None:
            restore(clip, clip.checkpoint, self.runner)
            clip.checkpoint = None
        else:
            self.runner.encode_text(clip)
        return [Unit(clip, phase, span)]

    def _settle(self, *, leave: int) -> None:
        """Account for the units that the device has finished; wait for the oldest until at most `leave` are in flight."""
        for unit in self._in_flight.finished(leave=leave):
            unit.clip.gpu_s += unit.seconds
            self._busy_s += unit.seconds
            unit.clip.last_ran_at = time.time()
            if unit.clip.ending is not None:
                self._clips.fail(unit.clip, unit.clip.ending)
            elif unit.clip in self._clips:
                self._account(unit)

    def _account(self, unit: Unit) -> None:
        """What a finished unit means: learn from its cost, and tell the clip's owner or send its tensors on their way."""
        if unit.phase is Phase.DENOISE:
            self._account_step(unit)
        elif unit.phase is Phase.DECODE:
            self._account_decode(unit)
        elif unit.snapshot is not None:
            self._saving.write(unit.clip, unit.snapshot)
        elif unit.preview is not None:
            self._previews.send(unit.clip, *unit.preview)

    def _account_step(self, unit: Unit) -> None:
        clip, request = unit.clip, unit.clip.request
        clip.finished_steps += 1
        clip.step_s.append(unit.seconds)
        self.speed.saw_step(request, unit.seconds)
        if unit.finite is not None and not bool(unit.finite):
            self._clips.fail(clip, not_finite(clip))
            return
        eta_s = self.speed.remaining_s(clip)
        done = StepDone(request.clip_id, clip.finished_steps, request.steps, clip.gpu_s, eta_s, unit.seconds)
        self._clips.tell(clip, done)

    def _account_decode(self, unit: Unit) -> None:
        clip, request = unit.clip, unit.clip.request
        clip.decoded_latent_frames += 1
        clip.decode_s += unit.seconds
        self.speed.saw_decode(request, unit.seconds)
        if clip.decode is not None and clip.decoded_latent_frames == clip.decode.latent_frames:
            frames = clip.decode.frames.numpy()
            self._clips.end(clip, ClipDone(request.clip_id, frames, receipt_of(clip, self.source, self.runner)))

    # ---- when there is nothing to do, and when all is over

    def _patience_s(self) -> float | None:
        """Seconds until something has waited too long for another thread; None: nothing waits."""
        alive = self._clips.all()
        limits = [clip.loading_until for clip in alive] + ([self._draining_until] if alive else [])
        return min((max(0.0, limit - time.monotonic()) for limit in limits if limit is not None), default=None)

    def _step_failed(self, error: Exception) -> None:
        """Something broke outside of any clip: all of them end, and run again elsewhere."""
        _log.error("the engine's step failed outside of any clip; all clips end", exc_info=error)
        self._fault.note(error)
        self._in_flight.clear()
        for clip in self._clips.all():
            lost = ReplicaLost(f"the engine's step failed: {type(error).__name__}: {error}")
            self._clips.fail(clip, clip.ending or lost)

    def _hand_back_all(self) -> None:
        try:
            self._settle(leave=0)
        except Exception:
            _log.exception("the work under way could not be finished; its clips end without it")
            self._in_flight.clear()
        for clip in self._clips.all():
            self._clips.fail(clip, clip.ending or handed_back(clip))


def _started(clip: ClipState) -> ClipStarted:
    if clip.checkpoint is None:
        return ClipStarted(clip.request.clip_id)
    return ClipStarted(clip.request.clip_id, clip.checkpoint.header.step, clip.checkpoint.header.gpu_s)

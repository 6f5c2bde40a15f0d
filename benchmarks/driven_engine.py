"""A real engine under measurement: clips handed in at chosen moments, all that is heard of them, and a clock with a budget.

Shared by the stages of `mixed_load_engine.py`. Moments are seconds of `time.monotonic`; deadlines are given relative to now.
"""

import dataclasses
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TypeVar
from unittest.mock import patch

import torch

from benchmarks.true_model import build_pipeline
from serve_app.engine import engine as engine_module
from serve_app.engine import kernels
from serve_app.engine.checkpoints import CheckpointStore
from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipReceipt, ClipRequest, StepDone
from serve_app.engine.engine import Engine
from serve_app.engine.load import ModelSource
from serve_app.scheduling.simulate import Policy
from serve_app.scheduling.steps import Runnable, StepPolicy

Event = TypeVar("Event", bound=ClipEvent)

EMBEDDED_TOKENS = 60
"""Length of the random prompt embeddings; the engine pads them to 512 as it does real ones."""


class OutOfTime(Exception):
    """The budget is spent; what was measured until now stands."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """What is left of the wall time that a benchmark may take."""

    started_at: float
    budget_s: float

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started_at

    @property
    def left_s(self) -> float:
        """Until the budget is spent; negative afterwards."""
        return self.budget_s - self.seconds

    def say(self, what: str) -> None:
        """A line of progress, at once."""
        print(f"[{self.seconds:6.1f} s] {what}", flush=True)


class Heard:
    """One clip: when it was handed in, and its events with their moments. Frames are dropped, only their receipt is kept."""

    def __init__(self, clip_id: str) -> None:
        self.clip_id = clip_id
        self.submitted_at = time.monotonic()
        self.receipt: ClipReceipt | None = None
        self.failure: ClipFailed | None = None
        self._events: list[tuple[float, ClipEvent]] = []
        self._changed = threading.Condition()

    def __call__(self, event: ClipEvent) -> None:
        """Note an event; the engine's thread calls this."""
        now = time.monotonic()
        with self._changed:
            if isinstance(event, ClipDone):
                self.receipt = event.receipt
                event = dataclasses.replace(event, frames=event.frames[:0].copy())
            elif isinstance(event, ClipFailed):
                self.failure = event
            self._events.append((now, event))
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether its last event has come."""
        return self.receipt is not None or self.failure is not None

    @property
    def ended_at(self) -> float:
        """Moment of the last event so far."""
        return self._events[-1][0]

    @property
    def gpu_s(self) -> float:
        """Device seconds that it had, once it has ended."""
        if self.receipt is not None:
            return self.receipt.gpu_s
        return self.failure.gpu_s if self.failure is not None else 0.0

    def moment(self, kind: type[Event]) -> float | None:
        """Moment of the first event of that kind; None: there was none yet."""
        return next((at for at, event in list(self._events) if isinstance(event, kind)), None)

    def steps_done(self) -> int:
        """Denoising steps that were told of."""
        return sum(isinstance(event, StepDone) for _, event in list(self._events))

    def step_times_s(self) -> list[float]:
        """Device seconds of each denoising step but the first."""
        gpu_s = [event.gpu_s for _, event in list(self._events) if isinstance(event, StepDone)]
        return [later - earlier for earlier, later in pairwise(gpu_s)]

    def wait_for_steps(self, steps: int, clock: Clock) -> None:
        """Until so many steps are done. Raises `OutOfTime`, and `RuntimeError` if the clip ends before."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.steps_done() >= steps or self.ended, max(0.0, clock.left_s)):
                raise OutOfTime
        if self.steps_done() < steps:
            raise RuntimeError(f"clip {self.clip_id} ended before its step {steps}: {self.failure}")

    def wait_for_end(self, clock: Clock) -> None:
        """Until its last event. Raises `OutOfTime`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended, max(0.0, clock.left_s)):
                raise OutOfTime

    def wait_until_done(self, clock: Clock) -> ClipReceipt:
        """Its receipt. Raises `OutOfTime`, and the clip's own error if it failed."""
        self.wait_for_end(clock)
        if self.failure is not None:
            raise self.failure.error
        assert self.receipt is not None
        return self.receipt


class PolicyInUse:
    """Lets one warm engine run under several policies, one after the other."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def pick(self, clips: Sequence[Runnable], now: float) -> str:
        """What the policy in use decides."""
        return self.policy.decide(clips, now).clip_id


class DrivenEngine(AbstractContextManager["DrivenEngine"]):
    """`Engine` as a replica runs it (its own thread, checkpoints to a local folder), on random weights.

    `small`: a model for a CPU; else the true 1.3B architecture on a GPU. The shapes of `warm_up` are compiled, others run
    eager. `skip_batches` leaves out the trial of several clips in one forward, which costs two compilations a picture shape.
    """

    def __init__(self, *, small: bool, warm_up: Sequence[ClipRequest], skip_batches: bool, clock: Clock) -> None:
        self.clock = clock
        self._folder = tempfile.mkdtemp(prefix="mixed-load-")
        self._heard: list[Heard] = []
        self.policy = PolicyInUse(StepPolicy())
        device = torch.device("cpu" if small else "cuda")
        pipeline = build_pipeline(device, torch.float32 if small else torch.bfloat16, small=small)
        clock.say(f"model built on {device}")
        batch_sizes = () if skip_batches else kernels._BATCH_SIZES
        # The engine loads from a folder or the hub; a model of this size with random weights lies in neither.
        with (
            patch.object(engine_module, "load_pipeline", return_value=pipeline),
            patch.object(kernels, "_BATCH_SIZES", batch_sizes),
        ):
            self.engine = Engine(
                ModelSource("random weights", None, trained=False),
                device=device.type,
                policy=self.policy,  # type: ignore[arg-type]
                checkpoints=CheckpointStore(self._folder),
                warm_up=warm_up,
            )
        # There is no text encoder: every prompt is one whose embedding is cached.
        config, dtype = pipeline.transformer.config, pipeline.transformer.dtype
        for prompt in ("prompt", "negative prompt"):
            rows = torch.randn(EMBEDDED_TOKENS, config.text_dim, device=device, dtype=dtype)
            self.engine.runner.text._cache[prompt] = rows
        self.engine.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.engine.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def submit(self, request: ClipRequest, *, due_in_s: float) -> Heard:
        """Hand in a clip like `request`, due so many seconds from now."""
        clip_id = f"clip-{len(self._heard):05}"
        heard = Heard(clip_id)
        self._heard.append(heard)
        deadline = time.time() + due_in_s
        self.engine.submit(
            dataclasses.replace(request, clip_id=clip_id, deadline=deadline, checkpoint_key=clip_id), heard
        )
        return heard

    def cancel_all(self) -> None:
        """End every clip that is alive, and wait for that: two units of work, or 10 s at most."""
        alive = [heard for heard in self._heard if not heard.ended]
        for heard in alive:
            self.engine.cancel(heard.clip_id)
        grace = Clock(time.monotonic(), 10.0)
        for heard in alive:
            heard.wait_for_end(grace)


def file_without_tearing(path: Path, text: str) -> None:
    """Write `text` so that a run that is cut at any moment leaves the whole old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(path.suffix + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)

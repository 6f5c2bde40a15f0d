"""What a GPU owes its users, measured on a running engine: unloaded times, how soon it turns to a picture that arrives during a
video, how soon it lets go of a cancelled video, and how busy it is under a backlog."""

import dataclasses
import time
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

from benchmarks.driven_engine import DrivenEngine, Heard
from benchmarks.driver_utilization import DriverUtilization
from benchmarks.mixed_load import MIX, kinds_on
from serve_app.engine.clip import ClipRequest, ClipStarted, StepDone
from serve_app.errors import ClipCancelled
from serve_app.jobs.presets import PRESETS, JobType

_TRIALS = 6
_PICTURE_RUNS = 3
_BUSY_SHARE_OF_BUDGET = 0.07


@dataclass(frozen=True)
class Alone:
    """One job of a type on the idle engine."""

    unloaded_s: float
    """From submission to its frames; the least of `runs`."""
    runs: int
    steps: int
    step_s: float
    """Median of the device's."""
    decode_s: float
    latent_frames: int
    promised_s: float
    """The preset's promise, scaled by `unloaded_s` over what the cost model says of the whole preset on an RTX 4090."""
    kernels: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A picture arrived during a video; when it was done, the video was cancelled. Seconds."""

    picture_started_s: float
    """From submission until the engine turned to it."""
    picture_first_step_s: float
    """From submission until the device had done its first step."""
    picture_done_s: float
    freed_s: float
    """From `cancel` until the video's `ClipFailed`: nothing of it is on the device any more."""


@dataclass(frozen=True)
class Responsiveness:
    """All trials, at evenly spaced places within a step of the video."""

    video: str
    picture: str
    video_step_s: float
    trials: list[Trial]

    def in_steps(self, name: str) -> list[float]:
        """A field of the trials, in steps of the video."""
        return [getattr(trial, name) / self.video_step_s for trial in self.trials]


@dataclass(frozen=True)
class Busy:
    """A stretch of time in which the engine always had work."""

    wall_s: float
    device_s: float
    """Sum of the clips' device time: spans between events in the stream (CPU: of the calls), gaps inside a unit included."""
    share: float
    driver_share: float | None
    """Share of time with a kernel running, by the GPU's driver; None where that does not say."""
    driver_readings: int
    clips: int


def measure_alone(driven: DrivenEngine, kind: JobType, request: ClipRequest) -> Alone:
    """One job at a time: pictures several times, since the first meets what is not warm yet."""
    runs = _PICTURE_RUNS if PRESETS[kind].is_image else 1
    latencies, receipt = [], None
    for _ in range(runs):
        heard = driven.submit(request, due_in_s=3600)
        receipt = heard.wait_until_done(driven.clock)
        latencies.append(heard.ended_at - heard.submitted_at)
    assert receipt is not None
    preset_s = next(each.work_s for each in kinds_on("RTX 4090") if each.name == kind)
    return Alone(
        unloaded_s=min(latencies),
        runs=runs,
        steps=request.steps,
        step_s=receipt.step_ms / 1000,
        decode_s=receipt.decode_ms / 1000,
        latent_frames=driven.engine.runner.architecture.latent_frames(request.frames),
        promised_s=PRESETS[kind].promised_s[1] * min(latencies) / preset_s,
        kernels=receipt.kernels,
    )


def measure_responsiveness(
    driven: DrivenEngine,
    picture: JobType,
    video: JobType,
    requests: dict[JobType, ClipRequest],
    alone: dict[str, Alone],
) -> Responsiveness:
    """A picture during a video, then a cancel of that video, at evenly spaced places within its steps."""
    step_s, step_times_s = alone[video].step_s, []
    trials = []
    for number in range(_TRIALS):
        into_step_s = (number + 0.5) / _TRIALS * step_s
        running = driven.submit(at_full_length(video, requests[video]), due_in_s=3600)
        running.wait_for_steps(2, driven.clock)
        time.sleep(into_step_s)
        arrived = driven.submit(at_full_length(picture, requests[picture]), due_in_s=60)
        arrived.wait_until_done(driven.clock)
        running.wait_for_steps(running.steps_done() + 1, driven.clock)
        time.sleep(into_step_s)
        cancelled_at = time.monotonic()
        driven.engine.cancel(running.clip_id)
        running.wait_for_end(driven.clock)
        if running.failure is None or not isinstance(running.failure.error, ClipCancelled):
            raise RuntimeError(f"the cancelled video ended otherwise: {running.failure}")
        step_times_s += running.step_times_s()
        started_at, first_step_at = arrived.moment(ClipStarted), arrived.moment(StepDone)
        assert started_at is not None
        assert first_step_at is not None
        trials.append(
            Trial(
                picture_started_s=started_at - arrived.submitted_at,
                picture_first_step_s=first_step_at - arrived.submitted_at,
                picture_done_s=arrived.ended_at - arrived.submitted_at,
                freed_s=running.ended_at - cancelled_at,
            )
        )
    found = Responsiveness(video.value, picture.value, median(step_times_s), trials)
    for name in ("picture_started_s", "picture_first_step_s", "freed_s"):
        steps = found.in_steps(name)
        driven.clock.say(f"{name}, in steps of {video}: median {median(steps):.2f}, max {max(steps):.2f}")
    return found


def measure_busy(driven: DrivenEngine, requests: dict[JobType, ClipRequest], alone: dict[str, Alone]) -> Busy:
    """Device time over wall time while there are always several clips to choose from: what is not done at the end is cancelled."""
    window_s = min(_BUSY_SHARE_OF_BUDGET * driven.clock.budget_s, driven.clock.left_s)
    deck = [kind for kind in requests for _ in range(MIX[kind])]
    Random(0).shuffle(deck)
    heard: list[Heard] = []
    queued_s = 0.0
    with DriverUtilization() as driver:
        started_at = time.monotonic()
        # Twice the work that the window can hold, in case the device is faster than it was alone.
        while queued_s < 2 * window_s:
            kind = deck[len(heard) % len(deck)]
            clip = at_full_length(kind, requests[kind])
            heard.append(driven.submit(clip, due_in_s=alone[kind].promised_s * clip.steps / alone[kind].steps))
            queued_s += alone[kind].unloaded_s
        time.sleep(max(0.0, started_at + window_s - time.monotonic()))
        driven.cancel_all()
    if broken := [c.failure for c in heard if c.failure and not isinstance(c.failure.error, ClipCancelled)]:
        raise broken[0].error
    first_at = min(at for clip in heard if (at := clip.moment(ClipStarted)) is not None)
    wall_s = max(clip.ended_at for clip in heard) - first_at
    device_s = sum(clip.gpu_s for clip in heard)
    done = sum(clip.receipt is not None for clip in heard)
    busy = Busy(wall_s, device_s, device_s / wall_s, driver.share, driver.readings, done)
    driven.clock.say(
        f"busy {100 * busy.share:.1f}% of {wall_s:.1f} s, {done} clips done; by the driver: {percent(driver.share)}"
    )
    return busy


def at_full_length(kind: JobType, request: ClipRequest) -> ClipRequest:
    """With as many steps as the preset has."""
    return dataclasses.replace(request, steps=PRESETS[kind].sample_steps)


def percent(share: float | None) -> str:
    """For people."""
    return "not known" if share is None else f"{100 * share:.1f}%"

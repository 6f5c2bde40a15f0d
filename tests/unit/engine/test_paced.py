"""The engine that only keeps time: the real engine's events, order and endings, at the cost model's pace."""

import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipRequest, ClipStarted, StepDone
from serve_app.engine.paced import PacedEngine
from serve_app.errors import ClipCancelled, EngineError, ReplicaDraining
from serve_app.scheduling.cost import CARDS, WAN_1_3B, clip_gpu_s

CARD = CARDS["RTX 4090"]
SPEEDUP = 20.0


@pytest.fixture
def engine() -> Iterator[PacedEngine]:
    engine = PacedEngine(CARD, WAN_1_3B, speedup=SPEEDUP)
    engine.start()
    yield engine
    engine.close()


def request(clip_id: str, frames: int = 1, **changes: Any) -> ClipRequest:
    values = {"prompt": "a red circle", "negative_prompt": "", "width": 640, "height": 480, "frames": frames, "steps": 10,
              "guidance_scale": 6.0, "flow_shift": 2.0, "seed": 1, "deadline": time.time() + 600}  # fmt: skip
    return ClipRequest(clip_id=clip_id, **(values | changes))  # type: ignore[arg-type]


def submitted(engine: PacedEngine, asked: ClipRequest) -> "queue.Queue[ClipEvent]":
    events: queue.Queue[ClipEvent] = queue.Queue()
    engine.submit(asked, events.put)
    return events


def ended(events: "queue.Queue[ClipEvent]") -> list[ClipEvent]:
    found = [events.get(timeout=30)]
    while not isinstance(found[-1], ClipDone | ClipFailed):
        found.append(events.get(timeout=30))
    return found


def test_a_clip_has_the_real_engines_events_and_the_cost_models_time(engine: PacedEngine) -> None:
    asked = request("a", frames=5)
    events = ended(submitted(engine, asked))
    assert isinstance(events[0], ClipStarted)
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, 11))
    done = events[-1]
    assert isinstance(done, ClipDone)
    whole_s = clip_gpu_s(CARD, WAN_1_3B, width=640, height=480, frames=5, steps=10)
    assert done.receipt.gpu_s == pytest.approx(whole_s / SPEEDUP)
    assert (done.receipt.paced, done.receipt.trained) == (True, False)
    assert "no model" not in done.receipt.device
    assert "20 times" in done.receipt.device
    assert done.frames.shape == (5, 480, 640, 3)
    assert done.frames.dtype == np.uint8
    assert len({frame.tobytes() for frame in done.frames}) == 5, "the frames differ, or they would count as frozen"


def test_a_picture_slips_into_a_video(engine: PacedEngine) -> None:
    video = submitted(engine, request("video", frames=81, steps=40))
    while not isinstance(video.get(timeout=30), StepDone):
        pass
    ended(submitted(engine, request("picture", deadline=time.time() + 30)))
    assert {clip.clip_id for clip in engine.report().clips} == {"video"}
    counts = engine.report().counts
    assert counts.preemptions == 1
    assert counts.busy_s > 0
    engine.cancel("video")
    failed = ended(video)[-1]
    assert isinstance(failed, ClipFailed)
    assert isinstance(failed.error, ClipCancelled)
    assert engine.report().clips == ()


def test_drain_hands_back_and_takes_no_more(engine: PacedEngine) -> None:
    events = submitted(engine, request("video", frames=81, steps=40))
    with pytest.raises(EngineError, match="alive already"):
        submitted(engine, request("video"))
    engine.drain(10.0)
    failed = ended(events)[-1]
    assert isinstance(failed, ClipFailed)
    assert isinstance(failed.error, ReplicaDraining)
    with pytest.raises(ReplicaDraining):
        submitted(engine, request("late"))


def test_it_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, serve_app.engine.paced; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""On a device that takes its time, as a GPU does, the next unit is chosen just before the running one ends, not a unit ahead."""

import time

import pytest

from serve_app.engine import engine as engine_module
from serve_app.engine.clip import ClipDone, StepDone
from serve_app.engine.engine import Engine
from serve_app.errors import ClipCancelled

from .conftest import Heard, MakeRequest

UNIT_S = 0.4


class FakeSlowSpan:
    """A device that takes `UNIT_S` for each unit, one after another, while the launching thread goes on."""

    free_at = 0.0

    def __init__(self, device: object) -> None:
        self.seconds = UNIT_S

    def __enter__(self) -> "FakeSlowSpan":
        return self

    def __exit__(self, *exc_info: object) -> None:
        FakeSlowSpan.free_at = self.ends_at = max(time.monotonic(), FakeSlowSpan.free_at) + UNIT_S

    @property
    def finished(self) -> bool:
        return time.monotonic() >= self.ends_at

    def wait(self) -> None:
        time.sleep(max(0.0, self.ends_at - time.monotonic()))


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "DeviceSpan", FakeSlowSpan)


def until(heard: Heard, reached: type, steps: int = 0) -> None:
    while not any(isinstance(event, reached) for event in list(heard.events)) or len(heard.steps) < steps:
        time.sleep(0.005)


def test_a_cancelled_clip_is_not_launched_again(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of("a", steps=8), heard)
    engine.start()
    until(heard, StepDone, steps=3)
    time.sleep(UNIT_S / 4)
    told = [event for event in heard.events if isinstance(event, StepDone)][-1]
    engine.cancel("a")
    while not heard.events or not hasattr(heard.events[-1], "error"):
        time.sleep(0.005)
    assert isinstance(heard.failed.error, ClipCancelled)
    # The unit that ran when it was cancelled, and no second one behind it.
    assert heard.failed.gpu_s == pytest.approx(told.gpu_s + UNIT_S)
    engine.close()


def test_what_arrives_during_a_step_is_next(engine: Engine, request_of: MakeRequest) -> None:
    video, picture = Heard(), Heard()
    engine.submit(request_of("video", steps=12, deadline=time.time() + 3600), video)
    engine.start()
    until(video, StepDone, steps=3)
    time.sleep(UNIT_S / 4)
    engine.submit(request_of("picture", frames=1, steps=1, deadline=time.time() + 60), picture)
    until(picture, StepDone)
    assert len(video.steps) == 4, "the step that was under way, and none that was launched ahead"
    until(picture, ClipDone)
    engine.cancel("video")
    engine.close()

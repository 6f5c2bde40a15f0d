"""The engine's loop under the real StepPolicy: pictures slip in, late clips yield, nobody starves. Clock and pace are the test's."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.engine.clip import ClipDone, ClipStarted, StepDone
from serve_app.engine.clip_state import ClipState
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.engine import Engine
from serve_app.engine.load import ModelSource
from serve_app.scheduling.steps import StepPolicy

from .conftest import Heard, MakeRequest, run_dry

VIDEO_STEP_S, PICTURE_STEP_S = 1.0, 0.05


class Clock:
    """Stands where `time` does in the engine; device work moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.started: list[tuple[float, str]] = []

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture(scope="module")
def paced(tiny: ModelSource) -> Iterator[tuple[Engine, Clock]]:
    """An engine whose units last what the test says, at a clock that only they move."""
    engine, clock = Engine(tiny, device="cpu"), Clock()
    launch = engine._launch

    def seconds_of(clip: ClipState) -> float:
        return PICTURE_STEP_S if clip.request.frames == 1 else VIDEO_STEP_S

    def timed(clip: ClipState) -> None:
        clock.started.append((clock.now, clip.request.clip_id))
        launch(clip)
        clock.now += seconds_of(clip)

    engine._launch = timed  # type: ignore[method-assign]
    engine.speed.step_s = lambda request: PICTURE_STEP_S if request.frames == 1 else VIDEO_STEP_S  # type: ignore[method-assign]
    engine.speed.decode_s = engine.speed.step_s  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve_app.engine.engine.time", clock)
        patch.setattr("serve_app.engine.turns.time", clock)
        patch.setattr(DeviceSpan, "seconds", property(lambda _self: 0.01))
        yield engine, clock
    engine.close()


@pytest.mark.parametrize("units_before", range(8))
def test_a_picture_starts_within_one_video_step(
    paced: tuple[Engine, Clock], request_of: MakeRequest, units_before: int
) -> None:
    """Whatever the video is doing: text, a step, a latent frame of its decode."""
    engine, clock = paced
    video, picture = Heard(), Heard()
    engine.submit(request_of("video", frames=9, steps=4, deadline=clock.now + 100), video)
    for _ in range(units_before):
        engine.step()
    engine.submit(request_of("picture", frames=1, steps=2, deadline=clock.now + 30), picture)
    engine.step()
    assert isinstance(picture.events[0], ClipStarted)
    for _ in range(3):
        engine.step()
    assert isinstance(picture.last, ClipDone), "and the video does not come between"
    run_dry(engine)
    assert isinstance(video.last, ClipDone)


def test_a_late_clip_yields(paced: tuple[Engine, Clock], request_of: MakeRequest) -> None:
    """One that can no longer be on time does not make another late, though its deadline is earlier."""
    engine, clock = paced
    late, timely = Heard(), Heard()
    engine.submit(request_of("late", frames=9, steps=8, deadline=clock.now + 3), late)
    engine.step()
    due = clock.now + 14
    engine.submit(request_of("timely", frames=9, steps=8, deadline=due), timely)
    while not any(isinstance(event, ClipDone) for event in timely.events):
        engine.step()
    assert clock.now <= due
    assert not any(isinstance(event, ClipDone) for event in late.events)
    run_dry(engine)
    assert isinstance(late.last, ClipDone)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 25), st.sampled_from([1, 1, 5, 9]), st.integers(1, 4), st.floats(-5, 60)),
        min_size=2,
        max_size=7,
    )
)
def test_nobody_starves_and_all_end(
    paced: tuple[Engine, Clock], request_of: MakeRequest, arrivals: list[tuple[int, int, int, float]]
) -> None:
    """Any mix of clips, arriving at any unit: the one that came first gets its share, and each ends exactly once."""
    engine, clock = paced
    share = StepPolicy().share
    heard = [Heard() for _ in arrivals]
    order = sorted(range(len(arrivals)), key=lambda index: arrivals[index][0])
    clock.started.clear()
    unit = 0
    while order or engine._clips.by_id:
        while order and arrivals[order[0]][0] <= unit:
            index = order.pop(0)
            _, frames, steps, slack = arrivals[index]
            engine.submit(request_of(f"c{index}", frames=frames, steps=steps, deadline=clock.now + slack), heard[index])
            clock.now += 1e-6  # so that arrival has an order
        first = min(engine._clips.by_id.values(), key=lambda clip: clip.arrived_at, default=None)
        engine.step()
        unit += 1
        if first is not None and first.request.clip_id in engine._clips.by_id:
            bound = 2 * engine.speed.step_s(first.request) / share + VIDEO_STEP_S
            assert clock.now - max(first.last_ran_at, first.arrived_at) <= bound + VIDEO_STEP_S
    for index, (_, _, steps, _) in enumerate(arrivals):
        assert isinstance(heard[index].last, ClipDone)
        assert [event.step for event in heard[index].events if isinstance(event, StepDone)] == list(range(1, steps + 1))

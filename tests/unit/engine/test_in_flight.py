"""A device that works behind the launching thread, as a GPU does: what is under way when a clip ends still counts."""

import pytest

from serve_app.engine.clip import ClipDone
from serve_app.engine.clip_state import Phase
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.engine import Engine
from serve_app.errors import ClipCancelled, EngineError

from .conftest import Heard, MakeRequest, run_dry


@pytest.fixture(autouse=True)
def _behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit is seen to be finished before somebody waits for it."""
    monkeypatch.setattr(DeviceSpan, "finished", property(lambda _self: False))


@pytest.mark.parametrize("phase", [Phase.DENOISE, Phase.DECODE])
@pytest.mark.parametrize("alone", [True, False])
def test_cancel_counts_the_unit_under_way(
    engine: Engine, request_of: MakeRequest, *, phase: Phase, alone: bool
) -> None:
    heard, other = Heard(), Heard()
    engine.submit(request_of("a", frames=9, steps=3), heard)
    if not alone:
        engine.submit(request_of("b", frames=1, steps=2, deadline=2000.0), other)
    clip = engine._clips.by_id["a"]
    while clip.phase is not phase or not engine._in_flight:
        engine.step()
    (unit,) = engine._in_flight.units
    assert unit.clip is clip
    counted, told = clip.gpu_s, len(heard.steps)
    engine.cancel("a")
    while engine._clips.by_id.get("a") is clip:  # a step may only wait for the device
        engine.step()
    assert isinstance(heard.failed.error, ClipCancelled)
    assert heard.failed.gpu_s == pytest.approx(counted + unit.span.seconds)
    assert unit.span.seconds > 0
    assert len(heard.steps) == told, "nothing is told of it"
    assert clip.latents is None
    run_dry(engine)
    if not alone:
        assert isinstance(other.last, ClipDone)


def test_a_clip_that_is_ending_is_not_reported_and_its_id_not_free(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of("a"), heard)
    engine.step()
    engine.step()
    engine.cancel("a")
    engine._end_cancelled()
    assert engine.report().clips == ()
    with pytest.raises(EngineError, match="alive already"):
        engine.submit(request_of("a"), Heard())
    run_dry(engine)
    assert isinstance(heard.failed.error, ClipCancelled)


def test_close_counts_it_too(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of("a"), heard)
    for _ in range(3):
        engine.step()
    (unit,) = engine._in_flight.units
    counted = engine._clips.by_id["a"].gpu_s
    engine.close()
    assert heard.failed.gpu_s == pytest.approx(counted + unit.span.seconds)

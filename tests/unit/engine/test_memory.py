"""Admission by memory: what fits runs together, the rest waits outside and holds nothing, and nobody waits for ever."""

import pytest
import torch

from serve_app.engine.clip import ClipDone, ClipRequest, ClipStarted
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.engine import Engine
from serve_app.engine.load import ModelSource
from serve_app.engine.memory import DeviceMemory, held_bytes
from serve_app.errors import GpuOutOfMemory

from .conftest import EarliestDeadline, Heard, MakeRequest, TurnByTurn, run_dry, run_until


def needs(engine: Engine, request: ClipRequest) -> tuple[int, int]:
    """Peak bytes of denoising and of decoding."""
    return engine.memory.need(request, Phase.DENOISE).peak, engine.memory.need(request, Phase.DECODE).peak


def limit(engine: Engine, limit_bytes: int) -> None:
    engine.memory._limit_bytes = limit_bytes
    engine.memory._needs.clear()


def test_what_does_not_fit_beside_others_waits(tiny: ModelSource, request_of: MakeRequest) -> None:
    engine = Engine(tiny, device="cpu", policy=TurnByTurn())  # type: ignore[arg-type]
    requests = [request_of(name, frames=9, steps=3) for name in "abcd"]
    engine.submit(request_of("before", frames=9, steps=3), Heard())
    run_dry(engine)  # so that what a clip holds is known
    engine.memory._limit_bytes = max(needs(engine, requests[0])) + engine.memory.need(requests[0], Phase.DENOISE).held
    heard = {request.clip_id: Heard() for request in requests}
    for request in requests:
        engine.submit(request, heard[request.clip_id])
    there: list[int] = []

    def watch() -> bool:
        clips = list(engine._clips.by_id.values())
        held = sum(held_bytes(clip) for clip in clips)
        assert held <= engine.memory.capacity(()), "what lies between units is within the limit"
        assert all(held_bytes(clip) == 0 for clip in clips if not heard[clip.request.clip_id].events)
        there.append(sum(clip.latents is not None for clip in clips))
        return not clips

    run_until(engine, watch)
    assert max(there) == 2, "there is room for one that runs and one that rests"
    for each in heard.values():
        assert isinstance(each.last, ClipDone)
    engine.close()


def test_with_room_clips_share_the_device(tiny: ModelSource, request_of: MakeRequest) -> None:
    """Guards the test above: the same clips interleave where memory is plenty."""
    engine = Engine(tiny, device="cpu", policy=TurnByTurn())  # type: ignore[arg-type]
    for name in "abcd":
        engine.submit(request_of(name, frames=9, steps=3), Heard())
    decoding: list[int] = []

    def watch() -> bool:
        clips = list(engine._clips.by_id.values())
        decoding.append(sum(clip.decode is not None for clip in clips))
        return not clips

    run_until(engine, watch)
    assert max(decoding) == 4
    engine.close()


def test_a_stream_of_small_clips_does_not_keep_a_large_one_out(engine: Engine, request_of: MakeRequest) -> None:
    """The large one is due first and does not fit beside the small one that runs; the next small ones wait behind it."""
    small, large = request_of("s0", frames=1, steps=6), request_of("large", frames=13, steps=2, deadline=10.0)
    limit(engine, max(needs(engine, large)) + 100)
    engine._turns.policy = EarliestDeadline()  # type: ignore[assignment]
    heard = {name: Heard() for name in ("s0", "s1", "s2", "large")}
    engine.submit(small, heard["s0"])
    run_until(engine, lambda: len(heard["s0"].steps) == 2)
    for request in (large, request_of("s1", frames=1), request_of("s2", frames=1)):
        engine.submit(request, heard[request.clip_id])
    run_until(engine, lambda: any(isinstance(event, ClipStarted) for event in heard["large"].events))
    assert isinstance(heard["s0"].last, ClipDone)
    assert heard["s1"].events == heard["s2"].events == []
    run_dry(engine)
    for each in heard.values():
        assert isinstance(each.last, ClipDone)


def test_too_big_for_the_whole_card(engine: Engine, request_of: MakeRequest) -> None:
    """It fails at once, with the sizes, and the others do not notice."""
    big, good = Heard(), Heard()
    request = request_of("big", width=640, height=480, frames=81)
    limit(engine, max(needs(engine, request)) // 3)
    assert max(needs(engine, request_of(frames=1))) < max(needs(engine, request)) // 3
    engine.submit(request, big)
    engine.submit(request_of("good", frames=1, deadline=2000.0), good)
    run_dry(engine)
    error = big.failed.error
    assert isinstance(error, GpuOutOfMemory)
    assert "clip big (640x480, 81 frames) needs about" in error.message
    assert "GiB for clips" in error.message
    assert big.events == [big.last], "it was given no device time"
    assert isinstance(good.last, ClipDone)


def test_a_guess_does_not_refuse_what_may_fit(engine: Engine, request_of: MakeRequest) -> None:
    """Somewhat over the limit by the guess: tried alone. After it ran out of memory that is known, and the next fails at once."""
    request = request_of(frames=9)
    limit(engine, int(max(needs(engine, request)) / 1.5))
    first, second, third = Heard(), Heard(), Heard()
    engine.submit(request, first)
    run_dry(engine)
    assert isinstance(first.last, ClipDone)

    step = engine.runner.denoise_step
    engine.runner.denoise_step = _out_of_memory  # type: ignore[method-assign, assignment]
    engine.submit(request, second)
    run_dry(engine)
    assert isinstance(second.failed.error, GpuOutOfMemory)
    engine.runner.denoise_step = step  # type: ignore[method-assign]
    engine.submit(request, third)
    run_dry(engine)
    assert isinstance(third.failed.error, GpuOutOfMemory)
    assert third.events == [third.last]


def _out_of_memory(_clips: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


def test_running_out_beside_others_does_not_bar_a_clip(engine: Engine, request_of: MakeRequest) -> None:
    """It needs more than was free then; alone it may still fit."""
    request, other = request_of("a", frames=9), request_of("b", frames=5)
    limit(engine, 2 * max(needs(engine, request)))
    beside = ClipState(other, print, arrived_at=0.0, last_ran_at=0.0, phase=Phase.DENOISE)
    beside.latents = torch.zeros(max(needs(engine, request)), dtype=torch.uint8)
    clip = ClipState(request, print, arrived_at=0.0, last_ran_at=0.0)
    assert engine.memory.admit(clip, [beside])
    engine.memory.ran_out(clip, Phase.DENOISE, [beside])
    assert not engine.memory.admit(clip, [beside])
    assert engine.memory.admit(clip, [])


def test_guesses_are_near_what_was_measured(
    engine: Engine, request_of: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """640x480x81 on the true architecture: 1.7 GiB on top of weights for a bf16 step of one branch, 3.9 GiB for a bf16 decode."""
    from types import SimpleNamespace

    from serve_app.scheduling.cost import WAN_1_3B

    parts = SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(in_channels=16, text_dim=4096), dtype=torch.bfloat16),
        vae=SimpleNamespace(config=SimpleNamespace(patch_size=None, base_dim=96), dtype=torch.bfloat16),
    )
    runner = SimpleNamespace(pipeline=parts, architecture=WAN_1_3B, device=torch.device("cpu"))
    memory = DeviceMemory(runner)  # type: ignore[arg-type]
    request = request_of(width=640, height=480, frames=81, guidance_scale=1.0)
    assert memory.need(request, Phase.DENOISE).on_top / 2**30 == pytest.approx(1.7, rel=0.15)
    assert memory.need(request, Phase.DECODE).peak / 2**30 == pytest.approx(3.9, rel=0.5)

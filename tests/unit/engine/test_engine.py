"""The life of clips in the engine: order, progress, cancel, failures, and the one last event."""

import threading
import time
from itertools import pairwise

import pytest
import torch

from serve_app.engine.clip import ClipDone, ClipFailed, ClipStarted, StepDone
from serve_app.engine.clip_state import Phase
from serve_app.engine.engine import Engine
from serve_app.engine.load import ModelSource
from serve_app.errors import (
    ClipCancelled,
    EngineError,
    GpuOutOfMemory,
    InvalidValue,
    LatentsNotFinite,
    ReplicaDraining,
    ReplicaLost,
)

from .conftest import Heard, MakeRequest, run_dry


def test_events_of_a_clip(engine: Engine, tiny: ModelSource, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of(steps=3), heard)
    assert heard.events == []
    run_dry(engine)

    started, *steps, done = heard.events
    assert started == ClipStarted("a")
    assert [(step.step, step.steps) for step in steps if isinstance(step, StepDone)] == [(1, 3), (2, 3), (3, 3)]
    assert all(step.eta_s > 0 for step in steps if isinstance(step, StepDone))
    spent = [step.gpu_s for step in steps if isinstance(step, StepDone)]
    assert spent == sorted(spent)
    assert isinstance(done, ClipDone)
    assert done is heard.done
    receipt = done.receipt
    assert (receipt.model, receipt.trained, receipt.device, receipt.dtype) == (
        tiny.name_or_path,
        False,
        "cpu",
        "float32",
    )
    assert (receipt.seed, receipt.steps, receipt.profile) == (7, 3, "exact")
    assert receipt.gpu_s > spent[-1]
    assert receipt.step_ms > 0
    assert receipt.decode_ms > 0
    assert receipt.versions["torch"] == torch.__version__


def test_eta_shrinks_to_the_decode(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of("first", frames=1), Heard())
    run_dry(engine)  # so that times of this shape are known and hold still
    step_s, decode_s = engine.speed.step_s(request_of(frames=1)), engine.speed.decode_s(request_of(frames=1))
    assert step_s > 0
    engine.speed.saw_step = lambda *_: None  # type: ignore[method-assign]
    engine.submit(request_of("second", frames=1, steps=4), heard)
    run_dry(engine)
    etas = [event.eta_s for event in heard.events if isinstance(event, StepDone)]
    assert etas == pytest.approx([3 * step_s + decode_s, 2 * step_s + decode_s, step_s + decode_s, decode_s])


def test_an_urgent_picture_passes_a_running_video(engine: Engine, request_of: MakeRequest) -> None:
    log: list[tuple[str, str]] = []

    def listener(name: str) -> Heard:
        heard = Heard()
        heard.events = _Logged(log, name)  # type: ignore[assignment]
        return heard

    engine.submit(request_of("video", frames=9, steps=6, deadline=2000.0), listener("video"))
    for _ in range(3):  # text and two steps
        engine.step()
    engine.submit(request_of("picture", frames=1, steps=2, deadline=1000.0), listener("picture"))
    run_dry(engine)

    names = [f"{name} {kind}" for name, kind in log]
    picture = names[names.index("picture ClipStarted") : names.index("picture ClipDone") + 1]
    assert names[:3] == ["video ClipStarted", "video StepDone", "video StepDone"]
    assert names[3] == "picture ClipStarted", "the picture starts at the very next step boundary"
    assert picture == ["picture ClipStarted", "picture StepDone", "picture StepDone", "picture ClipDone"]
    assert names[-1] == "video ClipDone"


class _Logged(list):
    def __init__(self, log: list[tuple[str, str]], name: str) -> None:
        self._log, self._name = log, name

    def append(self, event: object) -> None:
        self._log.append((self._name, type(event).__name__))


def test_a_picture_passes_a_decoding_video(engine: Engine, request_of: MakeRequest) -> None:
    video, picture = Heard(), Heard()
    engine.submit(request_of("video", frames=13, steps=1, deadline=2000.0), video)
    while engine.report().clips[0].phase != "decode":
        engine.step()
    engine.step()
    engine.submit(request_of("picture", frames=1, steps=1, deadline=1000.0), picture)
    for _ in range(3):  # text, step, decode
        engine.step()
    assert isinstance(picture.last, ClipDone)
    assert not any(isinstance(event, ClipDone) for event in video.events)
    run_dry(engine)
    assert video.done.frames.shape[0] == 13


@pytest.mark.parametrize("phase", [Phase.TEXT, Phase.DENOISE, Phase.DECODE])
def test_cancel_in_each_phase(engine: Engine, request_of: MakeRequest, phase: Phase) -> None:
    heard, other = Heard(), Heard()
    engine.submit(request_of("a", frames=9, steps=3), heard)
    engine.submit(request_of("b", frames=1, steps=2, deadline=2000.0), other)
    clip = engine._clips.by_id["a"]
    while clip.phase is not phase:
        engine.step()
    before = len(heard.steps)
    engine.cancel("a")
    engine.step()

    assert isinstance(heard.failed.error, ClipCancelled)
    assert len(heard.steps) == before
    assert clip.latents is clip.prompt_embeds is clip.decode is None, "nothing of it stays on the device"
    assert [progress.clip_id for progress in engine.report().clips] == ["b"]
    run_dry(engine)
    assert isinstance(other.last, ClipDone)


def test_cancel_of_what_is_not_alive_does_nothing(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.cancel("never seen")
    engine.submit(request_of(frames=1, steps=1), heard)
    run_dry(engine)
    engine.cancel("a")
    assert not engine.step()
    assert isinstance(heard.last, ClipDone)


def test_nan_ends_the_clip_at_its_step(
    engine: Engine, request_of: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, other = Heard(), Heard()
    engine.submit(request_of("bad", steps=5), heard)
    engine.submit(request_of("good", steps=5, deadline=2000.0), other)
    transformer = engine.runner.pipeline.transformer
    forward, calls = transformer.forward, 0

    def poisoned(*args: object, **kwargs: object) -> tuple[torch.Tensor]:
        nonlocal calls
        calls += 1
        (noise,) = forward(*args, **kwargs)
        if calls == 5:  # two branches a step: the third step of the first clip
            noise.view(-1)[123] = float("inf")
        return (noise,)

    monkeypatch.setattr(transformer, "forward", poisoned)
    run_dry(engine)
    assert isinstance(heard.failed.error, LatentsNotFinite)
    assert "after step 3 of 5" in heard.failed.error.message
    assert heard.steps == [1, 2]
    assert other.steps == [1, 2, 3, 4, 5]
    assert isinstance(other.last, ClipDone)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae.decoder"])
@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError("tried to allocate 20.00 GiB"), GpuOutOfMemory),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), EngineError),
    ],
)
def test_an_error_ends_one_clip_and_no_other(
    *,
    engine: Engine,
    request_of: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    raised: Exception,
    told: type[EngineError],
) -> None:
    bad, good = Heard(), Heard()
    engine.submit(request_of("bad", frames=1, steps=2), bad)
    engine.submit(request_of("good", frames=1, steps=2, deadline=2000.0), good)
    module = engine.runner.pipeline
    for name in part.split("."):
        module = getattr(module, name)
    forward, failed = module.forward, False

    def once(*args: object, **kwargs: object) -> object:
        nonlocal failed
        if not failed:
            failed = True
            raise raised
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", once)
    run_dry(engine)

    error = bad.failed.error
    assert type(error) is told
    assert "clip bad (64x96, 1 frames)" in error.message
    assert str(raised) in error.message
    assert isinstance(good.last, ClipDone)
    again = Heard()
    engine.submit(request_of("bad", frames=1, steps=2), again)
    run_dry(engine)
    assert isinstance(again.last, ClipDone)


def test_a_failing_listener_ends_its_clip_alone(engine: Engine, request_of: MakeRequest) -> None:
    heard, other = Heard(), Heard()

    def listen(event: object) -> None:
        heard(event)  # type: ignore[arg-type]
        if isinstance(event, StepDone):
            raise ValueError("no room in the mailbox")

    engine.submit(request_of("a", frames=1), listen)
    engine.submit(request_of("b", frames=1, deadline=2000.0), other)
    run_dry(engine)
    assert "no room in the mailbox" in heard.failed.error.message
    assert heard.steps == [1]
    assert isinstance(other.last, ClipDone)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", 6),
        ("frames", 0),
        ("width", 650),
        ("height", 0),
        ("steps", 0),
        ("guidance_scale", float("nan")),
        ("flow_shift", 0.0),
        ("seed", -1),
        ("profile", "turbo"),
    ],
)
def test_impossible_clips_are_refused(engine: Engine, request_of: MakeRequest, field: str, value: object) -> None:
    heard = Heard()
    with pytest.raises(InvalidValue, match=f"^{field} is {value!r}; it must be ") as refusal:
        engine.submit(request_of(**{field: value}), heard)
    assert refusal.value.param == field
    assert not engine.step()
    assert heard.events == []


def test_a_clip_id_is_alive_once(engine: Engine, request_of: MakeRequest) -> None:
    first = Heard()
    engine.submit(request_of(frames=1, steps=1), first)
    with pytest.raises(EngineError, match="alive already"):
        engine.submit(request_of(frames=1, steps=1), Heard())
    run_dry(engine)
    second = Heard()
    engine.submit(request_of(frames=1, steps=1), second)
    run_dry(engine)
    assert isinstance(first.last, ClipDone)
    assert isinstance(second.last, ClipDone)


def test_report(engine: Engine, request_of: MakeRequest) -> None:
    empty = engine.report()
    assert (empty.clips, empty.running, empty.backlog_gpu_s) == ((), None, 0)
    engine.submit(request_of("late", steps=4, deadline=2000.0), Heard())
    engine.submit(request_of("soon", steps=4, deadline=1000.0), Heard())
    before = engine.report()
    assert [clip.clip_id for clip in before.clips] == ["soon", "late"]
    assert before.backlog_gpu_s == pytest.approx(sum(clip.remaining_s for clip in before.clips))
    for _ in range(3):
        engine.step()
    running = engine.report().running
    assert running is not None
    assert (running.clip_id, running.phase, running.step, running.steps) == ("soon", "denoise", 2, 4)
    assert running.deadline == 1000.0
    run_dry(engine)
    assert engine.report() == empty


def test_the_report_counts_what_was_done(engine: Engine, request_of: MakeRequest) -> None:
    before, slow, urgent = engine.report().counts, Heard(), Heard()
    engine.submit(request_of("slow", steps=4, deadline=time.time() + 2000), slow)
    for _ in range(3):
        engine.step()
    engine.submit(request_of("urgent", steps=2, deadline=time.time() + 1), urgent)
    run_dry(engine)
    counts = engine.report().counts
    assert isinstance(slow.last, ClipDone)
    assert isinstance(urgent.last, ClipDone)
    assert counts.preemptions - before.preemptions == 1, "the device went to `urgent` and, when that was done, back"
    assert counts.busy_s - before.busy_s == pytest.approx(slow.last.receipt.gpu_s + urgent.last.receipt.gpu_s)
    assert counts.embeds_computed + counts.embeds_reused == before.embeds_computed + before.embeds_reused + 4, (
        "two prompts and two negative prompts"
    )
    assert counts.embeds_reused - before.embeds_reused >= 2, "`urgent` asks for the texts of `slow`"
    steps = [event for event in slow.events if isinstance(event, StepDone)]
    assert [later.gpu_s - step.gpu_s for step, later in pairwise(steps)] == pytest.approx(
        [later.step_s for later in steps[1:]], abs=0.05
    )


def test_the_thread_serves_many_submitters(engine: Engine, request_of: MakeRequest) -> None:
    """Clips come and are cancelled from several threads; each gets exactly one end, always from the engine's thread."""
    ends: dict[str, list[object]] = {}
    threads: set[str] = set()
    finished = threading.Semaphore(0)

    def listen(event: object) -> None:
        threads.add(threading.current_thread().name)
        if isinstance(event, ClipDone | ClipFailed):
            ends.setdefault(event.clip_id, []).append(event)
            finished.release()

    def submit(worker: int) -> None:
        for number in range(4):
            clip_id = f"{worker}-{number}"
            engine.submit(request_of(clip_id, frames=1, steps=2, seed=number), listen)
            if number == 3:
                engine.cancel(clip_id)

    engine.start()
    submitters = [threading.Thread(target=submit, args=(worker,)) for worker in range(4)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    for _ in range(16):
        assert finished.acquire(timeout=60)
    engine.close()

    assert {clip_id: len(events) for clip_id, events in ends.items()} == {
        f"{worker}-{number}": 1 for worker in range(4) for number in range(4)
    }
    assert threads == {"engine"}
    done = [event for events in ends.values() for event in events if isinstance(event, ClipDone)]
    assert len(done) >= 12, "only what was cancelled may fail"


def test_close_hands_clips_back(engine: Engine, request_of: MakeRequest) -> None:
    heard, waiting, started = Heard(), Heard(), threading.Event()

    def listen(event: object) -> None:
        heard(event)  # type: ignore[arg-type]
        if isinstance(event, StepDone):
            started.set()

    engine.submit(request_of("a", steps=1000), listen)
    engine.submit(request_of("b", deadline=2000.0), waiting)
    engine.start()
    assert started.wait(timeout=60)
    engine.close()

    assert isinstance(heard.failed.error, ReplicaDraining)
    assert heard.failed.error.retryable
    assert heard.failed.gpu_s > 0
    assert isinstance(waiting.failed.error, ReplicaDraining)
    assert not any(thread.name == "engine" for thread in threading.enumerate())
    with pytest.raises(ReplicaDraining):
        engine.submit(request_of("c"), Heard())
    engine.close()


def test_the_thread_survives_a_fault_of_its_own(engine: Engine, request_of: MakeRequest) -> None:
    """Should the policy itself fail, the clips that are alive are told, and the next one runs."""
    first, second = Heard(), Heard()
    policy, told = engine._turns.policy, threading.Event()

    class Broken:
        def pick(self, clips, now):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("no such clip")

    engine._turns.policy = Broken()  # type: ignore[assignment]
    engine.submit(request_of("a", frames=1, steps=1), lambda event: (first(event), told.set())[0])
    engine.start()
    assert told.wait(timeout=60)
    assert isinstance(first.failed.error, ReplicaLost)
    assert "ZeroDivisionError: no such clip" in first.failed.error.message
    engine._turns.policy = policy
    done = threading.Event()
    engine.submit(
        request_of("b", frames=1, steps=1),
        lambda event: (second(event), isinstance(event, ClipDone | ClipFailed) and done.set())[0],
    )
    assert done.wait(timeout=60)
    assert isinstance(second.last, ClipDone)


def test_check_tells_whether_clips_can_be_made(
    engine: Engine, request_of: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="not running"):
        engine.check()
    engine.start()
    engine.check()

    def broken(*_args: object, **_kwargs: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.runner.pipeline.transformer, "forward", broken)
    heard, ended = Heard(), threading.Event()
    engine.submit(request_of(frames=1), lambda event: (heard(event), isinstance(event, ClipFailed) and ended.set())[0])
    assert ended.wait(timeout=60)
    assert isinstance(heard.failed.error, ReplicaLost)
    with pytest.raises(EngineError, match="illegal memory access"):
        engine.check()


def test_an_idle_engine_sleeps(engine: Engine) -> None:
    """It waits to be woken, and does not poll."""
    steps: list[float] = []
    pick = engine._turns.next
    engine._turns.next = lambda: (steps.append(time.monotonic()), pick())[1]  # type: ignore[method-assign]
    engine.start()
    time.sleep(0.3)
    engine.close()
    assert len(steps) == 1

"""A clip that was stopped anywhere goes on elsewhere, to the same bits; and nothing about checkpoints ever harms a clip."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.engine import checkpointing, saving, snapshot
from serve_app.engine.checkpoints import Checkpoint, CheckpointStore
from serve_app.engine.clip import CheckpointSaved, ClipDone, ClipRequest, ClipStarted, StepDone
from serve_app.engine.clip_state import Phase
from serve_app.engine.denoise import TOLERANCE
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.engine import Engine
from serve_app.engine.kernels import _Plan
from serve_app.engine.load import ModelSource
from serve_app.errors import CheckpointUnavailable, ClipCancelled, InvalidValue, ReplicaDraining

from .conftest import EarliestDeadline, Heard, MakeRequest, TurnByTurn, run_dry, run_until

KEY = "job/clip-0"
STEPS = 5
MakeEngine = Callable[..., Engine]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


@pytest.fixture
def make_engine(tiny: ModelSource, store: CheckpointStore) -> Iterator[MakeEngine]:
    """Engines that share the store, as replicas do; they save every step unless told otherwise."""
    engines: list[Engine] = []

    def make(**arguments: object) -> Engine:
        values: dict[str, object] = {
            "device": "cpu",
            "checkpoints": store,
            "checkpoint_every_s": 0.0,
            "policy": EarliestDeadline(),
        }
        engines.append(Engine(tiny, **(values | arguments)))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def keyed(request_of: MakeRequest) -> Callable[..., ClipRequest]:
    def make(clip_id: str = "a", **changes: object) -> ClipRequest:
        return request_of(clip_id, **({"checkpoint_key": KEY, "steps": STEPS, "frames": 9} | changes))

    return make


def uninterrupted(engine: Engine, request: ClipRequest) -> np.ndarray:
    heard = Heard()
    engine.submit(replace(request, clip_id="whole", checkpoint_key=None), heard)
    run_dry(engine)
    return heard.done.frames


def saved_step(store: CheckpointStore, key: str = KEY) -> int:
    found = store.load(key)
    return 0 if found is None else found.header.step


def final_latents(store: CheckpointStore) -> torch.Tensor:
    """What is decoded: the checkpoint after the last step."""
    wait_until(lambda: saved_step(store) == STEPS)
    found = store.load(KEY)
    assert found is not None
    return found.tensors["latents"]


def wait_until(reached: Callable[[], bool], limit_s: float = 60.0) -> None:
    """For another thread, without giving the engine a step meanwhile."""
    limit = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.001)


# ---- stopped and resumed


@pytest.mark.parametrize("guidance_scale", [6.0, 1.0])
def test_killed_after_every_step(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest], guidance_scale: float
) -> None:
    """The first engine simply stops being stepped, as a killed one would; the second finds what it left."""
    second, request = make_engine(), keyed(guidance_scale=guidance_scale)
    whole = uninterrupted(second, request)
    for stop in range(1, STEPS + 1):
        store.delete("job")
        first, heard, resumed = make_engine(), Heard(), Heard()
        first.submit(request, heard)
        run_until(first, lambda: heard.steps[-1:] == [stop])  # noqa: B023
        wait_until(lambda: saved_step(store) == stop)  # noqa: B023
        first._clips.by_id.clear()

        second.submit(replace(request, clip_id=f"again-{stop}"), resumed)
        run_dry(second)
        started = resumed.events[0]
        assert isinstance(started, ClipStarted)
        assert started.resumed_from_step == stop
        assert resumed.steps == list(range(stop + 1, STEPS + 1)), "no step is done twice"
        np.testing.assert_array_equal(resumed.done.frames, whole)
        receipt = resumed.done.receipt
        assert receipt.resumed_from_steps == (stop,)
        assert 0 < started.earlier_gpu_s < receipt.gpu_s
        assert receipt.step_ms > 0
        wait_until(lambda: saved_step(store) == STEPS)


@pytest.mark.parametrize("paired_up_to", [0, 10**9], ids=["sequential", "paired"])
def test_killed_on_the_fast_path(
    make_engine: MakeEngine,
    store: CheckpointStore,
    keyed: Callable[..., ClipRequest],
    monkeypatch: pytest.MonkeyPatch,
    paired_up_to: int,
) -> None:
    """Table solver, guidance branches apart or in one forward: same kernels, so equal bits in latents and frames."""
    monkeypatch.setattr("serve_app.engine.kernels.PAIR_UP_TO_TOKENS", paired_up_to)
    second, request, whole = make_engine(exact_bits=False), keyed(), Heard()
    assert second.runner.kernels is not None
    second.submit(replace(request, clip_id="whole"), whole)
    run_dry(second)
    latents = final_latents(store)
    for stop in range(1, STEPS):
        store.delete("job")
        first, heard, resumed = make_engine(exact_bits=False), Heard(), Heard()
        first.submit(request, heard)
        run_until(first, lambda: heard.steps[-1:] == [stop])  # noqa: B023
        wait_until(lambda: saved_step(store) == stop)  # noqa: B023
        first._clips.by_id.clear()

        second.submit(replace(request, clip_id=f"again-{stop}"), resumed)
        run_dry(second)
        assert resumed.steps == list(range(stop + 1, STEPS + 1))
        assert torch.equal(final_latents(store), latents)
        np.testing.assert_array_equal(resumed.done.frames, whole.done.frames)


def test_killed_while_it_shared_forwards(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]
) -> None:
    """Two steps in one batch with another clip, the rest alone on another engine: equal to `TOLERANCE`, a rounding in frames."""
    second, request, whole = make_engine(exact_bits=False), keyed(), Heard()
    second.submit(replace(request, clip_id="whole"), whole)
    run_dry(second)
    latents = final_latents(store)
    store.delete("job")
    first, heard, resumed = make_engine(exact_bits=False, checkpoint_every_s=1e9), Heard(), Heard()
    assert first.runner.kernels is not None
    first.runner.kernels._plans[first.runner.step_shape(request)] = _Plan(paired=True, step_ms=10.0, batch_ms={2: 15.0})
    sizes: list[int] = []
    step = first.runner.denoise_step
    first.runner.denoise_step = lambda clips: (sizes.append(len(clips)), step(clips))[1]  # type: ignore[method-assign]
    first.submit(request, heard)
    first.submit(keyed("other", checkpoint_key=None, steps=60, seed=8, guidance_scale=3.0), Heard())
    run_until(first, lambda: sizes.count(2) == 2)
    first.drain(timeout_s=60)
    stop = saved_step(store)
    assert 2 <= stop < STEPS

    second.submit(replace(request, clip_id="again"), resumed)
    run_dry(second)
    assert resumed.steps == list(range(stop + 1, STEPS + 1))
    assert (final_latents(store) - latents).abs().max() <= TOLERANCE * latents.abs().max()
    difference = np.abs(resumed.done.frames.astype(int) - whole.done.frames.astype(int))
    assert difference.max() <= 1


def test_drained_at_every_unit(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]
) -> None:
    """Text, each step, each latent frame of the decode: whenever it is, the drained clip goes on to the same bits."""
    second, request = make_engine(), keyed()
    whole = uninterrupted(second, request)
    for units in range(STEPS + 3):
        store.delete("job")
        first, heard, resumed = make_engine(checkpoint_every_s=1e9), Heard(), Heard()
        first.submit(request, heard)
        run_until(first, lambda: not first._clips.by_id["a"].loading_until)  # noqa: B023
        for _ in range(units):  # after the text, which ran when the store had answered
            first.step()
        steps = min(units, STEPS)
        first.drain(timeout_s=60)
        assert isinstance(heard.failed.error, ReplicaDraining)
        assert saved_step(store) == steps
        wanted = f"go on after step {steps}" if steps else "starts again"
        assert wanted in heard.failed.error.message
        assert [type(event) for event in heard.events].count(CheckpointSaved) == (1 if steps else 0)

        second.submit(replace(request, clip_id=f"again-{units}"), resumed)
        run_dry(second)
        assert resumed.steps == list(range(steps + 1, STEPS + 1))
        wait_until(lambda: saved_step(store) == STEPS)
        np.testing.assert_array_equal(resumed.done.frames, whole)


def test_a_clip_that_moves_at_every_step(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]
) -> None:
    """Handed from engine to engine, one step on each: same bits, and its cost is that of the useful work."""
    request = keyed()
    whole, spent = uninterrupted(make_engine(), request), [0.0]
    for step in range(1, STEPS + 1):
        engine, heard = make_engine(checkpoint_every_s=1e9), Heard()
        engine.submit(request, heard)
        run_until(engine, lambda: bool(heard.steps))  # noqa: B023
        engine.drain(timeout_s=60)
        assert heard.steps == [step]
        assert heard.failed.gpu_s > spent[-1]
        spent.append(heard.failed.gpu_s)
    engine, heard = make_engine(), Heard()
    engine.submit(request, heard)
    run_dry(engine)
    np.testing.assert_array_equal(heard.done.frames, whole)
    assert heard.done.receipt.resumed_from_steps == (1, 2, 3, 4, 5)
    assert heard.done.receipt.gpu_s > spent[-1]


def test_saving_changes_no_bit(make_engine: MakeEngine, keyed: Callable[..., ClipRequest]) -> None:
    engine, heard = make_engine(), Heard()
    whole = uninterrupted(engine, keyed())
    engine.submit(keyed(), heard)
    run_dry(engine)
    np.testing.assert_array_equal(heard.done.frames, whole)


def test_the_decode_alone_can_be_repeated(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]
) -> None:
    """Where the frames were lost after the clip was done, the final latents are still there."""
    engine, first, second = make_engine(checkpoint_every_s=1e9), Heard(), Heard()
    engine.submit(keyed(), first)
    run_dry(engine)
    wait_until(lambda: saved_step(store) == STEPS)
    found = store.load(KEY)
    assert found is not None
    assert found.tensors.keys() == {"latents"}
    engine.submit(keyed("b"), second)
    run_dry(engine)
    assert second.steps == []
    np.testing.assert_array_equal(second.done.frames, first.done.frames)


def test_two_jobs_interleaved_and_moved(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]
) -> None:
    requests = [
        keyed("a", checkpoint_key="a/0", seed=1),
        keyed("b", checkpoint_key="b/0", seed=2, frames=13, steps=3, width=96),
    ]
    second = make_engine(policy=TurnByTurn())
    whole = [uninterrupted(second, request) for request in requests]
    for units in range(2, 16):
        store.delete("a")
        store.delete("b")
        first, heard, resumed = make_engine(policy=TurnByTurn()), Heard(), [Heard(), Heard()]
        for request in requests:
            first.submit(request, heard)
        run_until(first, lambda: not any(clip.loading_until for clip in first._clips.by_id.values()))  # noqa: B023
        for _ in range(units):
            first.step()
        first.drain(timeout_s=60)
        for request, each in zip(requests, resumed, strict=True):
            second.submit(request, each)
        run_dry(second)
        wait_until(lambda: saved_step(store, "a/0") == STEPS and saved_step(store, "b/0") == 3)
        for frames, each in zip(whole, resumed, strict=True):
            np.testing.assert_array_equal(each.done.frames, frames)


# ---- when checkpoints are made


@pytest.fixture
def one_second_each(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], Engine]:
    """An engine whose units last one device second each, and which knows it of its steps."""

    def pace(engine: Engine) -> Engine:
        monkeypatch.setattr(DeviceSpan, "seconds", property(lambda _self: 1.0))
        monkeypatch.setattr(engine.speed, "step_s", lambda _request: 1.0)
        return engine

    return pace


def saves(heard: Heard) -> list[CheckpointSaved]:
    return [event for event in heard.events if isinstance(event, CheckpointSaved)]


def test_saved_by_device_time(
    make_engine: MakeEngine,
    store: CheckpointStore,
    keyed: Callable[..., ClipRequest],
    one_second_each: Callable[[Engine], Engine],
) -> None:
    """About every `checkpoint_every_s`, and never with more than that and a step unsaved; and at the end."""
    engine, heard = one_second_each(make_engine(checkpoint_every_s=3.5)), Heard()
    engine.submit(keyed(steps=12), heard)
    run_until(engine, lambda: 11 in [event.step for event in saves(heard)])
    run_dry(engine)
    wait_until(lambda: saved_step(store) == 12)  # whether the clip still hears of it or has ended, it is there
    saved = saves(heard)[:3]
    assert [event.step for event in saved] == [3, 7, 11]
    assert [event.gpu_s for event in saved] == pytest.approx([4, 8, 12]), "text is a second too"


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_kill_costs_no_more_where_clips_interleave(
    make_engine: MakeEngine,
    store: CheckpointStore,
    keyed: Callable[..., ClipRequest],
    one_second_each: Callable[[Engine], Engine],
    number: int,
) -> None:
    """Killed at any moment, the engine leaves in the store all but `checkpoint_every_s` and a step of all clips' work."""
    every_s, step_s, steps = 4.0, 1.0, 9
    engine = one_second_each(make_engine(checkpoint_every_s=every_s, policy=TurnByTurn()))
    heard = {f"job-{index}/clip-0": Heard() for index in range(number)}
    for index, (key, each) in enumerate(heard.items()):
        engine.submit(keyed(f"c{index}", checkpoint_key=key, steps=steps + index, frames=1), each)

    def at_risk_s() -> float:
        spent = {
            key: [event.gpu_s for event in each.events if isinstance(event, StepDone)] for key, each in heard.items()
        }
        found = {key: store.load(key) for key in heard}
        return sum(
            seconds[-1] - (at.header.gpu_s if (at := found[key]) else 0.0) for key, seconds in spent.items() if seconds
        )

    run_until(engine, lambda: all(each.events for each in heard.values()))
    while not all(each.steps[-1:] == [steps + index] for index, each in enumerate(heard.values())):
        assert engine.step()
        wait_until(lambda: at_risk_s() <= every_s + step_s, limit_s=5.0)  # the store's thread writes meanwhile
    wait_until(lambda: at_risk_s() == 0.0)
    run_dry(engine)
    total_s = sum(each.done.receipt.gpu_s for each in heard.values())
    saved = sum(len(saves(each)) for each in heard.values())
    assert saved <= total_s / (every_s / number) + number, "each saves the most there is, so not at every step"


def test_a_clip_that_waits_is_saved_too(
    make_engine: MakeEngine, keyed: Callable[..., ClipRequest], one_second_each: Callable[[Engine], Engine]
) -> None:
    """What it did before short work came in between is most of what a kill would cost."""
    engine, video, picture = one_second_each(make_engine(checkpoint_every_s=20.5)), Heard(), Heard()
    engine.submit(keyed("video", steps=40), video)
    run_until(engine, lambda: video.steps[-1:] == [12])
    engine.submit(keyed("picture", checkpoint_key="other/0", steps=9, frames=1, deadline=1.0), picture)
    run_until(engine, lambda: bool(picture.steps))
    left_at = video.steps[-1]
    run_until(engine, lambda: bool(saves(video)))
    assert [event.step for event in saves(video)] == [left_at]
    assert video.steps[-1] == left_at, "it did not have to run for that"
    assert saves(picture) == []


@pytest.mark.parametrize("arguments", [{"checkpoint_every_s": None}, {"checkpoints": None}])
def test_off(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest], arguments: dict[str, object]
) -> None:
    engine, heard = make_engine(**arguments), Heard()
    engine.submit(keyed(), heard)
    run_dry(engine)
    assert isinstance(heard.last, ClipDone)
    assert store.list() == []


def test_no_key_no_checkpoint(make_engine: MakeEngine, store: CheckpointStore, request_of: MakeRequest) -> None:
    engine, heard = make_engine(), Heard()
    engine.submit(request_of(), heard)
    run_dry(engine)
    assert isinstance(heard.last, ClipDone)
    assert store.list() == []


def test_an_unsafe_key_is_refused(make_engine: MakeEngine, keyed: Callable[..., ClipRequest]) -> None:
    with pytest.raises(InvalidValue, match="checkpoint_key"):
        make_engine().submit(keyed(checkpoint_key="../elsewhere"), Heard())


def test_latents_that_are_not_finite_are_never_saved(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, heard = make_engine(), Heard()
    step = engine.runner.denoise_step

    def poisoned(clips):  # type: ignore[no-untyped-def]
        finite = step(clips)
        if clips[0].launched_steps == 3:
            clips[0].latents.view(-1)[5] = float("nan")
            return torch.tensor([False])
        return finite

    monkeypatch.setattr(engine.runner, "denoise_step", poisoned)
    engine.submit(keyed(), heard)
    run_dry(engine)
    assert heard.failed.error.code == "latents_not_finite"
    wait_until(lambda: saved_step(store) == 2)


# ---- checkpoints that cannot be used


CHANGES = {
    "prompt": "waves",
    "negative_prompt": "",
    "width": 96,
    "height": 64,
    "frames": 5,
    "steps": 4,
    "guidance_scale": 5.0,
    "flow_shift": 3.0,
    "seed": 8,
}


@pytest.mark.parametrize("field", CHANGES)
def test_of_another_request(
    make_engine: MakeEngine,
    store: CheckpointStore,
    keyed: Callable[..., ClipRequest],
    caplog: pytest.LogCaptureFixture,
    field: str,
) -> None:
    engine, first, second = make_engine(), Heard(), Heard()
    engine.submit(keyed(), first)
    run_until(engine, lambda: len(first.steps) == 2)
    engine.drain(timeout_s=60)
    changed, other = keyed("b", **{field: CHANGES[field]}), make_engine()
    other.submit(changed, second)
    with caplog.at_level(logging.WARNING):
        run_dry(other)
    assert f"is of another clip: other {field}" in caplog.text
    assert second.steps == list(range(1, changed.steps + 1))
    np.testing.assert_array_equal(second.done.frames, uninterrupted(other, changed))


def test_of_another_model(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest], tiny: ModelSource
) -> None:
    engine, heard = make_engine(), Heard()
    found = _some_checkpoint(make_engine, store, keyed)
    header = replace(found.header, made_from=found.header.made_from | {"model_revision": "another"})
    store.save(Checkpoint(header, found.tensors))
    engine.submit(keyed(), heard)
    run_dry(engine)
    assert heard.steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "text", "tensor missing"])
def test_damaged(
    *,
    make_engine: MakeEngine,
    store: CheckpointStore,
    keyed: Callable[..., ClipRequest],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    found = _some_checkpoint(make_engine, store, keyed)
    path = tmp_path / "checkpoints" / f"{KEY}.safetensors"
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "tensor missing":
        tensors = {name: tensor for name, tensor in found.tensors.items() if name != "solver.last_x0"}
        store.save(Checkpoint(found.header, tensors))
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"torn": data[:middle], "empty": b"", "flipped": flipped, "text": b"not found\n"}[damage])
    engine, heard = make_engine(checkpoint_every_s=1e9), Heard()
    engine.submit(keyed(), heard)
    run_until(engine, lambda: heard.steps == [1])
    assert store.list() == [], "what cannot be used is removed"
    run_dry(engine)
    assert f"checkpoint {KEY}" in caplog.text
    assert heard.steps == list(range(1, STEPS + 1))
    assert heard.done.receipt.resumed_from_steps == ()
    assert engine.report().checkpoint_failures == 0, "the store is well"
    run_until(engine, lambda: engine.report().counts.checkpoints == 1)  # the final latents


def _some_checkpoint(make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]) -> Checkpoint:
    engine, heard = make_engine(), Heard()
    engine.submit(keyed(), heard)
    run_until(engine, lambda: len(heard.steps) == 2)
    engine.drain(timeout_s=60)
    found = store.load(KEY)
    assert found is not None
    assert found.header.step == 2
    return found


# ---- stores in trouble


class Troubled(CheckpointStore):
    """A folder that fails while `broken`, and that answers no faster than `gate` opens."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()
        self.tried = 0

    def save(self, checkpoint: Checkpoint) -> int:
        self.tried += 1
        self.gate.wait()
        if self.broken:
            raise CheckpointUnavailable("no space left on device")
        return super().save(checkpoint)

    def load(self, key: str) -> Checkpoint | None:
        self.gate.wait()
        if self.broken:
            raise CheckpointUnavailable("connection refused")
        return super().load(key)


@pytest.fixture
def troubled(tmp_path: Path) -> Iterator[Troubled]:
    store = Troubled(str(tmp_path / "checkpoints"))
    yield store
    store.gate.set()


def test_a_store_that_fails_harms_no_clip(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest]
) -> None:
    troubled.broken = True
    engine, heard = make_engine(checkpoints=troubled), Heard()
    whole = uninterrupted(engine, keyed())
    engine.submit(keyed(), heard)
    run_until(engine, lambda: len(heard.steps) == 3 and troubled.tried >= 1)
    run_until(engine, lambda: engine.report().checkpoint_failures >= 2)  # reading, and a write
    assert not any(isinstance(event, CheckpointSaved) for event in heard.events)
    troubled.broken = False
    run_dry(engine)
    np.testing.assert_array_equal(heard.done.frames, whole)
    wait_until(lambda: saved_step(troubled) == STEPS)


def test_the_final_latents_are_tried_again(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest]
) -> None:
    """Nothing later makes up for them. The decode does not wait: the clip is done before the store is well again."""
    engine, first, second = make_engine(checkpoints=troubled, checkpoint_every_s=1e9), Heard(), Heard()
    engine.submit(keyed(), first)
    run_until(engine, lambda: first.steps[-1:] == [1])
    troubled.broken = True
    run_dry(engine)
    assert isinstance(first.last, ClipDone)
    wait_until(lambda: engine.report().checkpoint_failures >= 1)
    assert troubled.list() == []
    troubled.broken = False
    wait_until(lambda: saved_step(troubled) == STEPS)
    engine.submit(keyed("b"), second)
    run_dry(engine)
    assert second.steps == [], "only the decode is done again"
    np.testing.assert_array_equal(second.done.frames, first.done.frames)


def test_what_is_cancelled_is_not_tried_again(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest]
) -> None:
    engine, heard, other = make_engine(checkpoints=troubled, checkpoint_every_s=1e9), Heard(), Heard()
    engine.submit(keyed(), heard)
    run_until(engine, lambda: heard.steps[-1:] == [1])
    troubled.broken = True
    run_until(engine, lambda: heard.steps[-1:] == [STEPS])
    wait_until(lambda: engine.report().checkpoint_failures >= 1)
    engine.cancel("a")
    run_dry(engine)
    assert isinstance(heard.failed.error, ClipCancelled)
    troubled.broken = False
    engine.submit(keyed("other", checkpoint_key="other/0", frames=1), other)
    run_dry(engine)
    wait_until(lambda: saved_step(troubled, "other/0") == STEPS)  # the same thread wrote it, after it was done with `a`
    assert saved_step(troubled) == 0


def test_a_slow_store_is_not_waited_for(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest]
) -> None:
    """While one write hangs, the clip goes on, and of what piles up only the newest is kept and written."""
    engine, heard = make_engine(checkpoints=troubled), Heard()
    engine.submit(keyed(steps=20), heard)
    run_until(engine, lambda: not engine._clips.by_id["a"].loading_until)
    troubled.gate.clear()
    run_dry(engine)
    assert isinstance(heard.last, ClipDone)
    assert troubled.tried == 1
    troubled.gate.set()
    wait_until(lambda: saved_step(troubled) == 20)
    assert troubled.tried == 2


def test_a_store_that_never_answers(
    make_engine: MakeEngine,
    troubled: Troubled,
    keyed: Callable[..., ClipRequest],
    request_of: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clips without a key do not even notice; the one that waits starts when its time is up, and the thread wakes for it."""
    monkeypatch.setattr(checkpointing, "_CLOSE_LIMIT_S", 0.1)
    troubled.gate.clear()
    engine, ended = make_engine(checkpoints=troubled), threading.Event()
    keyed_clip, other = Heard(), Heard()
    engine.submit(
        keyed("a", frames=1), lambda event: (keyed_clip(event), isinstance(event, ClipDone) and ended.set())[0]
    )
    engine.submit(request_of("b", frames=1), other)
    run_until(engine, lambda: "b" not in engine._clips.by_id)
    assert isinstance(other.last, ClipDone)
    assert keyed_clip.events == []
    engine._clips.by_id["a"].loading_until = time.monotonic() + 0.3
    engine.start()
    assert ended.wait(timeout=60)
    assert keyed_clip.done.receipt.resumed_from_steps == ()
    assert engine.report().checkpoint_failures == 1
    engine.close()


def test_an_answer_that_comes_too_late_is_dropped(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    _some_checkpoint(make_engine, troubled, keyed)
    monkeypatch.setattr(saving, "LOAD_LIMIT_S", 0.0)
    troubled.gate.clear()
    engine, heard = make_engine(checkpoints=troubled, checkpoint_every_s=1e9), Heard()
    engine.submit(keyed(), heard)
    run_until(engine, lambda: len(heard.steps) == 1)
    troubled.gate.set()
    wait_until(lambda: not any(thread.name == "checkpoint-reader" for thread in threading.enumerate()))
    run_dry(engine)
    assert heard.steps == list(range(1, STEPS + 1))


def test_no_room_for_a_snapshot(
    make_engine: MakeEngine, keyed: Callable[..., ClipRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(_tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError("cannot pin")

    monkeypatch.setattr(snapshot, "_to_host", no_memory)
    engine, heard = make_engine(), Heard()
    engine.submit(keyed(steps=3), heard)
    run_dry(engine)
    assert isinstance(heard.last, ClipDone)
    assert engine.report().checkpoint_failures == 3


# ---- two with one key, cancel, drain


def test_of_two_with_one_key_the_later_writes(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest]
) -> None:
    """A superseded attempt that has not noticed does not write over its successor's checkpoint."""
    engine, old, new = make_engine(), Heard(), Heard()
    engine.submit(keyed("old", deadline=1000.0), old)
    run_until(engine, lambda: len(old.steps) == 2)
    wait_until(lambda: saved_step(store) == 2)
    engine.submit(keyed("new", deadline=2000.0), new)
    run_until(engine, lambda: len(old.steps) == STEPS)
    time.sleep(0.05)
    assert saved_step(store) == 2, "the old one writes no more"
    run_dry(engine)
    np.testing.assert_array_equal(old.done.frames, new.done.frames)
    assert new.done.receipt.resumed_from_steps == (2,)
    wait_until(lambda: saved_step(store) == STEPS)


def test_what_is_cancelled_is_not_written_any_more(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest]
) -> None:
    """Its job removes its checkpoints: what came to lie there afterwards would stay for ever."""
    engine, heard, other = make_engine(checkpoints=troubled), Heard(), Heard()
    engine.submit(keyed("other", checkpoint_key="other/0", frames=1, deadline=1.0), other)
    engine.submit(keyed(), heard)
    run_until(engine, lambda: not any(clip.loading_until for clip in engine._clips.by_id.values()))
    troubled.gate.clear()  # the other's first write hangs, so those of `a` wait
    run_until(engine, lambda: len(heard.steps) == 2)
    engine.cancel("a")
    run_dry(engine)
    assert isinstance(heard.failed.error, ClipCancelled)
    troubled.gate.set()
    wait_until(lambda: saved_step(troubled, "other/0") == STEPS)
    assert saved_step(troubled) == 0


def test_drain_in_the_engines_own_thread(
    make_engine: MakeEngine, store: CheckpointStore, keyed: Callable[..., ClipRequest], request_of: MakeRequest
) -> None:
    engine, running = make_engine(checkpoint_every_s=1e9), threading.Event()
    heard = {name: Heard() for name in ("keyed", "keyless", "waiting")}

    def listen(event: object) -> None:
        heard["keyed"](event)  # type: ignore[arg-type]
        if isinstance(event, StepDone) and event.step == 2:
            running.set()

    engine.start()
    engine.submit(keyed("keyed", steps=1000, deadline=1.0), listen)
    engine.submit(request_of("keyless", steps=1000), heard["keyless"])
    engine.submit(keyed("waiting", checkpoint_key="other/0", deadline=9999.0), heard["waiting"])
    assert running.wait(timeout=60)
    engine.drain(timeout_s=60)

    done = heard["keyed"].steps[-1]
    assert saved_step(store) == done
    for each in heard.values():
        assert isinstance(each.failed.error, ReplicaDraining)
        assert each.failed.error.retryable
    assert isinstance(heard["keyed"].events[-2], CheckpointSaved)
    with pytest.raises(ReplicaDraining):
        engine.submit(request_of("late"), Heard())
    engine.drain(timeout_s=60)


def test_drain_gives_up_on_a_store_that_hangs(
    make_engine: MakeEngine, troubled: Troubled, keyed: Callable[..., ClipRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_CLOSE_LIMIT_S", 0.1)
    engine, heard, running = make_engine(checkpoints=troubled, checkpoint_every_s=1e9), Heard(), threading.Event()
    engine.start()
    engine.submit(keyed(steps=1000), lambda event: (heard(event), isinstance(event, StepDone) and running.set())[0])
    assert running.wait(timeout=60)
    troubled.gate.clear()
    engine.drain(timeout_s=0.3)
    assert isinstance(heard.failed.error, ReplicaDraining)
    assert "starts again" in heard.failed.error.message
    engine.close()


def test_drain_lets_what_is_all_launched_finish(make_engine: MakeEngine, keyed: Callable[..., ClipRequest]) -> None:
    engine, heard = make_engine(), Heard()
    engine.submit(keyed(frames=1), heard)
    run_until(engine, lambda: engine._clips.by_id["a"].phase is Phase.DECODE)
    settle = engine._settle
    engine._settle = lambda *, leave: None  # type: ignore[method-assign, assignment]
    engine.step()
    assert engine._clips.by_id["a"].phase is Phase.DONE
    engine._settle = settle  # type: ignore[method-assign]
    engine.drain(timeout_s=60)
    assert isinstance(heard.last, ClipDone)

"""One tiny model for the session, and engines on it that a test steps by hand."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import WanPipeline

from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipRequest, StepDone
from serve_app.engine.engine import Engine
from serve_app.engine.load import ModelSource, load_pipeline
from serve_app.engine.tiny import build_tiny_model
from serve_app.scheduling.steps import Runnable


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread and lose much where tests share cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return ModelSource(str(folder), None, trained=False)


@pytest.fixture(scope="session")
def pipeline(tiny: ModelSource) -> WanPipeline:
    """The plain pipeline of the same weights, apart from any engine's."""
    return load_pipeline(tiny, "cpu", torch.float32)


@pytest.fixture
def engine(tiny: ModelSource) -> Iterator[Engine]:
    """A fresh engine; the test calls `step` itself, so that it can look between two steps."""
    engine = Engine(tiny, device="cpu", policy=EarliestDeadline())  # type: ignore[arg-type]
    yield engine
    engine.close()


@dataclass
class Heard:
    """All events of one clip, in order."""

    events: list[ClipEvent] = field(default_factory=list)

    def __call__(self, event: ClipEvent) -> None:
        self.events.append(event)

    @property
    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, StepDone)]

    @property
    def last(self) -> ClipDone | ClipFailed:
        """The one terminal event: fails the test if there is none, more than one, or anything after it."""
        ends = [event for event in self.events if isinstance(event, ClipDone | ClipFailed)]
        assert len(ends) == 1, self.events
        assert self.events[-1] is ends[0], self.events
        return ends[0]

    @property
    def done(self) -> ClipDone:
        assert isinstance(self.last, ClipDone), self.last
        return self.last

    @property
    def failed(self) -> ClipFailed:
        assert isinstance(self.last, ClipFailed), self.last
        return self.last


class EarliestDeadline:
    """A policy that does what a test's deadlines say, whatever the moment."""

    def pick(self, clips: Sequence[Runnable], now: float) -> str:
        return min(clips, key=lambda clip: (clip.deadline, clip.arrived_at)).clip_id


class TurnByTurn:
    """A policy that gives each clip a unit in turn."""

    def pick(self, clips: Sequence[Runnable], now: float) -> str:
        return min(clips, key=lambda clip: clip.last_ran_at).clip_id


MakeRequest = Callable[..., ClipRequest]


@pytest.fixture
def request_of() -> MakeRequest:
    def make(clip_id: str = "a", **changes: object) -> ClipRequest:
        values: dict[str, object] = {
            "prompt": "a red fox in the snow",
            "negative_prompt": "blurry, text",
            "width": 64,
            "height": 96,
            "frames": 5,
            "steps": 4,
            "guidance_scale": 6.0,
            "flow_shift": 2.0,
            "seed": 7,
            "deadline": 1000.0,
        }
        return ClipRequest(clip_id=clip_id, **(values | changes))  # type: ignore[arg-type]

    return make


def run_dry(engine: Engine) -> None:
    """Step until no clip is alive."""
    run_until(engine, lambda: not engine._clips.by_id)
    while engine.step():
        pass


def run_until(engine: Engine, reached: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Step until `reached`; where the engine waits for another thread, so does this."""
    limit = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < limit, f"not reached in {limit_s} s: {engine.report()}"
        if not engine.step():
            time.sleep(0.001)

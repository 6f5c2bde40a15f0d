"""One engine on the bundled model for the session, and its pictures read back by plain image analysis."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from benchmarks.quality import request_of, run
from serve_app.engine.engine import Engine
from serve_app.engine.load import WAN_SHAPES, ModelSource
from tests.pictures import one_thing_at_a_place
from training.captions import HeldOut
from training.reader import Reader

Draw = Callable[..., np.ndarray]
BUNDLED = ModelSource(str(WAN_SHAPES), None, trained=True)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    engine = Engine(BUNDLED, device="cpu", checkpoint_every_s=None)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def draw(engine: Engine) -> Draw:
    """Frames for a held-out prompt, with the values of its preset but for those given."""
    numbers = itertools.count()

    def draw(item: HeldOut, on: Engine = engine, **changes: object) -> np.ndarray:
        request = dataclasses.replace(request_of(item), **({"clip_id": f"clip-{next(numbers)}"} | changes))  # type: ignore[arg-type]
        return run(on, request).frames

    return draw


@pytest.fixture(scope="session")
def reader() -> Reader:
    return Reader()


@pytest.fixture(scope="session")
def pictures() -> list[HeldOut]:
    return one_thing_at_a_place(6)

"""Previews: only for whoever listens, seldom, a true picture, and no bit of the clip changes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from serve_app.engine.clip import ClipDone, Preview, StepDone
from serve_app.engine.engine import Engine
from serve_app.engine.load import ModelSource
from serve_app.engine.preview import to_jpeg

from .conftest import Heard, MakeRequest, run_dry, run_until


def previews(heard: Heard) -> list[Preview]:
    return [event for event in heard.events if isinstance(event, Preview)]


def run_with_previews(engine: Engine, heard: Heard) -> None:
    """The pictures are packed in a thread of their own, so give it time before each step."""
    while engine._clips.by_id:
        engine._previews._packing.submit(lambda: None).result(timeout=60)
        if not engine.step():
            break


def test_every_few_steps_while_somebody_listens(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of(steps=23, frames=5), heard)
    run_until(engine, lambda: len(heard.steps) == 6)
    engine.listen("a", True)
    run_until(engine, lambda: len(heard.steps) == 17)
    engine.listen("a", False)
    run_with_previews(engine, heard)
    assert [preview.step for preview in previews(heard)] == [10, 15]
    at = [heard.events.index(preview) for preview in previews(heard)]
    told = [
        heard.events.index(event) for event in heard.events if isinstance(event, StepDone) and event.step in (10, 15)
    ]
    assert all(step < preview for step, preview in zip(told, at, strict=True))


def test_no_bit_of_the_clip_changes(engine: Engine, request_of: MakeRequest, tiny: ModelSource) -> None:
    quiet, heard = Heard(), Heard()
    engine.submit(request_of("quiet", frames=9, steps=6), quiet)
    run_dry(engine)
    eager = Engine(tiny, device="cpu", preview_every_steps=1)
    eager.submit(request_of("heard", frames=9, steps=6), heard)
    eager.listen("heard", True)
    run_with_previews(eager, heard)
    assert [preview.step for preview in previews(heard)] == [1, 2, 3, 4, 5], (
        "after the last step the frames come anyway"
    )
    np.testing.assert_array_equal(heard.done.frames, quiet.done.frames)
    assert heard.done.receipt.gpu_s > 0
    eager.close()


def test_it_shows_the_predicted_first_frame(tiny: ModelSource, request_of: MakeRequest) -> None:
    """What diffusers' own VAE makes of the first latent frame of its scheduler's own prediction."""
    engine, heard = Engine(tiny, device="cpu", preview_every_steps=3), Heard()
    engine.submit(request_of(frames=5, steps=4, width=640, height=480), heard)
    engine.listen("a", True)
    run_until(engine, lambda: len(heard.steps) == 3)
    x0 = engine._clips.by_id["a"].solver.last_x0.clone()  # type: ignore[union-attr]
    vae = engine.runner.pipeline.vae
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.inference_mode():
        plain = vae.decode((x0 * std + mean)[:, :, :1], return_dict=False)[0]
    wanted = ((plain[0, :, 0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    run_with_previews(engine, heard)
    (preview,) = previews(heard)
    assert preview.jpeg == to_jpeg(wanted)
    assert len(preview.jpeg) < 60_000
    picture = Image.open(io.BytesIO(preview.jpeg))
    assert (picture.format, picture.size) == ("JPEG", (320, 240))
    engine.close()


def test_one_that_fails_harms_nothing_but_itself(
    engine: Engine, request_of: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    monkeypatch.setattr("serve_app.engine.preview.launch_preview", no_memory)
    heard = Heard()
    engine.submit(request_of(steps=12), heard)
    engine.listen("a", True)
    run_dry(engine)
    assert isinstance(heard.last, ClipDone)
    assert previews(heard) == []


def test_none_without_room(engine: Engine, request_of: MakeRequest) -> None:
    heard = Heard()
    engine.submit(request_of(steps=12), heard)
    engine.listen("a", True)
    engine.memory.has_room_for_preview = lambda _request: False  # type: ignore[method-assign]
    run_with_previews(engine, heard)
    assert isinstance(heard.last, ClipDone)
    assert previews(heard) == []


def test_listening_to_what_is_not_alive_does_nothing(engine: Engine) -> None:
    engine.listen("never seen", True)

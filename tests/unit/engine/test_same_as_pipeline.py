"""The engine's own loop gives what WanPipeline gives, bit for bit (float32 on a CPU, guidance branches one after the other)."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from serve_app.engine.clip import ClipRequest
from serve_app.engine.engine import Engine

from .conftest import Heard, MakeRequest, run_dry


def by_pipeline(pipeline: WanPipeline, request: ClipRequest) -> tuple[torch.Tensor, np.ndarray]:
    """Latents after the last step, and frames (uint8 RGB), as plain diffusers makes them."""
    kept: list[torch.Tensor] = []

    def keep(_pipe: WanPipeline, _step: int, _timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        kept.append(tensors["latents"])
        return tensors

    shifted = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=request.flow_shift)
    plain = WanPipeline(**{**pipeline.components, "scheduler": shifted})
    plain.set_progress_bar_config(disable=True)
    video = plain(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
        callback_on_step_end=keep,
    ).frames[0]
    return kept[-1], np.round(video * 255.0).astype(np.uint8)


def by_engine(engine: Engine, request: ClipRequest) -> tuple[torch.Tensor, np.ndarray]:
    """The same by the engine; the latents are taken when the last step is told."""
    heard, kept = Heard(), []

    def listen(event: object) -> None:
        heard(event)  # type: ignore[arg-type]
        if heard.steps and heard.steps[-1] == request.steps and not kept:
            kept.append(engine._clips.by_id[request.clip_id].latents)

    engine.submit(request, listen)
    run_dry(engine)
    return kept[0], heard.done.frames


CASES = {
    "image": {"frames": 1, "steps": 6},
    "video": {"frames": 9, "steps": 5},
    "two frames of latents, other shape, shift and seed": {
        "frames": 5,
        "width": 96,
        "height": 64,
        "flow_shift": 5.0,
        "seed": 2**63 - 1,
    },
    "one step": {"steps": 1},
    "guidance 1.0 is no guidance": {"guidance_scale": 1.0},
    "guidance below 1": {"guidance_scale": 0.5},
    "little guidance": {"guidance_scale": 1.5},
    "no negative prompt": {"negative_prompt": ""},
    "prompt longer than 512 tokens": {"prompt": "a red fox runs " * 400},
    "a preset's true size": {"width": 640, "height": 480, "frames": 5, "steps": 2},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_same_latents_and_frames(
    engine: Engine, pipeline: WanPipeline, request_of: MakeRequest, changes: dict[str, object]
) -> None:
    request = request_of(**changes)
    latents, frames = by_pipeline(pipeline, request)
    own_latents, own_frames = by_engine(engine, request)

    assert torch.equal(own_latents, latents)
    assert own_frames.shape == (request.frames, request.height, request.width, 3)
    assert own_frames.dtype == np.uint8
    assert own_frames.flags.c_contiguous
    np.testing.assert_array_equal(own_frames, frames)


def test_what_a_clip_is_made_from_matters(engine: Engine, request_of: MakeRequest) -> None:
    """Guards the tests above: were an input dropped on both sides, equality would still hold."""
    base, _ = by_engine(engine, request_of())
    for change in (
        {"prompt": "waves on black rocks"},
        {"negative_prompt": ""},
        {"seed": 8},
        {"guidance_scale": 3.0},
        {"flow_shift": 5.0},
        {"steps": 5},
    ):
        other, _ = by_engine(engine, request_of(**change))
        assert not torch.equal(other, base), change


def test_interleaved_clips_are_as_if_alone(engine: Engine, pipeline: WanPipeline, request_of: MakeRequest) -> None:
    """Three clips of different shapes, steps and guidance, turn by turn through text, steps and decoding."""

    class TurnByTurn:
        def pick(self, clips, now):  # type: ignore[no-untyped-def]
            return min(clips, key=lambda clip: clip.last_ran_at).clip_id

    engine._turns.policy = TurnByTurn()  # type: ignore[assignment]
    requests = [
        request_of("a", frames=9, steps=3, seed=1),
        request_of("b", frames=5, steps=4, seed=2, guidance_scale=1.0, flow_shift=3.0),
        request_of("c", frames=13, steps=2, seed=3, width=96, prompt="waves on black rocks"),
    ]
    heard = {request.clip_id: Heard() for request in requests}
    order: list[str] = []
    launch = engine._launch
    engine._launch = lambda clip: (order.append(clip.request.clip_id), launch(clip))[1]  # type: ignore[method-assign, assignment]
    for request in requests:
        engine.submit(request, heard[request.clip_id])
    run_dry(engine)

    assert order[:9] == ["a", "b", "c"] * 3
    for request in requests:
        _, frames = by_pipeline(pipeline, request)
        np.testing.assert_array_equal(heard[request.clip_id].done.frames, frames)

"""The fast arithmetic is WanPipeline's to rounding (float32 on a CPU), and what makes it fast never changes what comes out."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from torch._dynamo.utils import counters

from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.denoise import TOLERANCE
from serve_app.engine.engine import Engine
from serve_app.engine.kernels import _Plan
from serve_app.engine.load import ModelSource, load_pipeline
from serve_app.engine.model_runner import ModelRunner

from .conftest import Heard, MakeRequest, run_dry
from .test_same_as_pipeline import CASES, by_engine, by_pipeline


@pytest.fixture
def fast_engine(tiny: ModelSource) -> Iterator[Engine]:
    engine = Engine(tiny, device="cpu", exact_bits=False)
    yield engine
    engine.close()


@pytest.fixture
def runner(tiny: ModelSource) -> ModelRunner:
    return ModelRunner(load_pipeline(tiny, "cpu", torch.float32), "cpu", exact_bits=False)


def close(own: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((own - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def run(runner: ModelRunner, clips: list[ClipState], together: int) -> list[torch.Tensor]:
    """Latents of `clips` after their last steps, stepped by groups of `together` while they have steps left."""
    with torch.inference_mode():
        for clip in clips:
            runner.encode_text(clip)
        while left := [clip for clip in clips if clip.phase is Phase.DENOISE]:
            finite = runner.denoise_step(left[:together])
            assert finite.all()
            assert len(finite) == len(left[:together])
    return [clip.latents for clip in clips if clip.latents is not None]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_latents_and_frames_to_tolerance(
    fast_engine: Engine, pipeline: WanPipeline, request_of: MakeRequest, changes: dict[str, object]
) -> None:
    request = request_of(**changes)
    latents, frames = by_pipeline(pipeline, request)
    own_latents, own_frames = by_engine(fast_engine, request)
    assert close(own_latents, latents)
    difference = np.abs(own_frames.astype(int) - frames.astype(int))
    assert difference.max() <= 1, "a rounding at most"
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("paired_up_to", [0, 10**9], ids=["sequential", "paired"])
def test_guidance_branches_apart_or_together(
    runner: ModelRunner,
    pipeline: WanPipeline,
    request_of: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    paired_up_to: int,
) -> None:
    monkeypatch.setattr("serve_app.engine.kernels.PAIR_UP_TO_TOKENS", paired_up_to)
    rows: list[int] = []
    runner.pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    request = request_of()
    latents = run(runner, [ClipState(request, print, 0.0, 0.0)], together=1)[0]
    assert close(latents, by_pipeline(pipeline, request)[0])
    assert rows == ([2] * 4 if paired_up_to else [1] * 8)


def test_clips_at_different_steps_share_forwards(
    runner: ModelRunner, pipeline: WanPipeline, request_of: MakeRequest
) -> None:
    """Three clips of different steps, guidance, shift, prompt and seed; the first starts two steps ahead."""
    requests = [
        request_of("a", steps=6, seed=1),
        request_of("b", steps=4, seed=2, guidance_scale=2.0, flow_shift=5.0),
        request_of("c", steps=5, seed=3, prompt="waves on black rocks", negative_prompt=""),
    ]
    clips = [ClipState(request, print, 0.0, 0.0) for request in requests]
    assert len({runner.step_shape(request) for request in requests}) == 1
    with torch.inference_mode():
        runner.encode_text(clips[0])
        for _ in range(2):
            runner.denoise_step(clips[:1])
    ahead = clips[0]
    run_together = clips[1:]
    with torch.inference_mode():
        for clip in run_together:
            runner.encode_text(clip)
        while left := [clip for clip in (ahead, *run_together) if clip.phase is Phase.DENOISE]:
            runner.denoise_step(left)
    for clip, request in zip(clips, requests, strict=True):
        assert clip.latents is not None
        assert close(clip.latents, by_pipeline(pipeline, request)[0]), request.clip_id


def test_one_bad_clip_is_told_from_its_neighbours(runner: ModelRunner, request_of: MakeRequest) -> None:
    clips = [ClipState(request_of(name), print, 0.0, 0.0) for name in "abc"]
    with torch.inference_mode():
        for clip in clips:
            runner.encode_text(clip)
        assert clips[1].latents is not None
        clips[1].latents[0, 0, 0, 0, 0] = torch.nan
        assert runner.denoise_step(clips).tolist() == [True, False, True]


def test_any_shape_runs_past_the_recompile_limit(
    runner: ModelRunner, pipeline: WanPipeline, request_of: MakeRequest
) -> None:
    """Blocks are compiled for the shapes of the warm-up alone; more other shapes than dynamo would compile run eager."""
    assert runner.kernels is not None
    warmed = request_of(frames=5)
    torch._dynamo.reset()
    counters.clear()
    runner.kernels.warm_up([runner.step_shape(warmed)], compiler="eager")
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 1
    assert runner.kernels.describe(runner.step_shape(warmed))["blocks"] == "compiled"

    limit = torch._dynamo.config.recompile_limit
    others = [request_of(frames=4 * k + 1, steps=1) for k in range(2, limit + 4)]
    for request in others:
        assert runner.kernels.describe(runner.step_shape(request))["blocks"] == "eager"
        run(runner, [ClipState(request, print, 0.0, 0.0)], together=1)
    latents = run(runner, [ClipState(warmed, print, 0.0, 0.0)], together=1)[0]
    assert counters["stats"]["unique_graphs"] == compiled
    assert close(latents, by_pipeline(pipeline, warmed)[0])


def test_without_a_warm_up_nothing_is_compiled(fast_engine: Engine, request_of: MakeRequest) -> None:
    torch._dynamo.reset()
    counters.clear()
    by_engine(fast_engine, request_of())
    assert counters["stats"]["unique_graphs"] == 0


def test_batches_are_used_where_they_measured_faster(runner: ModelRunner, request_of: MakeRequest) -> None:
    kernels, request = runner.kernels, request_of()
    assert kernels is not None
    assert runner.clips_together(request, waiting=8) == 1, "not before it was measured"
    torch._dynamo.reset()
    kernels.warm_up([runner.step_shape(request)], compiler="eager")
    plan = kernels._plans[runner.step_shape(request)]
    assert set(plan.batch_ms) == {2, 4}
    plan.step_ms, plan.batch_ms = 10.0, {2: 15.0, 4: 39.0}
    assert [runner.clips_together(request, waiting) for waiting in (1, 2, 3, 4, 9)] == [1, 2, 2, 2, 2]
    plan.batch_ms = {2: 21.0, 4: 30.0}
    assert [runner.clips_together(request, waiting) for waiting in (1, 2, 3, 4, 9)] == [1, 1, 1, 4, 4]
    assert kernels.batches()[0]["used"] == [4]


def test_the_engine_steps_clips_together_where_that_is_faster(
    fast_engine: Engine, pipeline: WanPipeline, request_of: MakeRequest
) -> None:
    """Two of three clips of one shape go together; one of another shape, and the third, go alone; all come out right."""
    kernels = fast_engine.runner.kernels
    assert kernels is not None
    shape = fast_engine.runner.step_shape(request_of())
    kernels._plans[shape] = _Plan(paired=True, step_ms=10.0, batch_ms={2: 15.0})
    requests = [
        request_of("a", steps=3, seed=1),
        request_of("b", steps=4, seed=2, guidance_scale=3.0),
        request_of("c", steps=4, seed=3),
        request_of("other", steps=3, frames=9),
    ]
    sizes: list[list[str]] = []
    step = fast_engine.runner.denoise_step

    def listen(clips: list[ClipState]) -> torch.Tensor:
        sizes.append(sorted(clip.request.clip_id for clip in clips))
        return step(clips)

    fast_engine.runner.denoise_step = listen  # type: ignore[method-assign, assignment]
    heard = {request.clip_id: Heard() for request in requests}
    for request in requests:
        fast_engine.submit(request, heard[request.clip_id])
    run_dry(fast_engine)

    assert all(len(ids) == 1 or (len(ids) == 2 and "other" not in ids) for ids in sizes)
    assert any(len(ids) == 2 for ids in sizes)
    for request in requests:
        assert heard[request.clip_id].steps == list(range(1, request.steps + 1))
        _, frames = by_pipeline(pipeline, request)
        difference = np.abs(heard[request.clip_id].done.frames.astype(int) - frames.astype(int))
        assert difference.max() <= 1


def test_text_is_embedded_without_padding_and_once(
    runner: ModelRunner, pipeline: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    runner.pipeline.text_encoder.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    prompts = ["a red fox in the snow", "blurry, text", "", "a red fox runs " * 400]
    with torch.inference_mode():
        for prompt in prompts * 2:
            wanted = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]
            own = runner.text.embed(prompt)
            assert own.shape == wanted.shape
            torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
    assert len(lengths) == len(prompts)
    assert lengths[0] < 64
    assert lengths[2] == 1
    assert lengths[3] == 512


def test_the_oldest_prompt_is_forgotten(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine.text._CACHED_PROMPTS", 2)
    embedded: list[str] = []
    embed = runner.text._embed
    monkeypatch.setattr(runner.text, "_embed", lambda prompt: (embedded.append(prompt), embed(prompt))[1])
    with torch.inference_mode():
        for prompt in ("a", "negative", "b", "negative", "c", "negative", "a"):
            runner.text.embed(prompt)
    assert embedded == ["a", "negative", "b", "c", "a"]


def test_interleaved_decodes_are_as_if_alone(runner: ModelRunner, request_of: MakeRequest) -> None:
    def decoded(clips: list[ClipState]) -> list[np.ndarray]:
        for clip in clips:
            latents = torch.randn(1, 16, 3, 6, 4, generator=torch.Generator().manual_seed(clip.request.seed))
            clip.latents, clip.phase = latents, Phase.DECODE
        with torch.inference_mode():
            while left := [clip for clip in clips if clip.phase is Phase.DECODE]:
                for clip in left:
                    runner.decode_latent_frame(clip)
        return [clip.decode.frames.numpy() for clip in clips if clip.decode]

    requests = [request_of(name, frames=9, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    together = decoded([ClipState(request, print, 0.0, 0.0) for request in requests])
    for request, frames in zip(requests, together, strict=True):
        np.testing.assert_array_equal(decoded([ClipState(request, print, 0.0, 0.0)])[0], frames)
    assert not np.array_equal(*together)

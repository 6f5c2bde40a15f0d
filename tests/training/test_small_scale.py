"""The README's commands, for a few seconds each: they train, go on where they were stopped, and leave a model that loads."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from serve_app.engine.load import WAN_SHAPES, ModelSource, load_pipeline
from training import train_denoiser, train_vae
from training.run import Trainer


def test_from_nothing_to_a_model_that_loads(tmp_path: Path) -> None:
    vae, denoiser = tmp_path / "vae", tmp_path / "denoiser"
    train_vae.main(vae, minutes=0.02, batch=2, piece=64, scale=0.2, workers=0, check_clips=2)
    result = json.loads((vae / "result.json").read_text())
    assert result["psnr_db_clips"] > 0
    assert min(result["latents_std"]) > 0

    arguments = {"vae": vae / "vae", "tokens": 64, "scale": 0.2, "workers": 0}
    train_denoiser.main(denoiser, minutes=0.02, **arguments)  # type: ignore[arg-type]
    first = json.loads((denoiser / "result.json").read_text())
    train_denoiser.main(denoiser, minutes=0.1, **arguments)  # type: ignore[arg-type]
    second = json.loads((denoiser / "result.json").read_text())
    assert second["steps"] > first["steps"] >= 1, "it went on where it was"
    assert second["size_mb"] < 20

    pipeline = load_pipeline(ModelSource(str(denoiser / "model"), None, trained=True), "cpu", torch.float32)
    assert pipeline.vae.config.latents_std == result["latents_std"]
    with torch.inference_mode():
        frames = pipeline(
            "a red circle", width=128, height=96, num_frames=5, num_inference_steps=2, output_type="pt"
        ).frames
    assert frames.shape == (1, 5, 3, 96, 128)
    assert torch.isfinite(frames).all()


def test_it_goes_on_from_a_model(tmp_path: Path) -> None:
    """The bundled one, each part for a step or two: the decoder without the latents, and the denoiser."""
    vae, denoiser = tmp_path / "vae", tmp_path / "denoiser"
    train_vae.main(
        vae,
        minutes=0.02,
        batch=2,
        piece=64,
        scale=0.2,
        workers=0,
        check_clips=2,
        init=WAN_SHAPES / "vae",
        decoder_only=True,
    )
    before, after = (AutoencoderKLWan.from_pretrained(folder) for folder in (WAN_SHAPES / "vae", vae / "vae"))
    changed = {
        name.split(".")[0] for name, old in before.state_dict().items() if not equal(old, after.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert after.config.latents_mean == before.config.latents_mean

    train_denoiser.main(denoiser, vae=vae / "vae", minutes=0.02, tokens=64, scale=0.2, workers=0, init=WAN_SHAPES)
    loaded = load_pipeline(ModelSource(str(denoiser / "model"), None, trained=True), "cpu", torch.float32)
    bundled = load_pipeline(ModelSource(str(WAN_SHAPES), None, trained=True), "cpu", torch.float32)
    assert loaded.tokenizer("a red circle").input_ids == bundled.tokenizer("a red circle").input_ids
    for name, old in bundled.transformer.state_dict().items():
        torch.testing.assert_close(loaded.transformer.state_dict()[name], old, rtol=0.1, atol=0.01)


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path) -> None:
    torch.save({"modules": {"head": {}}}, tmp_path / "checkpoint.pt")
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt is of another version .* it holds head, where heads are trained"
    ):
        Trainer(tmp_path, {}, {"heads": layer}, minutes=1.0, peak_rate=1e-3, device=torch.device("cpu"))


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-6)  # half precision on disk

"""Which model is taken, how it is loaded, and what is said when it cannot be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from serve_app.engine import tiny as tiny_module
from serve_app.engine.load import (
    DEFAULT_MODEL,
    DEFAULT_REVISION,
    TINY_MODEL,
    WAN_SHAPES,
    ModelSource,
    load_pipeline,
    pick_device,
    resolve_model,
)
from serve_app.engine.tiny import UNTRAINED_MARKER, build_tiny_model
from serve_app.errors import EngineError, ModelNotLoadable


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tiny_model_is_of_wans_own_classes(pipeline: WanPipeline) -> None:
    assert isinstance(pipeline.transformer, WanTransformer3DModel)
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert isinstance(pipeline.text_encoder, UMT5EncoderModel)
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert pipeline.scheduler.config.flow_shift == 3.0
    assert pipeline.vae.config.scale_factor_temporal == 4
    tokens = pipeline.tokenizer("a red fox").input_ids
    assert tokens[-1] == pipeline.tokenizer.eos_token_id == 1
    assert max(tokens) < pipeline.text_encoder.config.vocab_size


@pytest.mark.parametrize(("width", "height"), [(640, 480), (832, 480), (480, 640)])
def test_tiny_model_makes_every_size(pipeline: WanPipeline, width: int, height: int) -> None:
    video = pipeline(
        prompt="a red fox", width=width, height=height, num_frames=5, num_inference_steps=1, guidance_scale=1.0
    ).frames[0]
    assert video.shape == (5, height, width, 3)
    assert video.std() > 0.02, "noise, and not a flat grey"


def test_tiny_model_is_the_same_every_time(tiny: ModelSource, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    built = build_tiny_model(tmp_path / "deeper" / "tiny")
    assert torch.equal(torch.get_rng_state(), before), "building must not disturb the caller's random numbers"
    assert files_of(built) == files_of(Path(tiny.name_or_path))
    assert [path.name for path in built.parent.iterdir()] == ["tiny"], "no unfinished folder stays behind"


def test_tiny_model_is_built_once(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "tiny")
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert build_tiny_model(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps


def test_who_loses_the_race_uses_the_winners_model(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, build = tmp_path / "tiny", tiny_module._save_tiny_pipeline

    def build_too_late(unfinished: Path) -> None:
        build(unfinished)
        shutil.copytree(tiny.name_or_path, folder)
        (folder / "winner.txt").touch()

    monkeypatch.setattr(tiny_module, "_save_tiny_pipeline", build_too_late)
    assert build_tiny_model(folder) == folder
    assert (folder / "winner.txt").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_space(unfinished: Path) -> None:
        (unfinished / "half.safetensors").write_bytes(b"0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_module, "_save_tiny_pipeline", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        build_tiny_model(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_tiny_model_never_overwrites_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="not empty"):
        build_tiny_model(folder)
    assert files_of(folder) == {"thesis.txt": b"years of work"}
    assert list(tmp_path.iterdir()) == [folder]


def test_resolve_without_a_model(tmp_path: Path) -> None:
    assert resolve_model(None, None, "cuda", tmp_path) == ModelSource(DEFAULT_MODEL, DEFAULT_REVISION, trained=True)
    on_cpu = resolve_model(None, None, "cpu", tmp_path)
    assert on_cpu == ModelSource(str(WAN_SHAPES), None, trained=True)
    assert not (tmp_path / "models").exists(), "nothing is built"


def test_resolve_the_tiny_model(tmp_path: Path) -> None:
    tiny = resolve_model(TINY_MODEL, None, "cpu", tmp_path)
    assert tiny == ModelSource(str(tmp_path / "models" / "tiny"), None, trained=False)


def test_resolve_a_model_that_is_named(tiny: ModelSource, tmp_path: Path) -> None:
    assert resolve_model(DEFAULT_MODEL, None, "cpu", tmp_path).revision == DEFAULT_REVISION
    assert resolve_model(DEFAULT_MODEL, "main", "cpu", tmp_path).revision == "main"
    assert resolve_model("some-org/some-model", None, "cuda", tmp_path) == ModelSource(
        "some-org/some-model", None, trained=True
    )
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny.name_or_path, copy)
    assert not resolve_model(str(copy), None, "cuda", tmp_path).trained, "known from the folder, not from its path"
    (copy / UNTRAINED_MARKER).unlink()
    assert resolve_model(str(copy), None, "cuda", tmp_path).trained


@pytest.mark.parametrize("model", ["/no/such/model", "./missing", "~/missing", "missing", "a/b/c"])
def test_a_directory_that_is_not_there(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoadable, match="no such directory") as refusal:
        resolve_model(model, None, "cpu", tmp_path)
    assert repr(model) in refusal.value.message
    assert refusal.value.param == "model"


def test_dtypes(tiny: ModelSource) -> None:
    pipeline = load_pipeline(tiny, "cpu", torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert pipeline.vae.dtype == torch.float32


def test_loading_says_nothing_on_the_terminal(tiny: ModelSource, capfd: pytest.CaptureFixture[str]) -> None:
    load_pipeline(tiny, "cpu", torch.float32)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file(tiny: ModelSource, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny.name_or_path, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelNotLoadable, match="diffusion_pytorch_model") as refusal:
        load_pipeline(ModelSource(str(broken), None, trained=False), "cpu", torch.float32)
    assert "missing or damaged" in refusal.value.hint


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoadable, match=r"model_index\.json") as refusal:
        load_pipeline(ModelSource(str(tmp_path), None, trained=True), "cpu", torch.float32)
    assert "missing or damaged" in refusal.value.hint


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    source = resolve_model(None, None, "cuda", tmp_path)
    with pytest.raises(ModelNotLoadable, match=DEFAULT_MODEL) as refusal:
        load_pipeline(source, "cpu", torch.float32)
    assert f"hf download {DEFAULT_MODEL} --revision {DEFAULT_REVISION}" in refusal.value.hint


def test_a_model_of_another_kind(tiny: ModelSource, tmp_path: Path) -> None:
    other = tmp_path / "wan22"
    shutil.copytree(tiny.name_or_path, other)
    index = other / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"expand_timesteps": True}))
    with pytest.raises(ModelNotLoadable, match="expand_timesteps"):
        load_pipeline(ModelSource(str(other), None, trained=True), "cpu", torch.float32)


def test_another_noise_scheduler(tiny: ModelSource, tmp_path: Path) -> None:
    other = tmp_path / "euler"
    shutil.copytree(tiny.name_or_path, other)
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotLoadable, match="scheduler is a FlowMatchEulerDiscreteScheduler"):
        load_pipeline(ModelSource(str(other), None, trained=True), "cpu", torch.float32)


def test_a_broken_torchvision(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ModuleNotFoundError("Could not import module 'UMT5EncoderModel'. Are this object's requirements defined?")

    monkeypatch.setattr(WanPipeline, "from_pretrained", broken)
    with pytest.raises(ModelNotLoadable) as refusal:
        load_pipeline(tiny, "cpu", torch.float32)
    assert "pip uninstall torchvision" in refusal.value.hint


def test_pick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    assert pick_device("cpu") == "cpu"
    with pytest.raises(EngineError, match="'cuda'"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    assert pick_device("cpu") == "cpu"


def test_words_of_the_engine_import_no_torch() -> None:
    code = "import serve_app.engine.clip, serve_app.engine.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

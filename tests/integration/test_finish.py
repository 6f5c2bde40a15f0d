"""A job's frames become its files: every format from one pass, at the size that was asked for, checked, signed and told about."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve_app.errors import HardwareEncodingFailed, MediaError
from serve_app.jobs.job import Artifact, JobSpec
from serve_app.jobs.presets import CONTACT_SHEET, VIDEO_FORMATS, JobType
from serve_app.jobs.receipt import RECEIPT_NAME
from serve_app.jobs.transitions import Transition
from serve_app.media import encoders
from serve_app.media.certificates import SigningCertificate, development_root, open_certificate
from serve_app.media.finish import make_files
from serve_app.media.formats import FORMATS, Encoder
from serve_app.media.probe import probe
from serve_app.media.provenance import ready_certificate
from serve_app.media.upscale import Upscaler
from serve_app.media.verify import read_provenance
from serve_app.settings import Settings
from serve_app.upscale_weights import find_weights
from tests.factories import make_spec
from tests.media_content import decode_rgb, moving_frames, psnr_db

RECEIPT = {
    "job_id": "0199f2f0a1b2c3d4e5f60718293a",
    "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "model_revision": "0fad780",
    "upscale": {"factor": 2, "model": "realesr-animevideov3"},
}
SMALL = {"resolution": "96*64"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("data"), upscale_model="realesr-animevideov3")


@pytest.fixture(scope="module")
def certificate(settings) -> SigningCertificate:
    return ready_certificate(settings)


def repeated(blocks: Iterable[np.ndarray], factor: int) -> Iterator[np.ndarray]:
    """A fake upscaler: each pixel so many times."""
    for block in blocks:
        yield block.repeat(factor, 1).repeat(factor, 2)


def made(spec: JobSpec, clips, folder: Path, settings, certificate, **how) -> dict[str, Artifact]:
    files = make_files(spec, clips, folder, settings, receipt=RECEIPT, certificate=certificate, **how)
    return {file.name: file for file in files}


@pytest.mark.parametrize("factor", [None, 2, 4])
def test_every_format_comes_of_one_pass(factor, settings, certificate, tmp_path):
    clips = [moving_frames(13, 96, 64), 255 - moving_frames(9, 96, 64)]
    spec = make_spec(
        JobType.VIDEO_FAST, video_length=18, formats=(*VIDEO_FORMATS, CONTACT_SHEET), upscale=factor,
        transitions=(Transition(frames=4),),
        shots=tuple(make_spec().clips[0].model_copy(update={"frames": len(clip)}) for clip in clips), **SMALL,
    )  # fmt: skip
    told: list[tuple[int, int]] = []
    files = made(
        spec, iter(clips), tmp_path, settings, certificate, upscale=repeated, report=lambda *news: told.append(news)
    )
    width, height = 96 * (factor or 1), 64 * (factor or 1)
    assert {name: (file.width, file.height, file.frames) for name, file in files.items()} == {
        "video.mp4": (width, height, 18),
        "video_h265.mp4": (width, height, 18),
        "video_av1.mp4": (width, height, 18),
        "video.webm": (width, height, 18),
        "preview.gif": (48, 32, 9),
        "preview.webp": (48, 32, 9),
        "poster.jpg": (width, height, None),
        "contact_sheet.jpg": (1292, 647, None),
        RECEIPT_NAME: (None, None, None),
    }
    for name in files.keys() - {RECEIPT_NAME}:
        facts = probe(tmp_path / name)
        assert (facts.width, facts.height) == (files[name].width, files[name].height)
    assert told[-1] == (18, 18)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    raw = np.concatenate([clips[0][:9], clips[1][4:]])
    shown = decode_rgb(tmp_path / "video.mp4")[[*range(9), *range(13, 18)]]
    expected = next(repeated([raw], factor or 1))
    assert min(psnr_db(one, other) for one, other in zip(shown, expected, strict=True)) > 33


def test_a_picture_is_upscaled_by_the_real_network(settings, certificate, tmp_path):
    network = Upscaler(find_weights(settings).path, tile_px=512)

    def upscaled(blocks, factor):
        return (np.stack([network.upscale(frame, factor) for frame in block]) for block in blocks)

    told: list[tuple[int, int]] = []
    spec = make_spec(upscale=4, **SMALL)
    report = {"upscale": upscaled, "report": lambda *news: told.append(news)}
    files = made(spec, [moving_frames(1, 96, 64)], tmp_path, settings, certificate, **report)
    assert (files["image.png"].width, files["image.png"].height, told) == (384, 256, [(1, 1)])
    assert (probe(tmp_path / "image.png").width, probe(tmp_path / "image.png").height) == (384, 256)


@pytest.mark.parametrize("type", [JobType.IMAGE_FAST, JobType.VIDEO_FAST])
def test_the_manifest_names_the_network(type, settings, certificate, tmp_path):
    open_certificate(settings)
    frames = 1 if type == JobType.IMAGE_FAST else 5
    spec = make_spec(type, video_length=frames, upscale=2, **SMALL)
    files = made(spec, [moving_frames(frames, 96, 64)], tmp_path, settings, certificate, upscale=repeated)
    anchors = development_root(settings.provenance_dir).read_text()
    for name in files.keys() - {RECEIPT_NAME}:
        found = read_provenance(tmp_path / name, anchors_pem=anchors, receipt=tmp_path / RECEIPT_NAME)
        assert found.problems == []
        assert (found.model, found.upscaled_by) == (RECEIPT["model"], "realesr-animevideov3")


def test_an_upscaler_that_leaves_frames_as_they_are_is_noticed(settings, certificate, tmp_path):
    spec = make_spec(JobType.VIDEO_FAST, video_length=5, upscale=2, **SMALL)
    with pytest.raises(MediaError, match="width is 96, not 192"):
        made(spec, [moving_frames(5, 96, 64)], tmp_path, settings, certificate, upscale=lambda blocks, _: iter(blocks))


def test_an_upscaler_that_loses_a_frame_is_noticed(settings, certificate, tmp_path):
    def losing(blocks, factor):
        return (block[1:] for block in repeated(blocks, factor))

    spec = make_spec(JobType.VIDEO_FAST, video_length=9, upscale=2, **SMALL)
    with pytest.raises(MediaError, match="7 frames came for a video of 9"):
        made(spec, [moving_frames(9, 96, 64)], tmp_path, settings, certificate, upscale=losing)


def test_hardware_that_fails_in_the_midst_is_not_used_again(settings, certificate, tmp_path, monkeypatch):
    """A stand-in for a card at its limit of encodes: an encoder that FFmpeg refuses although its trial went well."""
    broken = Encoder("no_such_encoder", is_hardware=True)
    monkeypatch.setitem(FORMATS, "mp4", replace(FORMATS["mp4"], encoders=(broken, FORMATS["mp4"].encoders[-1])))
    monkeypatch.setattr(encoders, "_works", lambda name, options: True)
    monkeypatch.setattr(encoders, "_given_up", set())
    spec, frames = make_spec(JobType.VIDEO_FAST, video_length=5, **SMALL), moving_frames(5, 96, 64)
    with pytest.raises(HardwareEncodingFailed, match="no_such_encoder") as caught:
        made(spec, [frames], tmp_path, settings, certificate)
    assert caught.value.retryable
    assert made(spec, [frames], tmp_path, settings, certificate)["video.mp4"].codec == "h264"


def test_a_service_that_no_longer_upscales_says_so(settings, certificate, tmp_path):
    with pytest.raises(MediaError, match="no longer upscales"):
        made(make_spec(upscale=2, **SMALL), [moving_frames(1, 96, 64)], tmp_path, settings, certificate)

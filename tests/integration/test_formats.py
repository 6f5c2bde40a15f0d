"""Every format is encoded by a real FFmpeg, decoded again, and held against the raw frames."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve_app.errors import MediaError
from serve_app.jobs.transitions import Transition, stitched_frames
from serve_app.media.colours import check_colours, decoded_indices
from serve_app.media.contact_sheet import clock, write_contact_sheet
from serve_app.media.encode import encode_video
from serve_app.media.encoders import encoder_for
from serve_app.media.ffmpeg_process import ffmpeg_binary
from serve_app.media.formats import FORMATS, GIF, MP4, WEBM, WEBP, Encoder, VideoFormat
from serve_app.media.probe import MediaFacts, check, check_video, probe
from serve_app.media.sampled import Sampled, spread_indices
from serve_app.media.stitch import stitched
from tests.media_content import decode_rgb, moving_frames, psnr_db

WIDTH, HEIGHT = 320, 240
NATURAL = replace(MP4, largest_difference=2.0)
"""What MP4 keeps to on content that 4:2:0 can hold: strict enough for a wrong matrix, too strict for a user's noise."""


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return moving_frames(41, WIDTH, HEIGHT)


def _encoded(blocks, path: Path, video_format: VideoFormat, indices=(0, 6, 20, 40)) -> tuple[MediaFacts, dict]:
    sampled = Sampled(blocks, indices)
    encode_video(sampled, path, fps=16, timeout_s=120, video_format=video_format)
    return probe(path, decoded_indices(sampled.frames, video_format)), sampled.frames


def _check_video(facts: MediaFacts, video_format: VideoFormat, frames: int) -> None:
    check_video(facts, video_format, width=WIDTH, height=HEIGHT, frames=frames, fps=16)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [41, 16, 1])
def test_each_format_is_what_it_should_be(name, count, frames, tmp_path):
    video_format = FORMATS[name]
    blocks = [block for block in (frames[:7], frames[7:count]) if len(block)] if count > 7 else [frames[:count]]
    facts, raw = _encoded(blocks, tmp_path / video_format.file_name, video_format)
    _check_video(facts, video_format, count)
    assert 0 < check_colours(facts, raw, video_format) < (6 if name == "gif" else NATURAL.largest_difference)
    assert set(facts.shown) == set(decoded_indices(raw, video_format))


def test_names_and_files_are_unique():
    assert list(FORMATS) == ["mp4", "h265", "av1", "webm", "gif", "webp"]
    assert len({one.file_name for one in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize("conversion", [{"out_color_matrix": "bt601", "out_range": "tv"},
                                        {"out_color_matrix": "bt709", "out_range": "pc"}], ids=["matrix", "range"])  # fmt: skip
def test_wrong_colours_are_noticed(conversion, frames, tmp_path):
    def wrong(stream, _):
        converted = stream.filter("scale", **conversion).filter("format", "yuv420p")
        return converted.filter("setparams", colorspace="bt709", range="tv")

    facts, raw = _encoded([frames], tmp_path / "v.mp4", replace(MP4, filters=wrong))
    _check_video(facts, MP4, 41)
    with pytest.raises(MediaError, match="away from the raw one"):
        check_colours(facts, raw, NATURAL)


def test_missing_tags_are_noticed(frames, tmp_path):
    """Right numbers that a player will take for BT.601."""

    def untagged(stream, _):
        converted = stream.filter("scale", out_color_matrix="bt709", out_range="tv").filter("format", "yuv420p")
        return converted.filter("setparams", colorspace="unknown")

    facts, raw = _encoded([frames], tmp_path / "v.mp4", replace(MP4, filters=untagged))
    with pytest.raises(MediaError, match="away from the raw one"):
        check_colours(facts, raw, NATURAL)


def test_right_files_of_what_no_coding_can_hold_are_not_refused(tmp_path):
    pure = np.random.default_rng(0).integers(0, 2, (9, HEIGHT // 16, WIDTH // 16, 3)) * 255
    noise = np.kron(pure, np.ones((1, 16, 16, 1))).astype(np.uint8)
    for video_format in FORMATS.values():
        facts, raw = _encoded([noise], tmp_path / video_format.file_name, video_format, indices=(0, 4, 8))
        check_colours(facts, raw, video_format)


@pytest.mark.parametrize("name", ["mp4", "gif"])
def test_frames_in_the_wrong_place_are_noticed(name, frames, tmp_path):
    video_format = FORMATS[name]
    facts, raw = _encoded([frames], tmp_path / video_format.file_name, video_format)
    with pytest.raises(MediaError, match="frame 10 of the file" if name == "gif" else "frame 20 of the file"):
        check_colours(facts, {**raw, 20: raw[0]}, video_format)
    with pytest.raises(MediaError, match="is not there"):
        check_colours(facts, {**raw, 30: raw[0]}, video_format)


@pytest.mark.parametrize("video_format", [MP4, WEBM, GIF, WEBP], ids=lambda one: one.name)
def test_a_missing_frame_is_noticed(video_format, frames, tmp_path):
    facts, _ = _encoded([frames[:39]], tmp_path / video_format.file_name, video_format)
    with pytest.raises(MediaError, match="frames is"):
        _check_video(facts, video_format, 41)
    with pytest.raises(MediaError, match=r"the file lasts 2\.[45]"):
        _check_video(replace(facts, frames=-(-41 // video_format.every)), video_format, 41)


def test_the_wrong_rate_is_noticed(frames, tmp_path):
    facts, _ = _encoded([frames], tmp_path / "v.mp4", MP4)
    with pytest.raises(MediaError, match="16 frames a second, not 8"):
        check_video(replace(facts, duration_s=41 / 8), MP4, width=WIDTH, height=HEIGHT, frames=41, fps=8)


def test_stitched_video_shows_the_raw_blend(tmp_path):
    """Three clips of other colours, by a crossfade and a wipe: each decoded frame is its raw one, transitions included."""
    clips = [moving_frames(21, WIDTH, HEIGHT), 255 - moving_frames(25, WIDTH, HEIGHT), moving_frames(17, WIDTH, HEIGHT)]
    joints = [Transition(frames=8), Transition("wipeleft", 5)]
    total = stitched_frames([21, 25, 17], joints) - 2
    raw = np.concatenate(list(stitched(clips, joints, total)))
    facts, sampled = _encoded(stitched(iter(clips), joints, total), tmp_path / "v.mp4", MP4, spread_indices(total, 6))
    _check_video(facts, MP4, total)
    check_colours(facts, sampled, MP4)
    shown = decode_rgb(tmp_path / "v.mp4")
    assert min(psnr_db(one, other) for one, other in zip(shown, raw, strict=True)) > 35


@pytest.mark.parametrize("trim", [0, 1, 7])
@pytest.mark.parametrize("kind", ["cut", "crossfade", "circleopen"])
@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_lengths_are_exact_to_the_frame(name, kind, trim, tmp_path):
    joint = Transition(kind, 0 if kind == "cut" else 6)
    clips = [moving_frames(n, 64, 48) for n in (13, 17, 9)]
    total = stitched_frames([13, 17, 9], [joint, joint]) - trim
    encode_video(
        stitched(clips, [joint, joint], total),
        tmp_path / FORMATS[name].file_name,
        fps=16, timeout_s=60, video_format=FORMATS[name],
    )  # fmt: skip
    facts = probe(tmp_path / FORMATS[name].file_name)
    check_video(facts, FORMATS[name], width=64, height=48, frames=total, fps=16)


def test_encoders_are_tried_before_they_are_used():
    broken = Encoder("no_such_encoder")
    works = Encoder("libx264", {"crf": 30})
    assert encoder_for(replace(MP4, encoders=(broken, works, Encoder("never")))) == works
    assert encoder_for(replace(MP4, encoders=(broken, Encoder("software")))) == Encoder("software")


def test_an_encoder_can_be_chosen(frames, tmp_path):
    encode_video(frames[:5], tmp_path / "v.mp4", fps=16, timeout_s=60, encoder=Encoder("libopenh264"))
    check(probe(tmp_path / "v.mp4"), codec="h264", frames=5)


def test_crf_replaces_the_encoders_own(frames, tmp_path):
    for crf in (18, 40):
        encode_video(frames[:9], tmp_path / f"{crf}.mp4", fps=16, timeout_s=60, crf=crf)
    assert probe(tmp_path / "40.mp4").size_bytes < probe(tmp_path / "18.mp4").size_bytes / 2


def test_contact_sheet(frames, tmp_path):
    sampled = Sampled([frames[:20], frames[20:]], spread_indices(41, 12))
    assert sum(len(block) for block in sampled) == 41
    write_contact_sheet(sampled.frames, tmp_path / "sheet.jpg", fps=16)
    check(probe(tmp_path / "sheet.jpg"), width=1292, height=728, codec="jpeg")
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        shown = np.asarray(sheet)
    for place, index in enumerate(spread_indices(41, 12)):
        x, y = place % 4 * 324, place // 4 * 244
        cell = shown[y : y + 200, x : x + 320]  # above the time
        assert psnr_db(cell, frames[index][:200]) > 30
        assert shown[y + 210 : y + 240, x : x + 80].min(axis=2).max() > 240  # the time, in white
    assert [clock(s) for s in (0, 2.5, 62.5625)] == ["0:00.00", "0:02.50", "1:02.56"]
    with pytest.raises(MediaError, match="no frames"):
        write_contact_sheet({}, tmp_path / "empty.jpg", fps=16)


def test_spread():
    assert spread_indices(41, 1) == [20]
    assert spread_indices(3, 12) == [0, 1, 2]
    assert spread_indices(81, 4) == [10, 30, 50, 70]


def test_an_encoder_is_tried_with_its_options():
    odd = Encoder("libx264", {"preset": "no such preset"})
    assert encoder_for(replace(MP4, encoders=(odd, Encoder("software")))) == Encoder("software")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a card")
def test_without_a_card_nvenc_gives_way_to_software():
    for video_format in (MP4, FORMATS["h265"]):
        nvenc, software = video_format.encoders
        assert nvenc.is_hardware
        listed = subprocess.run(
            [ffmpeg_binary(), "-hide_banner", "-encoders"], capture_output=True, text=True, check=True
        )
        assert nvenc.name in listed.stdout, "FFmpeg has it, so it is the card that is missing"
        assert encoder_for(video_format) == software

"""Frames become files with a real FFmpeg; the files are judged by decoding them."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import av
import ffmpeg
import numpy as np
import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from serve_app.errors import MediaError
from serve_app.media.encode import encode_video
from serve_app.media.pictures import poster_index, write_png, write_poster
from serve_app.media.probe import check, probe
from tests.media_content import decode_rgb, moving_frames, psnr_db


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return moving_frames(41, 640, 480)


def _encode(frames, path: Path, timeout_s: float = 60.0) -> None:
    encode_video(frames, path, fps=16, crf=18, preset="veryfast", timeout_s=timeout_s)


def _children() -> list[psutil.Process]:
    """FFmpeg's, not those of the session's services."""
    return [child for child in psutil.Process().children(recursive=True) if "ffmpeg" in child.name()]


def _only_child() -> psutil.Process:
    (child,) = _children()
    return child


def _assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert _children() == []


def test_video_is_what_was_asked_for(frames, tmp_path):
    path = tmp_path / "video.mp4"
    _encode(frames, path)
    facts = probe(path)
    check(facts, width=640, height=480, frames=41, fps=16, duration_s=41 / 16)
    check(facts, codec="h264", pix_fmt="yuv420p", faststart=True, size_bytes=path.stat().st_size)
    assert list(tmp_path.iterdir()) == [path]
    assert _children() == []


@pytest.mark.parametrize("count", [1, 5, 81])
def test_every_frame_is_kept_in_order(count, tmp_path):
    given = moving_frames(count, 128, 96)
    _encode((frame for frame in given), tmp_path / "v.mp4")  # an iterable, not an array
    assert probe(tmp_path / "v.mp4").frames == count
    shown = decode_rgb(tmp_path / "v.mp4")
    nearest = [int(np.argmin([np.abs(one.astype(int) - other).mean() for other in given])) for one in shown]
    assert nearest == list(range(count))


def test_colours_are_right_and_say_so(frames, tmp_path):
    _encode(frames, tmp_path / "v.mp4")
    assert psnr_db(decode_rgb(tmp_path / "v.mp4"), frames) > 35
    with av.open(str(tmp_path / "v.mp4")) as container:
        frame = next(container.decode(video=0))
    bt709, limited = 1, 1  # ITU-T H.273, and AVColorRange
    assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (bt709, bt709, bt709)
    assert frame.color_range == limited


@pytest.mark.parametrize(
    "conversion",
    [{"out_color_matrix": "bt601", "out_range": "tv"}, {"out_color_matrix": "bt709", "out_range": "pc"}],
    ids=["wrong matrix", "wrong range"],
)
def test_the_colour_measure_notices_a_wrong_conversion(conversion, frames, tmp_path):
    """The tags say bt709 limited and the numbers are something else: what the test above must be able to see."""
    (
        ffmpeg.input("pipe:", format="rawvideo", pixel_format="rgb24", video_size=(640, 480), framerate=16)
        .filter("scale", **conversion)
        .filter("format", "yuv420p")
        .filter("setparams", colorspace="bt709", range="tv")
        .output(str(tmp_path / "wrong.mp4"), vcodec="libx264", crf=18, preset="veryfast")
        .run(cmd=get_ffmpeg_exe(), input=frames.tobytes(), quiet=True)
    )
    assert psnr_db(decode_rgb(tmp_path / "wrong.mp4"), frames) < 35


def test_read_only_and_strided_frames(tmp_path):
    given = moving_frames(5, 128, 96)[:, :, ::-1]  # as a flipped view
    given.flags.writeable = False  # as the object store gives them
    _encode(given, tmp_path / "v.mp4")
    assert psnr_db(decode_rgb(tmp_path / "v.mp4"), given) > 30


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    _encode(moving_frames(1, 64, 64), path)
    check(probe(path), frames=1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((0, 64, 64, 3), np.uint8), "no frames"),
        ([], "no frames"),
        (np.zeros((5, 64, 64, 3), np.float32), "frame 0 is float32"),
        (np.zeros((5, 64, 64, 4), np.uint8), "shape (64, 64, 4)"),
        (np.zeros((64, 64, 3), np.uint8), "shape (64, 64, 3)"),
        (np.zeros((5, 64, 63, 3), np.uint8), "63x64"),
        (np.zeros((5, 0, 64, 3), np.uint8), "64x0"),
        ([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)], "frame 1 is 32x64"),
    ],
)
def test_unusable_frames_are_refused(bad, words, tmp_path):
    with pytest.raises(MediaError) as caught:
        _encode(bad, tmp_path / "v.mp4")
    assert words in caught.value.message
    _assert_nothing_left(tmp_path)


def test_ffmpeg_killed_midway(frames, tmp_path):
    def killing() -> Iterator[np.ndarray]:
        for index, frame in enumerate(frames):
            if index == 20:
                _only_child().send_signal(signal.SIGKILL)
            yield frame

    with pytest.raises(MediaError, match="killed by signal 9"):
        _encode(killing(), tmp_path / "v.mp4")
    _assert_nothing_left(tmp_path)


def test_ffmpeg_that_hangs_is_stopped(frames, tmp_path):
    def freezing() -> Iterator[np.ndarray]:
        for index, frame in enumerate(frames):
            if index == 5:
                _only_child().send_signal(signal.SIGSTOP)
            yield frame

    with pytest.raises(MediaError, match="stood still for longer than 1 s"):
        _encode(freezing(), tmp_path / "v.mp4", timeout_s=1.0)
    _assert_nothing_left(tmp_path)


def test_ffmpeg_that_hangs_after_the_last_frame_is_stopped(tmp_path):
    def freezing() -> Iterator[np.ndarray]:
        yield from moving_frames(3, 64, 64)  # fewer bytes than the pipe holds
        _only_child().send_signal(signal.SIGSTOP)

    with pytest.raises(MediaError, match="stood still for longer than 1 s"):
        _encode(freezing(), tmp_path / "v.mp4", timeout_s=1.0)
    _assert_nothing_left(tmp_path)


def test_waiting_for_frames_is_not_standing_still(tmp_path):
    """The next clip may still be in the making."""

    def slow() -> Iterator[np.ndarray]:
        yield moving_frames(5, 64, 64)
        time.sleep(1.5)
        yield moving_frames(4, 64, 64)

    _encode(slow(), tmp_path / "v.mp4", timeout_s=1.0)
    check(probe(tmp_path / "v.mp4"), frames=9)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, OSError, RuntimeError])
def test_an_error_of_the_frames_passes_through(error, frames, tmp_path):
    def failing() -> Iterator[np.ndarray]:
        yield from frames[:10]
        raise error("from the frames")

    with pytest.raises(error, match="from the frames"):
        _encode(failing(), tmp_path / "v.mp4")
    _assert_nothing_left(tmp_path)


def test_ffmpegs_own_words_are_in_the_error(tmp_path):
    with pytest.raises(MediaError, match="nosuchpreset"):
        encode_video(
            moving_frames(1, 64, 64), tmp_path / "v.mp4", fps=16, crf=18, preset="nosuchpreset", timeout_s=60.0
        )
    _assert_nothing_left(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(MediaError, match="No such file or directory"):
        _encode(moving_frames(1, 64, 64), tmp_path / "missing" / "v.mp4")


def test_missing_binary(monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    with pytest.raises(MediaError, match="cannot be started") as caught:
        _encode(moving_frames(1, 64, 64), tmp_path / "v.mp4")
    assert "IMAGEIO_FFMPEG_EXE" in caught.value.hint
    _assert_nothing_left(tmp_path)


def test_full_disk(monkeypatch, tmp_path):
    """A stand-in for FFmpeg says what the real one was seen to say on a full tmpfs; filling a disk takes privileges."""
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text(
        "#!/bin/sh\ncat > /dev/null\n"
        "echo '[out#0/mp4 @ 0x1] Error writing trailer: No space left on device' >&2\nexit 228\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(stand_in))
    with pytest.raises(MediaError, match="the disk is full"):
        _encode(moving_frames(1, 64, 64), tmp_path / "v.mp4")


def test_picture_is_lossless(frames, tmp_path):
    write_png(frames[7], tmp_path / "picture.png")
    facts = probe(tmp_path / "picture.png")
    check(facts, width=640, height=480, frames=1, codec="png", pix_fmt="RGB")
    assert facts.fps is None
    with av.open(str(tmp_path / "picture.png")) as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(shown, frames[7])
    assert len(list(tmp_path.iterdir())) == 1


def test_poster_shows_the_middle(frames, tmp_path):
    assert [poster_index(n) for n in (1, 41, 81)] == [0, 20, 40]
    write_poster(frames[poster_index(41)], tmp_path / "poster.jpg")
    check(probe(tmp_path / "poster.jpg"), width=640, height=480, frames=1, codec="jpeg")
    with av.open(str(tmp_path / "poster.jpg")) as container:
        assert psnr_db(next(container.decode(video=0)).to_ndarray(format="rgb24"), frames[20]) > 35


def test_unusable_pictures_are_refused(frames, tmp_path):
    for bad in (frames[0].astype(np.float32), frames[0, ..., 0], frames, frames[0, :0]):
        with pytest.raises(MediaError, match="uint8 RGB"):
            write_png(bad, tmp_path / "p.png")
    with pytest.raises(MediaError, match="No such file"):
        write_png(frames[0], tmp_path / "missing" / "p.png")
    _assert_nothing_left(tmp_path)


def test_probe_sees_a_file_without_faststart(tmp_path):
    (
        ffmpeg.input("pipe:", format="rawvideo", pixel_format="rgb24", video_size=(64, 64), framerate=16)
        .output(str(tmp_path / "slow.mp4"), vcodec="libx264", pix_fmt="yuv420p")
        .run(cmd=get_ffmpeg_exe(), input=moving_frames(5, 64, 64).tobytes(), quiet=True)
    )
    with pytest.raises(MediaError, match="faststart is False, not True"):
        check(probe(tmp_path / "slow.mp4"), frames=5, faststart=True)


def test_check_names_every_difference(tmp_path):
    _encode(moving_frames(5, 64, 64), tmp_path / "v.mp4")
    with pytest.raises(MediaError) as caught:
        check(probe(tmp_path / "v.mp4"), width=640, frames=41, fps=16, codec="hevc")
    assert "width is 64, not 640, frames is 5, not 41, codec is h264, not hevc" in caught.value.message


def test_a_cut_video_is_noticed(frames, tmp_path):
    """With the index first, a cut file still opens and still says 41 frames: only decoding tells."""
    _encode(frames, tmp_path / "v.mp4")
    path = tmp_path / "v.mp4"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(MediaError):
        check(probe(path), frames=41)


@pytest.mark.parametrize("name", ["v.mp4", "p.png", "p.jpg"])
def test_what_cannot_be_decoded(name, frames, tmp_path):
    path = tmp_path / name
    for content in (b"", b"not a picture, not a video" * 100):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=f"{name} cannot be decoded"):
            probe(path)
    with pytest.raises(MediaError, match="cannot be decoded"):
        probe(tmp_path / f"missing-{name}")


def test_a_cut_picture_is_noticed(frames, tmp_path):
    for write, name in ((write_png, "p.png"), (write_poster, "p.jpg")):
        write(frames[0], tmp_path / name)
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
        with pytest.raises(MediaError, match="cannot be decoded"):
            probe(tmp_path / name)

"""A job's clips -> its files, each marked as made by AI, decoded again and checked before it counts."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.errors import EncodingFailed, HardwareEncodingFailed, MediaError
from serve_app.jobs.job import Artifact, JobSpec
from serve_app.jobs.presets import CONTACT_SHEET
from serve_app.jobs.receipt import RECEIPT_NAME, receipt_json
from serve_app.media.certificates import SigningCertificate
from serve_app.media.colours import check_colours, decoded_indices
from serve_app.media.contact_sheet import write_contact_sheet
from serve_app.media.encode import Target, encode_videos
from serve_app.media.encoders import encoder_for, give_up
from serve_app.media.formats import FORMATS
from serve_app.media.pictures import poster_index, write_png, write_poster
from serve_app.media.probe import check, check_video, probe
from serve_app.media.provenance import Origin, mark, origin_of
from serve_app.media.sampled import Sampled, spread_indices
from serve_app.media.stitch import stitched
from serve_app.media.whole import os_error, written_whole
from serve_app.settings import Settings

STALL_TIMEOUT_S = 300.0
"""For an FFmpeg that stands still: a machine in trouble."""
SHEET_FRAMES = 12
COMPARED_FRAMES = 5
"""Frames of each video that are held against the raw ones."""
UNSIGNABLE = ("video/webm",)
"""Types for which the C2PA library has no place; such a file says nothing of its origin by itself."""

Upscale = Callable[[Iterable[np.ndarray], int], Iterator[np.ndarray]]
"""Makes frames 2 or 4 times as wide and high: blocks of uint8 RGB [frames, height, width, 3] to such blocks, in order."""
Report = Callable[[int, int], None]
"""Hears how many frames of how many have gone into the files."""


def make_files(
    spec: JobSpec,
    clips: Iterable[np.ndarray],
    folder: Path,
    settings: Settings,
    *,
    receipt: dict[str, Any],
    certificate: SigningCertificate,
    upscale: Upscale | None = None,
    report: Report = lambda done, total: None,
) -> list[Artifact]:
    """Write the files that `spec` delivers into `folder`: `image.png`, or a video of each format with `poster.jpg`; then
    `receipt.json`.

    `clips`: the frames of each clip in order, uint8 RGB [frames, height, width, 3]; they pass only once, through `upscale` where
    `spec` wants it, into all formats, so from a generator no more than a clip or two are in memory. Pictures and MP4 carry a manifest
    that `certificate` signed and that names the receipt's SHA-256. Blocks. Raises MediaError, also where a finished file turns out
    not to be what was asked for.
    """
    content, receipt_path = receipt_json(receipt), folder / RECEIPT_NAME
    _write(content, receipt_path)
    making = _Making(spec, clips, folder, settings, origin_of(receipt, content), certificate, upscale, report)
    files = making.image() if spec.is_image else making.videos()
    return [*files, _artifact(receipt_path, "application/json")]


@dataclass(frozen=True)
class _Making:
    """One job's files in the making."""

    spec: JobSpec
    clips: Iterable[np.ndarray]
    folder: Path
    settings: Settings
    origin: Origin
    certificate: SigningCertificate
    upscale: Upscale | None
    report: Report

    @property
    def size(self) -> dict[str, int]:
        """What is delivered, in pixels."""
        factor = self.spec.upscale or 1
        return {"width": self.spec.width * factor, "height": self.spec.height * factor}

    def image(self) -> list[Artifact]:
        for block in self._frames([next(iter(self.clips))[:1]]):
            write_png(block[0], self.folder / "image.png")
        return [self._picture("image.png", "image/png", codec="png", **self.size)]

    def videos(self) -> list[Artifact]:
        """The video in each format, its poster and, where it is wanted, its contact sheet."""
        spec, length = self.spec, self.spec.video_length
        compared, shown = spread_indices(length, COMPARED_FRAMES), spread_indices(length, SHEET_FRAMES)
        sheet = CONTACT_SHEET in spec.formats
        blocks = self._frames(stitched(_trimmed(spec, self.clips), spec.transitions, length))
        frames = Sampled(blocks, {poster_index(length), *compared, *(shown if sheet else ())})
        targets = [self._target(name) for name in spec.formats if name != CONTACT_SHEET]
        try:
            encode_videos(frames, targets, fps=spec.fps, timeout_s=STALL_TIMEOUT_S)
        except EncodingFailed as error:
            hardware = [target.encoder for target in targets if target.encoder.is_hardware]
            if not hardware:
                raise
            for encoder in hardware:
                give_up(encoder)
            raise HardwareEncodingFailed(error.message, hint="It is tried again in software.") from error
        files = [self._video(target, {index: frames.frames[index] for index in compared}) for target in targets]
        write_poster(frames.frames[poster_index(length)], self.folder / "poster.jpg")
        files.append(self._picture("poster.jpg", "image/jpeg", codec="jpeg", **self.size))
        if sheet:
            kept = {index: frames.frames[index] for index in shown}
            write_contact_sheet(kept, self.folder / "contact_sheet.jpg", fps=spec.fps)
            files.append(self._picture("contact_sheet.jpg", "image/jpeg", codec="jpeg"))
        return files

    def _frames(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """What is delivered, and the news of what has been."""
        if self.spec.upscale is not None:
            if self.upscale is None:
                raise MediaError(
                    f"the job is to be upscaled x{self.spec.upscale}, and this service no longer upscales",
                    hint="Set upscale_model and submit it again.",
                )
            blocks = self.upscale(blocks, self.spec.upscale)
        done = 0
        for block in blocks:
            yield block
            done += len(block)
            self.report(done, self.spec.video_length)
        if done != self.spec.video_length:
            raise MediaError(f"{done} frames came for a video of {self.spec.video_length}")

    def _target(self, name: str) -> Target:
        video_format = FORMATS[name].of_upscaled(self.spec.upscale or 1)
        encoder = encoder_for(video_format)
        if encoder.name == "libx264":
            encoder = encoder.changed(crf=self.settings.h264_crf, preset=self.settings.h264_preset)
        return Target(self.folder / video_format.file_name, video_format, encoder)

    def _picture(self, name: str, content_type: str, **expected: int | str) -> Artifact:
        """The picture of that name, once it is marked and found to be as expected."""
        path = self.folder / name
        mark(path, content_type, self.origin, self.certificate)
        facts = probe(path)
        check(facts, **expected)
        return _artifact(path, content_type, width=facts.width, height=facts.height, codec=facts.codec)

    def _video(self, target: Target, raw: Mapping[int, np.ndarray]) -> Artifact:
        """The encoded video, once it is marked and found to show what was encoded; `raw`: some of that, by index."""
        spec, path, video_format = self.spec, target.path, target.video_format
        if video_format.content_type not in UNSIGNABLE:
            mark(path, video_format.content_type, self.origin, self.certificate)
        facts = probe(path, decoded_indices(raw, video_format))
        check_video(facts, video_format, frames=spec.video_length, fps=spec.fps, **self.size)
        check_colours(facts, raw, video_format)
        names = ("width", "height", "frames", "fps", "duration_s", "codec")
        return _artifact(path, video_format.content_type, **{name: getattr(facts, name) for name in names})


def _trimmed(spec: JobSpec, clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Each clip without the frames that were generated only because the model makes 4k+1."""
    for shot, frames in zip(spec.clips, clips, strict=True):
        yield frames[: shot.frames]


def _artifact(path: Path, content_type: str, **facts: Any) -> Artifact:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artifact(name=path.name, content_type=content_type, size_bytes=path.stat().st_size, sha256=digest, **facts)


def _write(content: bytes, path: Path) -> None:
    with written_whole(path) as part:
        try:
            part.write_bytes(content)
        except OSError as error:
            raise os_error(error, path) from error

"""One FFmpeg that takes raw frames through a pipe: feeding it, hearing what it says, and ending it when it stands still."""

import os
import selectors
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from serve_app.errors import EncodingFailed, MediaError
from serve_app.media.whole import disk_full

STDERR_LINES = 10
"""How many of FFmpeg's last lines an error message carries."""
PIPE_BYTES = 1 << 20
"""About a frame of 640x480 at a time, for fewer changes between the two processes."""
READ_BYTES = 1 << 16


def ffmpeg_binary() -> str:
    """The FFmpeg to run: IMAGEIO_FFMPEG_EXE, or the packaged one. Raises MediaError where there is none."""
    try:
        return get_ffmpeg_exe()
    except RuntimeError as error:
        raise _no_binary(str(error)) from error


def run_ffmpeg(command: list[str], frames: Iterable[np.ndarray], paths: Sequence[Path], stall_s: float) -> None:
    """Run FFmpeg to its end on `frames`, which must be C-contiguous and go to its standard input; `paths` are for messages.

    The command must hold `-progress pipe:1`. FFmpeg is stopped where for `stall_s` seconds it neither takes nor makes
    anything; the time that `frames` takes to give a frame does not count. FFmpeg has ended when the call ends, also when
    `frames` raises, which passes through.

    Raises MediaError for a missing FFmpeg and a full disk, EncodingFailed for one that fails (with its last lines) or stands still.
    """
    names = ", ".join(path.name for path in paths)
    try:
        # Its own session: a Ctrl-C in the terminal is for the service to handle; FFmpeg would end the file early.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pipesize=PIPE_BYTES,
            start_new_session=True,
        )
    except OSError as error:
        raise _no_binary(f"{command[0]}: {error.strerror}") from error
    feed = _Feed(process, stall_s)
    try:
        feed.write_all(frames)
        feed.hear_out()
    except _StoodStill:
        raise EncodingFailed(
            f"encoding {names} stood still for longer than {stall_s:g} s and was stopped",
            hint="The machine is overloaded, or the encoder's preset is too slow for it.",
        ) from None
    finally:
        process.kill()
        process.wait()
        feed.close()
    if process.returncode == 0:
        return
    said = feed.said()
    if "No space left on device" in said:
        raise disk_full(paths[0])
    ended = f"was killed by signal {-process.returncode}" if process.returncode < 0 else "failed"
    raise EncodingFailed(f"FFmpeg {ended} while encoding {names}: {said or 'it said nothing'}")


class _StoodStill(Exception):
    pass


class _Feed:
    """The three pipes of a running FFmpeg, served in turn, so that none ever waits for another."""

    def __init__(self, process: subprocess.Popen[bytes], stall_s: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process, self._stall_s = process, stall_s
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._selector = selectors.DefaultSelector()
        os.set_blocking(self._stdin.fileno(), False)
        for pipe, event in (
            (self._stdin, selectors.EVENT_WRITE),
            (self._stdout, selectors.EVENT_READ),
            (self._stderr, selectors.EVENT_READ),
        ):
            self._selector.register(pipe, event)
        self._progress: set[bytes] = set()
        self._last_words = b""
        self._moved_at = time.monotonic()

    def write_all(self, frames: Iterable[np.ndarray]) -> None:
        """Write all frames and close the pipe; stop without an error where FFmpeg has ended: its exit code says why."""
        for frame in frames:
            rest = frame.data.cast("B")
            self._moved_at = time.monotonic()  # waiting for the frame was not FFmpeg's doing
            while rest:
                if self._stdin in self._wait():
                    try:
                        rest = rest[os.write(self._stdin.fileno(), rest) :]
                    except BrokenPipeError:
                        return
                    self._moved_at = time.monotonic()
        self._selector.unregister(self._stdin)
        self._stdin.close()
        self._moved_at = time.monotonic()

    def hear_out(self) -> None:
        """Wait until FFmpeg has ended."""
        if not self._stdin.closed:
            self._selector.unregister(self._stdin)
        while self._selector.get_map():
            self._wait()
        try:
            self._process.wait(self._stall_s)
        except subprocess.TimeoutExpired:
            raise _StoodStill from None

    def said(self) -> str:
        """FFmpeg's last words on its standard error."""
        return "\n".join(self._last_words.decode(errors="replace").strip().splitlines()[-STDERR_LINES:])

    def close(self) -> None:
        """Close what is open."""
        self._selector.close()
        for pipe in (self._stdin, self._stdout, self._stderr):
            with suppress(BrokenPipeError):  # bytes that a dead FFmpeg never read
                pipe.close()

    def _wait(self) -> list[object]:
        """The pipes that are ready, once one is; what FFmpeg said has been heard. Raises _StoodStill."""
        ready = self._selector.select(self._moved_at + self._stall_s - time.monotonic())
        pipes: list[object] = [key.fileobj for key, _ in ready]
        for pipe, hear in ((self._stdout, self._hear_progress), (self._stderr, self._hear_words)):
            if pipe in pipes:
                if said := os.read(pipe.fileno(), READ_BYTES):
                    hear(said)
                else:
                    self._selector.unregister(pipe)
        if time.monotonic() - self._moved_at > self._stall_s:
            raise _StoodStill
        return pipes

    def _hear_progress(self, said: bytes) -> None:
        """Note that FFmpeg moves when what it has made, in frames and bytes, is not what it had made before."""
        made = {line for line in said.splitlines() if line.startswith((b"frame=", b"total_size="))}
        if made - self._progress:
            self._progress, self._moved_at = made, time.monotonic()

    def _hear_words(self, said: bytes) -> None:
        self._last_words = (self._last_words + said)[-READ_BYTES:]


def _no_binary(reason: str) -> MediaError:
    return MediaError(
        f"FFmpeg cannot be started: {reason}",
        hint="Reinstall the package imageio-ffmpeg, or name a binary in the environment variable IMAGEIO_FFMPEG_EXE.",
    )

"""The artifact store of a single machine: a folder."""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from serve_app.errors import StorageError, StorageUnavailable
from serve_app.storage.keys import checked_key

PROBE_BYTES = 1 << 20
"""What `check` writes: more than the last free block of a full disk."""


class LocalStore:
    """Artifacts as files under `root`, which the ingress serves itself. Implements `ArtifactStore`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, path: Path, content_type: str, report: Callable[[int], None] = lambda _: None) -> None:
        """Copy the file at `path` to `key`: whole or not at all, and on the disk when the call returns.

        A copy, not a link or a rename: the source stays the caller's, who may sign or remove it.
        """
        target = self.root / checked_key(key)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        with self._plain_errors(f"storing {key}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("rb") as source, part.open("xb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
                    copy.flush()
                    os.fsync(copy.fileno())
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
            for folder in target.relative_to(self.root).parents:
                _sync_folder(self.root / folder)
            report(target.stat().st_size)

    def url(self, key: str, download_name: str) -> str | None:
        """None: the ingress serves the file."""
        return None

    def local_path(self, key: str) -> Path | None:
        """The file of `key`, or None if there is none."""
        path = self.root / checked_key(key)
        return path if path.is_file() else None

    def delete(self, prefix: str) -> None:
        """Remove the folder `prefix` with all that is in it."""
        with self._plain_errors(f"removing {prefix}"):
            shutil.rmtree(self.root / checked_key(prefix), onerror=_unless_gone)

    def list(self, folder: str = "", *, skip: int = 0, limit: int = 1000) -> Sequence[str]:
        """Names in `folder`, sorted, a page at a time."""
        place = self.root / checked_key(folder) if folder else self.root
        with self._plain_errors(f"listing {folder or self.root}"):
            try:
                return sorted(os.listdir(place))[skip : skip + limit]
            except FileNotFoundError:
                return []

    def check(self) -> None:
        """Write a file and remove it."""
        folder = f"check-{secrets.token_hex(4)}"
        with tempfile.NamedTemporaryFile() as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            self.put(f"{folder}/probe", Path(probe.name), "application/octet-stream")
        self.delete(folder)

    @contextmanager
    def _plain_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageUnavailable(
                    f"{doing}: the disk is full", hint=f"Free space on the disk that holds {self.root} (data_dir)."
                ) from error
            raise StorageError(
                f"{doing}: {error.strerror or error}: {error.filename or self.root}",
                hint=f"The service must be able to write in {self.root} (data_dir).",
            ) from error


def _unless_gone(
    function: Callable[..., object], path: str, error: tuple[type[BaseException], BaseException, TracebackType]
) -> None:
    """Two deletes at once, or one of a job that has no files, are no error."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _sync_folder(folder: Path) -> None:
    """Put a folder's new names on the disk: without it a power cut may take back the rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

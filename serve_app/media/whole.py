"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_app.errors import MediaError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the temporary path to write to; it becomes `path` when the block ends well and is removed when it does not.

    What the block raises passes through; MediaError if the rename is refused.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        try:
            part.replace(path)
        except OSError as error:
            raise os_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)


def os_error(error: OSError, path: Path) -> MediaError:
    """The MediaError that says what the operating system refused while `path` was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path)
    return MediaError(
        f"{path} could not be written: {error.strerror or error}",
        hint=f"Check that the folder {path.parent} exists and that the service may write there.",
    )


def disk_full(path: Path) -> MediaError:
    """The MediaError for a disk without room for `path`."""
    return MediaError(
        f"{path} could not be written: the disk is full", hint=f"Free space on the disk that holds {path.parent}."
    )

"""Folders for files in the making, and what is left of them after a kill."""

import shutil
import tempfile
from contextlib import suppress
from os import getpid, kill
from pathlib import Path

_PREFIX = "wan-serve-"


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new empty folder, to be used in a `with`; its name says which process it belongs to."""
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{getpid()}-")


def sweep_scratch() -> list[Path]:
    """Remove the folders whose process was killed before it could; those that were removed."""
    gone = [path for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*") if not _is_alive(path)]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def _is_alive(path: Path) -> bool:
    """Whether the process that made the folder runs; true where that cannot be told."""
    with suppress(PermissionError):
        try:
            kill(int(path.name.removeprefix(_PREFIX).partition("-")[0]), 0)
        except ProcessLookupError:
            return False
        except ValueError:
            return True
    return True

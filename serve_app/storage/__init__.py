"""Artifact stores: where finished files are delivered. One interface, two places: a local folder and Supabase."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from serve_app.settings import Settings


class ArtifactStore(Protocol):
    """A place for files under keys such as `{job_id}/{fencing_token}/{name}`. Calls block: use them from a thread.

    Every method raises `StorageUnavailable` for what may pass (already retried as the settings say) and
    `StorageError` for what will not.
    """

    def put(self, key: str, path: Path, content_type: str, report: Callable[[int], None] = lambda _: None) -> None:
        """Store the file at `path` under `key`, replacing what is there.

        `report` hears how many of its bytes are stored: as they arrive where that takes a while, and in the end all of them.
        """

    def url(self, key: str, download_name: str) -> str | None:
        """A signed URL that lets a browser download `key`, or None where the ingress serves the file itself.

        Raises `ArtifactNotFound` where a store that signs has no such file.
        """

    def local_path(self, key: str) -> Path | None:
        """The file of `key` on this machine, or None where there is none to serve."""

    def delete(self, prefix: str) -> None:
        """Remove every file whose key starts with the folder `prefix` (a job's id). Nothing there is no error."""

    def list(self, folder: str = "", *, skip: int = 0, limit: int = 1000) -> Sequence[str]:
        """Names of what lies directly in `folder` (empty: at the top), sorted, without the first `skip`, at most `limit`."""

    def check(self) -> None:
        """Prove that files can be written and removed, or raise with what to do about it."""


def open_store(settings: Settings) -> ArtifactStore:
    """The artifact store that the settings name."""
    if settings.storage == "supabase":
        from serve_app.storage.supabase import SupabaseStore

        return SupabaseStore(settings)
    from serve_app.storage.local import LocalStore

    return LocalStore(settings.artifacts_dir)

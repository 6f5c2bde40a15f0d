"""Names of files in an artifact store."""

import re

from serve_app.errors import StorageError

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def artifact_key(job_id: str, fencing_token: int, name: str) -> str:
    """The key under which the conductor that holds `fencing_token` stores a job's artifact (DESIGN.md section 5)."""
    return checked_key(f"{job_id}/{fencing_token}/{name}")


def checked_key(key: str) -> str:
    """The key or folder prefix itself, if it is safe in every store; else StorageError.

    Parts between slashes are letters, digits, `.`, `_` and `-` in ASCII and do not start with a dot: so no way out of
    the folder, no percent-encoding that a client would undo, and nothing that Supabase refuses as InvalidKey.
    """
    if not all(_PART.fullmatch(part) for part in key.split("/")):
        raise StorageError(
            f"{key!r} is no artifact key",
            hint="Keys are {job_id}/{fencing_token}/{name}: ASCII letters, digits, '.', '_', '-', no leading dot.",
        )
    return key

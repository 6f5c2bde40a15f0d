"""The artifact store on Supabase Storage, through the official client."""

import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import supabase
from storage3.exceptions import StorageApiError
from supabase.lib.client_options import SyncClientOptions
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from serve_app.errors import ArtifactNotFound, StorageError, StorageUnavailable, WanServeError
from serve_app.settings import Settings
from serve_app.storage.keys import checked_key
from serve_app.storage.resumable import CHUNK_BYTES, ResumableUpload

DELIVERED_TYPES = ("video/mp4", "image/png", "image/jpeg", "application/json")
"""Content types that jobs deliver; the bucket must take them all."""
PAGE = 1000
"""Files listed or removed in one request; Supabase removes at most 1,000."""
BACKOFF = wait_exponential_jitter(initial=0.5, max=20.0, jitter=0.5)
"""Seconds between tries: 0.5, 1, 2, ... up to 20, each with up to half a second more."""
MAX_RETRY_AFTER_S = 60.0
"""A Retry-After is honoured up to here: the caller has a job to report on."""
TRANSIENT_STATUSES = frozenset({408, 423, 425, 429})
"""Besides 5xx: timeout, locked, too early, too many requests."""

T = TypeVar("T")


class SupabaseStore:
    """Artifacts as objects in one bucket. Implements `ArtifactStore`; may be shared between threads.

    A try that ends in 5xx, 429, a timeout or a broken connection is repeated, `storage_attempts` tries in all;
    `storage_timeout_s` is for each wait on the network within a try, so a large file that keeps moving is not cut.
    """

    def __init__(self, settings: Settings) -> None:
        url = settings.supabase_url or ""
        key = settings.supabase_key.get_secret_value() if settings.supabase_key else ""
        if not re.fullmatch(r"[!-~]+", key):  # and the HTTP library would print the whole key in its error
            raise StorageError(
                "supabase_key is empty or holds spaces, line breaks or other characters that no key has",
                hint="Set WAN_SERVE_SUPABASE_KEY to the project's service-role key and nothing else.",
            )
        self._http = httpx.Client(timeout=settings.storage_timeout_s)
        try:
            client = supabase.create_client(url, key, SyncClientOptions(httpx_client=self._http))
        except supabase.SupabaseException as error:
            raise StorageError(
                f"supabase_url is {url!r}: {error}", hint="It looks like https://<project>.supabase.co"
            ) from error
        self._resumable_url = f"{url.rstrip('/')}/storage/v1/upload/resumable"
        self._headers = {"authorization": f"Bearer {key}", "apikey": key}
        self._bucket_name = settings.supabase_bucket
        self._bucket = client.storage.from_(settings.supabase_bucket)
        self._url_ttl_s = settings.signed_url_ttl_s
        self._attempts = settings.storage_attempts

    def put(self, key: str, path: Path, content_type: str, report: Callable[[int], None] = lambda _: None) -> None:
        """Upload the file at `path`, replacing what is there.

        One of over 6 MB goes in chunks. A cut connection then costs no more than the chunk that was on its way, and
        `storage_attempts` tries are for each chunk.
        """
        checked_key(key)
        doing = f"storing {key}"
        size = self._request(doing, lambda: path.stat().st_size)
        if size > CHUNK_BYTES:
            self._put_in_chunks(doing, key, path, content_type, report)
        else:
            self._request(doing, partial(self._put_at_once, key, path, content_type))
            report(size)

    def _put_at_once(self, key: str, path: Path, content_type: str) -> None:
        self._bucket.upload(
            key,
            path,
            {
                "content-type": content_type,
                "upsert": "true",  # a string: it becomes a header
                # Servers before September 2026 never answer the next request on the connection of a refused
                # upload. So no connection is used again after an upload, and each retry has a new one.
                "headers": {"connection": "close"},
            },
        )

    def _put_in_chunks(
        self, doing: str, key: str, path: Path, content_type: str, report: Callable[[int], None]
    ) -> None:
        metadata = {
            "bucketName": self._bucket_name,
            "objectName": key,
            "contentType": content_type,
            "cacheControl": "3600",
        }
        upload = ResumableUpload(
            self._http,
            self._resumable_url,
            path,
            headers=self._headers | {"x-upsert": "true"},
            metadata=metadata,
            max_setbacks=self._attempts - 1,
        )
        while not upload.is_done:
            self._request(doing, upload.advance)
            report(upload.offset)

    def url(self, key: str, download_name: str) -> str | None:
        """A signed URL for `signed_url_ttl_s` seconds. Raises ArtifactNotFound where there is no such file."""
        checked_key(key)
        signed = self._request(
            f"signing {key}",
            lambda: self._bucket.create_signed_url(key, self._url_ttl_s, {"download": download_name}),
        )
        return signed["signedUrl"]

    def local_path(self, key: str) -> Path | None:
        """None: the files are not on this machine."""
        return None

    def delete(self, prefix: str) -> None:
        """Remove the folder `prefix` with all that is in it."""
        keys = list(self._keys_under(checked_key(prefix)))
        for start in range(0, len(keys), PAGE):
            self._request(f"removing {prefix}", partial(self._bucket.remove, keys[start : start + PAGE]))

    def list(self, folder: str = "", *, skip: int = 0, limit: int = PAGE) -> Sequence[str]:
        """Names in `folder`, sorted, a page at a time."""
        return [entry["name"] for entry in self._entries(checked_key(folder) if folder else "", skip, limit)]

    def check(self) -> None:
        """Store a small file of each delivered type, sign a URL, and remove them again."""
        folder = f"check-{secrets.token_hex(4)}"
        try:
            with tempfile.NamedTemporaryFile() as probe:
                for index, content_type in enumerate(DELIVERED_TYPES):
                    self.put(f"{folder}/{index}", Path(probe.name), content_type)
            self.url(f"{folder}/0", "check")
            self.delete(folder)
        except WanServeError:
            with suppress(WanServeError):  # the first error is the one to report
                self.delete(folder)
            raise
        if any(self._keys_under(folder)):  # without the right, Supabase removes nothing and says nothing
            raise StorageError(
                f"the key may write to the bucket {self._bucket_name!r} but not remove from it", hint=KEY_HINT
            )

    def _keys_under(self, folder: str) -> Iterator[str]:
        offset = 0
        while page := self._entries(folder, offset, PAGE):
            for entry in page:
                key = f"{folder}/{entry['name']}"
                if entry["id"] is None:  # a folder
                    yield from self._keys_under(key)
                else:
                    yield key
            offset += len(page)

    def _entries(self, folder: str, offset: int, limit: int) -> Sequence[dict[str, Any]]:
        """A page of what lies directly in `folder`, by name (the client's default order)."""
        doing = f"listing {folder or 'the bucket'}"
        return self._request(doing, partial(self._bucket.list, folder, {"limit": limit, "offset": offset}))

    def _request(self, doing: str, send: Callable[[], T]) -> T:
        """What `send` gives; tried again while it fails in a way that may pass. `doing` begins the error message."""
        tries = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=_wait_s,
            retry=retry_if_exception_type(StorageUnavailable),
            reraise=True,
        )
        return tries(self._try, doing, send)

    def _try(self, doing: str, send: Callable[[], T]) -> T:
        try:
            return send()
        except StorageApiError as error:
            raise self._explained(doing, error) from error
        except httpx.RequestError as error:
            raise StorageUnavailable(
                f"{doing}: no answer from Supabase: {type(error).__name__}: {error}",
                hint="Check supabase_url, and storage_timeout_s if the network is slow.",
            ) from error
        except OSError as error:
            raise StorageError(f"{doing}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{doing}: this is no answer of Supabase Storage: {error}", hint=URL_HINT) from error

    def _explained(self, doing: str, error: StorageApiError) -> WanServeError:
        """The error in our words. The status in the body counts: the server sends most errors as HTTP 400."""
        status = int(error.status) if str(error.status).isdigit() else 0
        message = f"{doing}: Supabase answered {status} {error.code}: {error.message}"
        if status >= 500 or status in TRANSIENT_STATUSES:
            return StorageUnavailable(message, hint="Supabase may be overloaded or down; see its status page.")
        if status == 404 and error.code in ("not_found", "NoSuchKey"):
            return ArtifactNotFound(message)
        if status == 404 and "bucket" in error.message.lower():
            hint = f"Create the bucket {self._bucket_name!r} in Supabase, or name another one in supabase_bucket."
        elif status in (401, 403):
            hint = KEY_HINT
        elif status == 413:
            hint = f"Raise the file size limit of the bucket {self._bucket_name!r} (and of the project) in Supabase."
        elif status == 415:
            hint = f"Let the bucket {self._bucket_name!r} take these MIME types: {', '.join(DELIVERED_TYPES)}."
        else:
            hint = URL_HINT
        return StorageError(message, hint=hint)


KEY_HINT = "Set supabase_key (WAN_SERVE_SUPABASE_KEY) to the service-role key of the project that supabase_url names."
URL_HINT = "Check that supabase_url is the address of a Supabase project, as https://<project>.supabase.co"


def _wait_s(state: RetryCallState) -> float:
    """Seconds until the next try: our backoff, or longer where the server asks for it."""
    assert state.outcome is not None
    return max(BACKOFF(state), min(_retry_after_s(state.outcome.exception()), MAX_RETRY_AFTER_S))


def _retry_after_s(error: BaseException | None) -> float:
    """The Retry-After (RFC 9110: seconds or a date) of the response that led to `error`; 0 without one."""
    while error is not None and not isinstance(error, httpx.HTTPStatusError):
        error = error.__cause__ or error.__context__
    value = error.response.headers.get("retry-after", "") if error else ""
    if value.isdigit():
        return float(value)
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0

"""Uploads that go on where they were cut: TUS 1.0.0 (https://tus.io/protocols/resumable-upload), as Supabase Storage speaks it.

Three requests make the protocol: POST creates an upload and names it, PATCH appends a chunk at an offset, HEAD tells the offset
that the server has.
"""

from base64 import b64encode
from pathlib import Path

import httpx
from storage3.exceptions import StorageApiError

from serve_app.errors import StorageUnavailable

CHUNK_BYTES = 6 * 1024 * 1024
"""Supabase takes chunks of this size only, but for the last one."""


class ResumableUpload:
    """One file on its way to one key. Call `advance` until `is_done`; after an error it may be called again.

    `headers` authorize every request; `metadata` is Supabase's: bucketName, objectName, contentType, cacheControl. What the
    server forgets, it may forget `max_setbacks` times.
    """

    def __init__(
        self,
        http: httpx.Client,
        endpoint: str,
        path: Path,
        *,
        headers: dict[str, str],
        metadata: dict[str, str],
        max_setbacks: int,
    ) -> None:
        self._http, self._endpoint, self._path = http, endpoint, path
        # No connection is used again: servers before September 2026 hang on the one of a refused upload.
        self._headers = headers | {"tus-resumable": "1.0.0", "connection": "close"}
        self._metadata = ",".join(f"{name} {b64encode(value.encode()).decode()}" for name, value in metadata.items())
        self._url: str | None = None
        self._is_sure = True
        """Whether `offset` is what the server has; not after a request that failed."""
        self._setbacks_left = max_setbacks
        self._gave_up = ""
        self._doing = f"storing {metadata['objectName']}"
        self.size = path.stat().st_size
        self.offset = 0
        """Bytes that the server is known to have."""
        self.is_done = False

    def advance(self) -> None:
        """Bring the upload on: by a chunk, or by what an earlier call had brought without knowing.

        Blocks. Raises StorageUnavailable where another call may help, StorageApiError for what the server refused,
        httpx.RequestError for a broken connection, OSError, and ValueError or KeyError for an answer that no TUS server gives.
        """
        self._refuse_to_go_on()
        if self._url is None:
            self._create()
        elif not self._is_sure:
            known = self.offset
            self._ask()
            if self.offset > known:
                return
        self._append()

    def _create(self) -> None:
        headers = {"upload-length": str(self.size), "upload-metadata": self._metadata}
        answer = self._send("POST", self._endpoint, headers)
        # Only its last part counts: behind a proxy a server often names an address that nobody else reaches, and the key
        # is for this address alone.
        name = answer.headers["location"].rstrip("/").rpartition("/")[2]
        self._url, self.offset, self._is_sure = f"{self._endpoint}/{name}", 0, True

    def _ask(self) -> None:
        assert self._url is not None
        offset = int(self._send("HEAD", self._url, {}).headers["upload-offset"])
        if offset >= self.size:
            # All bytes are there, but whether an object was made of them no request tells.
            self._start_again("the end of the upload was not confirmed")
        if offset < self.offset:
            self._count_setback(f"the server has {offset} bytes after it had confirmed {self.offset}")
        self.offset, self._is_sure = offset, True

    def _append(self) -> None:
        assert self._url is not None
        with self._path.open("rb") as file:
            file.seek(self.offset)
            chunk = file.read(CHUNK_BYTES)
        if not chunk:
            raise OSError(f"{self._path} became shorter while it was uploaded")
        self._is_sure = False
        headers = {"upload-offset": str(self.offset), "content-type": "application/offset+octet-stream"}
        self.offset = int(self._send("PATCH", self._url, headers, chunk).headers["upload-offset"])
        self._is_sure = True
        self.is_done = self.offset == self.size

    def _send(self, method: str, url: str, headers: dict[str, str], content: bytes = b"") -> httpx.Response:
        answer = self._http.request(method, url, headers=self._headers | headers, content=content)
        if answer.is_success:
            return answer
        if method != "POST" and answer.status_code in (404, 410):
            self._start_again(f"the upload has expired (HTTP {answer.status_code})")
        if method == "PATCH" and answer.status_code == 409:
            raise StorageUnavailable(f"{self._doing}: the server has not {self.offset} bytes, as it had confirmed")
        try:
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise _refusal(answer) from error
        raise AssertionError("every answer but success is an error")

    def _start_again(self, reason: str) -> None:
        """Forget the upload, so that the next call begins a new one. Raises StorageUnavailable always."""
        self._url, self.offset = None, 0
        self._count_setback(reason)
        raise StorageUnavailable(f"{self._doing}: {reason}; it begins again")

    def _count_setback(self, reason: str) -> None:
        """One setback less to come. Raises StorageUnavailable, now and at every later `advance`, where it was one too many."""
        if self._setbacks_left == 0:
            self._gave_up = f"{self._doing}: {reason}, once too often"
            self._refuse_to_go_on()
        self._setbacks_left -= 1

    def _refuse_to_go_on(self) -> None:
        if self._gave_up:
            raise StorageUnavailable(self._gave_up, hint="Supabase loses what it was sent; see its log.")


def _refusal(answer: httpx.Response) -> StorageApiError:
    """The error in the answer: JSON with the true status from the API before TUS, plain text from TUS itself."""
    try:
        body = answer.json()
        return StorageApiError(body["message"], body["error"], body["statusCode"])
    except (ValueError, KeyError, TypeError):
        return StorageApiError(answer.text.strip()[:200], answer.reason_phrase, answer.status_code)

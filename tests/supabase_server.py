"""A stand-in for Supabase Storage: our own small server for tests, not Supabase's.

It answers the requests that the official client sends as the real server (storage-api 1.11) was seen to answer them:
errors are HTTP 400 with the true status in the body's `statusCode`, except 500, which is both; uploads are multipart;
a refused large upload leaves a connection on which the next request is never answered.

Resumable uploads are as in storage-api's source and that of its TUS server (@tus/server 2.4): errors of TUS have their true HTTP
status and a body of plain text, a wrong key is refused before TUS, and what arrived of a chunk before a cut is kept.
"""

import asyncio
import threading
import time
from base64 import b64decode, urlsafe_b64encode
from collections import deque
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

import jwt
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

SIGNING_SECRET = "a secret of the stand-in, long enough for HS256"
LARGE_BODY_BYTES = 64 * 1024


@dataclass
class StoredObject:
    content: bytes
    content_type: str


@dataclass
class Bucket:
    file_size_limit: int | None = None
    allowed_mime_types: list[str] | None = None
    may_remove: bool = True
    objects: dict[str, StoredObject] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A fault: answer so instead of doing anything."""

    status: int
    body_status: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    text: str | None = None


class Pass:
    """No fault: do as you are told."""


class Hang:
    """A fault: never answer."""


class Cut:
    """A fault: reset the connection."""


@dataclass(frozen=True)
class CutMidway:
    """A fault of a PATCH: reset the connection once `after` bytes of its body are here, and keep the first `kept` of them."""

    after: int
    kept: int


@dataclass
class Upload:
    """A resumable upload in the making, or done."""

    bucket: str
    key: str
    content_type: str
    size: int
    content: bytearray = field(default_factory=bytearray)
    is_expired: bool = False


@dataclass(frozen=True)
class Seen:
    """A request as it came in."""

    method: str
    path: str
    client: tuple[str, int]
    headers: dict[str, str]
    at: float


class ApiError(Exception):
    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error, self.message = status, error, message

    def response(self) -> Response:
        http_status = 500 if self.status == 500 else 400
        return JSONResponse(
            {"statusCode": str(self.status), "error": self.error, "message": self.message}, status_code=http_status
        )


class TusError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text

    def response(self) -> Response:
        return Response(self.text, status_code=self.status, media_type="text/plain")


class SupabaseServer:
    """Runs on a free port of this machine while the `with` block lasts.

    Set `faults` to spoil the next requests, `outage` to spoil every one until it is None again, `cuts` to spoil the next chunks.
    """

    def __init__(self, key: str = "service-role-key") -> None:
        self.key = key
        self.reset()
        self._stopping = asyncio.Event()
        storage = "/storage/v1"
        self._app = Starlette(
            routes=[
                Route(f"{storage}/object/sign/{{bucket}}/{{key:path}}", self._sign, methods=["POST"]),
                Route(f"{storage}/object/sign/{{bucket}}/{{key:path}}", self._signed_download, methods=["GET"]),
                Route(f"{storage}/object/list/{{bucket}}", self._list, methods=["POST"]),
                Route(f"{storage}/object/{{bucket}}", self._remove, methods=["DELETE"]),
                Route(f"{storage}/object/{{bucket}}/{{key:path}}", self._upload, methods=["POST"]),
                Route(f"{storage}/upload/resumable", self._create_resumable, methods=["POST"]),
                Route(f"{storage}/upload/resumable/{{id}}", self._resumable_offset, methods=["HEAD"]),
                Route(f"{storage}/upload/resumable/{{id}}", self._append, methods=["PATCH"]),
            ],
            exception_handlers={
                ApiError: lambda request, error: error.response(),
                TusError: lambda request, error: error.response(),
            },
        )
        config = uvicorn.Config(
            self._asgi, port=0, interface="asgi3", proxy_headers=False, lifespan="off", log_level="warning"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def reset(self) -> None:
        """As new: one empty bucket, no faults."""
        self.buckets: dict[str, Bucket] = {"wan-serve": Bucket()}
        self.faults: deque[Answer | Hang | Cut | Pass] = deque()
        self.outage: Answer | Hang | Cut | None = None
        self.cuts: deque[CutMidway] = deque()
        self.uploads: dict[str, Upload] = {}
        self.received: list[tuple[int, int]] = []
        """Offset and bytes of each chunk of resumable uploads, cut ones too."""
        self.fail_to_finish = 0
        """So many resumable uploads get a 500 once all their bytes are there, and no object comes of them."""
        self.named_host: str | None = None
        """The host that resumable uploads are said to lie on, where a proxy hides the true one."""
        self.seen: list[Seen] = []
        self.clock_offset_s = 0.0
        self.dead_connections: set[tuple[str, int]] = set()

    def spoil_after(self, requests: int, fault: Answer | Hang | Cut) -> None:
        """Let so many requests pass and spoil the next one."""
        self.faults.extend([*[Pass()] * requests, fault])

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the stand-in server did not start"
            time.sleep(0.01)
        self._loop = self._server.servers[0].get_loop()
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._server.should_exit = True
        self._thread.join()

    async def _asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope["client"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append(Seen(scope["method"], scope["path"], client, headers, time.monotonic()))
        fault = self.faults.popleft() if self.faults else self.outage
        if isinstance(fault, Hang) or client in self.dead_connections:
            await self._stopping.wait()
        elif isinstance(fault, Cut):
            receive.__self__.transport.abort()  # type: ignore[attr-defined]
        elif isinstance(fault, Answer):
            await Request(scope, receive).body()
            content = {"statusCode": fault.body_status or str(fault.status), "error": "Injected", "message": "injected"}
            response = Response(fault.text) if fault.text is not None else JSONResponse(content)
            response.status_code = fault.status
            response.headers.update(fault.headers)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _now(self) -> float:
        return time.time() + self.clock_offset_s

    def _authorize(self, request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {self.key}":
            raise ApiError(403, "Unauthorized", "Invalid Compact JWS")

    def _authorized_bucket(self, request: Request) -> Bucket:
        self._authorize(request)
        name = request.path_params["bucket"]
        if name not in self.buckets:
            raise ApiError(404, "Bucket not found", "Bucket not found")
        return self.buckets[name]

    async def _upload(self, request: Request) -> Response:
        body = await request.body()
        try:
            return self._accept(request, body)
        except ApiError:
            if len(body) > LARGE_BODY_BYTES:
                self.dead_connections.add(request.scope["client"])
            raise

    def _accept(self, request: Request, body: bytes) -> Response:
        bucket, key = self._authorized_bucket(request), request.path_params["key"]
        content, content_type = _file_part(request.headers["content-type"], body)
        if not key.isascii():
            raise ApiError(400, "InvalidKey", f"Invalid key: {key}")
        if bucket.allowed_mime_types is not None and content_type not in bucket.allowed_mime_types:
            raise ApiError(415, "invalid_mime_type", f"mime type {content_type} is not supported")
        if bucket.file_size_limit is not None and len(content) > bucket.file_size_limit:
            raise ApiError(413, "Payload too large", "The object exceeded the maximum allowed size")
        if key in bucket.objects and request.headers.get("x-upsert") != "true":
            raise ApiError(409, "Duplicate", "The resource already exists")
        bucket.objects[key] = StoredObject(content, content_type)
        return JSONResponse({"Id": "1", "Key": f"{request.path_params['bucket']}/{key}"})

    # ---- resumable uploads

    async def _create_resumable(self, request: Request) -> Response:
        self._check_tus(request)
        pairs = (pair.split(" ") for pair in request.headers["upload-metadata"].split(","))
        metadata = {name: b64decode(value, validate=True).decode() for name, value in pairs}
        bucket_name, key, size = metadata["bucketName"], metadata["objectName"], int(request.headers["upload-length"])
        if (bucket := self.buckets.get(bucket_name)) is None:
            raise TusError(404, "Bucket not found")
        if size == 0:
            raise TusError(404, "Not Found")
        if bucket.file_size_limit is not None and size > bucket.file_size_limit:
            raise TusError(413, "Maximum size exceeded\n")
        if not key.isascii():
            raise TusError(400, f"Invalid key: {key}")
        if key in bucket.objects and request.headers.get("x-upsert") != "true":
            raise TusError(409, "The resource already exists")
        if bucket.allowed_mime_types is not None and metadata["contentType"] not in bucket.allowed_mime_types:
            raise TusError(415, f"mime type {metadata['contentType']} is not supported")
        id = urlsafe_b64encode(f"{bucket_name}/{key}/version-{len(self.uploads)}".encode()).rstrip(b"=").decode()
        self.uploads[id] = Upload(bucket_name, key, metadata["contentType"], size)
        host = self.named_host or request.headers["host"]
        return self._tus_answer(201, {"location": f"http://{host}/storage/v1/upload/resumable/{id}"})

    async def _resumable_offset(self, request: Request) -> Response:
        self._check_tus(request)
        upload = self._upload_of(request)
        headers = {"upload-offset": str(len(upload.content)), "upload-length": str(upload.size)}
        return self._tus_answer(200, headers | {"cache-control": "no-store"})

    async def _append(self, request: Request) -> Response:
        self._check_tus(request)
        if "upload-offset" not in request.headers:
            raise TusError(403, "Upload-Offset header required\n")
        if request.headers.get("content-type") != "application/offset+octet-stream":
            raise TusError(400, "Invalid content-type\n")
        upload, offset = self._upload_of(request), int(request.headers["upload-offset"])
        if offset != len(upload.content):
            raise TusError(409, "Upload-Offset conflict\n")
        cut, body = self.cuts.popleft() if self.cuts else None, bytearray()
        async for part in request.stream():
            body += part
            if cut is not None and len(body) >= cut.after:
                self.received.append((offset, len(body)))
                upload.content += body[: cut.kept]
                request.receive.__self__.transport.abort()
                return Response()
        self.received.append((offset, len(body)))
        if offset + len(body) > upload.size:
            raise TusError(413, "upload's size exceeded\n")
        upload.content += body
        if len(upload.content) == upload.size:
            if self.fail_to_finish > 0:
                self.fail_to_finish -= 1
                raise TusError(500, "Something went wrong with that request\n")
            self.buckets[upload.bucket].objects[upload.key] = StoredObject(bytes(upload.content), upload.content_type)
        return self._tus_answer(204, {"upload-offset": str(len(upload.content))})

    def _check_tus(self, request: Request) -> None:
        self._authorize(request)
        if request.headers.get("tus-resumable") != "1.0.0":
            raise TusError(412, "Tus-Resumable Required\n")

    def _upload_of(self, request: Request) -> Upload:
        id = request.path_params["id"]
        if id not in self.uploads:
            raise TusError(404, "The file for this url was not found\n")
        if self.uploads[id].is_expired:
            raise TusError(410, "The file for this url no longer exists\n")
        return self.uploads[id]

    def _tus_answer(self, status: int, headers: dict[str, str]) -> Response:
        return Response(status_code=status, headers=headers | {"tus-resumable": "1.0.0"})

    # ---- downloads and the rest

    async def _sign(self, request: Request) -> Response:
        bucket, key = self._authorized_bucket(request), request.path_params["key"]
        if key not in bucket.objects:
            raise ApiError(404, "not_found", "Object not found")
        path = f"{request.path_params['bucket']}/{key}"
        expires = self._now() + int((await request.json())["expiresIn"])
        token = jwt.encode({"url": path, "exp": expires}, SIGNING_SECRET, algorithm="HS256")
        return JSONResponse({"signedURL": f"/object/sign/{quote(path)}?token={token}"})

    async def _signed_download(self, request: Request) -> Response:
        path = f"{request.path_params['bucket']}/{request.path_params['key']}"
        try:
            claims = jwt.decode(
                request.query_params["token"], SIGNING_SECRET, algorithms=["HS256"], options={"verify_exp": False}
            )
        except jwt.InvalidTokenError as error:
            raise ApiError(400, "InvalidJWT", str(error)) from error
        if claims["url"] != path:
            raise ApiError(400, "InvalidSignature", "The url do not match the signature")
        if claims["exp"] < self._now():
            raise ApiError(400, "InvalidJWT", '"exp" claim timestamp check failed')
        stored = self.buckets[request.path_params["bucket"]].objects[request.path_params["key"]]
        headers = {"accept-ranges": "bytes"}
        if name := request.query_params.get("download"):
            headers["content-disposition"] = f"attachment; filename*=UTF-8''{quote(name)}"
        content, status = stored.content, 200
        if asked := request.headers.get("range"):
            start, end = asked.removeprefix("bytes=").split("-")
            stop = int(end) + 1 if end else len(content)
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[int(start) : stop], 206
        return Response(content, status_code=status, headers=headers, media_type=stored.content_type)

    async def _list(self, request: Request) -> Response:
        """One folder, not its subfolders, which are entries without an id."""
        bucket, asked = self._authorized_bucket(request), await request.json()
        folder = f"{asked['prefix'].rstrip('/')}/".lstrip("/")
        inside = [key.removeprefix(folder).split("/") for key in bucket.objects if key.startswith(folder)]
        entries = {parts[0]: None if len(parts) > 1 else f"id of {parts[0]}" for parts in inside}
        page = sorted(entries)[asked["offset"] : asked["offset"] + asked["limit"]]
        return JSONResponse([{"name": name, "id": entries[name]} for name in page])

    async def _remove(self, request: Request) -> Response:
        bucket, keys = self._authorized_bucket(request), (await request.json())["prefixes"]
        if len(keys) > 1000:
            raise ApiError(400, "Error", "body/prefixes must NOT have more than 1000 items")
        if not bucket.may_remove:
            return JSONResponse([])
        return JSONResponse([{"name": key} for key in keys if bucket.objects.pop(key, None)])


def _file_part(content_type: str, body: bytes) -> tuple[bytes, str]:
    """Content and type of the multipart part that is a file."""
    boundary = content_type.split("boundary=")[1].encode()
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.strip().split(b"\r\n"))
        if b"filename=" in fields[b"content-disposition"]:
            return content.removesuffix(b"\r\n"), fields[b"content-type"].decode()
    raise ApiError(400, "InvalidRequest", "No content provided")

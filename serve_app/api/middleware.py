"""The outermost layer of HTTP: a request id, a bound on the body, and no answer that is not in our words."""

import logging
import secrets
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.errors import ErrorResponse, from_status
from serve_app.errors import BodyTooLarge, WanServeError

logger = logging.getLogger(__name__)


class Guard:
    """Wraps the whole application.

    Each answer carries `X-Request-Id`. A body over `max_body_bytes` gets 413, declared or not. An exception that
    nothing else answered is logged under the request id and becomes a 500. An error that a library answered in plain
    text gets our shape.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        body = await self._read(scope, receive)
        if body is None:
            error = BodyTooLarge(
                f"the body is over {self.max_body_bytes} bytes", hint="A job needs a prompt and a few numbers only."
            )
            await ErrorResponse(error)(scope, receive, answer.send)
            return
        try:
            await self.app(scope, _replay(body, receive), answer.send)
        except Exception:
            logger.exception("request %s: %s %s failed", answer.request_id, scope["method"], scope["path"])
            if answer.started:
                raise
            error_ = WanServeError(
                "something went wrong inside the service", hint=f"Its log has it under request id {answer.request_id}."
            )
            await ErrorResponse(error_)(scope, receive, answer.send)

    async def _read(self, scope: Scope, receive: Receive) -> list[Message] | None:
        """The messages of the whole body, or None where it is too large."""
        if scope["method"] in ("GET", "HEAD"):
            return []
        if int(Headers(scope=scope).get("content-length", "0")) > self.max_body_bytes:
            return None
        messages, size = [await receive()], 0
        while messages[-1]["type"] == "http.request":
            size += len(messages[-1].get("body", b""))
            if size > self.max_body_bytes:
                return None
            if not messages[-1].get("more_body", False):
                break
            messages.append(await receive())
        return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives `messages` first."""
    waiting = iter(messages)

    async def replayed() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replayed


class _Answer:
    """The way out: adds the request id, and replaces plain-text errors."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.request_id = secrets.token_hex(8)
        self.started = False
        self._scope, self._receive, self._send = scope, receive, send
        self._replaced = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if message["status"] >= 400 and not headers.get("content-type", "").startswith("application/json"):
                error = from_status(message["status"], self._scope["method"], self._scope["path"])
                kept = {name: headers[name] for name in ("content-range", "allow") if name in headers}
                await ErrorResponse(error, message["status"], kept)(self._scope, self._receive, self.send)
                self._replaced = True
                return
            self.started = True
            headers["X-Request-Id"] = self.request_id
        await self._send(message)

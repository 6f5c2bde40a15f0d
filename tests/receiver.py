"""A webhook receiver on a real port, well-behaved or hostile as each test scripts it."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from standardwebhooks import Webhook as Verifier

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="

Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""What the receiver does with the connection once it has read the request."""


def answer(status: int, *headers: str, body: bytes = b"") -> Behaviour:
    async def behave(writer: asyncio.StreamWriter) -> None:
        head = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        await writer.drain()

    return behave


def endless(first: bytes, part: bytes, pause_s: float = 0.0) -> Behaviour:
    """`first`, then `part` again and again."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while not writer.is_closing():
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return behave


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


@dataclass
class Request:
    line: str
    headers: dict[str, str]
    body: bytes

    def verified(self) -> dict[str, Any]:
        """The payload, checked as a receiver would: by the specification's own library."""
        payload: dict[str, Any] = Verifier(SECRET).verify(self.body, self.headers)
        return payload


@dataclass
class Receiver:
    """Answers by `script`, one behaviour a request; with its last one from then on."""

    script: list[Behaviour] = field(default_factory=lambda: [answer(204)])
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    port: int = 0
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def heard(self, count: int = 1) -> None:
        """Wait until so many requests have arrived."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
            headers = {name.lower(): value for name, value in (text.split(": ", 1) for text in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.requests.append(Request(line, headers, body))
            async with self.arrived:
                self.arrived.notify_all()
            behaviour = self.script[min(len(self.requests), len(self.script)) - 1]
            closed = asyncio.create_task(reader.read())
            behaving = asyncio.ensure_future(behaviour(writer))
            await asyncio.wait([closed, behaving], return_when=asyncio.FIRST_COMPLETED)
            closed.cancel()
            behaving.cancel()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the sender may hang up whenever it likes
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def receiving(*script: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver(list(script)) if script else Receiver()
    server = await asyncio.start_server(receiver._serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()

"""The network as a webhook may use it: public addresses only, and no more of an answer than its head needs."""

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpcore

from serve_app.webhooks.address import is_public

logger = logging.getLogger(__name__)

CONNECT_S = 3.0
"""Longest try of one of a name's addresses, so that a dead first one leaves time for the next."""
MAX_ANSWER_BYTES = 64 * 1024
"""Of one answer; its status and headers are far shorter, and its body is not read."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port -> IP addresses, the best first. Raises OSError."""


class AddressRefused(Exception):
    """A name that does not lead to the public internet. Says the same whether the name exists or not: an answer that
    told them apart would let anybody who may submit a job map the private network.
    """  # fmt: skip


class Resolver:
    """The system's resolver, in threads of its own: a name server that hangs must not hold up other users of threads."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="webhook-dns")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Every address of `host`, in the order of preference (RFC 6724)."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that it has resolved and vetted itself.

    The vetted address is the one connected to, so a name that changes between the check and the connection gains
    nothing. Host, server name indication and certificate stay the name's. One private address among a name's refuses
    them all. Raises `AddressRefused`, httpcore's errors.
    """

    def __init__(
        self, resolve: Resolve, *, allow_private: bool = False, dial: httpcore.AsyncNetworkBackend | None = None
    ) -> None:
        self._resolve = resolve
        self._allow_private = allow_private
        self._dial = dial or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first of the host's addresses that takes one."""
        error: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in await self._vetted(host, port):
            try:
                return _Bounded(await self._dial.connect_tcp(address, port, CONNECT_S, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        raise error

    async def _vetted(self, host: str, port: int) -> Sequence[str]:
        refused = AddressRefused(f"{host} does not resolve to a public address")
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise refused from error
        private = [address for address in addresses if not is_public(ipaddress.ip_address(address))]
        if private and not self._allow_private:
            logger.warning("a webhook to %s is refused: it resolves to %s", host, ", ".join(private))
            raise refused
        return addresses


class _Bounded(httpcore.AsyncNetworkStream):
    """A connection that ends after `MAX_ANSWER_BYTES`: headers and interim answers without end are cut."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner
        self._left = MAX_ANSWER_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._left <= 0:
            raise httpcore.ReadError(f"the head of the answer is over {MAX_ANSWER_BYTES} bytes")
        part = await self._inner.read(max_bytes, timeout)
        self._left -= len(part)
        return part

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Bounded(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

"""Where a webhook may go: an https address on the public internet. Private networks are the service's, not its users'.

`check_url` is asked when a job comes in and refuses what can be seen without a look-up; network.py asks `is_public` of
every address that a name resolves to, when the connection is made.
"""

import ipaddress
import re
import socket

import httpx

from serve_app.errors import InvalidValue

MAX_URL_CHARS = 2000
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses of this network stand for the IPv4 address in their last 32 bits (RFC 6052)."""
SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
"""Given up by RFC 7526; the IPv4 address in it may be any."""
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")


def is_public(address: IpAddress) -> bool:
    """Whether `address` is one host of the public internet: not loopback, private, link-local, multicast or reserved."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(address.packed[-4:]))
        if address.is_site_local or address in SIX_TO_FOUR:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def check_url(text: str, *, allow_private: bool) -> str:
    """The normal form of a webhook's URL. Looks nothing up. Raises `InvalidValue`.

    `allow_private` lets it be plain http and name a private address.
    """
    if len(text) > MAX_URL_CHARS:
        raise _refused(f"has {len(text)} characters; it must have {MAX_URL_CHARS} at most", "Shorten it.")
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _refused(
            f"is {text[:60]!a}, which is no URL: {error}", "Give one such as https://example.com/hook."
        ) from None
    schemes = ("https", "http") if allow_private else ("https",)
    if url.scheme not in schemes:
        raise _refused(f"is {text[:60]!a}; it must start with {' or '.join(s + '://' for s in schemes)}", "")
    if url.userinfo:
        raise _refused("holds a user name or password", "Leave them out: the signature tells who is calling.")
    host = url.raw_host.decode()
    literal = _literal(host)
    port = 443 if url.port is None else url.port
    if (literal is None and not HOST_NAME.fullmatch(host)) or not 1 <= port <= 65535:
        raise _refused(f"is {text[:60]!a}, which names no host and port", "Give one such as https://example.com/hook.")
    local = host.rstrip(".").rpartition(".")[2] == "localhost" if literal is None else not is_public(literal)
    if local and not allow_private:
        raise _refused(f"is {text[:60]!a}, which is not on the public internet", "Give a public address.")
    return str(url)


def _literal(host: str) -> IpAddress | None:
    """The IP address that `host` spells, in any way that the C library understands: 127.1 and 2130706433 are loopback."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _refused(what: str, hint: str) -> InvalidValue:
    return InvalidValue(f"webhook_url {what}", param="webhook_url", hint=hint)

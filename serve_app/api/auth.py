"""Who asks: the owner that an API key stands for. Another owner's job does not exist for the asker."""

import hmac
import ipaddress
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serve_app.errors import Unauthorized
from serve_app.settings import Settings

ANONYMOUS = "anonymous"
"""Everybody's owner name where no `api_keys` are set."""

bearer = HTTPBearer(
    scheme_name="API key",
    description="One of the service's `api_keys`; not needed where none are set.",
    auto_error=False,
)


def owner_of(key: str | None, settings: Settings) -> str:
    """The owner whose API key this is. Raises `Unauthorized`."""
    if not settings.api_keys:
        return ANONYMOUS
    if key is None:
        raise Unauthorized("this service needs an API key", hint="Send the header Authorization: Bearer <key>.")
    # HTTP headers arrive as Latin-1. Every key is compared, so the time taken tells nothing about which was close.
    given = key.encode("latin-1", "replace")
    owners = [
        owner
        for owner, secret in settings.api_keys.items()
        if hmac.compare_digest(given, secret.get_secret_value().encode())
    ]
    if not owners:
        raise Unauthorized("the API key is unknown", hint="Check the header Authorization: Bearer <key>.")
    return owners[0]


async def owner(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str:
    """FastAPI dependency: the owner who makes this request."""
    return owner_of(credentials.credentials if credentials else None, request.app.state.services.settings)


Owner = Annotated[str, Depends(owner)]


def refuse_public_address(host: str, settings: Settings) -> None:
    """Raise ValueError where `host` can be reached from other machines and everybody would be let in."""
    if settings.api_keys or settings.allow_anonymous or _is_loopback(host):
        return
    raise ValueError(
        f"the service would listen on {host}, which other machines can reach, and no api_keys are set; "
        "set api_keys, listen on 127.0.0.1, or set allow_anonymous to let everybody in"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

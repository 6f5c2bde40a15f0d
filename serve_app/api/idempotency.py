"""The header `Idempotency-Key`: a client that lost an answer sends the same request again and gets the first one's job."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from serve_app.api.auth import Owner
from serve_app.api.schemas import JobRequest
from serve_app.errors import InvalidValue
from serve_app.jobs.store import ALWAYS_ANEW, Once

PATTERN = r"[\x20-\x7e]{1,255}"
REPLAYED: dict[str, Any] = {
    "Idempotent-Replayed": {
        "description": "`true` where an earlier request with this Idempotency-Key made or changed the job.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}
"""The OpenAPI entry of the answer's header."""


async def _onces(
    request: Request,
    owner: Owner,
    _: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="1 to 255 printable ASCII characters, drawn by the client (a UUID, say). The same key with the same "
            "request is done once; with another request it is refused.",
            examples=["9b2f7c1e-54a1-4c7d-9a39-0d8d5e1f2a3b"],
            json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": r"^[!-~]([ -~]*[!-~])?$"},
        ),
    ] = None,
) -> Callable[[JobRequest | None], Once]:
    """What makes the `Once` of this request, given its body. Raises `InvalidValue`."""
    given = request.headers.getlist("Idempotency-Key")
    if not given:
        return lambda body: ALWAYS_ANEW
    if len(given) > 1 or not re.fullmatch(PATTERN, given[0]):
        raise InvalidValue(
            f"Idempotency-Key is {', '.join(given)[:60]!a}; it must be one key of 1 to 255 printable ASCII characters",
            param="Idempotency-Key",
            hint="Draw a UUID for each new request, or leave it out.",
        )
    name = f"{owner}:{_hash(given[0])}"  # a key belongs to its owner alone
    ttl_s = request.app.state.services.settings.idempotency_ttl_s
    return lambda body: Once(name, fingerprint(request.url.path, body), ttl_s)


OnceFor = Annotated[Callable[[JobRequest | None], Once], Depends(_onces)]


def fingerprint(path: str, body: JobRequest | None) -> str:
    """Hash of all that a POST says: where to, and each field that it sets, in the types that they were read as."""
    said = None if body is None else body.model_dump(mode="json", exclude_none=True)
    return _hash(json.dumps([path, said], sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]  # 128 bits are plenty and halve what the store keeps

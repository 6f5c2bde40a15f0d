"""Every error leaves the service in one shape: {"error": {"code", "message", "param", "hint", "retryable"}}."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from serve_app.api.schemas import ErrorBody, JobListQuery, JobRequest
from serve_app.errors import (
    BodyTooLarge,
    InvalidJson,
    InvalidRequest,
    InvalidValue,
    MethodNotAllowed,
    NotFound,
    RangeNotSatisfiable,
    UnknownField,
    UnknownJobType,
    UnsupportedMediaType,
    WanServeError,
)
from serve_app.jobs.presets import JobType

logger = logging.getLogger(__name__)

RETRY_AFTER_S = {429: 10, 503: 2}
"""Seconds after which to try again: a picture's time where the queue is full, a reconnection's where the store is away."""


class ErrorResponse(JSONResponse):
    """An error as an HTTP answer, with the headers that its status calls for."""

    def __init__(
        self, error: WanServeError, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        status = status or error.http_status
        own = dict(headers or {})
        if status in RETRY_AFTER_S:
            own["Retry-After"] = str(RETRY_AFTER_S[status])
        if status == 401:
            own["WWW-Authenticate"] = 'Bearer realm="wan-serve"'
        super().__init__(ErrorBody(error=error.info).model_dump(), status_code=status, headers=own)


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Give `app`, which serves `routes`, the handlers of every kind of error but the unexpected, which middleware.py answers."""

    @app.exception_handler(WanServeError)
    async def known(request: Request, error: WanServeError) -> ErrorResponse:
        if error.http_status >= 500:
            logger.error("%s %s: %s: %s", request.method, request.url.path, error.code, error.message)
        return ErrorResponse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> ErrorResponse:
        return ErrorResponse(from_validation(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> ErrorResponse:
        found = from_status(error.status_code, request.method, request.url.path)
        headers = {"Allow": _allowed(routes, request.scope)} if error.status_code == 405 else error.headers
        return ErrorResponse(found, error.status_code, headers)


def _allowed(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """The methods of every route at this address; the framework names those of the first alone."""
    here = [route for route in routes if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE]
    return ", ".join(sorted({method for route in here for method in route.methods or ()}))


def from_validation(problem: Mapping[str, Any]) -> WanServeError:
    """Pydantic's first problem with a request, in our words."""
    kind, place = problem["type"], problem["loc"]
    if kind == "json_invalid":
        return InvalidJson(
            f"the body is not JSON: {problem['ctx']['error']} at position {place[-1]}",
            hint='Send an object such as {"type": "image_fast", "prompt": "..."}.',
        )
    if len(place) == 1:
        return InvalidRequest(
            "the body is not a JSON object with names in valid Unicode",
            hint='Send an object such as {"type": "image_fast", "prompt": "..."}.',
        )
    param, value = str(place[1])[:60], problem.get("input")
    if kind == "extra_forbidden":
        known = JobRequest.model_fields if place[0] == "body" else JobListQuery.model_fields
        close = difflib.get_close_matches(param, known, n=1)
        return UnknownField(
            f"there is no field {_short(param)}",
            param=param,
            hint=f"Did you mean {close[0]}?" if close else f"The fields are {', '.join(known)}.",
        )
    if kind == "missing":
        return InvalidValue(f"{param} is missing", param=param, hint=f"{param} is required.")
    if param == "type":
        return UnknownJobType(f"type is {_short(value)}; it must be one of {', '.join(JobType)}", param=param)
    return InvalidValue(f"{param} is {_short(value)}: {problem['msg'][0].lower()}{problem['msg'][1:]}", param=param)


def from_status(status: int, method: str, path: str) -> WanServeError:
    """What the framework said by a bare status, in our words."""
    known: dict[int, WanServeError] = {
        400: InvalidJson("the body could not be read as JSON in UTF-8", hint="Send a JSON object."),
        404: NotFound(f"there is nothing at {_short(path)}", hint="GET /openapi.json lists what there is."),
        405: MethodNotAllowed(f"{method} does not work on {_short(path)}", hint="The Allow header names what does."),
        413: BodyTooLarge("the body is too large"),
        415: UnsupportedMediaType("the content type is not supported"),
        416: RangeNotSatisfiable("the range lies beyond the end of the file", hint="Content-Range tells its size."),
    }
    return known.get(status) or InvalidRequest(f"{method} {_short(path)} was refused with HTTP {status}")


def documented(*kinds: type[WanServeError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route's OpenAPI entry that can end with these errors."""
    answers: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        said = f"`{kind.code}`: {(kind.__doc__ or '').strip()}"
        answer = answers.setdefault(kind.http_status, {"model": ErrorBody, "description": ""})
        answer["description"] = f"{answer['description']} {said}".strip()
    return answers


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""The HTTP application: the routes, behind one guard, in front of one store."""

from fastapi import FastAPI

import serve_app
from serve_app.api import errors, routes
from serve_app.api.middleware import Guard
from serve_app.api.routes import Services
from serve_app.jobs.store import JobStore
from serve_app.settings import Settings
from serve_app.storage import ArtifactStore
from serve_app.tracing import Tracing

DESCRIPTION = """
Turns a prompt into a finished picture or video with Wan 2.1 T2V 1.3B.

**The way of a job:** `POST /v1/jobs` answers 202 once the job is on disk; follow it at `/v1/jobs/{id}/events`
(server-sent events) or read `/v1/jobs/{id}` now and then; when its `status` is `succeeded`, fetch the files that its
`artifacts` name.

**Errors** all have one shape: `{"error": {"code", "message", "param", "hint", "retryable"}}`.
Where `retryable` is true the same request may succeed later; `Retry-After` says when to try.

(This page loads Swagger UI from a content delivery network. Without internet, read `/openapi.json`.)
"""


def create_app(
    settings: Settings, store: JobStore, artifacts: ArtifactStore, tracing: Tracing | None = None
) -> FastAPI:
    """The ASGI application of one ingress replica. Stateless but for what it is given."""
    app = FastAPI(
        title="wan-serve",
        version=serve_app.__version__,
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = Services(settings, store, artifacts, tracing or Tracing())
    app.include_router(routes.jobs)
    app.include_router(routes.service)
    errors.install(app, [*routes.jobs.routes, *routes.service.routes])
    app.add_middleware(Guard, max_body_bytes=settings.max_body_bytes)
    return app

"""HTTP in. Stateless: all that a reader sees comes from the JobStore, so any replica answers for any job."""

import asyncio

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from deployments.forever import forever
from serve_app import logs
from serve_app.api.app import create_app
from serve_app.api.auth import refuse_public_address
from serve_app.jobs.store import JobStore
from serve_app.settings import Settings
from serve_app.storage import open_store
from serve_app.tracing import Tracing

PING_EVERY_S = 2.0


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
@serve.ingress()
class Ingress:
    """The FastAPI application of `serve_app.api` on Serve's proxies. Refuses to start on a public address unguarded."""

    async def __init__(
        self, settings: Settings, conductor: DeploymentHandle, store: DeploymentHandle | None = None
    ) -> None:
        logs.join()
        # The handles are not called: binding them here is what makes Serve deploy the whole graph.
        refuse_public_address(_get_global_client().http_config.host, settings)
        jobs = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
        self._app = create_app(settings, jobs, open_store(settings), Tracing.of(settings, "Ingress"))
        self._pinging = asyncio.create_task(forever(jobs.ping, PING_EVERY_S))  # for the metric of being up

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls for the application, once this replica is built."""
        return self._app

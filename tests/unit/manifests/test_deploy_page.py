"""docs/deploy.md says what is true of the files that it is about."""

import json
import re
import tomllib
from typing import Any

from serve_app import __version__
from serve_app.settings import Settings
from tests.unit.manifests import rendered
from tests.unit.manifests.rendered import MANY_NODES, ONE_NODE, ROOT, Objects, drain_s, grace_s, overlay

PAGE = (ROOT / "docs" / "deploy.md").read_text()
COMMANDS = PAGE.replace("\\\n", " ")
SETTINGS = {f"WAN_SERVE_{name.upper()}" for name in Settings.model_fields}
AWS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}


def secrets_made() -> dict[str, list[set[str]]]:
    """Keys by secret, of each `kubectl create secret generic` on the page."""
    found: dict[str, list[set[str]]] = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.+)", COMMANDS):
        keys = set(re.findall(r"--from-(?:literal|file)=(\w[\w.]*)", rest))
        if keys:
            found.setdefault(name, []).append(keys)
    return found


def references(value: Any) -> list[dict[str, Any]]:
    """Every reference to a secret inside `value`."""
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("secretKeyRef", "secretRef") if key in value]
    if "secretName" in value and "hosts" not in value:  # not the TLS secret of the Ingress, which has its own command
        own.append({"name": value["secretName"]})
    return own + [found for item in value.values() for found in references(item)]


def test_every_secret_that_pods_name_is_made(objects: Objects) -> None:
    made = secrets_made()
    found = references([thing for thing in objects if thing["kind"] != "Ingress"])
    assert {reference["name"] for reference in found} == made.keys()
    for reference in found:
        if "key" in reference:
            assert all(reference["key"] in keys for keys in made[reference["name"]])
    assert made["wan-serve-ray-token"] == [{"auth_token"}]  # the key that KubeRay reads
    assert "create secret tls" in (ROOT / "cluster/kuberay/components/ingress/ingress.yaml").read_text()


def test_the_secret_of_the_service_holds_what_each_overlay_needs() -> None:
    one_node, many_nodes = secrets_made()["wan-serve"]
    assert one_node == {"WAN_SERVE_STORE_URL", "WAN_SERVE_API_KEYS"}
    assert many_nodes == one_node | {"WAN_SERVE_SUPABASE_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert many_nodes <= SETTINGS | AWS
    made_later = set(re.findall(r"--from-literal=(WAN_SERVE_\w+)", PAGE)) - many_nodes
    assert made_later == {"WAN_SERVE_WEBHOOK_SECRETS"}


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"\bWAN_SERVE_\w+", PAGE)) - {"WAN_SERVE_API_KEY", "WAN_SERVE_TEST_CRDS"}
    named -= {name for name in named if name.endswith("_")}  # WAN_SERVE_*
    assert named <= SETTINGS


def test_the_certificate_is_where_it_is_mounted() -> None:
    files = set(re.findall(r"WAN_SERVE_C2PA_\w+=(\S+)/(\S+)", PAGE))
    (keys,) = secrets_made()["wan-serve-c2pa"]
    mounts = rendered.groups(overlay(ONE_NODE))["cpu"]["template"]["spec"]["containers"][0]["volumeMounts"]
    (mount,) = [entry for entry in mounts if entry["name"] == "c2pa"]
    assert files == {(mount["mountPath"], key) for key in keys}


def test_every_file_and_folder_that_is_named_exists() -> None:
    named = re.findall(r"(?<![\w/.])((?:cluster|tests|serve_app|components)/[\w./-]*\w)", PAGE)
    assert len(named) > 10
    for path in named:
        place = ROOT / ("cluster/kuberay/" if path.startswith("components") else "") / path
        assert place.exists(), path


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", PAGE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


def test_versions_and_names_are_the_manifests() -> None:
    service = rendered.one(overlay(MANY_NODES), "RayService")
    image = rendered.groups(overlay(MANY_NODES))["head"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"registry.example.com/wan-serve:{__version__}"
    assert f"docker push {image}\n" in PAGE
    name = service["metadata"]["name"]
    assert {f"{name}-serve-svc", f"{name}-head-svc"} == set(re.findall(r"\bwan-serve-\w+-svc\b", PAGE))
    assert set(re.findall(r"kuberay-operator --version (\d\S+)", PAGE)) == {"1.7.0"}
    groups = set(rendered.groups(overlay(MANY_NODES)))
    assert set(re.findall(r"ray\.io/group=([\w-]+)", PAGE)) <= groups
    valkey = rendered.one(overlay(ONE_NODE), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert valkey["image"] in PAGE
    namespaces = json.dumps(rendered.one(overlay(ONE_NODE), "NetworkPolicy", "wan-serve"))
    assert "kuberay-system" in namespaces
    assert "--namespace kuberay-system" in PAGE


def test_the_numbers_of_the_table_are_the_manifests() -> None:
    service = rendered.one(overlay(MANY_NODES), "RayService")
    groups = rendered.groups(overlay(MANY_NODES))

    generator = rendered.deployments(overlay(MANY_NODES))["Generator"]
    for said in (
        f"`maxReplicas` {groups['rtx-4090']['maxReplicas']} |",
        f"`idleTimeoutSeconds` {groups['rtx-4090']['idleTimeoutSeconds']} |",
        f"`terminationGracePeriodSeconds` {grace_s(groups['rtx-4090'])} > drain {drain_s(groups['rtx-4090']):g} > "
        f"`graceful_shutdown_timeout_s` {generator['graceful_shutdown_timeout_s']} |",
        f"`minReplicas` {groups['cpu']['minReplicas']} |",
        f"`requests.cpu` {groups['cpu']['template']['spec']['containers'][0]['resources']['requests']['cpu']} |",
        f"drain {drain_s(groups['head']):g} > the `cpu` pods' grace of {grace_s(groups['cpu'])} |",
        f"`rayClusterDeletionDelaySeconds` {service['spec']['rayClusterDeletionDelaySeconds']} |",
        f"`ray.io/gcs-ft-deletion-timeout` {service['metadata']['annotations']['ray.io/gcs-ft-deletion-timeout']} |",
    ):
        assert said in PAGE, said
    drain = f"--deadline-remaining-seconds={drain_s(groups['rtx-4090']):g}`"
    assert drain in PAGE  # the same on one's own hosts


def test_the_hosts_environment_file_is_complete() -> None:
    block = PAGE.split("cat > environment <<END\n")[1].split("   END\n")[0]
    names = set(re.findall(r"(?m)^ *(\w+)=", block))
    ray = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_SERVE_ENABLE_HA_PROXY"}
    assert ray <= names
    assert names - ray - {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} <= SETTINGS | AWS
    needed = {f"WAN_SERVE_{name}" for name in ("STORE_URL", "API_KEYS", "SUPABASE_URL", "SUPABASE_KEY")}
    assert needed <= names
    assert "$REDIS_PASSWORD" in (ROOT / "cluster/ray_up/on_premise.yaml").read_text()


def test_the_readmes_pointer_leads_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["readme"] == "README.md"
    assert "(docs/deploy.md)" in (ROOT / "README.md").read_text()

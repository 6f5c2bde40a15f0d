"""The custom resources against their operators' own CRDs, which no package carries: point WAN_SERVE_TEST_CRDS at a folder of them.

helm repo add kuberay https://ray-project.github.io/kuberay-helm
helm show crds kuberay/kuberay-operator --version 1.7.0 > crds/kuberay.yaml
WAN_SERVE_TEST_CRDS=crds python -m pytest tests/unit/manifests/test_true_crds.py
"""

import copy
import os
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from tests.unit.manifests import rendered
from tests.unit.manifests.test_strict import places

FOLDER = os.environ.get("WAN_SERVE_TEST_CRDS")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="WAN_SERVE_TEST_CRDS names no folder of CRDs")


def closed(schema: Any) -> Any:
    """The schema with every key refused that it does not list, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema_rs.Draft202012Validator]:
    found = {}
    for path in Path(FOLDER or "").glob("*.yaml"):
        for crd in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            for version in crd["spec"]["versions"]:
                schema = closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{crd['spec']['group']}/{version['name']} {crd['spec']['names']['kind']}"] = (
                    jsonschema_rs.Draft202012Validator(schema)
                )
    return found


@pytest.mark.parametrize("kind", ["RayService", "PodMonitor"])
def test_the_true_crd_knows_it_and_refuses_typos(
    kind: str, validators: dict[str, jsonschema_rs.Draft202012Validator]
) -> None:
    thing = copy.deepcopy(rendered.one(rendered.overlay(rendered.MANY_NODES), kind))
    validator = validators.get(f"{thing['apiVersion']} {kind}")
    if validator is None:
        pytest.skip(f"no CRD of {kind} in {FOLDER}")
    assert [f"{error.instance_path}: {error.message}" for error in validator.iter_errors(thing)] == []
    for owner, key in list(places(thing["spec"])):
        owner["typo" + key] = owner.pop(key)
        assert not validator.is_valid(thing), f"'typo{key}' was not noticed"
        owner[key] = owner.pop("typo" + key)
    assert validator.is_valid(thing)


def test_the_cluster_is_one_that_kuberay_may_make(validators: dict[str, jsonschema_rs.Draft202012Validator]) -> None:
    for overlay in (rendered.ONE_NODE, rendered.MANY_NODES):
        cluster = rendered.ray_cluster(rendered.overlay(overlay)) | {"apiVersion": "ray.io/v1", "kind": "RayCluster"}
        errors = validators["ray.io/v1 RayCluster"].iter_errors(cluster)
        assert [f"{error.instance_path}: {error.message}" for error in errors] == []

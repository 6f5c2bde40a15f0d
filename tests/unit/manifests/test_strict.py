"""Nothing in the rendered manifests is unknown to Kubernetes, to KubeRay, to the Prometheus operator, or to Serve."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.manifests import custom, rendered
from tests.unit.manifests.kubernetes import Refused

FREE = {
    *("annotations", "labels", "matchLabels", "nodeSelector", "rayStartParams", "data"),
    *("limits", "requests", "resources"),  # quantities by any name, and KubeRay's resources of a group
}
"""Maps whose keys are anybody's, and so is a Service's selector; the tests of their meaning are elsewhere."""


def named(objects: rendered.Objects) -> dict[str, dict[str, Any]]:
    return {f"{thing['kind']}/{thing['metadata']['name']}": thing for thing in objects}


@pytest.fixture(scope="module")
def all_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every object of both overlays and of each component."""
    found = {}
    for overlay in (rendered.ONE_NODE, rendered.MANY_NODES):
        found |= {f"{overlay}: {name}": thing for name, thing in named(rendered.overlay(overlay)).items()}
    for folder in sorted((rendered.OVERLAYS.parent / "components").iterdir()):
        overlay = rendered.ONE_NODE if folder.name in ("ingress", "monitoring") else rendered.MANY_NODES
        with_it = named(rendered.with_component(tmp_path_factory.mktemp(folder.name), overlay, folder.name))
        found |= {f"{folder.name}: {name}": thing for name, thing in with_it.items()}
    return found


def test_everything_is_known(all_objects: dict[str, dict[str, Any]]) -> None:
    for thing in all_objects.values():
        custom.check(thing)


def places(value: Any, under: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """Each map with a key of a schema, and that key."""
    if isinstance(value, list):
        for item in value:
            yield from places(item, under)
    if isinstance(value, dict):
        for key, item in value.items():
            if under not in FREE or isinstance(item, dict):
                yield value, key
            yield from places(item, key)


def refused(thing: dict[str, Any]) -> bool:
    try:
        custom.check(thing)
    except Refused:
        return True
    return False


def test_a_typo_in_any_key_is_refused(all_objects: dict[str, dict[str, Any]]) -> None:
    """Each key of each object in turn is misspelt; what is not refused would be dropped in silence, or do nothing."""
    tried = 0
    for name, thing in all_objects.items():
        broken = copy.deepcopy(thing)
        for owner, key in list(places(broken)):
            if owner is broken and key in ("apiVersion", "kind"):
                continue  # without them there is no telling what the rest should be
            if broken["kind"] == "Service" and owner is broken["spec"]["selector"]:
                continue
            right = list(owner.items())
            owner.clear()
            owner.update({"typo" + k if k == key else k: v for k, v in right})
            assert refused(broken), f"{name}: 'typo{key}' was not noticed"
            owner.clear()
            owner.update(right)
            tried += 1
        assert broken == thing
    assert tried > 1000


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("headGroupSpec.rayStartParams.num-cpus", 0),  # KubeRay wants text
        ("workerGroupSpecs.0.minReplicas", "2"),
        ("autoscalerOptions.version", "v3"),
        ("workerGroupSpecs.1.template.spec.terminationGracePeriodSeconds", "960"),
        ("workerGroupSpecs.0.replicas", 9),  # over maxReplicas
        ("gcsFaultToleranceOptions.redisAddress", "redis://:secret@valkey:6379"),  # a literal secret
    ],
)
def test_a_wrong_value_is_refused(path: str, wrong: Any) -> None:
    service = copy.deepcopy(rendered.one(rendered.overlay(rendered.MANY_NODES), "RayService"))
    *way, last = path.split(".")
    place: Any = service["spec"]["rayClusterConfig"]
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    assert place[last] != wrong
    place[last] = wrong
    with pytest.raises(Refused):
        custom.check(service)


def test_kustomize_refuses_a_typo(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resorces: []\n")
    with pytest.raises(RuntimeError, match="resorces"):
        rendered.kustomize(tmp_path)

"""What runs in the rendered clusters is the repository's Serve config, and it would start."""

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray.serve._private.constants as serve_constants
import yaml
from packaging.requirements import Requirement
from ray._private import ray_constants

from serve_app import __version__
from serve_app.settings import Settings
from serve_app.up import load_config
from tests.unit.manifests import rendered
from tests.unit.manifests.rendered import (
    MANY_NODES,
    ONE_NODE,
    ROOT,
    Objects,
    container,
    env,
    groups,
    one,
    overlay,
    serve_config,
)


def test_many_nodes_run_the_reference_config() -> None:
    reference, copied = ROOT / "serve_config.yaml", rendered.OVERLAYS / MANY_NODES / "serve_config.yaml"
    assert copied.read_text() == reference.read_text(), (
        f"they differ; run: cp {reference.name} {copied.relative_to(ROOT)}"
    )
    assert serve_config(overlay(MANY_NODES)) == yaml.safe_load(reference.read_text())


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Each value by its path; list entries go by their `name`."""
    if isinstance(value, list):
        value = {entry["name"]: entry for entry in value}
    if not isinstance(value, dict):
        return {path: value}
    return dict(itertools.chain.from_iterable(leaves(v, f"{path}.{k}".strip(".")).items() for k, v in value.items()))


def test_one_node_differs_only_in_what_one_node_must() -> None:
    reference, one_node = (leaves(serve_config(overlay(name))) for name in (MANY_NODES, ONE_NODE))
    differing = {path for path in reference | one_node if reference.get(path) != one_node.get(path)}
    application = "applications.wan-serve"
    assert differing == {
        f"{application}.args.look_ahead_s",
        f"{application}.args.storage",
        f"{application}.deployments.Ingress.num_replicas",
        f"{application}.deployments.Conductor.num_replicas",
        f"{application}.deployments.Generator.autoscaling_config.max_replicas",
        f"{application}.deployments.Finisher.autoscaling_config.max_replicas",
    }


def test_the_service_would_start_with_config_and_environment(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's schema knows each key, and the settings of file, ConfigMap and secret together are valid."""
    for name, value in (one(objects, "ConfigMap")["data"] | rendered.SECRETS).items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "serve_config.yaml"
    file.write_text(one(objects, "RayService")["spec"]["serveConfigV2"])
    settings = load_config(file)[1]
    assert settings.store_url == rendered.SECRETS["WAN_SERVE_STORE_URL"]
    assert str(settings.data_dir).startswith("/var/lib/wan-serve/")
    file.write_text(file.read_text().replace("max_ongoing_requests", "max_ongoing_request"))
    with pytest.raises(ValueError, match="max_ongoing_request"):
        load_config(file)


def test_every_environment_variable_is_known_to_who_reads_it(objects: Objects) -> None:
    settings = {f"WAN_SERVE_{name.upper()}" for name in Settings.model_fields}
    others = {
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "OMP_NUM_THREADS",
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
        "rendered.SECRETS_OF",
    }
    names = set(one(objects, "ConfigMap")["data"]).union(*(env(group) for group in groups(objects).values()))
    for name in names - settings - others:
        assert hasattr(ray_constants, name) or hasattr(serve_constants, name), f"nobody reads {name}"


def test_versions_are_this_repositorys(objects: Objects) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = [Requirement(text) for text in project["dependencies"] if text.startswith("ray[")]
    version = one(objects, "RayService")["spec"]["rayClusterConfig"]["rayVersion"]
    assert version in ray.specifier
    assert f"ARG RAY_VERSION={version}\n" in (ROOT / "cluster" / "image" / "Dockerfile").read_text()
    for group in groups(objects).values():
        assert container(group)["image"].endswith(f"/wan-serve:{__version__}")

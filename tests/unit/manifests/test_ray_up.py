"""The `ray up` files, by Ray's own validation and its own autoscaler."""

import copy
from typing import Any

import jsonschema
import pytest
import yaml
from click import ClickException
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from serve_app import __version__
from tests.unit.manifests import autoscaler
from tests.unit.manifests.rendered import ROOT

FILES = sorted((ROOT / "cluster" / "ray_up").glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "ray_up" / name).read_text())


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it touches a machine."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_ray_takes_it(name: str) -> None:
    config = read(name)
    assert checked(config)["cluster_name"] == "wan-serve"
    assert config["docker"]["image"].endswith(f"/wan-serve:{__version__}")
    start = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "RAY_AUTH_TOKEN" not in start  # secrets come from the environment file
    for typo in (
        {"head_start_ray_command": []},
        {"docker": config["docker"] | {"imagee": "a"}},
        {
            "available_node_types": {"cpu": {"node_config": {}, "resources": {}, "min_worker": 1}},
            "head_node_type": "cpu",
        },
    ):
        with pytest.raises((jsonschema.ValidationError, ClickException)):
            checked(config | typo)


def test_all_hosts_of_the_rack_are_taken() -> None:
    config = read("on_premise.yaml")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(Exception, match="available_node_types"):
        checked(config | {"available_node_types": {"any": {"resources": {}, "node_config": {}}}})


def test_the_clouds_gpu_nodes_come_from_zero() -> None:
    """The reference Serve config, asking for this cloud's card as docs/deploy.md says."""
    serve_config = yaml.safe_load((ROOT / "serve_config.yaml").read_text().replace("GeForce-RTX-4090", "L40S"))
    config = read("aws.yaml")
    for most in (False, True):
        wanted = autoscaler.demands(serve_config, most=most)
        nodes = autoscaler.started(AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True), wanted)
        assert nodes["l40s"] == sum("GPU" in one for one in wanted)
        assert autoscaler.cpus(wanted) <= nodes["cpu"] * config["available_node_types"]["cpu"]["resources"]["CPU"]
    del config["available_node_types"]["l40s"]["resources"]["accelerator_type:L40S"]
    with pytest.raises(LookupError, match="L40S"):
        autoscaler.started(AutoscalingConfig(config, skip_content_hash=True), wanted)

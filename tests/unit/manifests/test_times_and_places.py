"""The numbers keep what they promise each other: who ends before whom, and that there is a node for every replica."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.jobs.presets import PRESETS, JobType
from serve_app.up import load_config
from tests.unit.manifests import autoscaler, rendered
from tests.unit.manifests.rendered import (
    MANY_NODES,
    ONE_NODE,
    Objects,
    container,
    deployments,
    drain_s,
    env,
    grace_s,
    groups,
    one,
    overlay,
    serve_config,
)

LONGEST_PROMISE_S = max(preset.promised_s[1] for preset in PRESETS.values())


def test_a_pod_that_goes_lets_its_replicas_end_first(objects: Objects) -> None:
    """Serve's time for a replica < Ray's for a node < Kubernetes' for a pod; and the head goes after those that need it."""
    serves, pods = deployments(objects), groups(objects)
    generator_s = serves["Generator"]["graceful_shutdown_timeout_s"]
    assert LONGEST_PROMISE_S < generator_s < drain_s(pods["rtx-4090"]) < grace_s(pods["rtx-4090"])
    assert serves["Finisher"]["graceful_shutdown_timeout_s"] < drain_s(pods["cpu"]) < grace_s(pods["cpu"])
    assert grace_s(pods["cpu"]) < drain_s(pods["head"]) < grace_s(pods["head"])


def test_an_old_cluster_stays_for_the_longest_promise(objects: Objects) -> None:
    service = one(objects, "RayService")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > LONGEST_PROMISE_S
    redis_cleanup_s = 300  # KubeRay's time limit of the job that empties Redis
    timeout_s = int(service["metadata"]["annotations"]["ray.io/gcs-ft-deletion-timeout"])
    assert timeout_s > grace_s(groups(objects)["head"]) + redis_cleanup_s


def test_a_spot_pod_is_done_within_a_clouds_notice(tmp_path: Path) -> None:
    objects = rendered.with_component(tmp_path, MANY_NODES, "spot")
    assert list(groups(objects))[-1] == "rtx-4090-spot"  # else KubeRay makes a new cluster for it
    spot, steady = groups(objects)["rtx-4090-spot"], groups(objects)["rtx-4090"]
    assert drain_s(spot) < grace_s(spot) <= 30  # the shortest notice that a large cloud gives
    assert spot["priority"] > steady.get("priority", 0)
    assert container(spot)["image"] == container(steady)["image"]
    assert env(spot) | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": ""} == env(steady) | {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": ""
    }
    started = autoscaler.started(
        autoscaler.kuberay_config(rendered.ray_cluster(objects)), [autoscaler.demand(deployments(objects)["Generator"])]
    )
    assert started == {"rtx-4090-spot": 1, "cpu": 2}


def test_the_autoscaler_finds_a_place_for_every_replica(objects: Objects) -> None:
    """From nothing, at the least and at the most: the card's group from zero, and nothing on the head or beside a card."""
    config = autoscaler.kuberay_config(rendered.ray_cluster(objects))
    for most in (False, True):
        wanted = autoscaler.demands(serve_config(objects), most=most)
        nodes = autoscaler.started(config, wanted)
        assert nodes["rtx-4090"] == sum("GPU" in one for one in wanted)
        assert groups(objects)["cpu"]["minReplicas"] <= nodes["cpu"] <= groups(objects)["cpu"]["maxReplicas"]
        assert autoscaler.cpus(wanted) <= nodes["cpu"] * config.get_node_resources("cpu")["CPU"]
    for name in ("headgroup", "rtx-4090"):
        assert config.get_node_resources(name)["CPU"] == 0


@pytest.mark.parametrize(
    "broken",
    [
        {"resources": {"CPU": "0"}},
        {"resources": {"CPU": "0", "accelerator_type:RTX-4090": "1"}},  # not as Ray names the card
        {"maxReplicas": 0},
    ],
)
def test_it_would_be_noticed_if_the_group_lacked_what_scale_from_zero_needs(broken: dict[str, Any]) -> None:
    objects = copy.deepcopy(overlay(MANY_NODES))
    groups(objects)["rtx-4090"].update(broken)
    wanted = [autoscaler.demand(deployments(objects)["Generator"])]
    with pytest.raises((LookupError, KeyError, AssertionError)):
        assert autoscaler.started(autoscaler.kuberay_config(rendered.ray_cluster(objects)), wanted)["rtx-4090"] == 1


def test_replicas_that_keep_apart_have_nodes_enough(objects: Objects) -> None:
    nodes = groups(objects)["cpu"]["minReplicas"]
    for deployment in deployments(objects).values():
        if each := deployment.get("max_replicas_per_node"):
            assert autoscaler.replicas(deployment)[0] <= nodes * each


def test_the_label_is_the_resources_card(objects: Objects) -> None:
    group, asked = groups(objects)["rtx-4090"], deployments(objects)["Generator"]["ray_actor_options"]
    assert group["labels"]["ray.io/accelerator-type"] == asked["accelerator_type"]
    assert f"accelerator_type:{asked['accelerator_type']}" in group["resources"]
    assert container(group)["resources"]["limits"]["nvidia.com/gpu"] == str(asked["num_gpus"])


def test_one_card_is_never_waited_for_by_two_clusters() -> None:
    """The pending cluster of an upgrade would hold jobs without ever getting the card."""
    assert one(overlay(ONE_NODE), "RayService")["spec"]["upgradeStrategy"] == {"type": "None"}


def test_a_second_model_gets_nodes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The component, with its part of the Serve config put into the overlay's."""
    component = rendered.OVERLAYS.parent / "components" / "model-14b"
    (added,) = yaml.safe_load((component / "serve_config.yaml").read_text())["applications"]
    config = copy.deepcopy(serve_config(overlay(MANY_NODES)))
    (application,) = config["applications"]
    application["args"]["models"] |= added["args"]["models"]
    application["args"]["job_types"] = added["args"]["job_types"]
    application["deployments"] += added["deployments"]
    for name, value in (one(overlay(MANY_NODES), "ConfigMap")["data"] | rendered.SECRETS).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    settings = load_config(tmp_path / "serve_config.yaml")[1]
    assert added["deployments"][0]["name"] == settings.generator_name(settings.model_of(JobType.VIDEO_HIGH))
    objects = rendered.with_component(tmp_path, MANY_NODES, "model-14b")
    assert list(groups(objects))[-1] == "h100"
    cluster = autoscaler.kuberay_config(rendered.ray_cluster(objects))
    assert autoscaler.started(cluster, [autoscaler.demand(added["deployments"][0])] * 2)["h100"] == 2
    assert "h100" not in autoscaler.started(cluster, autoscaler.demands(config))
    for name in ("rtx-4090", "h100"):
        assert added["deployments"][0]["graceful_shutdown_timeout_s"] < drain_s(groups(objects)[name])

"""What Ray's own autoscaler (version 2) would start for a Serve config on a cluster that has only its head: no cluster needed."""

import math
from typing import Any

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

Demand = dict[str, float]

ACCELERATOR_SHARE = 0.001
"""What `accelerator_type` asks of the resource by that name (ray.util.accelerators)."""


def kuberay_config(ray_cluster: dict[str, Any]) -> AutoscalingConfig:
    """What the autoscaler in the head pod reads out of a RayCluster, by Ray's own reader."""
    return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(ray_cluster), skip_content_hash=True)


def demand(deployment: dict[str, Any]) -> Demand:
    """The resources of one replica of a deployment in a Serve config."""
    options = deployment["ray_actor_options"]
    wanted = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)} | options.get("resources", {})
    if accelerator := options.get("accelerator_type"):
        wanted[f"accelerator_type:{accelerator}"] = ACCELERATOR_SHARE
    return {name: quantity for name, quantity in wanted.items() if quantity}


def replicas(deployment: dict[str, Any]) -> tuple[int, int]:
    """Least and most replicas of a deployment in a Serve config."""
    scaling = deployment.get("autoscaling_config")
    if scaling is None:
        return deployment["num_replicas"], deployment["num_replicas"]
    return scaling["min_replicas"], scaling["max_replicas"]


def demands(serve_config: dict[str, Any], *, most: bool = False) -> list[Demand]:
    """One entry for each replica of the application: as few as there can be, or as many."""
    return [
        demand(deployment)
        for deployment in serve_config["applications"][0]["deployments"]
        for _ in range(replicas(deployment)[most])
    ]


def started(config: AutoscalingConfig, wanted: list[Demand]) -> dict[str, int]:
    """Nodes by type that the autoscaler starts for these demands. Raises LookupError where it would wait for ever."""
    kinds = config.get_node_type_configs()
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=kinds,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(one) for one in wanted]),
        )
    )
    if reply.infeasible_resource_requests:
        missing = [dict(request.resources_bundle) for request in reply.infeasible_resource_requests]
        offered = {name: kind.resources for name, kind in kinds.items()}
        raise LookupError(f"no node group offers {missing}; there are {offered}")
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def cpus(wanted: list[Demand]) -> float:
    """CPUs of these demands together."""
    return math.fsum(one.get("CPU", 0) for one in wanted)

"""A plan: a cluster's settings, and what a load would meet there. The policies are the objects that the service runs."""

import statistics
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.errors import InvalidValue
from serve_app.jobs.presets import PRESETS, JobType
from serve_app.planner.demand import Demand
from serve_app.scheduling.fleet import Cluster, Fleet
from serve_app.scheduling.scale import ScaleDecision, Scaler, ScaleRules
from serve_app.scheduling.simulate import Autoscaler, Outcome, Simulation
from serve_app.scheduling.steps import StepPolicy

MOST_MOMENTS = 2000
"""Points of the timeline that are kept: with more, every second one goes."""


@dataclass(frozen=True)
class ClusterSettings:
    """What runs the jobs, in the words of serve_config.yaml, with its values as defaults; `scheduling/scale.py` explains the rules."""

    min_replicas: int = 1
    max_replicas: int = 8
    startup_s: float = 180.0
    """From asking for a replica until it takes work: its node, the processes, the model, warm-up."""
    node_start_s: float = 120.0
    """The part of startup_s that a node takes; a replica on a node that is still there is faster by so much."""
    node_idle_s: float = 300.0
    """How long a node without a replica is kept (and paid) by the node autoscaler."""
    target_drain_s: float = 120.0
    downscale_delay_s: float = 300.0
    headroom: float = 0.25
    look_ahead_s: float = 180.0
    price_per_hour: float = 0.0
    """Of a node, in any currency."""

    def __post_init__(self) -> None:
        try:
            self.rules  # noqa: B018 (it checks them)
        except ValueError as error:
            raise InvalidValue(str(error)) from None
        if not 0 <= self.node_start_s <= self.startup_s:
            raise InvalidValue(
                f"node_start_s is {self.node_start_s:g}; it is a part of startup_s, so 0 to {self.startup_s:g}"
            )
        for name in ("node_idle_s", "look_ahead_s", "price_per_hour"):
            if not getattr(self, name) >= 0:
                raise InvalidValue(f"{name} is {getattr(self, name):g}; it must be 0 or more")

    @property
    def rules(self) -> ScaleRules:
        """The autoscaling policy's."""
        names = ("min_replicas", "max_replicas", "target_drain_s", "startup_s", "downscale_delay_s", "headroom")
        return ScaleRules(**{name: getattr(self, name) for name in names})

    @property
    def cluster(self) -> Cluster:
        """As the simulator takes it; at the beginning the least number of replicas is ready."""
        replica_s = self.startup_s - self.node_start_s
        return Cluster(self.look_ahead_s, self.min_replicas, self.node_start_s, replica_s, self.node_idle_s)


@dataclass(frozen=True)
class TypeResult:
    """How the jobs of one type fare. Waiting is from arrival to the first step; latency to the last frame, without finishing."""

    jobs: int
    on_time: float
    """Share inside their deadline."""
    wait_p50_s: float
    wait_p95_s: float
    latency_p50_s: float
    latency_p95_s: float
    latency_max_s: float
    cost_per_job: float
    """Of all that the cluster costs, by share of the work."""


@dataclass(frozen=True)
class Moment:
    """The cluster at a moment of the run."""

    at_s: float
    ready: int
    starting: int
    queued: int


@dataclass(frozen=True)
class Plan:
    """What a load meets on a cluster."""

    settings: ClusterSettings
    jobs: int
    duration_s: float
    """From the first arrival until the cluster has come to rest."""
    on_time: float
    types: dict[str, TypeResult]
    utilisation: float
    """Share of the paid node time in which a GPU worked."""
    node_hours: float
    cost: float
    cost_per_video: float
    cold_starts: int
    """Replicas that were started."""
    node_starts: int
    most_replicas: int
    timeline: list[Moment] = field(repr=False)


def plan(
    demand: Demand,
    settings: ClusterSettings,
    told: Callable[[int], None] = lambda count: None,
    autoscaler: Autoscaler | None = None,
) -> Plan:
    """Run the jobs through the cluster. Raises InvalidValue where there are none.

    `told` hears, now and then, how many are done; `autoscaler`: another one than the service's, to compare with.
    """
    watching = _Watching(told)
    simulation = Simulation(
        settings.cluster,
        StepPolicy(),
        watching,
        autoscaler or Scaler(settings.rules),
        tail_s=settings.rules.window_s + settings.node_idle_s,
    )
    spent = simulation.run(demand.jobs())
    if not watching.types:
        raise InvalidValue("there are no jobs to plan for")
    cost = spent.node_s / 3600 * settings.price_per_hour
    work_s = sum(seen.work_s for seen in watching.types.values())
    types = {name: seen.result(cost / work_s) for name, seen in sorted(watching.types.items(), key=_in_order)}
    videos = [seen for name, seen in watching.types.items() if not PRESETS[JobType(name)].is_image]
    count = watching.count
    return Plan(
        settings=settings,
        jobs=count,
        duration_s=spent.ended_at - watching.first_at,
        on_time=sum(seen.on_time for seen in watching.types.values()) / count,
        types=types,
        utilisation=spent.busy_s / spent.node_s if spent.node_s else 0.0,
        node_hours=spent.node_s / 3600,
        cost=cost,
        cost_per_video=cost / work_s * sum(v.work_s for v in videos) / max(1, sum(len(v.waits) for v in videos)),
        cold_starts=spent.replica_starts,
        node_starts=spent.node_starts,
        most_replicas=spent.most_replicas,
        timeline=watching.timeline,
    )


def _in_order(entry: tuple[str, "_Seen"]) -> int:
    return list(JobType).index(JobType(entry[0]))


class _Seen:
    """The finished jobs of a type: numbers only, since there may be millions."""

    def __init__(self) -> None:
        self.waits, self.latencies = array("d"), array("d")
        self.on_time = 0
        self.work_s = 0.0

    def result(self, cost_per_gpu_s: float) -> TypeResult:
        waits, latencies = _quantiles(self.waits), _quantiles(self.latencies)
        jobs = len(self.waits)
        return TypeResult(
            jobs=jobs,
            on_time=self.on_time / jobs,
            wait_p50_s=waits[9],
            wait_p95_s=waits[18],
            latency_p50_s=latencies[9],
            latency_p95_s=latencies[18],
            latency_max_s=max(self.latencies),
            cost_per_job=cost_per_gpu_s * self.work_s / jobs,
        )


def _quantiles(values: "array[float]") -> list[float]:
    # Before Python 3.13 there are no quantiles of a single value.
    return statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else list(values) * 19


class _Watching:
    def __init__(self, told: Callable[[int], None]) -> None:
        self.types: dict[str, _Seen] = {}
        self.count = 0
        self.first_at = float("inf")
        self.timeline: list[Moment] = []
        self._every, self._looks = 1, 0
        self._told = told

    def finished(self, outcome: Outcome) -> None:
        job = outcome.job
        seen = self.types.get(job.kind)
        if seen is None:
            seen = self.types[job.kind] = _Seen()
        seen.waits.append(outcome.started_at - job.arrived_at)
        seen.latencies.append(outcome.finished_at - job.arrived_at)
        seen.on_time += outcome.finished_at <= job.deadline
        seen.work_s += job.work_s
        self.first_at = min(self.first_at, job.arrived_at)
        self.count += 1
        if self.count % 10_000 == 0:
            self._told(self.count)

    def looked(self, now: float, fleet: Fleet, queued: int, decision: ScaleDecision) -> None:
        self._looks += 1
        if self._looks % self._every:
            return
        self.timeline.append(Moment(now, len(fleet.live), fleet.starting, queued))
        if len(self.timeline) > MOST_MOMENTS:
            del self.timeline[::2]
            self._every *= 2

"""A burst of mixed jobs at an idle cluster: our autoscaling against Serve's own, on a real Ray cluster whose nodes come and go.

    python -m benchmarks.burst

Ray's real node autoscaler starts pretended RTX 4090 nodes on this machine, from none; the generators are paced (no model runs). So
that it ends in minutes it is a time-lapse: work, deadlines, node boot and all settings are those of serve_config.yaml divided by
SPEEDUP, and every figure that is shown is multiplied by it again. `wan-serve plan` predicts the first run from its start-up times.

A job counts as in time if its last frame was made by its deadline: encoding runs on the same two cores here, at no faster pace.
Writes <out>.json and <out>.png. About ten minutes on two cores, with nothing else running.
"""

import asyncio
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.burst_nodes import BurstFleet
from benchmarks.mixed_load import MIX
from serve_app.api.admit import admit
from serve_app.api.schemas import JobRequest
from serve_app.jobs.job import Job, JobStatus, Stage
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.jobs.store import JobStore
from serve_app.planner.demand import Costs, Recorded
from serve_app.planner.plan import ClusterSettings, Plan, plan
from serve_app.settings import Settings

SPEEDUP = 3.0
NODES = 6
"""At most, in both runs."""
PRODUCTION = ClusterSettings(
    min_replicas=0, max_replicas=NODES, downscale_delay_s=180.0, node_idle_s=60.0, look_ahead_s=30.0
)
"""The rules of serve_config.yaml, from no replica, with less delay. The look-ahead is what the planner says of this burst: with 240 s
the first replica to come takes most of the work before the others are there. KubeRay's node autoscaler lets nodes go after 60 s."""
SERVES_OWN = {
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1.0,
}
"""Serve's policy, tuned for this: it asks for all nodes as soon as it may, and goes by what is there now."""
MAX_ONGOING = 4
"""Requests that a replica takes at a time under Serve's policy: few enough that replicas to come find work."""


@dataclass
class JobResult:
    """What became of a job. Seconds since the burst, at full scale."""

    job_type: str
    deadline_s: float
    made_s: float
    """When its last frame was there."""
    delivered_s: float


@dataclass
class Run:
    """The burst under one policy. Seconds at full scale, since the burst."""

    policy: str
    jobs: list[JobResult]
    node_s: float
    """From asking for each node until it went."""
    nodes: int
    first_replica_s: float
    node_start_s: float
    """Median, from the policy's asking for replicas until the node was there."""
    replica_start_s: float
    """Median, from then until its replica had reported."""
    ended_s: float
    timeline: list[tuple[float, int, int]] = field(repr=False)
    """Moment, nodes that are paid, replicas that are ready."""

    def in_time(self, job_type: str | None = None) -> int:
        """Jobs whose last frame was there by their deadline."""
        return sum(job.made_s <= job.deadline_s for job in self.jobs if job_type in (None, job.job_type))

    @property
    def last_frame_s(self) -> float:
        """When all was made."""
        return max(job.made_s for job in self.jobs)


def burst(count: int, seed: int) -> list[JobType]:
    """The types of the usual mix in exact proportion, in any order."""
    weights = sum(MIX.values())
    types = [job_type for job_type, weight in MIX.items() for _ in range(round(count * weight / weights))]
    Random(seed).shuffle(types)
    return types


def job_of(job_type: JobType, now: float) -> Job:
    """As the ingress would make it, with promise and work of the time-lapse."""
    job = admit(JobRequest(type=job_type.value, prompt="a red circle", seed=0), "burst", Settings(), now)
    scaled = {"deadline": now + (job.deadline - now) / SPEEDUP, "estimated_gpu_s": job.estimated_gpu_s / SPEEDUP}
    return job.model_copy(update=scaled)


# ---- the real runs


async def run(policy: str, types: Sequence[JobType], boot_s: float, console: Console) -> Run:
    """The burst on a cluster of its own, from no GPU node to none again."""
    shorter = {
        name: getattr(PRODUCTION, name) / SPEEDUP for name in ("startup_s", "target_drain_s", "downscale_delay_s")
    }
    common = {
        "paced": SPEEDUP,
        "max_gpu_nodes": NODES,
        "boot_s": boot_s,
        "idle_s": PRODUCTION.node_idle_s / SPEEDUP,
        "lease_s": 30.0,
    }
    if policy == "wan-serve":
        fleet = BurstFleet(
            rules=shorter | {"headroom": PRODUCTION.headroom}, generator={}, look_ahead_s=PRODUCTION.look_ahead_s / SPEEDUP, **common
        )  # fmt: skip
    else:
        own = SERVES_OWN | {"downscale_delay_s": shorter["downscale_delay_s"]}
        generator = {"max_ongoing_requests": MAX_ONGOING}
        fleet = BurstFleet(rules=None, autoscaling=own, generator=generator, look_ahead_s=1e9, **common)
    console.print(f"{policy}: starting the cluster")
    with fleet:
        store = JobStore(fleet.store.url)
        try:
            found = await _measure(policy, types, fleet, store, console)
        finally:
            await store.close()
    console.print(
        f"{policy}: {found.in_time()} jobs in time, {found.node_s / 3600:.2f} node hours; {found}", highlight=False
    )
    return found


async def _measure(policy: str, types: Sequence[JobType], fleet: BurstFleet, store: JobStore, console: Console) -> Run:
    start = time.time()
    jobs = [job_of(job_type, start) for job_type in types]
    for job in jobs:
        await store.submit(job, max_queued=1000)
    console.print(f"{policy}: {len(jobs)} jobs submitted to no replica")
    ready: dict[str, float] = {}
    timeline: list[tuple[float, int, int]] = []
    left = {job.id for job in jobs}
    while left or not timeline or timeline[-1][1]:
        now = time.time()
        here = [report.id for report in await store.replicas()]
        for replica in here:
            ready.setdefault(replica, now)
        lives = fleet.node_lives().values()
        alive = max(sum("went_at" not in life for life in lives), len(fleet.gpu_nodes()))
        timeline.append(((now - start) * SPEEDUP, alive, len(here)))
        statuses = await store.statuses(list(left))
        left = {job_id for job_id, status in statuses.items() if status is None or not status.is_final}
        if now - start > 420:
            raise TimeoutError(f"after 420 s {len(left)} jobs are not finished and {alive} nodes are there")
        await asyncio.sleep(0.5)
    ended_s = (time.time() - start) * SPEEDUP
    lives = sorted(fleet.node_lives().values(), key=lambda life: life["came_at"])
    asked_at = [note.at for note in await store.scaling_notes(DEFAULT_MODEL_NAME) if note.wanted > note.had]
    asked = [max([at for at in asked_at if at <= life["asked_at"]], default=life["asked_at"]) for life in lives]
    pairs = list(zip(sorted(ready.values()), lives, strict=False))
    return Run(
        policy=policy,
        jobs=[await _result(store, job, start) for job in jobs],
        node_s=SPEEDUP * sum(life["went_at"] - life["asked_at"] for life in lives),
        nodes=len(lives),
        first_replica_s=SPEEDUP * (min(ready.values()) - start),
        node_start_s=SPEEDUP * statistics.median(life["came_at"] - at for life, at in zip(lives, asked, strict=True)),
        replica_start_s=SPEEDUP * statistics.median(at - life["came_at"] for at, life in pairs),
        ended_s=ended_s,
        timeline=timeline,
    )


async def _result(store: JobStore, job: Job, start: float) -> JobResult:
    record = await store.get(job.id)
    if record.status != JobStatus.SUCCEEDED or record.finished_at is None:
        raise RuntimeError(f"job {job.id} has {record.status}: {record.error}")
    made_at = [
        int(event.id.partition("-")[0]) / 1000
        async for event in store.follow(job.id)
        if event.name == "stage" and event.data["stage"] == Stage.FINISHING
    ][-1]
    at = [SPEEDUP * (moment - start) for moment in (job.deadline, made_at, record.finished_at)]
    return JobResult(job.spec.type.value, *at)


# ---- what the planner says


def predict(types: Sequence[JobType], run: Run) -> Plan:
    """The first run, from its start-up times."""
    costs = Costs("RTX 4090")
    jobs = [costs.job(f"{number:02}", 0.0, job_type.value) for number, job_type in enumerate(types)]
    times = {"startup_s": run.node_start_s + run.replica_start_s, "node_start_s": run.node_start_s}
    return plan(Recorded(jobs), ClusterSettings(**{**asdict(PRODUCTION), **times}))


def compared(run: Run, predicted: Plan) -> dict[str, tuple[float, float]]:
    """What was measured and what was predicted, by what it is."""
    last_frame_s = max(one.latency_max_s for one in predicted.types.values())
    in_time = round(predicted.on_time * predicted.jobs)
    return {
        "jobs in time": (run.in_time(), in_time),
        "node hours": (run.node_s / 3600, predicted.node_hours),
        "last frame, s": (run.last_frame_s, last_frame_s),
        "nodes": (run.nodes, predicted.node_starts),
    }


# ---- what is shown


def print_tables(runs: Sequence[Run], predicted: Plan, console: Console) -> None:
    """The two runs side by side, and the planner beside the first."""
    table = Table(title=f"{len(runs[0].jobs)} mixed jobs at no replica, {NODES} nodes at most; times at full scale")
    table.add_column("")
    for run in runs:
        table.add_column(run.policy, justify="right")
    rows: dict[str, list[str]] = {"jobs in time": [f"{run.in_time()} of {len(run.jobs)}" for run in runs]}
    for job_type in MIX:
        of = sum(job.job_type == job_type for job in runs[0].jobs)
        rows[f"  {job_type.value}"] = [f"{run.in_time(job_type)} of {of}" for run in runs]
    rows["node hours, first asked for to last gone"] = [f"{run.node_s / 3600:.2f}" for run in runs]
    rows["node hours a job in time"] = [f"{run.node_s / 3600 / max(1, run.in_time()):.3f}" for run in runs]
    rows["nodes"] = [str(run.nodes) for run in runs]
    rows["first replica ready, s"] = [f"{run.first_replica_s:.0f}" for run in runs]
    rows["last frame, s"] = [f"{run.last_frame_s:.0f}" for run in runs]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    beside = Table(title=f"the planner on the run of {runs[0].policy}, told its start-up times")
    for name in ("", "measured", "predicted", "off by"):
        beside.add_column(name, justify="right" if name else "left")
    for name, (measured, said) in compared(runs[0], predicted).items():
        beside.add_row(name, f"{measured:.2f}", f"{said:.2f}", f"{said / measured - 1:+.1%}")
    console.print(beside)


def plot(runs: Sequence[Run], predicted: Plan, path: Path) -> None:
    """Nodes and ready replicas over time, and jobs in time by type."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (over_time, kept) = pyplot.subplots(1, 2, figsize=(12, 4.2), width_ratios=(2, 1))
    for run, colour in zip(runs, ("tab:blue", "tab:orange"), strict=True):
        moments = [moment for moment, _, _ in run.timeline]
        over_time.step(
            moments,
            [ready for _, _, ready in run.timeline],
            where="post",
            color=colour,
            label=f"{run.policy}: replicas ready",
        )
        over_time.step(
            moments, [nodes for _, nodes, _ in run.timeline], where="post", color=colour, linewidth=0.8, linestyle=":", label="nodes up",
        )  # fmt: skip
    moments = [moment.at_s for moment in predicted.timeline]
    ready = [moment.ready for moment in predicted.timeline]
    over_time.step(
        moments,
        ready,
        where="post",
        color="black",
        linewidth=0.9,
        linestyle="--",
        label=f"{runs[0].policy}: replicas, predicted",
    )
    over_time.set(xlabel="seconds since the burst, at full scale", title="what came and went")
    over_time.legend(fontsize=7)
    names = ["all", *(job_type.value for job_type in MIX)]
    for number, run in enumerate(runs):
        counts = [run.in_time(), *(run.in_time(job_type) for job_type in MIX)]
        kept.bar([place + 0.4 * (number - 0.5) for place in range(len(names))], counts, 0.38, label=run.policy)
    kept.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    kept.set(title=f"jobs in time, of {len(runs[0].jobs)}")
    kept.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    *,
    jobs: Annotated[int, typer.Option(help="In the burst.")] = 40,
    seed: Annotated[int, typer.Option(help="Of their order.")] = 0,
    boot_s: Annotated[
        float,
        typer.Option(
            help="Real seconds that a node boots before it starts, so that the whole start is about startup_s / SPEEDUP."
        ),
    ] = 45.0,
    out: Annotated[Path, typer.Option(help="Where to write, without suffix.")] = Path("benchmarks/results/burst"),
) -> None:
    """Both runs, the prediction, and what they were."""
    console, types = Console(width=140), burst(jobs, seed)
    runs = [asyncio.run(run(policy, types, boot_s, console)) for policy in ("wan-serve", "Serve's own")]
    predicted = predict(types, runs[0])
    print_tables(runs, predicted, console)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.burst", *sys.argv[1:]]),
        "speedup": SPEEDUP,
        "boot_s": boot_s,
        "settings": asdict(PRODUCTION),
        "serves_own": SERVES_OWN | {"max_ongoing_requests": MAX_ONGOING},
        "in_time": {one.policy: one.in_time() for one in runs},
        "node_hours": {one.policy: one.node_s / 3600 for one in runs},
        "predicted": compared(runs[0], predicted),
        "runs": [asdict(one) for one in runs],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    plot(runs, predicted, out.with_suffix(".png"))
    console.print(f"Written: {out.with_suffix('.json')}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)

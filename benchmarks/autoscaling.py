"""Our autoscaling rule against Serve's own, simulated over several loads: jobs in time, and node hours for it.

    python -m benchmarks.autoscaling

Both decide for the same simulated cluster, with the same claims, placement and step order, from no replica to none. Serve's rule is
its arithmetic (ray/serve/autoscaling_policy.py, 2.60) with several `target_ongoing_requests`, no delay upwards, our delay downwards, and
all jobs that wait in sight. Writes <out>.json. Under a minute on two cores.
"""

import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.mixed_load import MIX
from serve_app.planner.demand import Costs, Demand, Mix, Recorded
from serve_app.planner.plan import ClusterSettings, plan
from serve_app.scheduling.scale import Backlog, ScaleDecision

SETTINGS = ClusterSettings(min_replicas=0, max_replicas=8, node_idle_s=60.0, look_ahead_s=30.0)
COSTS = Costs("RTX 4090")
OURS = "wan-serve"
BURSTS, WARM_BURSTS = "bursts", "bursts, starts of 60 s"
TARGETS = (1.0, 2.0, 4.0, 8.0)


class ServesOwn:
    """Serve's default policy: as many as (running + waiting requests) / target, but from zero a single one until it is there."""

    def __init__(self, settings: ClusterSettings, target_ongoing_requests: float) -> None:
        self._most, self._delay_s = settings.max_replicas, settings.downscale_delay_s
        self._target_ongoing = target_ongoing_requests
        self._replicas = 0
        self._fewer_since = math.inf

    def decide(self, backlog: Backlog, now: float) -> ScaleDecision:
        """How many from now on."""
        requests = len(backlog.queued) + sum(len(clips) for clips in backlog.replicas)
        if not backlog.replicas:
            self._replicas = max(self._replicas, min(1, requests))
            return ScaleDecision(self._replicas, "cold start")
        desired = min(self._most, math.ceil(requests / self._target_ongoing))
        if desired >= self._replicas:
            self._fewer_since = math.inf
            self._replicas = desired
        else:
            self._fewer_since = min(self._fewer_since, now)
            if now - self._fewer_since >= self._delay_s:
                self._fewer_since = math.inf
                self._replicas = max(desired, 1 if self._replicas > 1 else 0)  # to zero only from one
        return ScaleDecision(self._replicas, "by requests")


@dataclass(frozen=True)
class Result:
    """One load under one rule."""

    load: str
    rule: str
    seed: int
    on_time: float
    node_hours: float
    cold_starts: int


def settings_of(load: str) -> ClusterSettings:
    """With the start-up time of production, unless the load names a shorter one."""
    return replace(SETTINGS, startup_s=60.0, node_start_s=40.0) if load == WARM_BURSTS else SETTINGS


def demand(load: str, seed: int) -> Demand:
    """`0.3`: the mix at that share of all cards; bursts: 40 jobs of it at once, a dozen times, twenty to sixty minutes apart."""
    kinds = [COSTS.kind(job_type, weight) for job_type, weight in MIX.items()]
    if "bursts" not in load:
        one = Mix(kinds, 1.0, 3000, seed)
        return replace(one, per_hour=float(load) * SETTINGS.max_replicas / one.load_gpus)
    random, now, jobs = Random(seed), 0.0, []
    for _ in range(12):
        for job_type in random.choices(list(MIX), list(MIX.values()), k=40):
            jobs.append(COSTS.job(f"{len(jobs):04}", now, job_type.value))
        now += random.uniform(1200, 3600)
    return Recorded(jobs)


def one_run(load: str, target: float | None, seed: int) -> Result:
    """`target`: of Serve's own rule; None: ours."""
    settings = settings_of(load)
    found = plan(demand(load, seed), settings, autoscaler=ServesOwn(settings, target) if target else None)
    rule = f"Serve's, target {target:g}" if target else OURS
    return Result(load, rule, seed, found.on_time, found.node_hours, found.cold_starts)


def print_table(results: Sequence[Result], console: Console) -> None:
    """A line for each load."""
    table = Table(title="jobs in time · node hours, median over seeds")
    table.add_column("load")
    rules = list(dict.fromkeys(result.rule for result in results))
    for rule in rules:
        table.add_column(rule, justify="right")
    for load in dict.fromkeys(result.load for result in results):
        cells = []
        for rule in rules:
            group = [result for result in results if (result.load, result.rule) == (load, rule)]
            on_time, hours = (
                statistics.median([getattr(r, name) for r in group]) for name in ("on_time", "node_hours")
            )
            cells.append(f"{on_time:.1%} · {hours:.1f}")
        table.add_row(load, *cells)
    console.print(table)


def main(
    *,
    seeds: Annotated[int, typer.Option(help="Streams for each load.")] = 3,
    out: Annotated[Path, typer.Option(help="Where to write, without suffix.")] = Path("benchmarks/results/autoscaling"),
) -> None:
    """Every load under every rule."""
    cases = list(product((BURSTS, WARM_BURSTS, "0.1", "0.3", "0.6", "0.9"), (None, *TARGETS), range(seeds)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(one_run, *zip(*cases, strict=True)))
    print_table(results, Console(width=140))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.autoscaling", *sys.argv[1:]]),
        "settings": asdict(SETTINGS),
        "results": [asdict(result) for result in results],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

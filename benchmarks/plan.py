"""How fast the planner is: a thousand GPUs and a million jobs, from an idle cluster to an idle cluster, on one core.

    python -m benchmarks.plan

The mix comes at 0.85 of the cards' capacity; every policy is the service's own. Writes <out>.json and <out>.png. About a minute and a
half.
"""

import json
import resource
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.mixed_load import MIX
from serve_app.planner.demand import Costs, Mix
from serve_app.planner.plan import ClusterSettings, plan
from serve_app.planner.show import plot_plan, print_plan

CARD = "RTX 4090"


def main(
    *,
    gpus: Annotated[int, typer.Option(help="The most there may be.")] = 1000,
    jobs: Annotated[int, typer.Option(help="In all.")] = 1_000_000,
    load: Annotated[float, typer.Option(help="Share of the cards' capacity.")] = 0.85,
    out: Annotated[Path, typer.Option(help="Where to write, without suffix.")] = Path("benchmarks/results/plan"),
) -> None:
    """Plan, and say how long it took."""
    costs = Costs(CARD)
    kinds = [costs.kind(job_type, weight) for job_type, weight in MIX.items()]
    mean_work_s = sum(kind.weight * kind.work_s for kind in kinds) / sum(kind.weight for kind in kinds)
    demand = Mix(kinds, per_hour=3600 * load * gpus / mean_work_s, count=jobs)
    settings = ClusterSettings(min_replicas=0, max_replicas=gpus, look_ahead_s=60.0, price_per_hour=0.4)
    started_at, cpu_before = time.monotonic(), time.process_time()
    found = plan(demand, settings)
    took_s, cpu_s = time.monotonic() - started_at, time.process_time() - cpu_before
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console = Console(width=140)
    title = f"{gpus:,} x {CARD}, {jobs:,} jobs at {load:g} of the capacity"
    print_plan(console, found, title)
    virtual = found.duration_s / took_s
    console.print(
        f"  simulated in      {took_s:.1f} s ({cpu_s:.1f} s of one core), {virtual:,.0f} times real time, {peak_mb:.0f} MB"
    )
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.plan", *sys.argv[1:]]),
        "gpus": gpus,
        "jobs": jobs,
        "load": load,
        "wall_s": took_s,
        "cpu_s": cpu_s,
        "us_per_job": 1e6 * took_s / jobs,
        "peak_mb": peak_mb,
        "plan": {name: value for name, value in asdict(found).items() if name != "timeline"},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot_plan(found, title, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)

"""A Poisson mix of the four job types on one card, replayed first come first served, by deadline, and by our policy.

    python -m benchmarks.mixed_load --card "RTX 4090"
    python -m benchmarks.mixed_load --engine    # in real time on a real engine: see mixed_load_engine.py

Step and decode times come from the cost model (serve_app/scheduling/cost.py), so no GPU is needed; the policy object is the
one that the engine runs. Writes <out>.json and <out>.png. Under a minute on two cores.
"""

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serve_app.jobs.presets import PRESETS, JobType, size_of
from serve_app.scheduling.cost import CARDS, WAN_1_3B, decode_gpu_s, step_gpu_s
from serve_app.scheduling.simulate import Outcome, Policy, simulate
from serve_app.scheduling.steps import Decision, Runnable, StepPolicy
from serve_app.scheduling.workload import JobKind, Phase, poisson

MIX = {JobType.IMAGE_FAST: 50, JobType.IMAGE_HIGH: 20, JobType.VIDEO_FAST: 20, JobType.VIDEO_HIGH: 10}


class FirstComeFirstServed:
    """What a plain queue does: each job runs to its end."""

    def decide(self, clips: Sequence[Runnable], now: float) -> Decision:
        """The clip that came first; holds while it lasts."""
        return Decision(min(clips, key=lambda clip: (clip.arrived_at, clip.clip_id)).clip_id, math.inf)


class EarliestDeadlineFirst:
    """Preemptive at step boundaries, and nothing else."""

    def decide(self, clips: Sequence[Runnable], now: float) -> Decision:
        """The clip that is due first; holds until another comes."""
        return Decision(min(clips, key=lambda clip: (clip.deadline, clip.clip_id)).clip_id, math.inf)


POLICIES: dict[str, Policy] = {
    "first come first served": FirstComeFirstServed(),
    "earliest deadline first": EarliestDeadlineFirst(),
    "wan-serve": StepPolicy(),
}


@dataclass(frozen=True)
class TypeResult:
    """How the jobs of one type fared in one run. Seconds."""

    jobs: int
    on_time: float
    p50_s: float
    p95_s: float
    max_s: float


@dataclass(frozen=True)
class Run:
    """One stream under one policy."""

    policy: str
    load: float
    seed: int
    on_time: float
    types: dict[str, TypeResult]


def kinds_on(card_name: str) -> list[JobKind]:
    """The four presets, with what they cost on a card."""
    kinds = []
    for job_type, weight in MIX.items():
        preset, card = PRESETS[job_type], CARDS[card_name]
        width, height = size_of(preset.resolution)
        frames, latent_frames = preset.video_length, WAN_1_3B.latent_frames(preset.video_length)
        step_s = step_gpu_s(card, WAN_1_3B, width=width, height=height, frames=frames)
        decode_s = decode_gpu_s(card, width=width, height=height, frames=frames)
        phases = (Phase(preset.sample_steps, step_s), Phase(latent_frames, decode_s / latent_frames))
        kinds.append(JobKind(job_type.value, weight, preset.promised_s[1], phases))
    return kinds


def replay(policy: str, load: float, seed: int, *, card: str, gpus: int, jobs: int, look_ahead_s: float) -> Run:
    """One run: a stream of jobs, and how they fared."""
    stream = poisson(kinds_on(card), load=load, jobs=jobs, seed=seed, replicas=gpus)
    outcomes = simulate(stream, POLICIES[policy], replicas=gpus, look_ahead_s=look_ahead_s)
    types = {kind.value: type_result([o for o in outcomes if o.job.kind == kind.value]) for kind in MIX}
    return Run(policy, load, seed, share_on_time(outcomes), types)


def type_result(outcomes: Sequence[Outcome]) -> TypeResult:
    """Share on time, and quantiles of latency."""
    latencies = [outcome.latency_s for outcome in outcomes]
    # Before Python 3.13 there are no quantiles of a single value.
    cuts = statistics.quantiles(latencies, n=20, method="inclusive") if len(latencies) > 1 else latencies * 19
    return TypeResult(len(outcomes), share_on_time(outcomes), cuts[9], cuts[18], max(latencies))


def share_on_time(outcomes: Sequence[Outcome]) -> float:
    """Of the jobs, how many were inside their deadline."""
    return sum(outcome.on_time for outcome in outcomes) / len(outcomes)


# ---- what is shown


def print_tables(runs: Sequence[Run], unloaded_s: dict[str, float], console: Console) -> None:
    """A table of deadlines kept and one of latencies: median over the seeds, least and most in brackets."""
    kept = Table(title="Jobs inside their deadline, %: median over seeds (least-most)")
    late = Table(title="Latency, s: p50 / p95, median over seeds; image_fast p95 also over its unloaded time")
    for table in (kept, late):
        for column in ("load", "policy"):
            table.add_column(column)
    kept.add_column("all", justify="right")
    for name, alone_s in unloaded_s.items():
        kept.add_column(name, justify="right")
        late.add_column(f"{name} ({alone_s:.1f} alone)", justify="right")
    for load, policy, group in grouped(runs):
        shares = [spread([100 * run.on_time for run in group])]
        shares += [spread([100 * run.types[name].on_time for run in group]) for name in unloaded_s]
        kept.add_row(f"{load:.2f}", policy, *shares)
        latencies = []
        for name, alone_s in unloaded_s.items():
            p50 = statistics.median(run.types[name].p50_s for run in group)
            p95 = statistics.median(run.types[name].p95_s for run in group)
            times = f" ({p95 / alone_s:.1f}x)" if name == JobType.IMAGE_FAST else ""
            latencies.append(f"{p50:.1f} / {p95:.1f}{times}")
        late.add_row(f"{load:.2f}", policy, *latencies)
    console.print(kept)
    console.print(late)


def grouped(runs: Sequence[Run]) -> list[tuple[float, str, list[Run]]]:
    """The runs of each load and policy."""
    loads = sorted({run.load for run in runs})
    return [(load, p, [r for r in runs if (r.load, r.policy) == (load, p)]) for load, p in product(loads, POLICIES)]


def spread(values: Sequence[float]) -> str:
    """`median (least-most)`."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Share of jobs inside their deadline by type, one panel for each load; whiskers are the least and most over seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    loads = sorted({run.load for run in runs})
    figure, axes = pyplot.subplots(1, len(loads), figsize=(4.6 * len(loads), 3.6), sharey=True, squeeze=False)
    labels = ["all", *(kind.value for kind in MIX)]
    for load, axis in zip(loads, axes[0], strict=True):
        for n, policy in enumerate(POLICIES):
            group = [run for run in runs if (run.load, run.policy) == (load, policy)]
            shares = [[100 * run.on_time for run in group]]
            shares += [[100 * run.types[name].on_time for run in group] for name in labels[1:]]
            middle = [statistics.median(values) for values in shares]
            below = [m - min(values) for m, values in zip(middle, shares, strict=True)]
            above = [max(values) - m for m, values in zip(middle, shares, strict=True)]
            places = [x + 0.27 * (n - 1) for x in range(len(labels))]
            axis.bar(places, middle, 0.25, yerr=(below, above), label=policy, error_kw={"linewidth": 0.8})
        axis.axhline(80, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"load {load:.2f}", ylim=(0, 100))
        axis.set_xticks(range(len(labels)), labels, rotation=25, fontsize=8)
    axes[0][0].set_ylabel("jobs inside their deadline, %")
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=len(POLICIES))
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)


def main(
    *,
    card: Annotated[str, typer.Option(help=f"One of {', '.join(CARDS)}.")] = "RTX 4090",
    gpus: Annotated[int, typer.Option(help="Cards, each with its own queue; a job goes to the least loaded.")] = 1,
    load: Annotated[list[float] | None, typer.Option(help="Share of the cards' capacity; can be repeated.")] = None,
    jobs: Annotated[int, typer.Option(help="Jobs in each run.")] = 6000,
    look_ahead_s: Annotated[
        float,
        typer.Option(
            help="Jobs wait in the store and are claimed with this look-ahead; inf: all go to a card at once."
        ),
    ] = math.inf,
    seeds: Annotated[int, typer.Option(help="Streams for each load.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Where to write, without suffix; by default, into benchmarks/results.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Replay on a real engine; what follows is for that.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A small model, for a CPU.")] = False,
    budget_s: Annotated[float, typer.Option(help="Wall time for all: model, warm-up, measurements.")] = 600.0,
    types: Annotated[str, typer.Option(help="Job types in the mix.")] = ",".join(MIX),
    warm_up: Annotated[
        str, typer.Option(help="Job types whose shapes are compiled, about 10 s each; others run eager.")
    ] = ",".join(MIX),
    skip_batches: Annotated[
        bool,
        typer.Option("--skip-batches", help="Compile no forwards of several pictures: saves two thirds of theirs."),
    ] = False,
    steps_scale: Annotated[float, typer.Option(help="Steps of every type, times this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The stream.")] = 0,
    plot_only: Annotated[Path | None, typer.Option(help="Draw this record of an engine again, and end.")] = None,
) -> None:
    """Replay the mix under every policy and load; print tables, write JSON and a plot."""
    started_at = time.monotonic()
    if engine:
        # Not before: the simulator needs no torch.
        from benchmarks import mixed_load_engine

        if plot_only is not None:
            mixed_load_engine.draw(plot_only)
            return
        default_out = Path("benchmarks/results/mixed_load_engine" + ("_tiny_cpu" if tiny else ""))
        options = mixed_load_engine.Options(
            tiny=tiny,
            budget_s=budget_s,
            load=load[0] if load else 0.95,
            types=_job_types(types),
            warm_up=_job_types(warm_up),
            steps_scale=steps_scale,
            skip_batches=skip_batches,
            seed=seed,
            out=out or default_out,
        )
        mixed_load_engine.run(options, started_at)
        return
    out = out or Path("benchmarks/results/mixed_load")
    if card not in CARDS:
        raise typer.BadParameter(f"{card!r} is not in the cost model; known: {', '.join(CARDS)}")
    setup = {"card": card, "gpus": gpus, "jobs": jobs, "look_ahead_s": look_ahead_s}
    cases = list(product(POLICIES, load or (0.70, 0.85, 0.95), range(seeds)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(replay, *case, **setup) for case in cases]
        runs = [run.result() for run in started]
    kinds = kinds_on(card)
    claimed = "" if look_ahead_s == math.inf else f", claimed with a look-ahead of {look_ahead_s:.0f} s"
    title = f"{gpus} x {card}, {jobs} jobs x {seeds} seeds, costs by model{claimed}"
    console = Console(width=160)
    console.print(title)
    print_tables(runs, {kind.name: kind.work_s for kind in kinds}, console)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.mixed_load", *sys.argv[1:]]),
        "setup": {**setup, "look_ahead_s": str(look_ahead_s)},
        "kinds": [asdict(kind) for kind in kinds],
        "policy": vars(POLICIES["wan-serve"]),
        "runs": [asdict(run) for run in runs],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(runs, title, out.with_suffix(".png"))
    console.print(f"Written: {out.with_suffix('.json')}, {out.with_suffix('.png')}")


def _job_types(names: str) -> list[JobType]:
    try:
        return [JobType(name) for name in names.split(",") if name]
    except ValueError as error:
        raise typer.BadParameter(f"{error}; known: {', '.join(MIX)}, with commas between") from error


if __name__ == "__main__":
    typer.run(main)

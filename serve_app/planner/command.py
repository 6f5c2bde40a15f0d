"""The body of `wan-serve plan`."""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from serve_app.errors import InvalidValue
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.scheduling.cost import ARCHITECTURES, CARDS

if TYPE_CHECKING:
    from serve_app.planner.demand import Costs, Demand, Mix, Recorded
    from serve_app.planner.plan import ClusterSettings
    from serve_app.settings import ModelSettings

TARGET_MISSED = 1
USUAL_TARGET = 0.95
USUAL_MIX = "image_fast=50,image_high=20,video_fast=20,video_high=10"


def plan_command(  # noqa: PLR0917 (typer calls it by keyword)
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Jobs from a CSV file with the columns arrived_at_s, job_type and, as you like, resolution, video_length, seconds, "
            "sample_steps, estimated_gpu_s (an empty cell: the preset's)."
        ),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Jobs from the finished ones that the job store remembers.")
    ] = False,
    store_url: Annotated[
        str | None, typer.Option(envvar="WAN_SERVE_STORE_URL", help="With --history: which store.")
    ] = None,
    store_prefix: Annotated[
        str, typer.Option(envvar="WAN_SERVE_STORE_PREFIX", help="With --history: its prefix.")
    ] = "wan",
    jobs: Annotated[int, typer.Option(min=1, help="Synthetic mix: jobs in all.")] = 5000,
    jobs_per_hour: Annotated[
        float | None, typer.Option(min=0.001, help="Synthetic mix: so many come, at random.")
    ] = None,
    load: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Synthetic mix: the share of max_replicas' time that the work takes, unless "
            "--jobs-per-hour says otherwise.",
        ),
    ] = 0.7,
    mix: Annotated[str, typer.Option(help="Synthetic mix: job types and weights.")] = USUAL_MIX,
    seed: Annotated[int, typer.Option(help="Synthetic mix: of its random numbers.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A Serve YAML file: card and settings, where no option says otherwise."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of the settings' models. Default: the default one.")] = None,
    card: Annotated[str | None, typer.Option(help=f"{', '.join(CARDS)}. Default: RTX 4090.")] = None,
    architecture: Annotated[str | None, typer.Option(help=f"{', '.join(ARCHITECTURES)}. Default: 1.3B.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of a node with one GPU. Default: gpu_price_per_hour of --config, or 0.")
    ] = None,
    min_replicas: Annotated[int | None, typer.Option(help="So many there always are. Default: 1.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="So many at most. Default: 8.")] = None,
    startup_s: Annotated[
        float | None,
        typer.Option(help="From asking for a replica until it takes work, its node included. Default: 180."),
    ] = None,
    node_start_s: Annotated[
        float | None, typer.Option(help="The part of startup_s that the node takes. Default: two thirds.")
    ] = None,
    node_idle_s: Annotated[float | None, typer.Option(help="So long an empty node is kept. Default: 300.")] = None,
    target_drain_s: Annotated[
        float | None, typer.Option(help="Late work is to be gone so long after new replicas started. Default: 120.")
    ] = None,
    downscale_delay_s: Annotated[
        float | None, typer.Option(help="So long fewer must have been enough before any go. Default: 300.")
    ] = None,
    headroom: Annotated[float | None, typer.Option(help="Work counts as larger by this share. Default: 0.25.")] = None,
    look_ahead_s: Annotated[
        float | None, typer.Option(help="GPU-seconds of claimed work that may wait at a replica. Default: 180.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Values of a setting to try, as max_replicas=4,8,16. Repeat it: all combinations.", show_default=False
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help=f"Share of jobs that must be in time; exit code 1 where no setting does it. With --sweep: {USUAL_TARGET}.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the plan (with --sweep: all settings, by their cost) into this file.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file. `-`: print them, and nothing else.")
    ] = None,
) -> None:
    """Say what a load would meet on a cluster: waiting times, deadlines kept, GPU use, cold starts, cost a video.

    Simulated on a virtual clock by the very policies that the service runs (order of steps and claims, placement, autoscaling),
    with times of the cost model. Nothing is started, no cluster is needed. Jobs come from --trace or --history; else a mix is made up.

    \b
    wan-serve plan --load 0.7 --price-per-hour 0.40
    wan-serve plan --trace monday.csv --config serve_config.yaml --price-per-hour 0.40 --plot monday.png
    wan-serve plan --history --store-url redis://localhost:6379/0 --min-replicas 2
    wan-serve plan --jobs-per-hour 600 --price-per-hour 0.40 --target 0.95 --sweep max_replicas=4,6,8,12 --sweep min_replicas=0,2,4

    The settings are the Generator's of serve_config.yaml. A job waits until its first denoising step, and is in time if its last frame
    is made by its deadline; encoding and upload, on CPUs, are not simulated. Costs are paid node time, shared among the jobs by work.
    """
    from serve_app.planner.plan import plan  # here, since other commands need none of it
    from serve_app.planner.show import plot_plan, plot_sweep, print_plan, print_sweep
    from serve_app.planner.sweep import axes_of, cheapest, combinations
    from serve_app.planner.sweep import sweep as try_all

    said = {
        "min_replicas": min_replicas, "max_replicas": max_replicas, "startup_s": startup_s, "node_start_s": node_start_s,
        "node_idle_s": node_idle_s, "target_drain_s": target_drain_s, "downscale_delay_s": downscale_delay_s,
        "headroom": headroom, "look_ahead_s": look_ahead_s, "price_per_hour": price_per_hour,
    }  # fmt: skip
    name, chosen, settings = _settings(config, model, {key: value for key, value in said.items() if value is not None})
    costs = _costs(card or chosen.reference_card, architecture or chosen.architecture)
    demand: Demand
    if trace is not None and history:
        raise InvalidValue("--trace and --history both say where jobs come from; give one of them")
    if trace is not None:
        demand, title = _trace(trace, costs), f"trace {trace}"
    elif history:
        demand, title = _history(store_url, store_prefix, name, costs), f"history of {name}"
    else:
        demand = _mix(mix, costs, jobs=jobs, seed=seed, per_hour=jobs_per_hour, busy_gpus=load * settings.max_replicas)
        title = f"{demand.per_hour:,.0f} jobs an hour, {demand.load_gpus:.1f} GPUs' work"
    title += f", on {card or chosen.reference_card} ({architecture or chosen.architecture})"
    console, axes = Console(stderr=json_path == Path("-")), axes_of(sweep or ())
    if axes:
        target = USUAL_TARGET if target is None else target
        tried = combinations(settings, axes)
        with _telling(f"{{}} of {len(tried)} settings tried") as told:
            plans = try_all(demand, tried, told)
        print_sweep(console, plans, list(axes), target)
        best = cheapest(plans, target) or max(plans, key=lambda one: one.on_time)
        print_plan(console, best, title + ": " + ", ".join(f"{axis} {getattr(best.settings, axis):g}" for axis in axes))
        draw = partial(plot_sweep, plans, list(axes), target)
    else:
        with _telling("{:,} jobs done") as told:
            best = plan(demand, settings, told)
        plans = [best]
        print_plan(console, best, title)
        draw = partial(plot_plan, best)
    if plot is not None:
        draw(title, plot)
        console.print(f"Written: {plot}")
    _write(console, {"title": title, "target": target, "best": best, "plans": plans if axes else []}, json_path)
    if target is not None and best.on_time < target:
        console.print(f"[red]The target is missed:[/] {best.on_time:.1%} of the jobs in time, not {target:.1%}.")
        raise typer.Exit(TARGET_MISSED)


def _write(console: Console, data: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    text = json.dumps(data, indent=1, default=asdict)
    if path == Path("-"):
        print(text)  # noqa: T201 (for programs)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    console.print(f"Written: {path}")


def _settings(
    config: Path | None, model: str | None, said: dict[str, float]
) -> "tuple[str, ModelSettings, ClusterSettings]":
    """The model's name, its settings, and the cluster's: those that were said, else the file's, else the defaults."""
    from serve_app.planner.config import read_config
    from serve_app.planner.plan import ClusterSettings
    from serve_app.settings import ModelSettings

    known: dict[str, Any] = {}
    name, chosen = model or DEFAULT_MODEL_NAME, ModelSettings()
    if config is not None:
        name, chosen, known = read_config(config, model)
    known |= said
    if "startup_s" in known:
        known.setdefault("node_start_s", known["startup_s"] * 2 / 3)
    return name, chosen, ClusterSettings(**known)


def _check(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise InvalidValue(f"{what} is {value!r}; it must be one of {', '.join(known)}")


def _costs(card: str, architecture: str) -> "Costs":
    from serve_app.planner.demand import Costs

    _check("--card", card, CARDS)
    _check("--architecture", architecture, ARCHITECTURES)
    return Costs(card, architecture)


def _trace(path: Path, costs: "Costs") -> "Recorded":
    from serve_app.planner.demand import read_trace

    return read_trace(path, costs)


def _mix(text: str, costs: "Costs", *, jobs: int, seed: int, per_hour: float | None, busy_gpus: float) -> "Mix":
    """The synthetic mix; by its rate, or by how many GPUs its work keeps busy. Raises InvalidValue."""
    from serve_app.planner.demand import Mix

    kinds = []
    for entry in text.split(","):
        name, _, weight = entry.partition("=")
        _check("a job type in --mix", name.strip(), list(JobType))
        try:
            kinds.append(costs.kind(JobType(name.strip()), float(weight)))
        except ValueError:
            raise InvalidValue(f"--mix has {entry!r}; write it as {name}=10") from None
    if not sum(kind.weight for kind in kinds) > 0 or min(kind.weight for kind in kinds) < 0:
        raise InvalidValue(f"--mix is {text!r}; weights must be 0 or more, and one of them more")
    one = Mix(kinds, 1.0, jobs, seed)
    return replace(one, per_hour=busy_gpus / one.load_gpus if per_hour is None else per_hour)


def _history(url: str | None, prefix: str, model: str, costs: "Costs") -> "Recorded":
    from serve_app.jobs.store import JobStore
    from serve_app.planner.demand import read_history

    if url is None:
        raise InvalidValue("--history needs the store's address", hint="Give --store-url, or set WAN_SERVE_STORE_URL.")

    async def read() -> "Recorded":
        store = JobStore(url, prefix=prefix)
        try:
            return await read_history(store, model, costs)
        finally:
            await store.close()

    return asyncio.run(read())


@contextmanager
def _telling(what: str) -> Iterator[Callable[[int], None]]:
    """A line on stderr that says how far it is."""
    with Console(stderr=True).status("simulating") as status:
        yield lambda count: status.update(f"simulating: {what.format(count)}")

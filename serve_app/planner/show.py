"""A plan on the terminal and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from serve_app.errors import InvalidValue
from serve_app.planner.plan import Plan, TypeResult
from serve_app.planner.sweep import cheapest


def print_plan(console: Console, plan: Plan, title: str) -> None:
    """How each job type fares, and what the cluster takes."""
    caption = "waiting: to the first step; latency: to the last frame, without encoding and upload"
    table = Table(title=title, caption=caption)
    table.add_column("job type")
    for name in ("jobs", "in time", "waiting, s\np50 / p95", "latency, s\np50 / p95", "longest\ns", "cost\na job"):
        table.add_column(name, justify="right")
    for name, one in plan.types.items():
        table.add_row(name, *_cells(one))
    table.add_section()
    table.add_row("all", f"{plan.jobs:,}", f"{plan.on_time:.1%}", "", "", "", f"{plan.cost / plan.jobs:.4f}")
    console.print(table)
    facts = {
        "time": _span(plan.duration_s),
        "replicas at most": f"{plan.most_replicas} of {plan.settings.max_replicas}",
        "cold starts": f"{plan.cold_starts} of replicas, {plan.node_starts} of nodes",
        "utilisation": f"{plan.utilisation:.1%} of the paid GPU time",
        "node hours": f"{plan.node_hours:,.1f}",
        "cost": f"{plan.cost:,.2f} in all, {plan.cost_per_video:.4f} a video",
    }
    for name, value in facts.items():
        console.print(f"  {name:<18}{value}", highlight=False)


def _cells(one: TypeResult) -> list[str]:
    return [
        f"{one.jobs:,}",
        f"{one.on_time:.1%}",
        f"{one.wait_p50_s:,.1f} / {one.wait_p95_s:,.1f}",
        f"{one.latency_p50_s:,.1f} / {one.latency_p95_s:,.1f}",
        f"{one.latency_max_s:,.0f}",
        f"{one.cost_per_job:.4f}",
    ]


def _span(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def print_sweep(console: Console, plans: Sequence[Plan], axes: Sequence[str], target: float) -> None:
    """A line for each plan, cheapest first; the cheapest that meets the target is marked."""
    best = cheapest(plans, target)
    table = Table(title=f"{len(plans)} settings; * the cheapest with {target:.1%} of the jobs in time")
    table.add_column("")
    for name in (*axes, "in time", "GPU use", "cold starts", "node hours", "cost", "cost a video"):
        table.add_column(name, justify="right", overflow="fold")
    for plan in sorted(plans, key=lambda one: (one.cost, one.node_hours)):
        values = [f"{getattr(plan.settings, name):g}" for name in axes]
        style = "bold green" if plan is best else ("" if plan.on_time >= target else "dim")
        table.add_row(
            "*" if plan is best else "", *values, f"{plan.on_time:.1%}", f"{plan.utilisation:.1%}",
            str(plan.cold_starts), f"{plan.node_hours:,.1f}", f"{plan.cost:,.2f}", f"{plan.cost_per_video:.4f}", style=style,
        )  # fmt: skip
    console.print(table)


def plot_plan(plan: Plan, title: str, path: Path) -> None:
    """Replicas and queue over time, deadlines kept, waiting and latency by type, cost. Raises InvalidValue without matplotlib."""
    pyplot = _pyplot()
    figure, ((top, kept), (waits, costs)) = pyplot.subplots(2, 2, figsize=(12, 7), width_ratios=(2, 1))
    start = plan.timeline[0].at_s if plan.timeline else 0.0
    hours = [(moment.at_s - start) / 3600 for moment in plan.timeline]
    ready = [moment.ready for moment in plan.timeline]
    top.fill_between(hours, ready, step="post", alpha=0.5, label="ready")
    top.step(
        hours, [m.ready + m.starting for m in plan.timeline], where="post", linewidth=0.9, label="ready or starting"
    )
    top.axhline(plan.settings.max_replicas, color="grey", linestyle=":", linewidth=0.8)
    top.set(title="replicas and jobs that wait", xlabel="hours", ylabel="replicas")
    queue = top.twinx()
    queue.plot(hours, [moment.queued for moment in plan.timeline], color="tab:red", linewidth=0.7)
    queue.tick_params(axis="y", colors="tab:red")
    top.legend(loc="upper left", fontsize=8)
    names, results = list(plan.types), list(plan.types.values())
    kept.bar(names, [100 * one.on_time for one in results])
    kept.set(title=f"inside their deadline: {plan.on_time:.1%} of all", ylabel="%", ylim=(0, 100))
    kept.tick_params(axis="x", labelsize=8)
    series = {
        "waiting p50": [one.wait_p50_s for one in results],
        "waiting p95": [one.wait_p95_s for one in results],
        "latency p50": [one.latency_p50_s for one in results],
        "latency p95": [one.latency_p95_s for one in results],
    }
    for number, (label, values) in enumerate(series.items()):
        waits.bar([place + 0.2 * (number - 1.5) for place in range(len(names))], values, 0.19, label=label)
    waits.set_xticks(range(len(names)), names)
    waits.set(title="waiting and latency", ylabel="s", yscale="log")
    waits.legend(fontsize=8)
    costs.bar(names, [one.cost_per_job for one in results])
    costs.set(title=f"cost a job; utilisation {plan.utilisation:.0%}, {plan.cold_starts} cold starts")
    costs.tick_params(axis="x", labelsize=8)
    _save(figure, title, path)


def plot_sweep(plans: Sequence[Plan], axes: Sequence[str], target: float, title: str, path: Path) -> None:
    """What each setting gives for its cost: jobs in time, waiting, GPU use and cold starts. Raises InvalidValue without matplotlib."""
    figure, panels = _pyplot().subplots(2, 2, figsize=(12, 8), sharex=True)
    best, costs = cheapest(plans, target), [plan.cost or plan.node_hours for plan in plans]
    waits_s = [max(one.wait_p95_s for one in plan.types.values()) for plan in plans]
    shown: dict[str, list[float]] = {
        "jobs in time, %": [100 * plan.on_time for plan in plans],
        "waiting p95 of the job type that waits longest, s": waits_s,
        "GPU use, % of the paid time": [100 * plan.utilisation for plan in plans],
        "cold starts of replicas": [plan.cold_starts for plan in plans],
    }
    for panel, (name, values) in zip(panels.flat, shown.items(), strict=True):
        panel.scatter(costs, values, c=["tab:green" if plan is best else "tab:blue" for plan in plans])
        panel.set_title(name, fontsize=10)
        for plan, cost, value in zip(plans, costs, values, strict=True):
            label = ", ".join(f"{getattr(plan.settings, axis):g}" for axis in axes)
            panel.annotate(label, (cost, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
    panels[0][0].axhline(100 * target, color="grey", linestyle=":", linewidth=0.8)
    for panel in panels[1]:
        panel.set_xlabel("cost" if plans[0].cost else "node hours")
    _save(figure, f"{title}; points: {', '.join(axes)}; green: the cheapest that meets the target", path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise InvalidValue(
            "a plot needs matplotlib, which is not installed",
            hint="pip install 'wan-serve[plan]', or leave --plot out.",
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InvalidValue(f"--plot {path}: {error}") from None
    _pyplot().close(figure)

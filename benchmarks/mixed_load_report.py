"""Tables and plot of `mixed_load_engine.py`."""

import importlib.util
import json
import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.engine_stages import percent

if TYPE_CHECKING:
    from benchmarks.mixed_load_engine import Results

RESPONSES = {
    "picture started": "picture_started_s",
    "picture's first step done": "picture_first_step_s",
    "cancel to freed": "freed_s",
}

CAPTION = (
    "Deadlines are the presets' promises for an RTX 4090, scaled for each type by this card's unloaded time over the 4090's "
    "by the cost model, and the load is of this card's capacity by the same unloaded times: the same scheduling problem on "
    "another card. A short stream that starts on an idle engine, so kinder than the long run."
)


def show(results: "Results") -> None:
    """Print the tables of what there is."""
    console = Console(width=150)
    if found := results.responsiveness:
        table = Table(
            title=f"{len(found.trials)} times during {found.video} (step: {1000 * found.video_step_s:.0f} ms)"
        )
        for column in ("", "median s", "max s", "median steps", "max steps"):
            table.add_column(column, justify="right")
        for label, name in RESPONSES.items():
            seconds, steps = [getattr(trial, name) for trial in found.trials], found.in_steps(name)
            table.add_row(label, *(f"{x:.3f}" for x in (median(seconds), max(seconds), median(steps), max(steps))))
        console.print(table)
    if busy := results.busy:
        console.print(
            f"Busy {100 * busy.share:.1f}% of {busy.wall_s:.1f} s with a backlog (device spans over wall time); "
            f"with a kernel running, by the driver: {percent(busy.driver_share)}"
        )
    if results.replays:
        table = Table(title="Jobs inside their deadline; p50 / p95 in s", caption=CAPTION)
        for column in ("policy", "jobs", "cut", "all", *results.alone):
            table.add_column(column, justify="right")
        for each in results.replays:
            cells = [
                f"{100 * t.on_time:.0f}% of {t.jobs}; {t.p50_s:.2f} / {t.p95_s:.2f}"
                for t in (each.types.get(name) for name in results.alone)
                if t is not None
            ]
            label = each.policy + (" (simulated)" if each.simulated else "")
            table.add_row(label, str(each.jobs), str(each.cut), f"{100 * each.on_time:.0f}%", *cells)
        console.print(table)


def draw(record_path: Path) -> None:
    """Plot a written record, beside it. Does nothing where matplotlib is not installed: a record can be drawn elsewhere."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    record = json.loads(record_path.read_text())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1))
    names = list(record["alone"])
    runs = record["replays"]
    for n, each in enumerate(runs):
        shares = [each["on_time"], *(each["types"].get(name, {}).get("on_time", math.nan) for name in names)]
        places = [x + 0.8 / len(runs) * (n - (len(runs) - 1) / 2) for x in range(len(shares))]
        label = each["policy"] + (", simulated" if each["simulated"] else "")
        left.bar(places, [100 * share for share in shares], 0.75 / len(runs), label=label)
    left.set_xticks(range(1 + len(names)), ["all", *names])
    left.set(
        ylabel="jobs inside their deadline, %",
        ylim=(0, 100),
        xlim=(-0.5, len(names) + 0.5),
        title=f"load {record['setup']['load']}",
    )
    if runs:
        left.legend(fontsize=7)
    if found := record["responsiveness"]:
        for x, name in enumerate(RESPONSES.values()):
            steps = [trial[name] / found["video_step_s"] for trial in found["trials"]]
            right.plot([x] * len(steps), steps, "o", alpha=0.6)
        right.set_xticks(range(len(RESPONSES)), list(RESPONSES), fontsize=7)
        right.set(ylabel=f"steps of {found['video']}", ylim=(0, None), xlim=(-0.5, len(RESPONSES) - 0.5))
    busy = record["busy"]
    figure.suptitle(
        record["device"] + (f", busy {100 * busy['share']:.1f}% under a backlog" if busy else ""), fontsize=10
    )
    figure.tight_layout()
    figure.savefig(record_path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)

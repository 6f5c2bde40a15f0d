"""The dashboard on a real run: a service under load on this machine, a real Prometheus that scrapes it, each panel drawn from its answers.

    python -m benchmarks.dashboard --seconds 180        # needs the binary `prometheus` (Debian: apt-get install prometheus)

The panels are drawn by matplotlib from `cluster/observability/dashboard.json`: same queries, same places, but not Grafana. The run has
the tiny model, a job that is cancelled and a replica that is killed at work, so that what is about trouble has something to show.
"""

import argparse
import contextlib
import json
import math
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import yaml
from PIL import Image

mpl.use("Agg")
import matplotlib.pyplot as plt

from serve_app.client import Client
from serve_app.jobs.presets import JobType
from tests.cluster.running_service import RunningService, free_port, write_config

ROOT = Path(__file__).parents[1]
STEP_S = 5
UNITS = {"percentunit": (100, "%"), "s": (1, "s"), "ms": (1, "ms"), "short": (1, "")}


@contextlib.contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes `target` every two seconds and loads our alerts; its address."""
    rules = yaml.safe_load((ROOT / "cluster/observability/prometheus-rule.yaml").read_text())["spec"]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    scrape = {"job_name": "ray", "scrape_interval": "2s", "static_configs": [{"targets": [target]}]}
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {"global": {"evaluation_interval": "5s"}, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
        )
    )
    address = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": folder / "prometheus.yaml",
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": address,
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def load(service: RunningService, until: float, seed: int = 7) -> None:
    """Jobs of all types until then, one of them cancelled, and a replica killed halfway."""
    draw, killed, halfway = random.Random(seed), False, (time.time() + until) / 2
    with Client(service.url) as client:
        submitted = 0
        while time.time() < until:
            job_type = draw.choices(list(JobType), weights=[50, 20, 20, 10])[0]
            frames = {} if job_type.value.startswith("image") else {"video_length": draw.choice([5, 13, 21])}
            prompt = draw.choice(["a red kite", "a calm bay", f"a hill in weather {submitted}"])
            job = client.submit(prompt, job_type, sample_steps=draw.randint(4, 12), **frames)
            submitted += 1
            if submitted % 9 == 0:
                client.cancel(job.id)
            if not killed and time.time() > halfway:
                killed = True
                long = client.submit("a lighthouse in a storm", JobType.VIDEO_HIGH, sample_steps=40, video_length=21)
                next(event for event in client.events(long.id) if event.name == "progress")
                service.replica("Generator").kill()
            time.sleep(draw.expovariate(1.0))


def answer(url: str, panel: dict[str, Any], began: float, ended: float) -> Iterator[tuple[str, list[float], list[float]]]:  # fmt: skip
    """Each series of a panel: its legend, Unix seconds, values."""
    for target in panel["targets"]:
        expr = target["expr"].replace("$__range", f"{int(ended - began)}s").replace("$__rate_interval", "30s")
        ask = {"query": expr, "start": began, "end": ended, "step": STEP_S}
        if panel["type"] == "stat":
            ask["start"] = ended
        got = httpx.get(f"{url}/api/v1/query_range", params=ask, timeout=30).json()
        if got["status"] != "success":
            raise RuntimeError(f"{panel['title']}: {got}")
        for series in got["data"]["result"]:
            legend = target["legendFormat"]
            for label, value in series["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", value)
            times, values = zip(*series["values"], strict=True)
            yield legend, [float(at) for at in times], [float(value) for value in values]


def draw(url: str, began: float, ended: float, out: Path) -> list[str]:
    """The dashboard as a picture; the titles of panels without data."""
    dashboard = json.loads((ROOT / "cluster/observability/dashboard.json").read_text())
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = plt.figure(figsize=(20, height * 0.42), facecolor="#f4f5f5")
    empty = []
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        x, y, wide, high = at["x"] / 24, 1 - (at["y"] + at["h"]) / height, at["w"] / 24, at["h"] / height
        if panel["type"] == "row":
            figure.text(x + 0.005, y + high / 3, panel["title"], fontsize=13, weight="bold")
            continue
        if panel["type"] != "timeseries":
            axes = figure.add_axes((x + 0.004, y + 0.003, wide - 0.008, high - 0.006))
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.85, panel["title"], ha="center", va="center", fontsize=11)
            if panel["type"] == "text":
                axes.text(0.5, 0.4, panel["options"]["content"], ha="center", fontsize=9)
                continue
            series = list(answer(url, panel, began, ended))
            value = series[0][2][-1] if series else float("nan")
            defaults = panel["fieldConfig"]["defaults"]
            factor, unit = UNITS[defaults["unit"]]
            colour = [step["color"] for step in defaults["thresholds"]["steps"] if (step["value"] or 0) <= value]
            axes.set_facecolor(
                {"red": "#e0584f", "green": "#7abf6b", "orange": "#f0a350"}[colour[-1]] if colour else "w"
            )
            axes.text(0.5, 0.4, f"{value * factor:.4g} {unit}", ha="center", va="center", fontsize=22)
            continue
        axes = figure.add_axes((x + 0.025, y + 0.25 * high, wide - 0.035, 0.6 * high))
        factor, unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
        found = False
        for legend, times, values in answer(url, panel, began, ended):
            pairs = zip(times, values, strict=True)
            points = [(when - began, value * factor) for when, value in pairs if not math.isnan(value)]
            found = found or bool(points)
            if points:
                axes.plot(*zip(*points, strict=True), label=legend)
        if not found:
            empty.append(panel["title"])
        axes.set_title(f"{panel['title']}{f' ({unit})' if unit else ''}", fontsize=10, loc="left")
        axes.set_xlim(0, ended - began)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if found:
            axes.legend(fontsize=6, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    figure.savefig(out, dpi=70)
    with Image.open(out) as picture:
        picture.convert("RGB").quantize(64).save(out, optimize=True)  # a third of the size
    return empty


def main() -> None:
    """Run the service under load, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dashboard.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        priced = {"wan-1.3b": {"gpu_price_per_hour": 0.4}}
        service = RunningService(write_config(folder, models=priced))
        try:
            (port,) = (folder / "data" / "ray" / "session_latest").glob("metrics_export_port_*")
            with prometheus(f"127.0.0.1:{port.read_text()}", folder) as url:
                began = time.time()
                loading = threading.Thread(target=load, args=(service, began + options.seconds))
                loading.start()
                loading.join()
                time.sleep(10)
                ended = time.time()
                empty = draw(url, began, ended, options.out)
                alerts = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
                targets = httpx.get(f"{url}/api/v1/targets").json()["data"]["activeTargets"]
        finally:
            service.stop()
    print("panels without data:", ", ".join(empty) or "none")
    print("alerts:", {alert["name"]: f"{alert['health']}, {alert['state']}" for alert in alerts})
    print("scrape:", targets[0]["health"], targets[0]["lastError"])
    print("picture:", options.out)


if __name__ == "__main__":
    main()

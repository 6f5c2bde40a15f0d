"""`wan-serve plan`: where its jobs come from, what it counts, which settings it finds, and what it says of bad input."""

import json
import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.api.admit import admit
from serve_app.api.schemas import JobRequest
from serve_app.cli import app
from serve_app.errors import InvalidValue
from serve_app.jobs.presets import PRESETS, JobType
from serve_app.planner.config import read_config
from serve_app.planner.demand import Costs, Mix, Recorded, read_trace
from serve_app.planner.plan import ClusterSettings, plan
from serve_app.planner.sweep import axes_of, cheapest, combinations, sweep
from serve_app.scheduling.workload import SimulatedJob
from serve_app.settings import Settings

COSTS = Costs("RTX 4090")
ALWAYS_ON = ClusterSettings(min_replicas=2, max_replicas=2, price_per_hour=0.5)


def trace(folder: Path, *lines: str) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- jobs


def test_a_trace_asks_for_what_the_service_would_make_and_promise(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        "job_type,arrived_at_s,sample_steps,seconds",
        "video_fast,7.5,50,12",
        "image_fast,2,,",
    )
    image, video = read_trace(path, COSTS).known
    assert (image.kind, image.arrived_at, image.deadline) == (
        "image_fast",
        2.0,
        2.0 + PRESETS[JobType.IMAGE_FAST].promised_s[1],
    )
    asked = admit(JobRequest(type="video_fast", prompt="x", sample_steps=50, seconds=12.0), "me", Settings(), now=7.5)
    assert 1 + len(video.further_clips) == len(asked.spec.clips) == 3
    assert video.work_s == pytest.approx(asked.estimated_gpu_s)
    assert video.deadline == pytest.approx(asked.deadline)


def test_what_a_trace_says_of_the_work_goes_before_the_cost_model(tmp_path: Path) -> None:
    preset = COSTS.kind(JobType.VIDEO_HIGH)
    path = trace(
        tmp_path, "arrived_at_s,job_type,estimated_gpu_s", f"0,video_high,{2 * preset.work_s}", "0,video_high,1"
    )
    long, short = sorted(read_trace(path, COSTS).known, key=lambda job: -job.work_s)
    assert (long.work_s, long.deadline) == (pytest.approx(2 * preset.work_s), pytest.approx(2 * preset.promised_s))
    assert (short.work_s, short.deadline) == (pytest.approx(1.0), preset.promised_s)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ("arrived_at_s,job_type", "0,image_fast", "soon,image_fast"),
            r"line 3: arrived_at_s is 'soon'; it must be a finite",
        ),
        (("arrived_at_s,job_type", "nan,image_fast"), r"line 2: arrived_at_s is 'nan'"),
        (("arrived_at_s,job_type", "0,film"), r"line 2: job_type is 'film'; it must be one of image_fast, "),
        (("arrived_at_s,job_type", "0"), r"line 2 has another number of values"),
        (("arrived_at_s,job_type", "0,image_fast,7"), r"line 2 has another number of values"),
        (
            ("arrived_at_s,job_type,sample_steps", "0,image_fast,1000"),
            r"line 2: sample_steps is 1000; it must be 1 to 100",
        ),
        (
            ("arrived_at_s,job_type,sample_steps", "0,image_fast,2.5"),
            r"line 2: sample_steps is '2.5'; it must be a whole",
        ),
        (("arrived_at_s,job_type,resolution", "0,image_fast,9x9"), r"line 2: .*9"),
        (("arrived_at_s,job_type,estimated_gpu_s", "0,image_fast,-1"), r"line 2: estimated_gpu_s is -1"),
        (("arrived_at_s,job_type,colour", "0,image_fast,red"), r"line 1 has an unknown column 'colour'"),
        (("job_type", "image_fast"), r"line 1 has no column 'arrived_at_s'"),
        (("arrived_at_s,job_type",), r"has no jobs"),
    ],
)
def test_a_bad_trace_is_refused_by_line_and_value(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        read_trace(trace(tmp_path, *lines), COSTS)


def test_a_mix_has_the_load_that_it_says() -> None:
    mix = Mix([COSTS.kind(JobType.VIDEO_FAST, 1), COSTS.kind(JobType.IMAGE_FAST, 3)], 360.0, 20_000, seed=3)
    jobs = list(mix.jobs())
    assert [job.job_id for job in mix.jobs()][:9] == [job.job_id for job in jobs[:9]]
    hours = jobs[-1].arrived_at / 3600
    assert len(jobs) / hours == pytest.approx(360, rel=0.02)
    assert sum(job.work_s for job in jobs) / jobs[-1].arrived_at == pytest.approx(mix.load_gpus, rel=0.03)


# ---- figures


def test_figures_of_a_run_that_can_be_worked_out_by_hand() -> None:
    """Two pictures and a video at once on two GPUs that are always there: the video alone on one, the pictures on the other."""
    video, image = COSTS.kind(JobType.VIDEO_FAST), COSTS.kind(JobType.IMAGE_FAST)
    jobs = [
        SimulatedJob(str(n), kind.name, 0.0, due, kind.phases)
        for n, (kind, due) in enumerate(((video, 1e3), (image, 50.0), (image, image.work_s)))
    ]
    found = plan(Recorded(jobs), ALWAYS_ON)
    images, videos = found.types["image_fast"], found.types["video_fast"]
    assert (found.jobs, images.jobs, videos.jobs) == (3, 2, 1)
    assert (found.on_time, images.on_time, videos.on_time) == (pytest.approx(2 / 3), 0.5, 1.0)
    assert (images.latency_max_s, videos.latency_max_s) == (
        pytest.approx(2 * image.work_s),
        pytest.approx(video.work_s),
    )
    assert found.node_hours == pytest.approx(2 * found.duration_s / 3600)
    assert found.cost == pytest.approx(0.5 * found.node_hours)
    assert found.utilisation == pytest.approx((video.work_s + 2 * image.work_s) / (3600 * found.node_hours))
    assert found.cost_per_video == pytest.approx(found.cost * video.work_s / (video.work_s + 2 * image.work_s))
    assert sum(one.jobs * one.cost_per_job for one in found.types.values()) == pytest.approx(found.cost)
    assert (found.cold_starts, found.node_starts, found.most_replicas) == (0, 0, 2)


def test_from_zero_a_job_waits_for_its_cold_start() -> None:
    job = COSTS.job("one", 100.0, "video_fast")
    found = plan(Recorded([job]), ClusterSettings(min_replicas=0, max_replicas=3, startup_s=60.0, node_start_s=40.0))
    assert found.types["video_fast"].wait_p50_s == pytest.approx(60.0)
    assert (found.cold_starts, found.node_starts, found.most_replicas) == (1, 1, 1)
    assert [(moment.ready, moment.starting) for moment in found.timeline[:2]] == [(0, 0), (0, 1)]


def test_no_jobs_are_no_plan() -> None:
    with pytest.raises(InvalidValue, match="no jobs"):
        plan(Recorded([]), ALWAYS_ON)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_replicas": 0}, "max_replicas=0"),
        ({"headroom": -1.0}, "headroom"),
        ({"node_start_s": 200.0}, "node_start_s is 200; it is a part of startup_s"),
        ({"look_ahead_s": math.nan}, "look_ahead_s is nan"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        ClusterSettings(**wrong)  # type: ignore[arg-type]


# ---- the cheapest that meets a target


def test_a_sweep_finds_the_cheapest_that_meets_the_target() -> None:
    mix = Mix([COSTS.kind(type) for type in JobType], 120.0, 150)
    axes = axes_of(["min_replicas=0,1,2", "max_replicas=2,8"])
    plans = sweep(mix, combinations(ClusterSettings(price_per_hour=1.0), axes))
    assert [(p.settings.min_replicas, p.settings.max_replicas) for p in plans] == [
        (0, 2),
        (0, 8),
        (1, 2),
        (1, 8),
        (2, 2),
        (2, 8),
    ]
    assert plans[3] == plan(mix, ClusterSettings(min_replicas=1, max_replicas=8, price_per_hour=1.0))
    shares = sorted({one.on_time for one in plans})
    assert len(shares) > 2
    target = shares[len(shares) // 2]
    best = cheapest(plans, target)
    assert best is not None
    assert best.on_time >= target
    assert all(one.cost >= best.cost for one in plans if one.on_time >= target)
    assert cheapest(plans, 1.01) is None


@pytest.mark.parametrize("text", ["speed=1", "max_replicas=", "max_replicas=1.5", "headroom=much"])
def test_a_sweep_over_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidValue, match=text.partition("=")[0]):
        axes_of([text])


# ---- the command


def test_the_command_reads_the_production_file_and_writes_all_it_found(tmp_path: Path) -> None:
    name, model, settings = read_config(Path("serve_config.yaml"), None)
    assert (name, model.reference_card) == ("wan-1.3b", "RTX 4090")
    assert (settings["startup_s"], settings["max_replicas"], settings["look_ahead_s"]) == (180, 8, 120.0)
    record, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = [
        "plan",
        "--config",
        "serve_config.yaml",
        "--jobs",
        "200",
        "--max-replicas",
        "5",
        "--price-per-hour",
        "0.4",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", str(record), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    best = json.loads(record.read_text())["best"]
    assert best["jobs"] == 200
    assert (best["settings"]["max_replicas"], best["settings"]["headroom"]) == (5, 0.25)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "in time" in done.output


def test_a_config_of_several_models_tells_card_and_price_of_each(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    large = {"architecture": "14B", "reference_card": "H100", "gpu_price_per_hour": 2.5}
    deployment = {"name": "Generator-large", "autoscaling_config": {"min_replicas": 0, "max_replicas": 3}}
    application = {"args": {"models": {"wan-1.3b": {}, "large": large}}, "deployments": [deployment]}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    name, model, settings = read_config(path, "large")
    assert (name, model.architecture, model.reference_card) == ("large", "14B", "H100")
    assert (settings["price_per_hour"], settings["max_replicas"]) == (2.5, 3)
    with pytest.raises(InvalidValue, match="no autoscaling_config for the deployment Generator"):
        read_config(path, None)
    with pytest.raises(InvalidValue, match="no model 'small'; it has large"):
        read_config(path, "small")
    large["reference_card"] = "GTX"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.raises(InvalidValue, match=r"models\.large\.reference_card.*'GTX'"):
        read_config(path, "large")


def test_the_command_sweeps_marks_the_best_and_draws_all(tmp_path: Path) -> None:
    record, picture = tmp_path / "plans.json", tmp_path / "plans.svg"
    arguments = ["plan", "--jobs", "60", "--sweep", "max_replicas=1,8", "--target", "0.9"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(record), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    found = json.loads(record.read_text())
    assert [one["settings"]["max_replicas"] for one in found["plans"]] == [1, 8]
    meeting = [one for one in found["plans"] if one["on_time"] >= 0.9]
    assert found["best"] == min(meeting, key=lambda one: one["node_hours"])
    assert "</svg>" in picture.read_text()


def test_a_missed_target_is_an_exit_code() -> None:
    done = CliRunner().invoke(app, ["plan", "--jobs", "50", "--min-replicas", "0", "--load", "0.1", "--target", "1"])
    assert done.exit_code == 1
    assert "target is missed" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--card", "GTX"], "--card is 'GTX'"),
        (["--mix", "film=1"], "'film'"),
        (["--mix", "image_fast=0"], "weights must be"),
        (["--history"], "needs the store's address"),
        (["--trace", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["--config", "README.md"], "README.md"),
    ],
)
def test_wrong_calls_say_what_is_wrong(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAN_SERVE_STORE_URL", raising=False)
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(done.exception, InvalidValue)
    assert said in done.exception.message

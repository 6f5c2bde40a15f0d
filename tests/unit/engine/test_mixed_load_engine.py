"""The benchmark of a real engine, scaled down: that it measures what it says, keeps to its budget and leaves a record."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import engine_stages, mixed_load_engine
from benchmarks.driven_engine import Heard
from benchmarks.mixed_load import MIX, kinds_on
from benchmarks.mixed_load_engine import Options, known_outcomes, run, stream
from serve_app.engine.clip import ClipDone, ClipFailed, ClipReceipt, ClipStarted
from serve_app.errors import LatentsNotFinite
from serve_app.jobs.presets import JobType
from serve_app.scheduling.workload import SimulatedJob

RECEIPT = ClipReceipt(
    model="m", model_revision=None, trained=False, profile="exact", device="cpu", dtype="float32", seed=0, steps=2,
    gpu_s=0.5, step_ms=1.0, decode_ms=1.0,
)  # fmt: skip


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        tiny=True,
        budget_s=270.0,  # far more than it takes; a budget that ends the run has its own test
        load=0.95,
        types=[JobType.IMAGE_FAST, JobType.VIDEO_FAST],
        warm_up=[],
        steps_scale=0.1,
        skip_batches=False,
        seed=0,
        out=tmp_path / "record",
    )


def test_every_measurement_is_made_and_written(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_load_engine, "decks_within", lambda *_: 1)  # not as many as the budget holds
    monkeypatch.setattr(engine_stages, "_BUSY_SHARE_OF_BUDGET", 0.003)
    monkeypatch.setattr(engine_stages, "_TRIALS", 2)
    results = run(options, time.monotonic())
    record = json.loads(options.out.with_suffix(".json").read_text())
    assert record["ended"] == results.ended == "complete"
    assert options.out.with_suffix(".png").stat().st_size > 0

    assert record["alone"].keys() == {"image_fast", "video_fast"}
    for name, alone in record["alone"].items():
        assert alone["unloaded_s"] >= alone["steps"] * 0.5 * alone["step_s"] > 0
        assert alone["promised_s"] > alone["unloaded_s"], name
    assert record["alone"]["video_fast"]["latent_frames"] > 1

    found = record["responsiveness"]
    assert (found["video"], found["picture"], len(found["trials"])) == ("video_fast", "image_fast", 2)
    for trial in found["trials"]:
        assert 0 < trial["picture_started_s"] < trial["picture_first_step_s"] < trial["picture_done_s"]
        assert trial["freed_s"] > 0

    assert 0 < record["busy"]["share"] <= 1
    assert record["busy"]["device_s"] == pytest.approx(record["busy"]["share"] * record["busy"]["wall_s"])
    assert record["busy"]["driver_share"] is None, "there is no GPU whose driver could say"

    runs = {(each["policy"], each["simulated"]): each for each in record["replays"]}
    assert len(runs) == len(record["replays"]) == 4
    for each in runs.values():
        assert {name: fared["jobs"] for name, fared in each["types"].items()} == {"image_fast": 5, "video_fast": 2}
        assert each["cut"] == 0


def test_a_spent_budget_ends_the_run_with_a_record(options: Options) -> None:
    results = run(replace(options, budget_s=3.5), time.monotonic() - 10)
    record = json.loads(options.out.with_suffix(".json").read_text())
    assert record["ended"] == results.ended == "budget spent"
    assert record["replays"] == []


def test_a_short_stream_has_exactly_the_mix_and_the_load() -> None:
    kinds = kinds_on("RTX 4090")
    jobs = stream(kinds, load=0.8, decks=3, seed=1)
    assert {kind: sum(job.kind == kind for job in jobs) for kind in MIX} == {
        kind: 3 * weight // 10 for kind, weight in MIX.items()
    }
    assert sum(job.work_s for job in jobs) / jobs[-1].arrived_at == pytest.approx(0.8)
    assert [job.arrived_at for job in jobs] == sorted(job.arrived_at for job in jobs)
    promised = {kind.name: kind.promised_s for kind in kinds}
    assert all(job.deadline - job.arrived_at == pytest.approx(promised[job.kind]) for job in jobs)


def test_of_a_replay_that_is_cut_only_known_fates_count() -> None:
    zero = time.monotonic() - 100
    kind = kinds_on("RTX 4090")[0]

    def job(number: int, deadline: float) -> SimulatedJob:
        return SimulatedJob(str(number), kind.name, 1.0, deadline, kind.phases)

    done, late, undecided = Heard("0"), Heard("1"), Heard("2")
    for heard in (done, late):
        heard(ClipStarted(heard.clip_id))
    done(ClipDone("0", np.zeros((1, 2, 2, 3), np.uint8), RECEIPT))
    heard = [(job(0, 1000.0), done), (job(1, 50.0), late), (job(2, 1000.0), undecided)]
    outcomes = known_outcomes(heard, zero)
    assert [(outcome.job.job_id, outcome.on_time) for outcome in outcomes] == [("0", True), ("1", False)]

    undecided(ClipFailed("2", LatentsNotFinite("NaN"), 0.1))
    with pytest.raises(LatentsNotFinite):
        known_outcomes(heard, zero)

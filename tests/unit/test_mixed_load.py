"""The figures that the step policy was made for, on a stream of the usual mix (virtual clock, so never a matter of timing)."""

import math
import statistics

import pytest

from benchmarks.mixed_load import MIX, Run, kinds_on, replay
from serve_app.scheduling.cost import CARDS, WAN_1_3B, clip_gpu_s
from serve_app.scheduling.workload import poisson


def run(policy: str, seed: int, jobs: int = 3000, look_ahead_s: float = math.inf) -> Run:
    return replay(policy, 0.95, seed, card="RTX 4090", gpus=1, jobs=jobs, look_ahead_s=look_ahead_s)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [run("wan-serve", seed) for seed in range(3)]


def test_at_95_percent_load_95_percent_are_on_time_and_80_percent_of_each_type(runs: list[Run]) -> None:
    assert statistics.median(r.on_time for r in runs) >= 0.95
    for kind in MIX:
        assert statistics.median(r.types[kind.value].on_time for r in runs) >= 0.80


def test_a_picture_hardly_feels_the_videos(runs: list[Run]) -> None:
    alone_s = kinds_on("RTX 4090")[0].work_s
    assert statistics.median(r.types["image_fast"].p95_s for r in runs) <= 3 * alone_s


def test_a_plain_queue_misses_most_deadlines_on_the_same_stream() -> None:
    assert run("first come first served", 0).on_time < 0.4


def test_claiming_a_little_ahead_keeps_the_deadlines_too() -> None:
    """Late jobs in the store and at the replica must not hold up those that can be on time."""
    assert run("wan-serve", 0, jobs=1500, look_ahead_s=30.0).on_time >= 0.95


def test_the_kinds_cost_what_the_cost_model_says() -> None:
    video_high = kinds_on("H100")[3]
    assert video_high.work_s == pytest.approx(
        clip_gpu_s(CARDS["H100"], WAN_1_3B, width=640, height=480, frames=81, steps=40)
    )


def test_a_stream_has_the_load_and_the_mix_that_were_asked_for() -> None:
    jobs = list(poisson(kinds_on("RTX 4090"), load=0.8, jobs=40_000, seed=1, replicas=4))
    assert sum(job.work_s for job in jobs) / (4 * jobs[-1].arrived_at) == pytest.approx(0.8, rel=0.03)
    assert sum(job.kind == "image_high" for job in jobs) / len(jobs) == pytest.approx(0.2, rel=0.03)
    assert jobs == list(poisson(kinds_on("RTX 4090"), load=0.8, jobs=40_000, seed=1, replicas=4))

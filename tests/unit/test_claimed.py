"""Where claimed work is, read off what replicas report and what the store says of jobs."""

from serve_app.jobs.claimed import claimed_work
from serve_app.jobs.job import Stage
from serve_app.jobs.replica import ClipReport, ReplicaReport
from serve_app.jobs.store import JobWork
from serve_app.scheduling.claim import Outstanding


def job(
    id: str, *, model: str = "small", clips: int = 1, made: int = 0, stage: Stage | None = Stage.GENERATING
) -> JobWork:
    return JobWork(id, model, clips, 100.0, estimated_gpu_s=12.0, stage=stage, clips_to_make=clips - made)


def replica(*held: tuple[str, float], model: str = "small") -> ReplicaReport:
    clips = [
        ClipReport(clip_id=f"{id}.1.0-1", job_id=id, deadline=100.0, step=1, steps=4, remaining_s=remaining_s)
        for id, remaining_s in held
    ]
    return ReplicaReport(id="r", node="n", device="cpu", model=model, source="here", trained=False, clips=clips)


def test_each_replica_has_what_it_reports_and_idle_ones_count() -> None:
    work = claimed_work("small", [replica(("a", 3.0), ("b", 5.0)), replica()], [job("a"), job("b")])
    assert work.replicas == [[Outstanding(100.0, 3.0), Outstanding(100.0, 5.0)], []]
    assert work.unplaced == []


def test_a_job_that_no_replica_reports_waits_with_all_its_clips() -> None:
    work = claimed_work("small", [replica()], [job("a", clips=3, stage=None)])
    assert work.unplaced == [Outstanding(100.0, 4.0)] * 3


def test_clips_of_one_job_wait_beside_those_that_replicas_have_and_those_that_are_made() -> None:
    work = claimed_work("small", [replica(("a", 3.0)), replica(("a", 1.0))], [job("a", clips=6, made=1)])
    assert work.replicas == [[Outstanding(100.0, 3.0)], [Outstanding(100.0, 1.0)]]
    assert work.unplaced == [Outstanding(100.0, 2.0)] * 3


def test_what_is_made_or_ended_is_no_work() -> None:
    work = claimed_work("small", [replica(("made", 1.0), ("ended", 1.0))], [job("made", stage=Stage.FINISHING)])
    assert (work.replicas, work.unplaced) == ([[]], [])


def test_other_models_are_left_out() -> None:
    work = claimed_work("small", [replica(("a", 1.0), model="large")], [job("a", model="large"), job("b")])
    assert (work.replicas, work.unplaced) == ([], [Outstanding(100.0, 12.0)])

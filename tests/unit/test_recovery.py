"""What follows a failure."""

import pytest

from serve_app.errors import (
    GpuOutOfMemory,
    LatentsNotFinite,
    MediaError,
    ReplicaDraining,
    ReplicaLost,
    StorageError,
    StorageUnavailable,
    UnusableOutput,
    WanServeError,
)
from serve_app.jobs.job import Job
from serve_app.jobs.presets import JobType
from serve_app.jobs.recovery import MAX_BACKOFF_S, NextTry, next_try
from tests.factories import make_job, make_spec


def follow(error: WanServeError, job: Job | None = None, attempt: int = 1, max_attempts: int = 3) -> NextTry | None:
    return next_try(error, job or make_job(), attempt=attempt, max_attempts=max_attempts, draw=lambda: 0.5)


def test_retryable_errors_wait_longer_each_time_and_end() -> None:
    delays = [follow(ReplicaLost("x"), attempt=n, max_attempts=9) for n in range(1, 9)]
    assert [move.delay_s for move in delays if move] == [1, 2, 4, 8, 16, MAX_BACKOFF_S, MAX_BACKOFF_S, MAX_BACKOFF_S]
    assert follow(ReplicaLost("x"), attempt=3) is None
    assert follow(StorageUnavailable("x"), attempt=2) == NextTry(2.0)


def test_backoff_is_spread() -> None:
    low = next_try(ReplicaLost("x"), make_job(), attempt=1, max_attempts=3, draw=lambda: 0.0)
    high = next_try(ReplicaLost("x"), make_job(), attempt=1, max_attempts=3, draw=lambda: 1.0)
    assert (low, high) == (NextTry(0.5), NextTry(1.5))


@pytest.mark.parametrize(
    "error", [StorageError("wrong key"), MediaError("x"), LatentsNotFinite("nan"), WanServeError("x")]
)
def test_what_cannot_pass_is_not_tried_again(error: WanServeError) -> None:
    assert follow(error) is None


def test_a_draining_replica_is_nobodys_fault() -> None:
    assert follow(ReplicaDraining("x"), attempt=3) == NextTry(0.0, counts=False)


@pytest.mark.parametrize("error", [GpuOutOfMemory("12 GB"), LatentsNotFinite("step 3"), UnusableOutput("black")])
def test_the_less_stable_size_falls_back_once(error: WanServeError) -> None:
    job = make_job(spec=make_spec(JobType.IMAGE_HIGH))
    move = follow(error, job, attempt=3)
    assert move is not None
    assert move.degraded is not None
    assert error.message in move.degraded
    assert "832*480" in move.degraded
    assert not move.counts
    job.degraded = move.degraded
    again = follow(error, job, attempt=1)
    assert again is None or again.degraded is None

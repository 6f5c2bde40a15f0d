"""Where the claimed work of a model is: what each replica holds, and what no replica reports yet."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.jobs.job import Stage
from serve_app.jobs.replica import ReplicaReport
from serve_app.jobs.store import JobWork
from serve_app.scheduling.claim import Outstanding


@dataclass(frozen=True)
class ClaimedWork:
    """Clips that are claimed and not yet made."""

    replicas: list[list[Outstanding]]
    """What each replica holds, in the order of their reports."""
    unplaced: list[Outstanding]
    """Clips that no replica reports: on their way, or waiting for room or for a first replica."""


def claimed_work(model: str, reports: Sequence[ReplicaReport], running: Sequence[JobWork]) -> ClaimedWork:
    """The claimed work of one model, by its replicas' `reports` and the jobs that are under way, of any model.

    A clip that a replica still reports after its job has ended, or while it is being finished, is no work.
    """
    generating = [job for job in running if job.model == model and job.stage in (None, Stage.GENERATING)]
    ids = {job.id for job in generating}
    held = [[clip for clip in report.clips if clip.job_id in ids] for report in reports if report.model == model]
    placed = Counter(clip.job_id for clips in held for clip in clips)
    return ClaimedWork(
        [[Outstanding(clip.deadline, clip.remaining_s) for clip in clips] for clips in held],
        [clip for job in generating for clip in job.outstanding(max(0, job.clips_to_make - placed[job.id]))],
    )

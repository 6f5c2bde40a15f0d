"""What a conductor tells of a job's progress."""

import time

from deployments.drive import ClipDrive, Drive
from serve_app.jobs.job import Progress, StageProgress
from serve_app.jobs.store import Lease
from tests.factories import make_spec


def drive() -> Drive:
    clips = [ClipDrive(index, shot) for index, shot in enumerate(make_spec(sample_steps=4).clips)]
    clips[0].step, clips[0].eta_s = 4, 0.0
    return Drive(Lease("job", 1), clips)


def test_the_finishers_progress_stands_beside_the_steps() -> None:
    driven = drive()
    assert driven.progress() == Progress(step=4, steps=4, eta_s=0.0)
    driven.enter_stage()
    driven.stage = StageProgress(unit="frames", done=0, total=40)
    assert driven.progress() == Progress(step=4, steps=4, eta_s=None, stage=driven.stage)


def test_time_left_is_by_the_stages_own_pace() -> None:
    driven = drive()
    driven.enter_stage()
    driven.stage_since = time.monotonic() - 20.0
    driven.stage = StageProgress(unit="frames", done=10, total=40)
    eta_s = driven.progress().eta_s
    assert eta_s is not None
    assert 60.0 <= eta_s < 61.0
    driven.enter_stage()
    assert driven.progress() == Progress(step=4, steps=4, eta_s=0.0)

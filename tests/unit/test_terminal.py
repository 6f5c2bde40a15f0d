"""What the command line's bars show of a job's events."""

from typing import Any

from rich.progress import Progress, Task

from serve_app.jobs.job import JobEvent
from serve_app.terminal import _show


def shown(*events: tuple[str, dict[str, Any]]) -> Task:
    bars = Progress()
    task = bars.add_task("video_fast", total=25, doing="queued", steps="", left="")
    for name, data in events:
        _show(bars, task, JobEvent(id="1-0", name=name, data=data))
    return bars.tasks[0]


STEPS = {"step": 25, "steps": 25, "eta_s": 0.0, "stage": None}


def test_steps() -> None:
    bar = shown(("running", {}), ("progress", STEPS | {"step": 12, "eta_s": 8.4}))
    assert (bar.completed, bar.total, bar.fields["steps"], bar.fields["left"]) == (12, 25, "step 12 of 25", "8 s left")


def test_an_older_services_event_has_no_stage() -> None:
    assert shown(("progress", {"step": 12, "steps": 25, "eta_s": None})).fields["steps"] == "step 12 of 25"


def test_frames_and_bytes() -> None:
    frames = {"unit": "frames", "done": 24, "total": 81}
    bar = shown(("stage", {"stage": "finishing"}), ("progress", STEPS | {"eta_s": 30.0, "stage": frames}))
    assert (bar.fields["doing"], bar.completed, bar.total) == ("finishing", 24, 81)
    assert (bar.fields["steps"], bar.fields["left"]) == ("frame 24 of 81", "30 s left")
    sent = {"unit": "bytes", "done": 3_200_000, "total": 14_700_000}
    bar = shown(("stage", {"stage": "uploading"}), ("progress", STEPS | {"stage": sent}))
    assert (bar.fields["steps"], bar.completed, bar.total) == ("3.2 MB of 14.7 MB", 3_200_000, 14_700_000)

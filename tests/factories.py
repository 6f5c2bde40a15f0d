"""Small valid objects for tests."""

import time
from typing import Any

from serve_app.jobs.job import Job, JobSpec, new_job_id
from serve_app.jobs.presets import PRESETS, JobType


def make_spec(type: JobType = JobType.IMAGE_FAST, **changes: Any) -> JobSpec:
    preset = PRESETS[type]
    values: dict[str, Any] = {
        "type": type,
        "prompt": "a red circle on a white table",
        "negative_prompt": "",
        "resolution": preset.resolution,
        "video_length": preset.video_length,
        "sample_steps": preset.sample_steps,
        "guidance_scale": preset.guidance_scale,
        "sample_shift": preset.sample_shift,
        "seed": 1,
    }
    return JobSpec(**(values | changes))


def make_job(
    owner: str = "anonymous", *, deadline_in_s: float = 30.0, spec: JobSpec | None = None, **changes: Any
) -> Job:
    now = time.time()
    values: dict[str, Any] = {
        "id": new_job_id(), "owner": owner, "spec": spec or make_spec(), "created_at": now, "deadline": now + deadline_in_s,
        "estimated_gpu_s": 2.0,
    }  # fmt: skip
    return Job(**(values | changes))

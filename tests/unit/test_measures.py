"""What is counted of jobs that ended: the pure part. The rest is in tests/cluster/test_watching.py."""

import pytest

from deployments.measures import gpu_seconds
from serve_app.jobs.job import JobStatus
from serve_app.settings import ModelSettings
from tests.factories import make_job


@pytest.mark.parametrize(
    ("outcome", "billed", "wasted"),
    [(JobStatus.SUCCEEDED, 10.0, 2.0), (JobStatus.CANCELLED, 10.0, 2.0), (JobStatus.FAILED, 0.0, 12.0)],
)
def test_who_pays(outcome: JobStatus, billed: float, wasted: float) -> None:
    assert gpu_seconds(make_job(wasted_gpu_s=2.0), outcome, 10.0) == {"billed": billed, "wasted": wasted}


def test_cost() -> None:
    assert ModelSettings(gpu_price_per_hour=0.4).cost_of(1800.0) == pytest.approx(0.2)
    assert ModelSettings(gpu_price_per_hour=0.0).cost_of(1800.0) == 0.0
    assert ModelSettings().cost_of(1800.0) is None

"""What ops see of a real run: metrics as Prometheus scrapes them, logs that name their job, the job's trace."""

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments import metrics
from serve_app.api.schemas import JobView
from serve_app.client import Client
from serve_app.jobs.job import JobStatus
from serve_app.jobs.store import JobStore
from serve_app.top import Now, look
from serve_app.up import load_config
from tests.cluster.conftest import PRICE
from tests.cluster.running_service import RunningService
from tests.otlp_receiver import OtlpReceiver, Received

STEPS = 3
ONLY_IN_TROUBLE = {metrics.PREEMPTIONS, metrics.CHECKPOINT_FAILURES}
TEXTS = {"prompt": "a kite over the dunes, seen by nobody before"}

Series = dict[str, list[tuple[dict[str, str], float]]]


def scrape(service: RunningService) -> Series:
    """Each of the service's own series, by its exported name."""
    (file,) = (service.config.parent / "data" / "ray" / "session_latest").glob("metrics_export_port_*")
    text = httpx.get(f"http://127.0.0.1:{file.read_text()}/metrics", timeout=10).text
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_wan_serve_"):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(series: Series, name: str, **labels: str) -> float:
    return sum(value for its, value in series.get(f"ray_wan_serve_{name}", []) if labels.items() <= its.items())


def wait_for(what: Callable[[], bool], *, up_to_s: float) -> None:
    give_up_at = time.monotonic() + up_to_s
    while not what():
        assert time.monotonic() < give_up_at, f"not so within {up_to_s} s"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def before(service: RunningService) -> Series:
    return scrape(service)


@pytest.fixture(scope="module")
def job(service: RunningService, before: Series) -> JobView:
    with Client(service.url) as client:
        job = client.wait(client.submit(TEXTS["prompt"], "image_fast", sample_steps=STEPS).id)
    assert job.status == JobStatus.SUCCEEDED, job.error
    return job


def test_a_job_is_in_the_numbers(service: RunningService, before: Series, job: JobView) -> None:
    def grown(name: str, **labels: str) -> float:
        return total(now, name, **labels) - total(before, name, **labels)

    of, last = {"type": "image_fast", "model": "wan-1.3b"}, "upload_seconds_count"
    wait_for(lambda: total(scrape(service), last) > total(before, last), up_to_s=20)
    time.sleep(4)  # the other processes' turn to export
    now = scrape(service)
    assert grown("jobs_total", **of, outcome="succeeded") == 1
    assert grown("jobs_total", **of) == 1
    assert grown("deadlines_total", **of) == 1
    assert job.finished_at is not None
    assert grown("jobs_took_seconds_total", **of) == pytest.approx(
        (job.finished_at - job.created_at).total_seconds(), abs=0.5
    )
    assert grown("gpu_seconds_total", **of, use="billed") == pytest.approx(job.gpu_s, rel=0.01)
    assert grown("jobs_cost_total", **of, use="billed") == pytest.approx(job.gpu_s * PRICE / 3600, rel=0.01)
    assert grown("step_milliseconds_count", model="wan-1.3b", shape="640x480x1") == STEPS
    assert grown("decode_seconds_count", model="wan-1.3b", shape="640x480x1") == 1
    assert grown("encode_seconds_count", type="image_fast") == 1
    assert grown("prompt_embeds_total", cache="miss") >= 1
    assert grown("gpu_busy_seconds_total") >= 0.9 * job.gpu_s
    assert grown("gpu_held_seconds_total") >= grown("gpu_busy_seconds_total")
    assert grown("replicas_cost_total") == pytest.approx(grown("gpu_held_seconds_total") * PRICE / 3600, rel=0.01)
    assert {labels["deployment"] for labels, value in now["ray_wan_serve_up"] if value == 1} == {
        "Ingress",
        "Conductor",
        "Generator",
    }
    assert total(now, "replicas", model="wan-1.3b") == 1
    for metric in metrics.ALL:
        if metric not in ONLY_IN_TROUBLE:
            assert set(metric.exported) <= now.keys(), metric.name
    assert now.keys() <= {name for metric in metrics.ALL for name in metric.exported}


def test_a_job_under_way_is_seen_and_its_end_is_counted(service: RunningService, client: Client) -> None:
    before = scrape(service)
    settings = load_config(service.config)[1]
    job = client.submit("a slow river", "video_high", sample_steps=100)

    async def now() -> Now:
        store = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
        try:
            return await look(store, settings)
        finally:
            await store.close()

    def is_running() -> bool:
        (replica,) = asyncio.run(now()).replicas
        return replica.running is not None and replica.running.startswith(job.id) and replica.clips[0].step > 0

    wait_for(is_running, up_to_s=30)
    (model,) = asyncio.run(now()).models
    assert (model.running, model.replicas, model.cost_per_hour) == (1, 1, PRICE)
    wait_for(lambda: total(scrape(service), "running_jobs", model="wan-1.3b") == 1, up_to_s=10)
    client.cancel(job.id)
    assert client.wait(job.id).status == JobStatus.CANCELLED
    ended = {"type": "video_high", "outcome": "cancelled"}
    wait_for(
        lambda: total(scrape(service), "jobs_total", **ended) == total(before, "jobs_total", **ended) + 1, up_to_s=10
    )
    assert total(scrape(service), "deadlines_total") == total(before, "deadlines_total"), "only what succeeded"


def test_every_part_logs_the_job_with_its_id(service: RunningService, job: JobView) -> None:
    folder = service.config.parent / "data" / "ray" / "session_latest" / "logs" / "serve"
    said: dict[str, list[str]] = {}
    for file in folder.glob("replica_wan-serve_*.log"):
        for record in map(json.loads, file.read_text().splitlines()):
            if record.get("job_id") == job.id:
                said.setdefault(record["deployment"], []).append(record["message"])
    assert said.keys() == {f"wan-serve_{part}" for part in ("Ingress", "Conductor", "Generator", "Finisher")}
    assert any("succeeded after" in message for message in said["wan-serve_Conductor"])


def test_a_job_is_one_trace_over_all_deployments(collector: OtlpReceiver, job: JobView) -> None:
    def spans() -> list[Received]:
        (submit,) = [
            span
            for span in collector.spans
            if span.name == "submit" and span.attributes.get("wan_serve.job_id") == job.id
        ]
        return [span for span in collector.spans if span.trace_id == submit.trace_id]

    wait_for(lambda: {"job", "upload", "clip"} <= {span.name for span in spans()}, up_to_s=10)
    found = spans()
    parts = {span.name: span.part for span in found}
    assert parts == {
        "submit": "Ingress",
        **dict.fromkeys(("job", "queued", "generating", "finishing", "uploading"), "Conductor"),
        **dict.fromkeys(("clip", "waiting", "text", "denoise", "decode"), "Generator"),
        **dict.fromkeys(("encode", "upload"), "Finisher"),
    }
    by_id = {span.span_id: span for span in found}
    parents = {span.name: by_id[span.parent_id].name for span in found if span.parent_id}
    assert parents["job"] == "submit"
    assert parents["clip"] == "generating"
    assert parents["encode"] == parents["upload"] == "finishing"
    assert {name for name in parents if parents[name] == "job"} == {"queued", "generating", "finishing", "uploading"}
    by_name = {span.name: span for span in found}
    assert not [span for span in found if span.failed], "nothing failed"
    assert by_name["job"].attributes["wan_serve.outcome"] == "succeeded"
    order = [by_name[name] for name in ("queued", "generating", "finishing", "uploading")]
    assert [span.start_ns for span in order] == sorted(span.start_ns for span in order)
    assert all(by_name["job"].start_ns <= span.start_ns <= span.end_ns <= by_name["job"].end_ns for span in order)

"""Load comes and nodes come with it; load goes and they go; what dies or is replaced meanwhile loses nothing.

Ray's real node autoscaler, real nodes with pretended cards, paced generators: these tests are about who comes, who goes and what is
lost, and say nothing of speed.
"""

import time
from collections.abc import Iterator

import pytest

from serve_app.api.schemas import JobView
from serve_app.client import Client
from serve_app.jobs.job import JobStatus
from tests.cluster.elastic.elastic import ElasticFleet
from tests.cluster.fleet.fleet import until

pytestmark = pytest.mark.timeout(900)

VIDEO_S = 35.0
"""GPU-seconds of a video_fast on an RTX 4090, about (scheduling/cost.py)."""
PACE = 8.0
MIX = ("image_fast", "video_fast", "image_high", "video_fast")


@pytest.fixture(scope="module")
def fleet() -> Iterator[ElasticFleet]:
    """Idle at first: no GPU node, no generator."""
    rules = {"target_drain_s": 2 * VIDEO_S, "startup_s": 15.0, "downscale_delay_s": 15.0, "headroom": 0.2}
    with ElasticFleet(rules=rules, paced=PACE) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: ElasticFleet) -> Iterator[Client]:
    with Client(fleet.url) as client:
        yield client


def submit_mix(client: Client, count: int) -> list[str]:
    return [client.submit("a red circle", MIX[n % len(MIX)]).id for n in range(count)]


def ends(client: Client, job_ids: list[str]) -> list[JobView]:
    return [client.wait(job_id) for job_id in job_ids]


def assert_nothing_was_lost(jobs: list[JobView]) -> None:
    assert [job.status for job in jobs] == [JobStatus.SUCCEEDED] * len(jobs), [job.error for job in jobs]
    for job in jobs:
        assert job.receipt is not None
        assert job.receipt["paced"]
        assert job.notice is not None
        assert "no model ran" in job.notice


def test_nodes_come_with_the_load_and_go_with_it(fleet: ElasticFleet, client: Client) -> None:
    assert (fleet.gpu_nodes(), fleet.replicas("Generator")) == ([], [])
    jobs = submit_mix(client, 16)
    until(lambda: len(fleet.replicas("Generator")) >= 2, "more than one generator, on nodes of their own")
    assert len(fleet.gpu_nodes()) >= 2
    assert_nothing_was_lost(ends(client, jobs))
    until(lambda: not fleet.replicas("Generator"), "no generator once nothing is to do")
    until(lambda: not fleet.gpu_nodes(), "no GPU node once it has no generator")
    notes = fleet.scaling_notes()
    assert notes[0].had == 0
    assert max(note.wanted for note in notes) >= 2
    assert notes[-1].wanted == 0
    assert all(note.reason for note in notes)


def test_from_zero_again_and_a_node_that_dies_takes_nothing_with_it(fleet: ElasticFleet, client: Client) -> None:
    until(lambda: not fleet.gpu_nodes(), "no GPU node")
    jobs = submit_mix(client, 12)
    busy = until(lambda: next(filter(None, map(fleet.node_of, jobs)), None), "a generator at work")
    fleet.kill_node(busy)
    until(lambda: busy not in fleet.gpu_nodes(), "the node being missed")
    done = ends(client, jobs)
    assert_nothing_was_lost(done)
    assert any(job.failures for job in done), "the node took nothing with it"


def test_a_release_under_load_loses_nothing(fleet: ElasticFleet, client: Client) -> None:
    jobs = submit_mix(client, 8)
    until(lambda: any(map(fleet.node_of, jobs)), "a generator at work")
    before = {replica.pid for replica in fleet.replicas()}
    fleet.deploy(max_prompt_chars=1999)
    jobs += submit_mix(client, 4)
    assert_nothing_was_lost(ends(client, jobs))
    assert before.isdisjoint(replica.pid for replica in fleet.replicas())


def test_without_the_store_serves_own_policy_decides_and_no_job_is_lost(fleet: ElasticFleet, client: Client) -> None:
    jobs = submit_mix(client, 8)
    until(lambda: any(map(fleet.node_of, jobs)), "a generator at work")
    fleet.kill_store()
    time.sleep(12)  # longer than the policy believes what it knew
    fleet.start_store()
    assert_nothing_was_lost(ends(client, jobs))

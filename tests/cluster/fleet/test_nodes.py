"""What a cluster of several machines goes through: a node dies, Ray's control plane is away, releases and scale-downs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from serve_app.client import Client
from serve_app.jobs.job import JobStatus
from tests.cluster.fleet.audit import Audit, Facts, audit, job_ids, settle
from tests.cluster.fleet.fleet import Fleet, until
from tests.cluster.fleet.load import Load, Order

pytestmark = pytest.mark.timeout(900)  # seconds on a quiet machine; each wait inside has its own end

LONG = {"type": "video_fast", "prompt": "a slow river", "sample_steps": 60, "video_length": 9}


@contextmanager
def loaded(fleet: Fleet, references: dict[Order, Facts], found: Audit) -> Iterator[Load]:
    """Three users at work while the block lasts; then `found` says what became of their jobs."""
    known = job_ids(fleet)
    with Load(fleet.url, users=3, seed=1) as load:
        until(lambda: len(load.accepted) > 3, "the load at work")
        yield load
        sent = len(load.accepted)
        until(lambda: len(load.accepted) > sent, "the load at work after it")
    settle(fleet, patience_s=120)
    found.__dict__ |= vars(audit(fleet, load.accepted, references, known))


def assert_all_succeeded(found: Audit) -> None:
    assert found.accepted > 0
    assert found.broken == []
    assert found.succeeded == found.accepted, [story.job.failures for story in found.stories if story.job.error]


def holder(fleet: Fleet, client: Client, job_id: str) -> str:
    """The node whose generator has made steps of the job."""
    for event in client.events(job_id):
        if event.name == "progress" and event.data["step"] > 2:
            break
    node = until(lambda: fleet.node_of(job_id), "a generator that reports the job")
    assert isinstance(node, str)
    return node


def test_a_node_dies_with_the_generator_of_a_job(fleet: Fleet) -> None:
    with Client(fleet.url) as client:
        job = client.submit(**LONG)
        fleet.kill_node(holder(fleet, client, job.id))
        done = client.wait(job.id)
        fleet.start_node()
        names = [event.name for event in client.events(job.id)]
    assert done.status == JobStatus.SUCCEEDED, done.error
    assert "retry" in names or names.count("running") > 1, "the node took nothing with it"


# With the fleet whole: with Ray 2.60, replicas that were being placed when the GCS died were seen to wait for minutes,
# unplaced, after it was back. Why is not known.
def test_the_control_plane_is_away_and_comes_back(fleet: Fleet) -> None:
    with Client(fleet.url) as client:
        ids = [client.submit(**LONG).id for _ in range(3)]
        until(lambda: client.get(ids[0]).progress.step > 0, "the first job at work")
        fleet.kill_gcs()
        first = client.wait(ids[0])  # nothing that runs needs it
        fleet.start_gcs()
        ends = [first, *(client.wait(job_id) for job_id in ids[1:])]
    assert [job.status for job in ends] == [JobStatus.SUCCEEDED] * 3, [job.error for job in ends]


def test_a_release_under_load_loses_and_fails_nothing(fleet: Fleet, references: dict[Order, Facts]) -> None:
    before = {replica.pid for replica in fleet.replicas()}
    found = Audit()
    with loaded(fleet, references, found):
        fleet.deploy(max_prompt_chars=1999)
    assert before.isdisjoint(replica.pid for replica in fleet.replicas())
    assert_all_succeeded(found)


def test_scaling_down_under_load_fails_nothing(fleet: Fleet, references: dict[Order, Facts]) -> None:
    found = Audit()
    with loaded(fleet, references, found):
        fleet.deploy(generators=1)
        until(lambda: len(fleet.replicas("Generator")) == 1, "one generator")
    assert_all_succeeded(found)
    for story in found.stories:
        assert "replica_lost" not in {failure.code for failure in story.job.failures}

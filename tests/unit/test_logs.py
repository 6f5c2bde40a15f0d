"""Log records that carry their job's id, in the form of the logger whose handlers they use."""

import json
import logging
import threading
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter

from serve_app import logs

JOB, OTHER = "0199f2f0a1b2c3d4e5f60718293a", "0199f2f0a1b2c3d4e5f607182930"


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.lines: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What comes out where Serve's records would."""
    handler, serves = Kept(), logging.getLogger("serve_like")
    serves.addHandler(handler)
    serves.setLevel(logging.INFO)
    logs.join("serve_like", ("room_of_ours",))
    yield handler
    serves.handlers.clear()


ROOM = logging.getLogger("room_of_ours.engine")


def test_what_is_said_about_a_job_names_it(kept: Kept) -> None:
    with logs.about(JOB):
        ROOM.info("encoded, beside job %s", OTHER)
    ROOM.info("nothing about a job")
    assert [line.get("job_id") for line in kept.lines] == [JOB, None]
    assert kept.lines[0]["message"] == f"encoded, beside job {OTHER}"


def test_a_message_that_names_a_job_or_a_clip_of_it(kept: Kept) -> None:
    ROOM.warning("clip %s.3.0-1 starts at step 0", JOB)
    assert kept.lines[0]["job_id"] == JOB


def test_fields_of_ones_own_stay(kept: Kept) -> None:
    with logs.about(JOB):
        ROOM.info("done", extra={logs.EXTRA: {"bytes": 7}})
    assert (kept.lines[0]["job_id"], kept.lines[0]["bytes"]) == (JOB, 7)


def test_a_thread_does_not_speak_about_another_ones_job(kept: Kept) -> None:
    with logs.about(JOB):
        thread = threading.Thread(target=ROOM.info, args=("something else",))
        thread.start()
        thread.join()
    assert "job_id" not in kept.lines[0]

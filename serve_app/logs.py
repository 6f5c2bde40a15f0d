"""The service's log records go where Serve's own go, in the same form, and each carries the id of the job that it is about.

The form is Serve's `logging_config` (`encoding: JSON` in serve_config.yaml). Without this only the logger `ray.serve` has a handler:
what the service's own rooms say would come as text through standard error, and below a warning not at all.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from serve_app.jobs.job import JOB_ID

EXTRA = "ray_serve_extra_fields"
"""Serve's formatter puts the entries of this attribute of a record among the fields of the JSON object."""

_job: ContextVar[str | None] = ContextVar("job", default=None)


@contextmanager
def about(job_id: str) -> Iterator[None]:
    """What is logged inside, in this thread or task, is about that job."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


class JobId(logging.Filter):
    """Adds the field `job_id`: of the job that `about` says, else of the first that the message names (alone or in a clip's id)."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record through."""
        job_id = _job.get()
        if job_id is None and (named := JOB_ID.search(record.getMessage())):
            job_id = named[0]
        if job_id is not None:
            setattr(record, EXTRA, {"job_id": job_id} | getattr(record, EXTRA, {}))
        return True


def join(logger_name: str = "ray.serve", rooms: tuple[str, ...] = ("serve_app", "deployments")) -> None:
    """Give the loggers of `rooms` the handlers and the level of that logger. To be called in each replica."""
    serves = logging.getLogger(logger_name)
    for handler in serves.handlers:
        if not any(isinstance(each, JobId) for each in handler.filters):
            handler.addFilter(JobId())
    for room in rooms:
        logger = logging.getLogger(room)
        logger.handlers, logger.propagate = serves.handlers, False
        logger.setLevel(serves.level)

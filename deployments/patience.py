"""For writes that must not be lost: a store that is away for a while costs time, not the work. Fencing keeps it safe."""

import logging

import tenacity

from serve_app.errors import StoreUnavailable

patiently = tenacity.retry(
    retry=tenacity.retry_if_exception_type(StoreUnavailable),
    wait=tenacity.wait_exponential_jitter(initial=0.2, max=5.0),
    stop=tenacity.stop_after_delay(600),
    before_sleep=tenacity.before_sleep_log(logging.getLogger(__name__), logging.WARNING),
    reraise=True,
)
"""Wraps a coroutine function of the JobStore; raises StoreUnavailable after ten minutes."""

"""One real service for the session: starting Ray and loading the model takes a while."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.client import Client
from tests.cluster.running_service import RunningService, write_config
from tests.receiver import SECRET


@pytest.fixture(scope="session")
def service() -> Iterator[RunningService]:
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        webhooks = {"webhook_secrets": {"anonymous": SECRET}, "webhook_allow_private": True}
        service = RunningService(write_config(Path(folder), **webhooks))
        yield service
        left = service.stop()
        assert left == []


@pytest.fixture
def client(service: RunningService) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client

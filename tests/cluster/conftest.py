"""One real service for the session: starting Ray and loading the model takes a while."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.client import Client
from serve_app.engine.load import TINY_MODEL
from serve_app.jobs.presets import DEFAULT_MODEL_NAME
from tests.cluster.running_service import RunningService, write_config
from tests.otlp_receiver import OtlpReceiver
from tests.receiver import SECRET

PRICE = 3600.0
"""A second of a card costs 1."""


@pytest.fixture(scope="session")
def collector() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def service(collector: OtlpReceiver) -> Iterator[RunningService]:
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        webhooks = {"webhook_secrets": {"anonymous": SECRET}, "webhook_allow_private": True}
        model = {"source": TINY_MODEL, "gpu_price_per_hour": PRICE}
        watching = {"otlp_endpoint": collector.url, "models": {DEFAULT_MODEL_NAME: model}}
        service = RunningService(write_config(Path(folder), **webhooks, **watching))
        yield service
        left = service.stop()
        assert left == []


@pytest.fixture
def client(service: RunningService) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client

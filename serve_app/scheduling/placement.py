"""Which replica gets a clip: the one with the least backlog in GPU-seconds (DESIGN.md section 4)."""

import heapq
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

UNHEARD_S = 3.0
"""A replica reports once a second: a clip that was sent there so long ago, and that its report does not have, has ended."""
AHEAD_EVERY_S = 30.0
"""How often a clip goes ahead to where there is no replica yet: Serve's own autoscaling starts one for a request that waits."""
FORGOTTEN_S = 60.0
"""So long after its last report a replica is forgotten. Until then it has what it had: it may only be too busy to report, and
whether it hangs is for health checks to find."""


@dataclass(frozen=True)
class _Report:
    clips: Mapping[str, float]
    at: float


@dataclass(frozen=True)
class _Sent:
    replica: str
    work_s: float
    at: float


class Placement:
    """What replicas report of their clips, and the clips that were sent to them since. Safe to use from several threads.

    Moments are in seconds of any one clock that goes on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: dict[str, _Report] = {}
        self._sent: dict[str, _Sent] = {}
        """By clip: those that no report has yet."""

    def hear(self, reports: Mapping[str, Mapping[str, float]], now: float) -> None:
        """Of each replica that is heard of now, the GPU-seconds that its clips, by id, still need."""

        def has_news(clip: str, sent: _Sent) -> bool:
            if sent.replica not in reports:
                return now - sent.at > FORGOTTEN_S
            return clip in reports[sent.replica] or now - sent.at > UNHEARD_S

        with self._lock:
            self._reports |= {replica: _Report(clips, now) for replica, clips in reports.items()}
            self._reports = {name: report for name, report in self._reports.items() if now - report.at <= FORGOTTEN_S}
            self._sent = {clip: sent for clip, sent in self._sent.items() if not has_news(clip, sent)}

    def place(self, clip_id: str, work_s: float, replicas: Sequence[str], now: float) -> list[str]:
        """The `replicas`, least backlog first; the clip counts as sent to the first of them from now on.

        Among equals each clip has an order of its own, so that several senders do not all choose the same one.
        """
        with self._lock:
            self._sent.pop(clip_id, None)
            backlog_s = self._backlog_s(replicas)
            order = sorted(replicas, key=lambda replica: (backlog_s[replica], _draw(clip_id, replica)))
            if order:
                self._sent[clip_id] = _Sent(order[0], work_s, now)
            return order

    def backlog_s(self, replicas: Sequence[str]) -> list[float]:
        """GPU-seconds that each of the `replicas` has to do."""
        with self._lock:
            return list(self._backlog_s(replicas).values())

    def _backlog_s(self, replicas: Sequence[str]) -> dict[str, float]:
        backlog_s = {
            replica: sum(self._reports[replica].clips.values()) if replica in self._reports else 0.0
            for replica in replicas
        }
        for sent in self._sent.values():
            if sent.replica in backlog_s:
                backlog_s[sent.replica] += sent.work_s
        return backlog_s


class Waiting:
    """Clips that wait for room at a replica, so that those which come late get their share; earliest deadline first."""

    def __init__(self, look_ahead_s: float) -> None:
        self._look_ahead_s = look_ahead_s
        self._clips: list[tuple[float, str, float, Callable[[], bool]]] = []
        self._ahead_at = -math.inf

    def add(self, clip_id: str, deadline: float, work_s: float, let_go: Callable[[], bool]) -> None:
        """`let_go` is called when the clip may be sent; it says whether anybody still wants to send it."""
        heapq.heappush(self._clips, (deadline, clip_id, work_s, let_go))

    def let_go(self, backlog_s: Sequence[float], now: float) -> None:
        """Let clips go as long as a replica, of which each has so many GPU-seconds to do, has less than `look_ahead_s`, or none.

        Without replicas one goes, to be there for the first, and another `AHEAD_EVERY_S` later, should that have come to nothing.
        """
        loads = list(backlog_s)
        if not loads and now - self._ahead_at >= AHEAD_EVERY_S:
            loads = [0.0]
        heapq.heapify(loads)
        while self._clips and loads and (loads[0] == 0 or loads[0] < self._look_ahead_s):
            _, _, work_s, let_go = heapq.heappop(self._clips)
            if not let_go():
                continue
            if backlog_s:
                heapq.heapreplace(loads, loads[0] + max(work_s, math.ulp(0.0)))
            else:
                self._ahead_at = now
                return


def _draw(clip_id: str, replica: str) -> bytes:
    return blake2b(f"{clip_id} {replica}".encode(), digest_size=8).digest()


HERE = Placement()
"""This process's: a conductor tells it what it hears, and the request router, which Serve makes, asks it."""

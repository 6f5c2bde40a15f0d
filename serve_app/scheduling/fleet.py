"""The replicas of a simulated cluster, one on each node: which of them take work, start or drain, and how long nodes are paid."""

import heapq
import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from serve_app.scheduling.claim import Outstanding
from serve_app.scheduling.room import Room
from serve_app.scheduling.simulated_replica import SimulatedReplica


@dataclass(frozen=True)
class Cluster:
    """What the jobs run on: nodes of one GPU, each with one replica, or with none while it is kept for the next."""

    look_ahead_s: float = math.inf
    """GPU-seconds of claimed work that may wait at a replica (claim.py)."""
    replicas: int = 1
    """At the beginning, ready for work; all along, where nothing scales."""
    node_startup_s: float = 0.0
    """From asking for a node until a replica can start on it."""
    replica_startup_s: float = 0.0
    """From then on until the replica takes work: processes, model, warm-up."""
    node_idle_s: float = 0.0
    """How long a node is kept without a replica; one that is asked for meanwhile starts there."""


@dataclass
class Spent:
    """What a run took. A node is paid from the moment it is asked for until it is let go."""

    node_s: float = 0.0
    busy_s: float = 0.0
    """Device seconds of work."""
    node_starts: int = 0
    replica_starts: int = 0
    most_replicas: int = 0
    """Ready or starting."""
    ended_at: float = 0.0


@dataclass
class Fleet:
    """The replicas and their nodes. Moments are seconds on the virtual clock and must not go back."""

    cluster: Cluster
    new_replica: Callable[[int], SimulatedReplica]
    spent: Spent = field(default_factory=Spent)
    live: dict[int, SimulatedReplica] = field(default_factory=dict)
    """Replicas that take work, by number: oldest first."""

    def __post_init__(self) -> None:
        self._rooms = [Room(self.cluster.look_ahead_s, late=late) for late in (False, True)]
        self._least = _LeastLoaded(self.live)
        self._starting: list[tuple[float, int, float]] = []
        """When it is ready, its number, and since when its node is paid; by the first."""
        self._paid_since: dict[int, float] = {}
        self._idle_nodes: list[tuple[float, float]] = []
        """Since (or from) when a node is idle, and since when it is paid; by the first."""
        self._numbers = 0
        self.busy_until = -math.inf
        """When all that was ever given to replicas will be done."""

    # ---- what is to be known

    @property
    def starting(self) -> int:
        """Replicas that were asked for and are not there yet."""
        return len(self._starting)

    @property
    def next_ready_at(self) -> float:
        """When the next replica comes; inf: none is starting."""
        return self._starting[0][0] if self._starting else math.inf

    def held(self, now: float) -> "Held":
        """The clips that each live replica holds."""
        return Held(list(self.live.values()), now)

    def has_room(self, deadline: float, late: bool, now: float) -> bool:
        """Whether a job, on time or late, may be claimed."""
        return self._rooms[late].is_there(deadline, now)

    def next_room_at(self, late: bool) -> float:
        """The earliest moment at which there might be room for a job that there was none for, unless a replica comes."""
        return self._rooms[late].next_at()

    # ---- what happens

    def place(self, now: float) -> SimulatedReplica:
        """The live replica with the least backlog, the oldest of several; once it has the work, call `placed`."""
        return self._least.take(now)

    def placed(self, replica: SimulatedReplica) -> None:
        """It has been given work."""
        self._least.put(replica)
        self.busy_until = max(self.busy_until, replica.free_at)

    def start(self, now: float, *, at_once: bool = False) -> None:
        """Asks for a replica; `at_once`: it is ready, as at the beginning."""
        cluster = self.cluster
        self._forget_old_nodes(now)
        paid_since, ready_at = now, now
        if not at_once:
            ready_at += cluster.replica_startup_s
            self.spent.replica_starts += 1
            if self._idle_nodes and self._idle_nodes[0][0] <= now:
                _, paid_since = self._idle_nodes.pop(0)
            else:
                ready_at += cluster.node_startup_s
                self.spent.node_starts += 1
        self._numbers += 1
        insort(self._starting, (ready_at, self._numbers, paid_since))
        self.spent.most_replicas = max(self.spent.most_replicas, len(self.live) + len(self._starting))

    def arrive(self, now: float) -> None:
        """Replicas whose start ends now or before take work."""
        while self._starting and self._starting[0][0] <= now:
            _, number, self._paid_since[number] = self._starting.pop(0)
            self.live[number] = replica = self.new_replica(number)
            self._least.put(replica)
            for room in self._rooms:
                room.add(replica)

    def remove(self, now: float) -> None:
        """Removes a replica as Serve would: one that is starting, or else the newest, which ends the clips it holds."""
        self._forget_old_nodes(now)
        if self._starting:
            ready_at, _, paid_since = self._starting.pop()
            idle_from = max(now, ready_at - self.cluster.replica_startup_s)
        else:
            number, replica = self.live.popitem()
            for room in self._rooms:
                room.remove(replica)
            replica.run_until(math.inf)
            idle_from, paid_since = max(now, replica.free_at), self._paid_since.pop(number)
        insort(self._idle_nodes, (idle_from, paid_since))

    def end(self, now: float) -> None:
        """The end of the run: what is still there is paid until now, or until it is done."""
        while self.live or self._starting:
            self.remove(now)
        self.spent.ended_at = now
        for idle_from, paid_since in self._idle_nodes:
            self.spent.node_s += max(now, idle_from) - paid_since

    def _forget_old_nodes(self, now: float) -> None:
        while self._idle_nodes and self._idle_nodes[0][0] + self.cluster.node_idle_s < now:
            idle_from, paid_since = self._idle_nodes.pop(0)
            self.spent.node_s += idle_from + self.cluster.node_idle_s - paid_since


class Held(Sequence[Sequence[Outstanding]]):
    """What each replica holds, worked out when it is looked at."""

    def __init__(self, replicas: list[SimulatedReplica], now: float) -> None:
        self._replicas = replicas
        self._now = now

    def __len__(self) -> int:
        return len(self._replicas)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        return self._replicas[place].outstanding(self._now)

    def __iter__(self) -> Iterator[list[Outstanding]]:
        return (replica.outstanding(self._now) for replica in self._replicas)


class _LeastLoaded:
    """Finds what `min(live.values(), key=backlog_s)` would, without asking each."""

    def __init__(self, live: dict[int, SimulatedReplica]) -> None:
        self._live = live
        self._idle: list[int] = []
        self._busy: list[tuple[float, int]] = []
        """A heap of when each is free, by number."""

    def put(self, replica: SimulatedReplica) -> None:
        heapq.heappush(self._busy, (replica.free_at, replica.number))

    def take(self, now: float) -> SimulatedReplica:
        while self._busy and self._busy[0][0] <= now:
            heapq.heappush(self._idle, heapq.heappop(self._busy)[1])
        while True:  # some live replica is in one of the heaps
            number = heapq.heappop(self._idle) if self._idle else heapq.heappop(self._busy)[1]
            if number in self._live:
                return self._live[number]

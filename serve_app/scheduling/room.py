"""Where there is room for a claim, kept up to date at little cost: says of each deadline what `claim_horizons` would say.

A replica that has no room for a deadline has none for a later one, and gets none before it has worked off what it has too
much, or some of its clips have turned late. So most answers need no look at any replica.
"""

import heapq
import math

from serve_app.scheduling.simulated_replica import SimulatedReplica


class Room:
    """Replicas with less than `look_ahead_s` GPU-seconds of work before a deadline, or none at all (claim.py has the rule).

    One for each of the two queues: what is late counts only against what is late.
    """

    def __init__(self, look_ahead_s: float, *, late: bool) -> None:
        self._look_ahead_s = look_ahead_s
        self._late = late
        self._refusals: dict[SimulatedReplica, tuple[float, float]] = {}
        """For each replica a moment and a deadline: before that moment it has no room for jobs due then or later."""
        self._by_moment: list[tuple[float, int, SimulatedReplica]] = []
        """A heap of those moments, also of outdated ones."""
        self._latest_deadline = -math.inf
        """Of any refusal."""

    def add(self, replica: SimulatedReplica) -> None:
        """A replica that has just come to life."""
        self._refuse(replica, -math.inf, -math.inf)

    def remove(self, replica: SimulatedReplica) -> None:
        """A replica that takes no more work."""
        del self._refusals[replica]

    def is_there(self, deadline: float, now: float) -> bool:
        """Whether a replica has room for a job of this deadline."""
        while self._by_moment and self._by_moment[0][0] <= now:
            moment, _, replica = self._by_moment[0]
            if self._is_outdated(moment, replica):
                heapq.heappop(self._by_moment)
            elif self._takes(replica, deadline, now):
                return True
        if deadline < self._latest_deadline:
            for replica, (_, refused) in self._refusals.items():  # values may be replaced meanwhile, keys not
                if refused > deadline and self._takes(replica, deadline, now):
                    return True
            self._latest_deadline = deadline
        return False

    def next_at(self) -> float:
        """Unless another replica comes: the earliest moment at which there might be room for what was refused. inf: none."""
        while self._by_moment and self._is_outdated(self._by_moment[0][0], self._by_moment[0][2]):
            heapq.heappop(self._by_moment)
        return self._by_moment[0][0] if self._by_moment else math.inf

    def _takes(self, replica: SimulatedReplica, deadline: float, now: float) -> bool:
        if replica.free_at - now < self._look_ahead_s or replica.free_at <= now:
            return True
        load, turns_late_at = replica.load_before(deadline, now, late=self._late)
        if load == 0 or load < self._look_ahead_s:
            return True
        moment = now + load - self._look_ahead_s
        if not self._late:
            moment = min(moment, turns_late_at)
        self._refuse(replica, max(moment, math.nextafter(now, math.inf)), deadline)
        return False

    def _refuse(self, replica: SimulatedReplica, moment: float, deadline: float) -> None:
        self._refusals[replica] = (moment, deadline)
        self._latest_deadline = max(self._latest_deadline, deadline)
        heapq.heappush(self._by_moment, (moment, replica.number, replica))

    def _is_outdated(self, moment: float, replica: SimulatedReplica) -> bool:
        known = self._refusals.get(replica)
        return known is None or known[0] != moment

"""How many replicas there should be: enough for what waits to be done by its deadline, and no more.

All work is laid out in order of deadline over the replicas there are; where a clip would come too late on each of them,
one more is asked for. Only what waits can be helped by more replicas: clips that a replica holds stay with it.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from serve_app.scheduling.claim import Outstanding


@dataclass(frozen=True)
class ScaleRules:
    """What operators say. Raises ValueError where it is impossible."""

    min_replicas: int
    """So many there always are; with 0 the last one goes, too, when nothing was to do for `downscale_delay_s`."""
    max_replicas: int
    """More there never are, whatever waits: the bound of cost."""
    target_drain_s: float
    """Work that no further replica could do in time, since its deadline is past or too close, is to be gone within so
    many seconds after they have started. Lower: late jobs wait less; higher: fewer replicas are started for them."""
    startup_s: float
    """From asking for a replica until it takes work, its node's start included. Too low: replicas come too late, and more
    than are needed; too high: work that they could do in time is given up as late."""
    downscale_delay_s: float
    """A smaller number must have been enough for so long, and at least for `startup_s`, before replicas are removed.
    Lower: less idle time; higher: fewer starts where load comes in waves."""
    headroom: float
    """Work is planned for as if it were larger by this share (0.5: by half), for what is still to come and for replicas
    that are slower than thought. Higher: more jobs are on time, and replicas start earlier."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"need 0 <= min_replicas <= max_replicas and at least one replica at most, "
                f"got min_replicas={self.min_replicas}, max_replicas={self.max_replicas}"
            )
        for name in ("target_drain_s", "startup_s", "downscale_delay_s", "headroom"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number, zero or more; it is {value}")

    @property
    def window_s(self) -> float:
        """How long the largest need is remembered."""
        return max(self.downscale_delay_s, self.startup_s)


@dataclass(frozen=True)
class Backlog:
    """All work that is there. GPU-seconds are those of this fleet's card."""

    queued: Sequence[Outstanding]
    """Clips that no replica holds yet: of jobs that wait, and of jobs that are claimed but not placed."""
    replicas: Sequence[Sequence[Outstanding]]
    """The clips that each live replica holds. One that drains is not live: it takes no more work."""
    starting: int
    """Replicas that were asked for and are not there yet."""


@dataclass(frozen=True)
class ScaleDecision:
    """How many replicas there should be, those that are starting included, and why, in a sentence for the log."""

    replicas: int
    reason: str


_Clip = tuple[float, int, float, bool]
"""Until when it is to be done, which replica holds it or -1, GPU-seconds, whether it is held and yields."""


class Scaler:
    """Decides again and again for one fleet. It keeps when replicas were asked for and what was needed lately, no more.

    **It asks for another replica only for work that it helps**: where clips that wait would otherwise be late, or, if no
    further replica could be in time, would not be gone within `target_drain_s`; late clips on replicas count as waiting. **It
    says enough only where it is**: there is an order in which each clip that waits, and that a further replica could still do
    in time, meets its deadline with `headroom` to spare. **It removes replicas only when fewer would have been enough all the
    time** for `downscale_delay_s`, and never while those asked for are still to come.

    One long job may change how short ones fall into place, so that more work asks for one or two replicas fewer than less
    work did (Graham's anomaly of list scheduling, SIAM J. Appl. Math. 17(2), 1969); it never asks for fewer than the sum of the
    work needs.
    """

    def __init__(self, rules: ScaleRules) -> None:
        self.rules = rules
        self._asked_at: deque[float] = deque()
        """For each replica that is starting, oldest first."""
        self._needs: deque[tuple[float, int]] = deque()
        """When what was needed, as far as nothing later was larger: the first is the window's largest."""

    def decide(self, backlog: Backlog, now: float) -> ScaleDecision:
        """How many replicas there should be from now on (Unix seconds). To be asked about once a second.

        O(n log n) in the number of clips, of which some 2,000 that wait suffice: the most urgent ones.
        """
        rules, live, starting = self.rules, len(backlog.replicas), backlog.starting
        while len(self._asked_at) > starting:
            self._asked_at.popleft()
        while len(self._asked_at) < starting:
            self._asked_at.append(now)  # asked for by somebody else, or by this process before it was started anew
        if not self._needs:
            self._needs.append((now, live + starting))

        clips = self._in_order(backlog, now)
        further = self._further(clips, live, now) if backlog.queued else 0
        if any(yields for _, _, _, yields in clips):
            further = max(further, self._further(clips, live, now, late_moves=True))
        enough = live + starting + further if further else min(live + starting, self._from_nothing(clips, now))
        need = min(max(enough, rules.min_replicas), rules.max_replicas)
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now, need))
        while self._needs[0][0] < now - rules.window_s:
            self._needs.popleft()
        replicas = min(max(need, min(self._needs[0][1], live + starting)), rules.max_replicas)
        self._asked_at.extend([now] * (replicas - live - starting))
        return ScaleDecision(replicas, self._reason(backlog, enough, replicas))

    def _in_order(self, backlog: Backlog, now: float) -> list[_Clip]:
        """(until when it is to be done, which replica holds it or -1, GPU-seconds, whether it yields) of each clip, by the first.

        That is its deadline, if a replica that is asked for now could keep it. Whether those that are there keep closer
        ones is up to them: more replicas cannot help, so they are asked to see only to it that late work is soon gone.

        A held clip that is late yields to all that can be on time, and others keep coming. So it waits as one in the queue
        does, and a further replica helps it by taking those: were it not counted, such clips would pile up on replicas that
        are busy with what comes, unseen, as long as the load lasts.
        """
        ready_at = now + self.rules.startup_s
        target_drain_s = self.rules.target_drain_s
        clips = []
        for replica, group in enumerate(chain([backlog.queued], backlog.replicas), start=-1):
            for clip in group:
                work_s, until = clip.remaining_s, clip.deadline
                if ready_at + work_s > until:
                    until = ready_at + max(target_drain_s, work_s)
                clips.append((until, replica, work_s, replica >= 0 and now + work_s > clip.deadline))
        clips.sort()
        return clips

    def _further(self, clips: Iterable[_Clip], live: int, now: float, *, late_moves: bool = False) -> int:
        """How many more replicas are needed: each clip that waits (`late_moves`: or yields) goes to the replica that is free first."""
        startup_s, stretch = self.rules.startup_s, 1 + self.rules.headroom
        free_at = [now] * live + [max(now, asked_at + startup_s) for asked_at in self._asked_at]
        present = len(free_at)
        first = [(moment, replica) for replica, moment in enumerate(free_at)]
        heapq.heapify(first)
        for until, holder, work_s, yields in clips:
            if holder >= 0 and not (late_moves and yields):
                free_at[holder] += stretch * work_s
                continue
            while first and first[0][0] != free_at[first[0][1]]:
                heapq.heapreplace(first, (free_at[first[0][1]], first[0][1]))
            if first and first[0][0] + work_s <= until:
                replica = first[0][1]
                free_at[replica] += stretch * work_s
                heapq.heapreplace(first, (free_at[replica], replica))
            else:
                free_at.append(now + startup_s + stretch * work_s)
                heapq.heappush(first, (free_at[-1], len(free_at) - 1))
        return len(free_at) - present

    def _from_nothing(self, clips: Iterable[_Clip], now: float) -> int:
        """How many replicas would do all of it, if they were there and it could be handed out anew."""
        stretch = 1 + self.rules.headroom
        free_at: list[float] = []
        for until, _, work_s, _ in clips:
            if free_at and free_at[0] + work_s <= until:
                heapq.heapreplace(free_at, free_at[0] + stretch * work_s)
            else:
                heapq.heappush(free_at, now + stretch * work_s)
        return len(free_at)

    def _reason(self, backlog: Backlog, enough: int, replicas: int) -> str:
        rules, present = self.rules, len(backlog.replicas) + backlog.starting
        waits_s = sum([clip.remaining_s for clip in backlog.queued])
        there = f"{len(backlog.queued)} clips wait ({waits_s:.0f} GPU-s), {backlog.starting} of {present} replicas are starting"
        if enough > rules.max_replicas:
            return f"{there}; {enough} would be needed, max_replicas is {rules.max_replicas}"
        if replicas > present:
            return f"{there}; {replicas} are needed" + (
                ", as min_replicas says" if enough < replicas else " for the work to be done in time"
            )
        if replicas < present:
            return f"{there}; for {rules.window_s:.0f} s {replicas} would have been enough"
        if enough < replicas:
            return f"{there}; {enough} would be enough now, more were needed in the last {rules.window_s:.0f} s"
        return f"{there}; that is enough and not too much"

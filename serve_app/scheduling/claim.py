"""How far ahead jobs may be claimed: enough that no replica idles, little enough that order is decided late (DESIGN.md section 6).

Jobs that can still be on time and jobs that cannot are two queues, each in order of deadline with a horizon of its own.
In one queue the late ones, whose deadlines are the earliest, would be claimed first and fill the look-ahead, and the step
policy, which lets them yield, would have nothing to let them yield to: at 0.95 load on one card 43% of jobs were on time
where two queues keep 97% (simulated with a look-ahead of 30 s; `benchmarks/mixed_load.py --look-ahead-s 30`).
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outstanding:
    """A clip that has been claimed and is not finished. Raises ValueError on negative or NaN work."""

    deadline: float
    """Unix seconds."""
    remaining_s: float
    """GPU-seconds that it still needs, decode included."""

    def __post_init__(self) -> None:
        if not self.remaining_s >= 0:
            raise ValueError(f"remaining_s must be zero or more GPU-seconds, got {self.remaining_s}")


def claim_horizon(
    replicas: Sequence[Sequence[Outstanding]], waiting: Sequence[Outstanding], look_ahead_s: float
) -> float:
    """Latest deadline (Unix seconds, inclusive) that may be claimed now: inf for any, -inf for none.

    `replicas` holds the outstanding clips of each live replica; `waiting` those that are claimed but not yet placed,
    which are thought to go, in order of deadline, each to the replica with the least work before it. A job may be
    claimed where a replica has less than `look_ahead_s` GPU-seconds of work that would run before the job (deadline no
    later than its own), or none at all. So an idle replica takes anything; a picture passes a replica that is full of
    later-due video; and a second long video waits until the first has less than `look_ahead_s` to go.

    With no live replica one clip may be outstanding, which is what makes scale from zero start.
    """
    if not replicas:
        return -math.inf if waiting else math.inf
    in_order = sorted(waiting, key=lambda clip: clip.deadline)

    def full(deadline: float) -> bool:
        """Whether every replica has enough to do before a job of this deadline. Once true, true for all later ones:
        more work, placed greedily, never lowers the least load."""
        loads = [sum(clip.remaining_s for clip in clips if clip.deadline <= deadline) for clips in replicas]
        heapq.heapify(loads)
        for clip in in_order:
            if clip.deadline > deadline:
                break
            heapq.heapreplace(loads, loads[0] + clip.remaining_s)
        return loads[0] > 0 and loads[0] >= look_ahead_s

    # The load before a job changes only at the deadlines of outstanding clips.
    deadlines = sorted({clip.deadline for clips in (*replicas, waiting) for clip in clips})
    first_full = bisect_left(deadlines, True, key=full)
    return math.inf if first_full == len(deadlines) else math.nextafter(deadlines[first_full], -math.inf)


@dataclass(frozen=True)
class Horizons:
    """Latest deadlines (Unix seconds, inclusive) that may be claimed now; inf for any, -inf for none."""

    on_time: float
    """For jobs that can still meet their deadline if they run at once and alone."""
    late: float
    """For those that cannot."""


ANY_DEADLINE = Horizons(math.inf, math.inf)
"""Claims whatever is queued."""


def is_late(deadline: float, remaining_s: float, now: float) -> bool:
    """Whether work can no longer be done by its deadline, even if it ran alone from now on. Moments are Unix seconds."""
    return now + remaining_s > deadline


def claim_horizons(
    replicas: Sequence[Sequence[Outstanding]], waiting: Sequence[Outstanding], look_ahead_s: float, now: float
) -> Horizons:
    """`claim_horizon` for each of the two queues: what is late counts only against what is late.

    So late work, which runs in the gaps and in its guaranteed share, holds up nobody who can be on time, and still at
    least one late clip is at hand for each replica.
    """
    if not replicas:
        only = claim_horizon(replicas, waiting, look_ahead_s)
        return Horizons(only, only)

    def of(late: bool) -> float:
        clips = [
            [c for c in group if is_late(c.deadline, c.remaining_s, now) == late] for group in (*replicas, waiting)
        ]
        return claim_horizon(clips[:-1], clips[-1], look_ahead_s)

    return Horizons(on_time=of(late=False), late=of(late=True))

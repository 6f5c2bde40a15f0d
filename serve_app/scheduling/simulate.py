"""A cluster on a virtual clock: jobs come, wait, are claimed, placed and run, and replicas come and go.

Everything that decides is the service's own object: step policy, order and horizons of claims, placement, `Scaler`. Between
two events nothing is looked at, and what cannot change a decision is no event; a test holds the claims against those of
asking `claim_horizons` about all replicas twice a second.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from serve_app.scheduling.claim import ANY_DEADLINE, Outstanding
from serve_app.scheduling.fleet import Cluster, Fleet, Spent
from serve_app.scheduling.order import ClaimOrder
from serve_app.scheduling.scale import Backlog, ScaleDecision
from serve_app.scheduling.simulated_replica import Policy, SimulatedReplica
from serve_app.scheduling.workload import SimulatedJob

CLAIM_EVERY_S = 0.5
"""Seconds between two looks of a conductor at its queue when there is no news."""
MOST_SEEN = 2000
"""Clips that wait, of which an autoscaler is told: the most urgent ones."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job. Moments are seconds on the virtual clock."""

    job: SimulatedJob
    started_at: float
    finished_at: float

    @property
    def latency_s(self) -> float:
        """Seconds from arrival to end."""
        return self.finished_at - self.job.arrived_at

    @property
    def on_time(self) -> bool:
        """Whether it was finished by its deadline."""
        return self.finished_at <= self.job.deadline


class Autoscaler(Protocol):
    """What says how many replicas there should be: `Scaler`, or a rule to compare it with."""

    def decide(self, backlog: Backlog, now: float) -> ScaleDecision:
        """How many from now on."""


class Observer(Protocol):
    """Is told what happens."""

    def finished(self, outcome: Outcome) -> None:
        """A job is done. Jobs are reported in no particular order."""

    def looked(self, now: float, fleet: Fleet, queued: int, decision: ScaleDecision) -> None:
        """The autoscaler was asked, while so many jobs waited; its decision has not been followed yet."""


class Simulation:
    """One run. `scale_every_s` is how often the autoscaler is asked; where nothing waits, ten times as seldom, since all it
    can say then is that fewer would do. After the last job has finished it is asked for `tail_s` more."""

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        observer: Observer,
        autoscaler: Autoscaler | None = None,
        *,
        scale_every_s: float = 1.0,
        tail_s: float = 0.0,
    ) -> None:
        self._observer = observer
        self._autoscaler = autoscaler
        self._scale_every_s = scale_every_s
        self._tail_s = tail_s
        self._fleet = Fleet(cluster, lambda number: SimulatedReplica(policy, self._clip_ended, number))
        self._queue: ClaimOrder[SimulatedJob] = ClaimOrder()
        self._unplaced: list[SimulatedJob] = []
        """Jobs that were claimed while there was no replica."""
        self._unfinished: dict[str, list[float]] = {}
        """Of jobs of several clips, by id: clips to come, first start, last end."""
        self._outstanding: dict[str, list[Outstanding]] = {}
        """The clips of jobs that the autoscaler saw waiting."""

    def run(self, jobs: Iterable[SimulatedJob]) -> Spent:
        """Runs jobs, in order of arrival, to their ends. Raises ValueError where one comes before its predecessor."""
        fleet, queue = self._fleet, self._queue
        arrivals = iter(jobs)
        job = next(arrivals, None)
        now = job.arrived_at if job else 0.0
        for _ in range(fleet.cluster.replicas):
            fleet.start(now, at_once=True)
        scaled_at = -math.inf if self._autoscaler else math.inf
        claim_at = scale_at = ends_at = math.inf
        while True:
            arrives_at = job.arrived_at if job else math.inf
            if job is None and not queue and not self._unplaced:
                ends_at = max(now, fleet.busy_until + self._tail_s)
            moment = min(arrives_at, fleet.next_ready_at, claim_at, scale_at, ends_at)
            if moment == math.inf:
                raise ValueError(f"{len(queue) + len(self._unplaced)} jobs wait, and there never is a replica")
            if moment == ends_at:
                break
            now = moment
            fleet.arrive(now)
            if fleet.live and self._unplaced:
                self._place(self._unplaced.pop(), now)
            if job and now == arrives_at:
                queue.add(job.job_id, job.deadline, job.work_s, job)
                job = next(arrivals, None)
                if job and job.arrived_at < now:
                    raise ValueError(f"job {job.job_id} at {job.arrived_at} s comes before its predecessor at {now} s")
            self._claim(now)
            claim_at = self._next_claim_at(now)
            scale_at = scaled_at + self._scale_every_s * (1 if queue or self._unplaced else 10)
            if now >= scale_at:
                self._scale(now)
                scaled_at = now
                scale_at = now + self._scale_every_s
        fleet.end(ends_at)
        return fleet.spent

    # ---- claims

    def _claim(self, now: float) -> None:
        """Claims and places whatever may be claimed now; without replicas one job."""
        queue, fleet = self._queue, self._fleet
        if not fleet.live:
            if queue and not self._unplaced and (job := queue.claim(ANY_DEADLINE, now)):
                self._unplaced.append(job)
            return
        while queue and (job := queue.claim_where(lambda deadline, late: fleet.has_room(deadline, late, now), now)):
            self._place(job, now)

    def _next_claim_at(self, now: float) -> float:
        """When a conductor that looks every CLAIM_EVERY_S might next find something, unless a job or a replica comes."""
        queue, fleet = self._queue, self._fleet
        if not queue or not fleet.live:
            return math.inf
        changes_at = min([fleet.next_room_at(late) for late in (False, True) if queue.waits(late=late)])
        looks = max(math.ceil(min(changes_at, queue.next_late_at) / CLAIM_EVERY_S), math.floor(now / CLAIM_EVERY_S) + 1)
        return looks * CLAIM_EVERY_S

    def _place(self, job: SimulatedJob, now: float) -> None:
        """Gives each clip to the replica with the least backlog."""
        fleet = self._fleet
        fleet.spent.busy_s += job.work_s
        self._outstanding.pop(job.job_id, None)
        if not job.further_clips:
            replica = fleet.place(now)
            replica.add(job.job_id, job, job.phases, now)
            fleet.placed(replica)
            return
        clips = (job.phases, *job.further_clips)
        self._unfinished[job.job_id] = [len(clips), math.inf, -math.inf]
        for index, phases in enumerate(clips):
            replica = fleet.place(now)
            replica.add(f"{job.job_id}.{index}", job, phases, now)
            fleet.placed(replica)

    def _clip_ended(self, job: SimulatedJob, started_at: float, ended_at: float) -> None:
        if job.further_clips:
            clips = self._unfinished[job.job_id]
            clips[:] = [clips[0] - 1, min(clips[1], started_at), max(clips[2], ended_at)]
            if clips[0]:
                return
            _, started_at, ended_at = self._unfinished.pop(job.job_id)
        self._observer.finished(Outcome(job, started_at, ended_at))

    # ---- scaling

    def _scale(self, now: float) -> None:
        assert self._autoscaler is not None
        fleet = self._fleet
        queued: list[Outstanding] = []
        for job in chain(self._unplaced, self._queue):
            if len(queued) >= MOST_SEEN:
                break
            queued += self._clips_of(job)
        decision = self._autoscaler.decide(Backlog(queued, fleet.held(now), fleet.starting), now)
        self._observer.looked(now, fleet, len(self._queue) + len(self._unplaced), decision)
        more = decision.replicas - len(fleet.live) - fleet.starting
        for _ in range(more):
            fleet.start(now)
        for _ in range(-more):
            fleet.remove(now)

    def _clips_of(self, job: SimulatedJob) -> list[Outstanding]:
        known = self._outstanding.get(job.job_id)
        if known is None:
            clips = (job.phases, *job.further_clips)
            known = [Outstanding(job.deadline, sum([phase.work_s for phase in phases])) for phases in clips]
            self._outstanding[job.job_id] = known
        return known


class _Noting:
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def looked(self, now: float, fleet: Fleet, queued: int, decision: ScaleDecision) -> None:
        """Nobody scales."""


def simulate(
    jobs: Iterable[SimulatedJob], policy: Policy, replicas: int = 1, look_ahead_s: float = math.inf
) -> list[Outcome]:
    """Runs jobs (in order of arrival) on so many replicas that are always there; returns their outcomes in that order.

    As in the service, a job is claimed with the look-ahead (inf: at once) and goes to the replica with the least backlog.
    Raises ValueError where a job comes before its predecessor, or twice.
    """
    jobs = list(jobs)
    order = {job.job_id: place for place, job in enumerate(jobs)}
    if len(order) < len(jobs):
        raise ValueError(f"{len(jobs) - len(order)} of {len(jobs)} jobs have the id of another")
    noting = _Noting()
    Simulation(Cluster(look_ahead_s, replicas), policy, noting).run(jobs)
    return sorted(noting.outcomes, key=lambda outcome: order[outcome.job.job_id])

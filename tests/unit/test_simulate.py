"""The simulated cluster: it claims and places as the service's plain functions say, loses nothing, and counts its costs."""

import math
from random import Random

import pytest

from serve_app.scheduling.claim import claim_horizons
from serve_app.scheduling.fleet import Cluster, Fleet, Spent
from serve_app.scheduling.scale import Backlog, ScaleDecision
from serve_app.scheduling.simulate import CLAIM_EVERY_S, Outcome, Simulation, simulate
from serve_app.scheduling.simulated_replica import SimulatedReplica
from serve_app.scheduling.steps import StepPolicy
from serve_app.scheduling.workload import Phase, SimulatedJob

TICK = 1 / 64  # times are multiples of it, so that sums are exact and two ways to add them up agree

KINDS = (
    (Phase(4, 4 * TICK), Phase(1, 8 * TICK)),
    (Phase(5, 64 * TICK), Phase(3, 24 * TICK)),
    (Phase(10, 200 * TICK), Phase(6, 30 * TICK)),
)


class Watching:
    """An observer that keeps all."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.seen: list[tuple[float, int, int, int]] = []

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def looked(self, now: float, fleet: Fleet, queued: int, decision: ScaleDecision) -> None:
        self.seen.append((now, len(fleet.live), fleet.starting, queued))


class Erratic:
    """An autoscaler that says anything, the same in each run."""

    def __init__(self, seed: int, most: int) -> None:
        self._random = Random(seed)
        self._most = most

    def decide(self, backlog: Backlog, now: float) -> ScaleDecision:
        return ScaleDecision(self._random.randint(1, self._most), "erratic")


class PlainSimulation(Simulation):
    """Looks at all replicas twice a second and at each event, and goes by the service's functions alone."""

    def _claim(self, now: float) -> None:
        while self._queue:
            held = [replica.outstanding(now) for replica in self._fleet.live.values()]
            horizons = claim_horizons(
                held,
                [clip for job in self._unplaced for clip in self._clips_of(job)],
                self._fleet.cluster.look_ahead_s,
                now,
            )
            job = self._queue.claim(horizons, now)
            if job is None:
                return
            if held:
                self._place(job, now)
            else:
                self._unplaced.append(job)

    def _next_claim_at(self, now: float) -> float:
        return (math.floor(now / CLAIM_EVERY_S) + 1) * CLAIM_EVERY_S if self._queue and self._fleet.live else math.inf


class PlainFleet(Fleet):
    """Asks each replica for its backlog."""

    def place(self, now: float) -> SimulatedReplica:
        return min(self.live.values(), key=lambda replica: replica.backlog_s(now))


def jobs_of(random: Random, count: int, load: float) -> list[SimulatedJob]:
    """At about that many replicas' load, in bursts, with deadlines from hopeless to roomy, some of several clips."""
    jobs, now = [], 0.0
    for number in range(count):
        phases = random.choice(KINDS)
        others = tuple(random.choice(KINDS) for _ in range(random.choice((0, 0, 0, 0, 1, 3))))
        work_s = sum(phase.work_s for clip in (phases, *others) for phase in clip)
        if random.random() < 0.7:
            now += math.floor(random.expovariate(load / 25.0) / TICK) * TICK
        due_s = math.floor(random.choice((0.5, 1.0, 1.5, 3.0, 8.0)) * work_s / TICK) * TICK
        jobs.append(SimulatedJob(f"{number:03}", "any", now, now + due_s, phases, others))
    return jobs


@pytest.mark.parametrize("part", range(4))
def test_claims_and_places_are_those_of_asking_all_replicas_all_the_time(part: int) -> None:
    for seed in range(part * 30, (part + 1) * 30):
        random = Random(seed)
        most = random.choice((1, 2, 3, 6))
        jobs = jobs_of(random, 60, random.choice((0.5, 1.0, 2.0)) * most)
        look_ahead_s = random.choice((0.0, TICK, 5.0, 30.0, 60.0, 240.0, math.inf))
        cluster = Cluster(look_ahead_s, random.choice((0, 1, most)), 4.0, 2.5, random.choice((0.0, 8.0)))
        scale_every_s = random.choice((1.0, 7.0))
        runs = []
        for simulation, fleet in ((Simulation, Fleet), (PlainSimulation, PlainFleet)):
            watching = Watching()
            run = simulation(
                cluster, StepPolicy(), watching, Erratic(seed, most), scale_every_s=scale_every_s, tail_s=20.0
            )
            run._fleet.__class__ = fleet
            runs.append((run.run(jobs), sorted(watching.outcomes, key=lambda o: o.job.job_id), watching.seen))
        assert runs[0] == runs[1], seed
        assert [outcome.job for outcome in runs[0][1]] == jobs


# ---- replicas that come and go


class Told:
    """An autoscaler that says what it was told, from each moment on."""

    def __init__(self, *said: tuple[float, int]) -> None:
        self._said = said

    def decide(self, backlog: Backlog, now: float) -> ScaleDecision:
        return ScaleDecision([number for moment, number in self._said if moment <= now][-1], "told")


def job(number: int, arrived_at: float, work_s: float, further: int = 0) -> SimulatedJob:
    phases = (Phase(int(work_s), 1.0),)
    return SimulatedJob(f"{number}", "any", arrived_at, arrived_at + 1000.0, phases, (phases,) * further)


def told(
    jobs: list[SimulatedJob], *said: tuple[float, int], cluster: Cluster | None = None, **options: float
) -> tuple[Watching, Spent]:
    watching = Watching()
    cluster = cluster or Cluster(0.0, 0, node_startup_s=60.0, replica_startup_s=30.0, node_idle_s=100.0)
    return watching, Simulation(cluster, StepPolicy(), watching, Told(*said), **options).run(jobs)


def test_a_job_waits_for_the_node_and_the_replica() -> None:
    watching, spent = told([job(0, 5.0, 40.0)], (0.0, 1), tail_s=10.0)
    assert [(o.started_at, o.finished_at) for o in watching.outcomes] == [(95.0, 135.0)]
    assert (spent.node_starts, spent.replica_starts, spent.most_replicas) == (1, 1, 1)
    assert (spent.node_s, spent.busy_s, spent.ended_at) == (140.0, 40.0, 145.0)


def test_a_replica_that_is_removed_ends_its_clip_and_its_node_is_kept_for_a_while() -> None:
    jobs = [job(0, 0.0, 400.0), job(1, 20.0, 400.0), job(2, 2000.0, 1.0)]
    watching, spent = told(jobs, (0.0, 2), (150.0, 1), (1990.0, 1))
    assert [(o.started_at, o.finished_at) for o in watching.outcomes[:2]] == [(90.0, 490.0), (90.0, 490.0)]
    assert spent.node_s == 2001.0 + 590.0  # one until the end, the other until 100 s after its clip


def test_a_replica_starts_faster_on_a_node_that_is_still_there() -> None:
    jobs = [job(0, 0.0, 10.0), job(1, 150.0, 10.0), job(2, 1000.0, 10.0)]
    said = ((0.0, 1), (100.0, 0), (150.0, 1), (200.0, 0), (1000.0, 1))
    watching, spent = told(jobs, *said, scale_every_s=1.0)
    assert [o.started_at for o in watching.outcomes] == [90.0, 180.0, 1090.0]
    assert (spent.node_starts, spent.replica_starts) == (2, 3)


def test_a_replica_that_has_not_come_yet_is_removed_first() -> None:
    watching, spent = told([job(0, 0.0, 10.0), job(1, 200.0, 10.0)], (0.0, 1), (95.0, 2), (105.0, 1))
    assert spent.most_replicas == 2
    assert [o.started_at for o in watching.outcomes] == [90.0, 200.0]


def test_clips_of_a_job_run_side_by_side_and_it_ends_with_the_last() -> None:
    [outcome] = simulate([job(0, 0.0, 10.0, further=2)], StepPolicy(), replicas=2)
    assert (outcome.started_at, outcome.finished_at) == (0.0, 20.0)
    [outcome] = simulate([job(0, 0.0, 10.0, further=2)], StepPolicy(), replicas=3)
    assert outcome.finished_at == 10.0


def test_wrong_streams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"job 1 at 4\.0 s comes before its predecessor at 5\.0 s"):
        simulate([job(0, 5.0, 1.0), job(1, 4.0, 1.0)], StepPolicy())
    with pytest.raises(ValueError, match="1 of 2 jobs"):
        simulate([job(0, 5.0, 1.0), job(0, 5.0, 1.0)], StepPolicy())
    with pytest.raises(ValueError, match="1 jobs wait, and there never is a replica"):
        simulate([job(0, 5.0, 1.0)], StepPolicy(), replicas=0)
    with pytest.raises(ValueError, match="without phases"):
        SimulatedJob("0", "any", 0.0, 1.0, ())


def test_no_jobs_cost_nothing() -> None:
    assert simulate([], StepPolicy()) == []

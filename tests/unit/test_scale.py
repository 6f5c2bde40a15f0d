"""How many replicas: enough for the deadlines, none too many, and no flapping. Seconds are whole, so that sums are exact."""

import math
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.scheduling.claim import Outstanding
from serve_app.scheduling.fleet import Cluster, Fleet
from serve_app.scheduling.scale import Backlog, ScaleDecision, Scaler, ScaleRules
from serve_app.scheduling.simulate import Outcome, Simulation
from serve_app.scheduling.steps import StepPolicy
from serve_app.scheduling.workload import Phase, SimulatedJob

RULES = ScaleRules(
    min_replicas=0, max_replicas=50, target_drain_s=120.0, startup_s=90.0, downscale_delay_s=300.0, headroom=0.5
)
NOW = 1000.0


def rules(**changes: float) -> ScaleRules:
    return ScaleRules(**(vars(RULES) | changes))  # type: ignore[arg-type]


clips = st.builds(Outstanding, deadline=st.integers(900, 2000).map(float), remaining_s=st.integers(1, 300).map(float))
queues = st.lists(clips, max_size=30)
fleets = st.lists(st.lists(clips, max_size=4), max_size=6)
any_rules = st.builds(
    ScaleRules,
    min_replicas=st.integers(0, 3),
    max_replicas=st.integers(3, 60),
    target_drain_s=st.sampled_from((0.0, 60.0, 600.0)),
    startup_s=st.sampled_from((0.0, 10.0, 200.0)),
    downscale_delay_s=st.sampled_from((0.0, 30.0, 300.0)),
    headroom=st.sampled_from((0.0, 0.25, 1.0)),
)


def decide(backlog: Backlog, under: ScaleRules = RULES) -> ScaleDecision:
    return Scaler(under).decide(backlog, NOW)


# ---- how many


def test_nothing_to_do_needs_nobody() -> None:
    assert decide(Backlog([], [], 0)).replicas == 0
    assert decide(Backlog([], [], 0), rules(min_replicas=2)).replicas == 2


@given(clips, any_rules)
def test_from_zero_any_work_asks_for_one_at_once(clip: Outstanding, under: ScaleRules) -> None:
    assert decide(Backlog([clip], [], 0), under).replicas == max(1, under.min_replicas)


def test_as_many_as_the_deadline_needs() -> None:
    """Eight clips of 40 s, due in 240 s: after 90 s of start-up there is time for two each, with half as much again."""
    videos = [Outstanding(NOW + 240, 40.0)] * 8
    assert decide(Backlog(videos, [], 0)).replicas == 4
    assert decide(Backlog(videos, [[]], 0)).replicas == 3  # one that is ready does four
    assert decide(Backlog(videos, [[], []], 0)).replicas == 2


def test_those_that_start_already_are_counted_on_and_come_earlier_than_those_asked_for_now() -> None:
    videos = [Outstanding(NOW + 240, 40.0)] * 8
    scaler = Scaler(RULES)
    assert scaler.decide(Backlog(videos, [], 0), NOW).replicas == 4
    for passed in (1.0, 30.0, 60.0, 89.0):
        assert scaler.decide(Backlog(videos, [], 4), NOW + passed).replicas == 4
    assert scaler.decide(Backlog(videos, [[]] * 4, 0), NOW + 90).replicas == 4


def test_replicas_that_are_overdue_are_waited_for() -> None:
    scaler = Scaler(RULES)
    work = [Outstanding(NOW + 1000, 40.0)] * 8
    asked = scaler.decide(Backlog(work, [], 0), NOW).replicas
    assert scaler.decide(Backlog(work, [], asked), NOW + 5 * RULES.startup_s).replicas == asked


def test_work_that_is_late_anyway_is_gone_within_the_target() -> None:
    late = [Outstanding(NOW - 100, 30.0)] * 12  # 120 s: four each, or three with the headroom
    assert decide(Backlog(late, [], 0), rules(headroom=0.0)).replicas == 3
    assert decide(Backlog(late, [], 0), rules(headroom=0.0, target_drain_s=360.0)).replicas == 1
    assert decide(Backlog(late, [], 0), rules(headroom=0.0, target_drain_s=30.0)).replicas == 12


def test_nothing_is_started_for_what_it_could_not_help() -> None:
    """A picture that is due before a replica could come, and a clip that its replica holds already."""
    assert decide(Backlog([Outstanding(NOW + 30, 2.0)], [[]], 0)).replicas == 1
    busy = [Outstanding(NOW + 400, 150.0)] * 2
    assert decide(Backlog([Outstanding(NOW + 30, 2.0)], [busy], 0)).replicas == 1
    assert decide(Backlog([], [[Outstanding(NOW + 200, 190.0), Outstanding(NOW + 250, 190.0)]], 0)).replicas == 1


def test_a_clip_does_not_run_on_two_replicas() -> None:
    long = Outstanding(NOW + 300, 300.0)
    assert decide(Backlog([long], [], 0)).replicas == 1
    assert decide(Backlog([long, long], [], 0)).replicas == 2


@given(queues, fleets, st.integers(0, 4), any_rules)
def test_it_stays_within_bounds(
    queued: list[Outstanding], held: list[list[Outstanding]], starting: int, under: ScaleRules
) -> None:
    assert under.min_replicas <= decide(Backlog(queued, held, starting), under).replicas <= under.max_replicas


@given(queues, fleets, any_rules)
def test_where_it_asks_for_no_more_all_that_more_could_help_is_on_time(
    queued: list[Outstanding], held: list[list[Outstanding]], under: ScaleRules
) -> None:
    """By a plain way to hand it out: in order of deadline, to the replica that is free first; to a further one where that is
    too late. Work takes as long as it takes, so the headroom is what is left over."""
    unbounded = ScaleRules(**(vars(under) | {"max_replicas": 1000}))  # type: ignore[arg-type]
    replicas = decide(Backlog(queued, held, 0), unbounded).replicas
    ready_at = NOW + under.startup_s
    work = [(until(c, ready_at, under), -1, c.remaining_s) for c in queued]
    work += [(until(c, ready_at, under), holder, c.remaining_s) for holder, group in enumerate(held) for c in group]
    planned = [NOW] * len(held)
    ends = list(planned)
    for due, holder, work_s in sorted(work):
        place = holder
        if holder < 0:
            place = min(range(len(planned)), key=planned.__getitem__, default=-1)
            if place < 0 or planned[place] + work_s > due:
                place = len(planned)
                planned.append(ready_at)
                ends.append(ready_at)
            assert ends[place] + work_s <= due
        planned[place] += (1 + under.headroom) * work_s
        ends[place] += work_s
    assert len(planned) <= max(replicas, len(held))


def until(clip: Outstanding, ready_at: float, under: ScaleRules) -> float:
    """Its deadline where a further replica could keep it; otherwise when it is to be gone."""
    kept = ready_at + clip.remaining_s <= clip.deadline
    return clip.deadline if kept else ready_at + max(under.target_drain_s, clip.remaining_s)


@given(queues, any_rules)
def test_it_never_asks_for_fewer_than_the_sum_of_the_work_needs(queued: list[Outstanding], under: ScaleRules) -> None:
    """A bound that only grows with the work."""
    unbounded = ScaleRules(**(vars(under) | {"max_replicas": 1000}))  # type: ignore[arg-type]
    ready_at = NOW + under.startup_s
    needed, work_s = 0.0, 0.0
    for due, remaining_s in sorted((until(c, ready_at, under), c.remaining_s) for c in queued):
        work_s += remaining_s
        needed = max(needed, work_s / (due - ready_at))
    assert decide(Backlog(queued, [], 0), unbounded).replicas >= needed


@given(st.integers(1, 200), queues, st.integers(900, 2000), fleets, any_rules)
def test_more_work_of_one_length_never_asks_for_fewer(
    length: int, queued: list[Outstanding], deadline: int, held: list[list[Outstanding]], under: ScaleRules
) -> None:
    same = [Outstanding(c.deadline, float(length)) for c in queued]
    more = [*same, Outstanding(float(deadline), float(length))]
    assert decide(Backlog(more, held, 0), under).replicas >= decide(Backlog(same, held, 0), under).replicas


# ---- over time


class Moving:
    """A fleet that follows the decisions: what is asked for comes after its start-up."""

    def __init__(self, under: ScaleRules) -> None:
        self.rules, self.scaler = under, Scaler(under)
        self.ready, self.starting_until = 0, list[float]()

    def decide(self, queued: Sequence[Outstanding], now: float, held: Sequence[Outstanding] = ()) -> int:
        came = [moment for moment in self.starting_until if moment <= now]
        self.ready += len(came)
        self.starting_until = [moment for moment in self.starting_until if moment > now]
        groups = [list(held[place :: self.ready]) for place in range(self.ready)]
        replicas = self.scaler.decide(Backlog(queued, groups, len(self.starting_until)), now).replicas
        while self.ready + len(self.starting_until) > replicas:
            if self.starting_until:
                self.starting_until.pop()
            else:
                self.ready -= 1
        self.starting_until += [now + self.rules.startup_s] * (replicas - self.ready - len(self.starting_until))
        return replicas


@given(st.lists(st.tuples(st.integers(1, 60), queues), min_size=2, max_size=30), any_rules)
def test_what_was_asked_for_is_kept_for_the_delay_and_for_the_start_up(
    steps: list[tuple[int, list[Outstanding]]], under: ScaleRules
) -> None:
    moving, now, before, rises = Moving(under), NOW, 0, list[tuple[float, int]]()
    for passed, queued in steps:
        now += passed
        replicas = moving.decide([Outstanding(c.deadline - NOW + now, c.remaining_s) for c in queued], now)
        lately = [number for moment, number in rises if now - moment <= max(under.startup_s, under.downscale_delay_s)]
        assert replicas >= max(lately, default=0)
        if replicas > before:
            rises.append((now, replicas))
        before = replicas


def test_to_zero_and_back() -> None:
    moving = Moving(RULES)
    assert [moving.decide([], NOW + second) for second in range(3)] == [0, 0, 0]
    assert moving.decide([Outstanding(NOW + 240, 40.0)], NOW + 3) == 1
    assert [moving.decide([], NOW + second) for second in (4, 100, 303)] == [1, 1, 1]
    assert moving.decide([], NOW + 304) == 0
    assert moving.decide([Outstanding(NOW + 600, 40.0)], NOW + 305) == 1


def test_the_last_replica_stays_while_it_has_work_and_where_the_minimum_says_so() -> None:
    moving = Moving(RULES)
    moving.decide([Outstanding(NOW + 600, 500.0)], NOW)
    assert [moving.decide([], NOW + s, held=[Outstanding(NOW + 600, 700.0 - s)]) for s in (90, 400, 690)] == [1, 1, 1]
    assert [moving.decide([], NOW + second) for second in (695, 985, 1000)] == [1, 1, 0]
    kept = Moving(rules(min_replicas=1))
    assert [kept.decide([], NOW + second) for second in (0, 500, 5000)] == [1, 1, 1]


def test_a_scaler_that_starts_anew_keeps_the_replicas_it_finds() -> None:
    scaler = Scaler(RULES)
    assert scaler.decide(Backlog([], [[], []], 1), NOW).replicas == 3
    assert scaler.decide(Backlog([], [[], [], []], 0), NOW + 299).replicas == 3
    assert scaler.decide(Backlog([], [[], [], []], 0), NOW + 301).replicas == 0


# ---- with the rest of the service, on a virtual clock


class Watching:
    """An observer that keeps what matters here."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.decided: list[tuple[float, int]] = []

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def looked(self, now: float, fleet: Fleet, queued: int, decision: ScaleDecision) -> None:
        if not self.decided or self.decided[-1][1] != decision.replicas:
            self.decided.append((now, decision.replicas))


def run(jobs: Sequence[SimulatedJob], under: ScaleRules, look_ahead_s: float = 5.0) -> Watching:
    watching = Watching()
    cluster = Cluster(look_ahead_s, under.min_replicas, under.startup_s * 2 / 3, under.startup_s / 3, 60.0)
    Simulation(cluster, StepPolicy(), watching, Scaler(under), tail_s=under.window_s).run(jobs)
    return watching


def test_what_it_starts_replicas_for_is_on_time() -> None:
    """Bursts on nothing, of jobs that a replica asked for at once can do in time: nearly all are, by the real policies."""
    outcomes: list[Outcome] = []
    for seed in range(40):
        random = Random(seed)
        jobs = []
        for number in range(random.randint(1, 60)):
            phase = random.choice((Phase(25, 0.1), Phase(25, 1.3), Phase(40, 3.7)))
            due_s = RULES.startup_s + 15.0 + random.uniform(1.5, 4.5) * phase.work_s
            jobs.append(SimulatedJob(f"{number:02}", "any", 0.0, due_s, (phase,)))
        outcomes += run(jobs, rules(max_replicas=1000)).outcomes
    assert sum(not outcome.on_time for outcome in outcomes) <= len(outcomes) / 200


def test_late_clips_do_not_pile_up_on_replicas_that_are_busy_with_what_comes() -> None:
    """Five and a half replicas' worth of work, of which each clip alone would fit: what turns late on a replica counts, too."""
    random, jobs = Random(1), []
    for number in range(3000):
        phase = random.choice((Phase(25, 0.08), Phase(25, 1.7)))
        jobs.append(SimulatedJob(f"{number:04}", "any", number * 4.0, number * 4.0 + 6.0 * phase.work_s, (phase,)))
    watching = run(jobs, rules(max_replicas=8, startup_s=180.0), look_ahead_s=120.0)
    assert sum(outcome.on_time for outcome in watching.outcomes) >= 0.94 * len(jobs)
    assert max(outcome.latency_s for outcome in watching.outcomes) < 3600.0


def test_a_steady_load_is_served_by_a_steady_number() -> None:
    """Four replicas' worth of work, evenly: once it has settled, nothing changes any more."""
    jobs = [SimulatedJob(f"{n:04}", "any", n * 10.0, n * 10.0 + 240.0, (Phase(40, 1.0),)) for n in range(2000)]
    watching = run(jobs, RULES)
    assert all(outcome.on_time for outcome in watching.outcomes)
    assert [number for moment, number in watching.decided if moment < jobs[-1].arrived_at] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"min_replicas": -1}, "min_replicas=-1"),
        ({"min_replicas": 5, "max_replicas": 4}, "max_replicas=4"),
        ({"max_replicas": 0}, "max_replicas=0"),
        ({"startup_s": -1.0}, "startup_s"),
        ({"target_drain_s": math.inf}, "target_drain_s"),
        ({"headroom": math.nan}, "headroom"),
        ({"downscale_delay_s": -0.1}, "downscale_delay_s"),
    ],
)
def test_impossible_rules_are_refused(wrong: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        rules(**wrong)


def test_a_reason_says_the_numbers_that_made_it() -> None:
    videos = [Outstanding(NOW + 240, 40.0)] * 8
    scaler = Scaler(RULES)
    assert "8 clips wait (320 GPU-s), 0 of 0" in scaler.decide(Backlog(videos, [], 0), NOW).reason
    assert "more were needed in the last 300 s" in scaler.decide(Backlog([], [[]] * 4, 0), NOW + 200).reason
    assert "for 300 s 0 would have been enough" in scaler.decide(Backlog([], [[]] * 4, 0), NOW + 900).reason
    assert "4 would be needed, max_replicas is 2" in decide(Backlog(videos, [], 0), rules(max_replicas=2)).reason

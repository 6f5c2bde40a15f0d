"""The step policy: deadlines, preemption, and that nobody starves. All streams of arrivals are the test's own worst."""

import math
from collections.abc import Sequence
from itertools import accumulate
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.scheduling.simulate import Outcome, simulate
from serve_app.scheduling.steps import Decision, Runnable, StepPolicy
from serve_app.scheduling.workload import Phase, SimulatedJob

# ---- clips and streams. Times are multiples of 1/64 s, so that sums and products are exact and boundaries can be tested.

TICK = 1 / 64
KINDS = (
    (Phase(4, 4 * TICK), Phase(1, 8 * TICK)),
    (Phase(5, 64 * TICK), Phase(3, 24 * TICK)),
    (Phase(10, 200 * TICK), Phase(6, 30 * TICK)),
    (Phase(20, 190 * TICK),),
)


@st.composite
def streams(draw: st.DrawFn, max_size: int = 30) -> list[SimulatedJob]:
    """Jobs in order of arrival: alone or in bursts, at a load around what the device can do, with deadlines from
    hopeless to roomy."""
    made = draw(
        st.lists(
            st.tuples(
                st.sampled_from((0, 1, 300, 1500, 4000)),  # ticks since the one before
                st.integers(0, 64),
                st.sampled_from(KINDS),
                st.sampled_from((0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)),  # promise over work
                st.integers(-64, 64),
            ),
            min_size=1,
            max_size=max_size,
        )
    )
    arrivals = accumulate((wait + more) * TICK for wait, more, *_ in made)
    jobs = []
    for n, (at, (_, _, phases, promise, shift)) in enumerate(zip(arrivals, made, strict=True)):
        work_s = sum(phase.work_s for phase in phases)
        jobs.append(SimulatedJob(f"{n:02}", "any", at, at + promise * work_s + shift * TICK, phases))
    return jobs


policies = st.builds(
    StepPolicy,
    share=st.sampled_from((1 / 2, 1 / 4, 1 / 32, 1 / 1024)),
    slip_steps=st.sampled_from((0.0, 1.0, 4.0)),
    headroom=st.sampled_from((1.0, 1.125, 1.125, 1.5)),
    length_weight=st.sampled_from((0.0, 0.5, 4.0)),
)


class Watched:
    """A policy that is asked at every step, with a record of what it saw and said."""

    def __init__(self, policy: StepPolicy) -> None:
        self.policy = policy
        self.seen: list[tuple[float, Sequence[Runnable], str]] = []

    def decide(self, clips: Sequence[Runnable], now: float) -> Decision:
        clip_id = self.policy.pick(clips, now)
        self.seen.append((now, clips, clip_id))
        return Decision(clip_id, until=now)


def clip(clip_id: str, deadline: float, remaining_s: float, step_s: float = 1.0, **others: float) -> Runnable:
    arrived_at = others.pop("arrived_at", 0.0)
    last_ran_at = others.pop("last_ran_at", arrived_at)
    return Runnable(clip_id, deadline, arrived_at, last_ran_at, remaining_s, step_s, **others)


def longest_step(jobs: Sequence[SimulatedJob]) -> float:
    return max(phase.step_s for job in jobs for phase in job.phases)


# ---- the same schedule, asked seldom or always


def crowd(random: Random) -> list[SimulatedJob]:
    """A stream in which something is always waiting, and most comparisons are close."""
    mean_wait_s = 17.0 / random.choice((0.7, 1.0, 1.5))
    arrived_at, jobs = 0.0, []
    for n in range(40):
        phases = random.choice(KINDS)
        promise_s = random.uniform(0.5, 6.0) * sum(phase.work_s for phase in phases)
        arrived_at += to_tick(random.expovariate(1 / mean_wait_s))
        jobs.append(SimulatedJob(f"{n:02}", "any", arrived_at, arrived_at + to_tick(promise_s), phases))
    return jobs


def to_tick(seconds: float) -> float:
    return math.floor(seconds / TICK) * TICK


@pytest.mark.parametrize("part", range(4))
def test_asking_only_when_the_decision_may_change_gives_the_schedule_of_asking_at_every_step(part: int) -> None:
    for seed in range(part * 125, (part + 1) * 125):
        random = Random(seed)
        jobs = crowd(random)
        policy = StepPolicy(
            share=random.choice((1 / 2, 1 / 32, 1 / 1024)),
            slip_steps=random.choice((0.0, 1.0, 4.0)),
            headroom=random.choice((1.0, 1.125, 1.5)),
            length_weight=random.choice((0.0, 0.5, 4.0)),
        )
        replicas = random.choice((1, 1, 2))
        assert simulate(jobs, policy, replicas) == simulate(jobs, Watched(policy), replicas), seed


@given(streams(), policies, st.integers(1, 3))
@settings(deadline=None)
def test_so_it_does_in_bursts_and_at_ties(jobs: list[SimulatedJob], policy: StepPolicy, replicas: int) -> None:
    assert simulate(jobs, policy, replicas) == simulate(jobs, Watched(policy), replicas)


# ---- nobody starves


def step_gap_bound(policy: StepPolicy, step_s: float, longest: float) -> float:
    """As the docstring of StepPolicy states it, per step of the first clip."""
    return 2 * step_s / policy.share + longest


@given(streams(), policies)
@settings(max_examples=150, deadline=None)
def test_the_first_clip_starts_a_step_within_two_patiences_and_one_step(
    jobs: list[SimulatedJob], policy: StepPolicy
) -> None:
    watched = Watched(policy)
    simulate(jobs, watched)
    for now, clips, picked in watched.seen:
        first = min(clips, key=lambda c: (c.arrived_at, c.clip_id))
        if now >= first.last_ran_at + 2 * policy.patience(first):
            assert picked == first.clip_id


@given(streams(max_size=20), policies)
@settings(max_examples=150, deadline=None)
def test_every_clip_is_finished_within_the_stated_bound_whatever_comes_after_it(
    jobs: list[SimulatedJob], policy: StepPolicy
) -> None:
    outcomes = simulate(jobs, policy)
    assert [o.job for o in outcomes] == jobs
    for outcome in outcomes:
        assert outcome.latency_s <= finish_bound(outcome, outcomes, policy)


def finish_bound(outcome: Outcome, outcomes: Sequence[Outcome], policy: StepPolicy) -> float:
    """The sum of the bound over all steps outstanding at arrival (here: of all jobs then present, whole)."""
    job = outcome.job
    present = [o.job for o in outcomes if o.finished_at > job.arrived_at and o.job.job_id <= job.job_id]
    longest = longest_step([o.job for o in outcomes])
    return longest + sum(
        phase.steps * step_gap_bound(policy, phase.step_s, longest) for old in present for phase in old.phases
    )


@pytest.mark.parametrize("rival_s", [0.5, 4.0, 30.0])
def test_a_hopeless_video_is_finished_under_an_endless_flood_of_clips_that_could_all_be_on_time(rival_s: float) -> None:
    """Deadline order alone, late clips last, would never run it: the flood is more than the device can do."""
    policy = StepPolicy()
    video = SimulatedJob("video", "video", 0.0, 1.0, (Phase(20, 1.0),))
    flood = [
        SimulatedJob(f"{n}", "rival", n * rival_s, (n + 3) * rival_s, (Phase(4, rival_s / 4),)) for n in range(9000)
    ]
    outcomes = simulate([video, *flood], policy)
    finished_at = next(o.finished_at for o in outcomes if o.job is video)
    assert finished_at <= 20 * step_gap_bound(policy, 1.0, rival_s / 4)
    assert finished_at < max(o.finished_at for o in outcomes) / 2  # the flood went on for long after


def test_without_its_share_that_video_would_starve() -> None:
    """The test above is able to fail."""
    video = SimulatedJob("video", "video", 0.0, 1.0, (Phase(20, 1.0),))
    flood = [SimulatedJob(f"{n}", "rival", n * 4.0, (n + 3) * 4.0, (Phase(4, 1.0),)) for n in range(1000)]
    outcomes = simulate([video, *flood], StepPolicy(share=1e-9))
    assert max(outcomes, key=lambda o: o.finished_at).job is video


# ---- short work slips in

VIDEO_STEP_S, PICTURE_STEP_S = 3.75, 0.0625
VIDEO = SimulatedJob("video", "video", 0.0, 480.0, (Phase(40, VIDEO_STEP_S), Phase(21, 0.5)))


@given(st.integers(0, int(155 / TICK)), st.booleans())
@example(int(155 / TICK), True)
def test_a_picture_starts_within_one_step_of_a_video_wherever_that_is(arrival: int, urgent_video: bool) -> None:
    """Also while the video decodes, and when the video is due before the picture."""
    at = arrival * TICK
    video = SimulatedJob("video", "video", 0.0, 165.0 if urgent_video else 480.0, VIDEO.phases)
    picture = SimulatedJob("picture", "picture", at, at + 90.0, (Phase(40, PICTURE_STEP_S), Phase(1, 0.125)))
    outcome = simulate([video, picture], StepPolicy())[1]
    assert outcome.started_at - at < VIDEO_STEP_S
    assert outcome.finished_at - outcome.started_at == picture.work_s


def test_a_picture_waits_for_one_step_more_when_a_late_video_has_waited_twice_its_time() -> None:
    policy = StepPolicy(share=0.5)
    late = clip("late", deadline=0.0, remaining_s=100.0, step_s=4.0)
    picture = clip("picture", deadline=90.0, remaining_s=2.0, arrived_at=1.0)
    assert policy.pick([late, picture], 7.9) == "picture"
    assert policy.pick([late, picture], 8.0) == "late"


def test_work_that_is_not_short_waits_for_its_deadline_order() -> None:
    policy = StepPolicy(slip_steps=4.0)
    assert policy.pick([clip("a", 100.0, 50.0), clip("b", 200.0, 4.5)], 0.0) == "a"
    assert policy.pick([clip("a", 100.0, 50.0), clip("b", 200.0, 4.0)], 0.0) == "b"


# ---- deadlines


def test_earliest_deadline_first_among_those_that_fit() -> None:
    clips = [clip("c", 300.0, 50.0), clip("a", 100.0, 50.0), clip("b", 200.0, 50.0)]
    assert StepPolicy().pick(clips, 0.0) == "a"


def test_a_clip_that_can_no_longer_meet_its_deadline_yields() -> None:
    late, good = clip("late", 49.0, 50.0), clip("good", 200.0, 50.0)
    assert StepPolicy().pick([late, good], 0.0) == "good"


def test_a_clip_that_can_no_longer_meet_its_deadline_pushes_nobody_out() -> None:
    good, late = clip("good", 119.0, 60.0, arrived_at=50.0), clip("late", 140.0, 110.0, last_ran_at=50.0)
    roomy = clip("roomy", 1000.0, 10.0)
    assert StepPolicy().pick([good, late, roomy], 50.0) == "good"


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
def test_of_two_that_do_not_both_fit_the_later_comer_yields(first: str, second: str) -> None:
    clips = [clip(first, 99.0, 60.0, arrived_at=0.0), clip(second, 100.0, 60.0, arrived_at=1.0)]
    assert StepPolicy().pick(clips, 2.0) == first
    clips = [clip(first, 100.0, 60.0, arrived_at=0.0), clip(second, 99.0, 60.0, arrived_at=1.0)]
    assert StepPolicy().pick(clips, 2.0) == first


def test_the_longer_a_clip_the_sooner_it_yields() -> None:
    clips = [clip("long", 99.0, 90.0, arrived_at=0.0), clip("short", 99.0, 20.0, arrived_at=20.0)]
    assert StepPolicy(headroom=1.0, length_weight=0.0).pick(clips, 5.0) == "long"
    assert StepPolicy(headroom=1.0, length_weight=0.5).pick(clips, 5.0) == "short"


def test_what_is_late_anyway_runs_shortest_first() -> None:
    assert StepPolicy().pick([clip("long", 1.0, 50.0), clip("short", 2.0, 40.0)], 0.0) == "short"


@given(streams(max_size=6))
def test_if_all_fit_with_room_to_spare_all_are_on_time(jobs: list[SimulatedJob]) -> None:
    """Work of the whole stream, headroom, and every wait for a step of another, before anyone's deadline."""
    room = 2 * sum(job.work_s for job in jobs) + (len(jobs) + 1) * longest_step(jobs)
    easy = [SimulatedJob(j.job_id, j.kind, j.arrived_at, j.arrived_at + room, j.phases) for j in jobs]
    assert all(outcome.on_time for outcome in simulate(easy, StepPolicy()))


def test_at_a_load_that_breaks_deadline_order_most_deadlines_hold() -> None:
    """Two videos' work arrives for every one that can be done: EDF makes all of them late, fitting in about half."""
    jobs = [SimulatedJob(f"{n:03}", "video", n * 20.0, n * 20.0 + 160.0, (Phase(40, 1.0),)) for n in range(300)]

    class Edf:
        def decide(self, clips: Sequence[Runnable], now: float) -> Decision:
            return Decision(min(clips, key=lambda c: c.deadline).clip_id, math.inf)

    assert sum(o.on_time for o in simulate(jobs, Edf())) < 15
    assert sum(o.on_time for o in simulate(jobs, StepPolicy())) > 120


# ---- the object itself


@given(streams(), policies, st.randoms(use_true_random=False))
def test_the_order_in_which_clips_are_listed_does_not_matter(
    jobs: list[SimulatedJob], policy: StepPolicy, random
) -> None:  # type: ignore[no-untyped-def]
    watched = Watched(policy)
    simulate(jobs, watched)
    for now, clips, picked in watched.seen:
        shuffled = list(clips)
        random.shuffle(shuffled)
        assert policy.pick(shuffled, now) == picked


def test_no_clips_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="no clip"):
        StepPolicy().pick([], 0.0)
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"slip_steps": -1.0}, {"headroom": 0.5}, {"length_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StepPolicy(**wrong)


def test_one_clip_runs_through() -> None:
    [outcome] = simulate([VIDEO], StepPolicy())
    assert (outcome.started_at, outcome.finished_at) == (0.0, VIDEO.work_s)

"""Look-ahead: what may be claimed next."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.scheduling.claim import Horizons, Outstanding, claim_horizon, claim_horizons, is_late

clips = st.lists(
    st.builds(
        Outstanding,
        deadline=st.floats(0, 1000),
        remaining_s=st.integers(0, 300).map(float),  # whole seconds: sums are exact, so boundaries can be tested
    ),
    max_size=6,
)
fleets = st.lists(clips, min_size=1, max_size=5)
look_aheads = st.integers(1, 120).map(float)


def may_claim(deadline: float, replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float) -> bool:
    """The rule in words: some replica has less than `ahead` seconds to run before a job of this deadline."""
    before = [sum(c.remaining_s for c in clips if c.deadline <= deadline) for clips in replicas]
    for clip in sorted(waiting, key=lambda c: c.deadline):
        if clip.deadline <= deadline:
            before[before.index(min(before))] += clip.remaining_s
    return min(before) < ahead


VIDEO = Outstanding(deadline=480.0, remaining_s=250.0)


def test_a_picture_passes_replicas_full_of_video_and_a_second_video_waits() -> None:
    horizon = claim_horizon([[VIDEO], [VIDEO]], [], 30.0)
    assert horizon >= 30.0  # a picture's deadline
    assert horizon < 480.0
    assert horizon < 500.0


def test_a_second_video_comes_when_the_first_is_nearly_done() -> None:
    assert claim_horizon([[Outstanding(480.0, 30.0)]], [], 30.0) < 480.0
    assert claim_horizon([[Outstanding(480.0, 29.9)]], [], 30.0) == math.inf


def test_waiting_clips_go_to_different_replicas() -> None:
    assert claim_horizon([[], []], [VIDEO], 30.0) == math.inf
    assert claim_horizon([[], []], [VIDEO, VIDEO], 30.0) < 480.0


def test_pictures_are_claimed_up_to_the_look_ahead() -> None:
    pictures = [Outstanding(30.0 + n, 2.0) for n in range(5)]
    assert claim_horizon([pictures[:4]], [], 10.0) == math.inf
    assert claim_horizon([pictures], [], 10.0) == math.nextafter(34.0, -math.inf)


def test_without_replicas_one_clip_may_be_outstanding() -> None:
    assert claim_horizon([], [], 30.0) == math.inf
    assert claim_horizon([], [Outstanding(480.0, 1.0)], 30.0) == -math.inf


def test_without_look_ahead_only_an_idle_replica_or_an_earlier_deadline_claims() -> None:
    assert claim_horizon([[]], [], 0.0) == math.inf
    assert claim_horizon([[VIDEO]], [], 0.0) == math.nextafter(480.0, -math.inf)


@pytest.mark.parametrize("remaining_s", [-1.0, math.nan])
def test_impossible_work_is_refused(remaining_s: float) -> None:
    with pytest.raises(ValueError, match=str(remaining_s)):
        Outstanding(480.0, remaining_s)


@given(fleets, clips, look_aheads, st.floats(0, 1000))
def test_the_horizon_is_the_rule(
    replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float, deadline: float
) -> None:
    horizon = claim_horizon(replicas, waiting, ahead)
    every = [c.deadline for group in (*replicas, waiting) for c in group]
    for d in (deadline, *every, *(math.nextafter(d, -math.inf) for d in every)):
        assert (d <= horizon) == may_claim(d, replicas, waiting, ahead)


@given(fleets, clips, look_aheads)
def test_an_idle_replica_that_nobody_waits_for_takes_anything(
    replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float
) -> None:
    idle: list[list[Outstanding]] = [[] for _ in range(len(waiting) + 1)]
    assert claim_horizon([*replicas, *idle], waiting, ahead) == math.inf


@given(fleets, clips, look_aheads)
def test_what_is_due_before_all_else_is_always_claimed(
    replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float
) -> None:
    assert claim_horizon(replicas, waiting, ahead) > -1.0  # every deadline above is at least 0


@given(fleets, clips, look_aheads, st.data())
def test_more_work_never_raises_it_and_more_room_never_lowers_it(
    replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float, data: st.DataObject
) -> None:
    horizon = claim_horizon(replicas, waiting, ahead)
    extra = Outstanding(data.draw(st.floats(0, 1000)), float(data.draw(st.integers(0, 300))))
    at = data.draw(st.integers(0, len(replicas) - 1))
    loaded = [[*clips, extra] if n == at else clips for n, clips in enumerate(replicas)]
    assert claim_horizon(loaded, waiting, ahead) <= horizon
    assert claim_horizon(replicas, [*waiting, extra], ahead) <= horizon
    assert claim_horizon([*replicas, []], waiting, ahead) >= horizon
    assert claim_horizon(replicas, waiting, ahead + 1.0) >= horizon


@given(fleets, clips, look_aheads)
def test_claiming_what_it_allows_comes_to_an_end(
    replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float
) -> None:
    """Jobs of one length, claimed in order of deadline, never pile up beyond the look-ahead and one clip a replica."""
    claimed = list(waiting)
    deadline, length = 1000.0, 50.0
    while claim_horizon(replicas, claimed, ahead) >= deadline:
        claimed.append(Outstanding(deadline, length))
        deadline += 1.0
    assert (len(claimed) - len(waiting)) * length <= len(replicas) * (ahead + length)


# ---- two queues: on time, and late


def test_late_work_holds_up_nobody_who_can_be_on_time() -> None:
    late = Outstanding(deadline=90.0, remaining_s=250.0)
    assert claim_horizon([[late]], [], 30.0) < 130.0
    assert claim_horizons([[late]], [], 30.0, now=100.0).on_time == math.inf


def test_one_late_clip_is_at_hand_and_not_many() -> None:
    busy, late = Outstanding(1000.0, 250.0), Outstanding(90.0, 250.0)
    assert claim_horizons([[busy]], [], 30.0, now=100.0).late == math.inf
    assert claim_horizons([[busy, late]], [], 30.0, now=100.0).late < 95.0
    assert claim_horizons([[busy]], [late], 30.0, now=100.0).late < 95.0


def test_without_replicas_one_clip_may_be_outstanding_in_both_queues_together() -> None:
    late = Outstanding(90.0, 250.0)
    assert claim_horizons([], [], 30.0, now=100.0) == Horizons(math.inf, math.inf)
    assert claim_horizons([], [late], 30.0, now=100.0) == Horizons(-math.inf, -math.inf)


@given(fleets, clips, look_aheads, st.floats(0, 1000))
def test_each_queue_is_held_back_by_its_own_kind_alone(
    replicas: list[list[Outstanding]], waiting: list[Outstanding], ahead: float, now: float
) -> None:
    horizons = claim_horizons(replicas, waiting, ahead, now)
    on_time = [[c for c in group if not is_late(c.deadline, c.remaining_s, now)] for group in (*replicas, waiting)]
    late = [[c for c in group if is_late(c.deadline, c.remaining_s, now)] for group in (*replicas, waiting)]
    assert horizons.on_time == claim_horizon(on_time[:-1], on_time[-1], ahead)
    assert horizons.late == claim_horizon(late[:-1], late[-1], ahead)

"""Clips go to the replica with the least backlog, also when many are sent before a replica has reported."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve_app.scheduling.placement import AHEAD_EVERY_S, FORGOTTEN_S, UNHEARD_S, Placement, Waiting


def test_the_least_backlog_wins_whatever_the_number_of_clips() -> None:
    placement = Placement()
    placement.hear({"a": {"1": 300.0}, "b": {"2": 5.0, "3": 5.0, "4": 5.0}}, 0.0)
    assert placement.place("new", 50.0, ["a", "b"], 0.0) == ["b", "a"]


def test_clips_that_no_report_has_yet_count() -> None:
    placement = Placement()
    placement.hear({"a": {}, "b": {}}, 0.0)
    first = placement.place("one", 50.0, ["a", "b"], 0.0)[0]
    other = placement.place("two", 50.0, ["a", "b"], 0.0)[0]
    assert {first, other} == {"a", "b"}
    placement.hear({first: {"one": 4.0}, other: {"two": 40.0}}, 0.1)
    assert placement.place("three", 50.0, ["a", "b"], 0.1)[0] == first


def test_a_clip_that_never_arrived_is_forgotten() -> None:
    placement = Placement()
    placement.hear({"a": {}, "b": {"x": 10.0}}, 0.0)
    assert placement.place("one", 50.0, ["a", "b"], 0.0)[0] == "a"
    placement.hear({"a": {}, "b": {"x": 10.0}}, UNHEARD_S)
    assert placement.place("two", 50.0, ["a", "b"], UNHEARD_S)[0] == "b"
    placement.hear({"a": {}, "b": {"x": 10.0}}, 3 * UNHEARD_S)
    assert placement.place("three", 50.0, ["a", "b"], 3 * UNHEARD_S)[0] == "a"


def test_a_clip_that_is_sent_again_counts_once() -> None:
    placement = Placement()
    placement.hear({"a": {}, "b": {"x": 60.0}}, 0.0)
    for _ in range(5):
        assert placement.place("one", 50.0, ["a", "b"], 0.0)[0] == "a"


def test_a_silent_replica_keeps_its_clips_for_a_while() -> None:
    """One that hangs must not draw all clips, and one that is too busy to report must not be shunned."""
    placement = Placement()
    placement.hear({"silent": {"1": 30.0}, "b": {"2": 40.0}}, 0.0)
    assert placement.place("3", 20.0, ["silent", "b"], 0.0)[0] == "silent"
    placement.hear({"b": {"2": 40.0}}, 2 * UNHEARD_S)
    assert placement.place("4", 20.0, ["silent", "b"], 2 * UNHEARD_S)[0] == "b"
    placement.hear({"b": {"2": 40.0, "4": 20.0}}, 2 * UNHEARD_S + 0.1)
    assert placement.place("5", 20.0, ["silent", "b"], 2 * UNHEARD_S + 0.1)[0] == "silent"
    placement.hear({"b": {"2": 40.0, "4": 20.0}}, FORGOTTEN_S + 3 * UNHEARD_S)
    assert placement.place("6", 20.0, ["silent", "b"], FORGOTTEN_S + 3 * UNHEARD_S)[0] == "silent"


def test_only_candidates_are_chosen() -> None:
    placement = Placement()
    placement.hear({"a": {"1": 300.0}, "gone": {}}, 0.0)
    assert placement.place("new", 1.0, ["a"], 0.0) == ["a"]
    assert placement.place("other", 1.0, [], 0.0) == []


def test_without_any_report_clips_are_spread() -> None:
    placement = Placement()
    chosen = Counter(placement.place(str(n), 1.0, ["a", "b", "c", "d"], 0.0)[0] for n in range(40))
    assert set(chosen.values()) == {10}


def test_several_senders_do_not_choose_the_same_of_equal_replicas() -> None:
    reports: dict[str, dict[str, float]] = {str(n): {} for n in range(8)}
    chosen = set()
    for sender in range(8):
        placement = Placement()
        placement.hear(reports, 0.0)
        chosen.add(placement.place(f"clip-{sender}", 1.0, list(reports), 0.0)[0])
    assert len(chosen) >= 4


@given(st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=60), st.integers(1, 9))
def test_no_replica_is_ahead_by_more_than_a_clip(works: list[float], count: int) -> None:
    """What list scheduling promises: the loads differ by the largest clip at most."""
    placement, names = Placement(), [str(n) for n in range(count)]
    placement.hear({name: {} for name in names}, 0.0)
    loads = dict.fromkeys(names, 0.0)
    for n, work_s in enumerate(works):
        loads[placement.place(f"clip-{n}", work_s, names, 0.0)[0]] += work_s
    assert max(loads.values()) - min(loads.values()) <= max(works) + 1e-6


def let_go(waiting: Waiting, backlog_s: list[float], now: float = 0.0) -> list[str]:
    gone.clear()
    waiting.let_go(backlog_s, now)
    return list(gone)


gone: list[str] = []


def wait(waiting: Waiting, name: str, deadline: float, *, wanted: bool = True) -> None:
    def go() -> bool:
        if wanted:
            gone.append(name)
        return wanted

    waiting.add(name, deadline, 50.0, go)


def test_clips_wait_until_a_replica_has_little_to_do_and_go_by_deadline() -> None:
    waiting = Waiting(look_ahead_s=60.0)
    for number, deadline in enumerate((4.0, 2.0, 3.0, 5.0, 6.0, 7.0)):
        wait(waiting, f"clip-{number}", deadline)
    assert let_go(waiting, [60.0]) == []
    assert let_go(waiting, [0.0, 61.0]) == ["clip-1", "clip-2"]  # 50 GPU-seconds there are less than 60, 100 are not
    assert let_go(waiting, [59.0, 0.0]) == ["clip-0", "clip-3", "clip-4"]
    assert let_go(waiting, [100.0, 100.0]) == []


def test_an_idle_replica_takes_a_clip_however_little_may_wait() -> None:
    waiting = Waiting(look_ahead_s=0.001)
    for number in range(3):
        wait(waiting, f"clip-{number}", 1.0)
    assert let_go(waiting, [0.0, 0.0]) == ["clip-0", "clip-1"]


def test_without_replicas_one_clip_goes_ahead() -> None:
    waiting = Waiting(look_ahead_s=60.0)
    wait(waiting, "cancelled", 1.0, wanted=False)
    for number in range(3):
        wait(waiting, f"clip-{number}", 2.0)
    assert let_go(waiting, [], 0.0) == ["clip-0"]
    assert let_go(waiting, [], AHEAD_EVERY_S / 2) == []
    assert let_go(waiting, [], AHEAD_EVERY_S) == ["clip-1"]
    assert let_go(waiting, [0.0], AHEAD_EVERY_S) == ["clip-2"]

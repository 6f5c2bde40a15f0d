"""The short storm of `make test`; `python -m benchmarks.chaos` is the long one."""

import pytest

from benchmarks.chaos import storm
from tests.cluster.fleet.audit import Facts
from tests.cluster.fleet.fleet import Fleet
from tests.cluster.fleet.load import Order

KILLS, SEED = 8, 7

pytestmark = pytest.mark.timeout(900)  # a minute on a quiet machine; each wait inside has its own end


def test_nothing_is_lost_done_twice_mixed_up_or_stuck(fleet: Fleet, references: dict[Order, Facts]) -> None:
    outcome = storm(fleet, references, kills=KILLS, seed=SEED, users=3, pause_s=3.0)
    found = outcome.audit
    assert len(outcome.kills) == KILLS
    assert found.accepted > 0
    assert found.broken == []
    # A job that the kills follow about may run out of attempts, and says so. Nothing else may fail.
    assert set(found.failed) <= {"attempts_exhausted"}, [story.job.error for story in found.stories if story.job.error]
    assert found.succeeded > 0

"""The store's order of claims, which is Lua, against the pure one that the simulator and the planner use, on a real Valkey.

The server's clock cannot be set, so moments lie so far from now that a job's lateness, or its turn, does not depend on the
milliseconds that a test takes. Deadlines repeat, horizons fall on them, and jobs come back: where two orders would part.
"""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.store import JobStore, Lease
from serve_app.scheduling.claim import Horizons, Outstanding, claim_horizons
from serve_app.scheduling.order import ClaimOrder
from tests.factories import make_job

HOURS = 3600.0
DUE_IN_S = [hours * HOURS for hours in (-2, 1, 2, 3, 5, 8)]
WORK_S = [hours * HOURS for hours in (0.0, 0.5, 4.5)]
LOOK_AHEAD_S = 2 * HOURS

submits = st.tuples(st.just("submit"), st.sampled_from(DUE_IN_S), st.sampled_from(WORK_S))
horizons = st.sampled_from([float("-inf"), *DUE_IN_S, 2.5 * HOURS, float("inf")])
claims = st.tuples(st.just("claim"), horizons, horizons)
outstanding = st.lists(st.tuples(st.sampled_from(DUE_IN_S), st.sampled_from(WORK_S)), max_size=3)
fitting_claims = st.tuples(st.just("claim_what_fits"), st.lists(outstanding, max_size=3), outstanding)
returns = st.tuples(st.just("requeue"), st.integers(0, 99), st.none())
cancels = st.tuples(st.just("cancel"), st.integers(0, 99), st.none())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(submits, submits, claims, fitting_claims, returns, cancels), max_size=30))
async def test_the_store_claims_what_the_pure_order_claims(valkey: EmbeddedStore, moves: list[tuple]) -> None:
    now = time.time()
    store, order = JobStore(valkey.url, prefix=f"t{time.time_ns()}"), ClaimOrder[str]()
    waiting: dict[str, tuple[float, float]] = {}
    held: dict[str, tuple[Lease, float, float]] = {}
    try:
        for move, one, other in moves:
            if move == "submit":
                job = make_job(deadline_in_s=0.0, estimated_gpu_s=other).model_copy(update={"deadline": now + one})
                await store.submit(job, max_queued=1000)
                waiting[job.id] = (job.deadline, other)
                order.add(job.id, job.deadline, other, job.id)
            elif move == "requeue" and held:
                job_id = sorted(held)[one % len(held)]
                lease, due, work_s = held.pop(job_id)
                await store.requeue(lease, "for the test")
                waiting[job_id] = (due, work_s)
                order.add(job_id, due, work_s, job_id)
            elif move == "cancel" and waiting:
                job_id = sorted(waiting)[one % len(waiting)]
                await store.cancel(job_id)
                del waiting[job_id]
                order = ClaimOrder[str]()  # the pure one forgets nobody: made anew from those that are left
                for left, (due, work_s) in waiting.items():
                    order.add(left, due, work_s, left)
            elif move in ("claim", "claim_what_fits"):
                if move == "claim":
                    limits = Horizons(now + one, now + other)
                else:
                    replicas = [[Outstanding(now + due, work_s) for due, work_s in clips] for clips in one]
                    unplaced = [Outstanding(now + due, work_s) for due, work_s in other]
                    limits = claim_horizons(replicas, unplaced, LOOK_AHEAD_S, now)
                claimed = await store.claim(horizons=limits, lease_s=600)
                expected = order.claim(limits, now)
                assert (claimed.id if claimed else None) == expected
                if claimed:
                    held[claimed.id] = (Lease(claimed.id, claimed.fencing_token), *waiting.pop(claimed.id))
        assert await store.queue_length() == len(order) == len(waiting)
    finally:
        await store.close()

"""The autoscaling policy of generator replicas: as many as meet the deadlines of the work that waits, at the least cost.

The decision itself is `serve_app.scheduling.scale.Scaler`; this is how it hears of the backlog and how Serve hears of it. Given in
the Serve YAML as `autoscaling_config.policy`, a deployment each. Serve calls it on its controller's event loop, several times a
second, so the JobStore is read in a thread. While the store cannot be read, Serve's own policy decides by the requests that it
sees. Every change that is asked for stands in the controller's log and in the store, with its reason.
"""

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingContext

from serve_app.jobs.claimed import claimed_work
from serve_app.jobs.presets import DEFAULT_MODEL_NAME
from serve_app.jobs.scaling import ScalingNote
from serve_app.jobs.store import JobStore
from serve_app.scheduling.claim import Outstanding
from serve_app.scheduling.scale import Backlog, Scaler, ScaleRules

logger = logging.getLogger("ray.serve")

READ_EVERY_S = 1.0
STALE_S = 10.0
"""So old may be what is known of the backlog; after that Serve's own policy decides."""
MOST_QUEUED = 2000
"""Queued jobs that are read one by one, by deadline; were there more, the rest are taken to be like them."""


@dataclass(frozen=True)
class _Seen:
    """The backlog at a moment (monotonic seconds)."""

    at: float
    queued: Sequence[Outstanding]
    replicas: Sequence[Sequence[Outstanding]]


class _Reader:
    """Reads a model's backlog from the store once a second, in a thread of its own, and writes down what was decided."""

    def __init__(self, model: str, store_url: str, store_prefix: str) -> None:
        self.seen: _Seen | None = None
        self.notes: deque[ScalingNote] = deque(maxlen=100)
        self.stop = threading.Event()
        self._model, self._url, self._prefix = model, store_url, store_prefix
        self._cluster = ray.get_runtime_context().get_session_name()

    def start(self) -> None:
        """Read until `stop` is set."""
        threading.Thread(
            target=lambda: asyncio.run(self._read_on()), name=f"backlog-{self._model}", daemon=True
        ).start()

    async def _read_on(self) -> None:
        store = JobStore(self._url, prefix=self._prefix)
        away = False
        while not self.stop.is_set():
            try:
                self.seen = await self._read(store)
                while self.notes:
                    await store.note_scaling(self._model, self.notes[0])
                    self.notes.popleft()
                away = False
            except Exception as error:
                if not away:  # once an outage is enough
                    logger.warning("autoscaling of %s: the job store cannot be read: %s", self._model, error)
                away = True
            await asyncio.sleep(READ_EVERY_S)
        await store.close()

    async def _read(self, store: JobStore) -> _Seen:
        await store.scaler_is_here(self._model, for_s=STALE_S)
        count, queued = await store.queued(self._model, limit=MOST_QUEUED)
        reports = [report for report in await store.replicas() if report.cluster == self._cluster]
        work = claimed_work(self._model, reports, await store.running())
        likely = count / max(1, len(queued))
        return _Seen(
            time.monotonic(),
            [
                replace(clip, remaining_s=clip.remaining_s * likely) if likely > 1 else clip
                for clip in (*(clip for job in queued for clip in job.outstanding()), *work.unplaced)
            ],
            work.replicas,
        )


class BacklogPolicy:
    """Serve's extension point for autoscaling; Serve makes an instance for each deployment, from `policy_kwargs`.

    `model` is the name of the deployment's model in the settings; `store_url` and `store_prefix` are the application's own
    (the URL may stand in the environment instead, as WAN_SERVE_STORE_URL); `rules` are those of ScaleRules but for the
    bounds, which are the `autoscaling_config`'s `min_replicas` and `max_replicas`. Set its `upscale_delay_s` and
    `downscale_delay_s` to 0, since the delays are here.

    Raises ValueError, which stops the deploy, where there is no URL or a rule cannot be.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL_NAME,
        store_url: str | None = None,
        store_prefix: str = "wan",
        **rules: float,
    ) -> None:
        url = store_url or os.environ.get("WAN_SERVE_STORE_URL")
        if not url:
            raise ValueError("autoscaling: give policy_kwargs a store_url, or set WAN_SERVE_STORE_URL on the head node")
        self._model = model
        self._rules = ScaleRules(min_replicas=0, max_replicas=1, **rules)
        self._scaler = Scaler(self._rules)
        self._wanted: int | None = None
        self._blind = False
        self._reader = _Reader(model, url, store_prefix)
        self._reader.start()
        weakref.finalize(self, self._reader.stop.set)

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """How many replicas the deployment should have."""
        seen = self._reader.seen
        if seen is None or time.monotonic() - seen.at > STALE_S:
            return self._without_store(ctx)
        self._blind = False
        self._heed_bounds(ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas)
        starting = max(0, ctx.target_num_replicas - len(seen.replicas))
        decision = self._scaler.decide(Backlog(seen.queued, seen.replicas, starting), time.time())
        if decision.replicas != (ctx.target_num_replicas if self._wanted is None else self._wanted):
            self._note(ctx.target_num_replicas, decision.replicas, decision.reason)
        self._wanted = decision.replicas
        return decision.replicas, {}

    def _heed_bounds(self, lowest: int, highest: int) -> None:
        if (lowest, highest) != (self._rules.min_replicas, self._rules.max_replicas):
            self._rules = replace(self._rules, min_replicas=lowest, max_replicas=highest)
            self._scaler = Scaler(self._rules)

    def _without_store(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        if not self._blind:
            self._blind = True
            logger.warning("autoscaling of %s: the backlog is not known; Serve's own policy decides", self._model)
        return default_autoscaling_policy(ctx)

    def _note(self, had: int, wanted: int, reason: str) -> None:
        logger.info("autoscaling of %s: from %d to %d replicas: %s", self._model, had, wanted, reason)
        self._reader.notes.append(ScalingNote(at=time.time(), had=had, wanted=wanted, reason=reason))

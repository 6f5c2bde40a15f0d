"""The loop that empties the store's outbox: bounded, fair between receivers, patient over hours."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence

from serve_app.errors import StoreUnavailable
from serve_app.jobs.job import Webhook, WebhookState
from serve_app.jobs.store import Delivery, JobStore
from serve_app.settings import Settings
from serve_app.webhooks.deliver import TIMEOUT_S, Attempt, Deliverer
from serve_app.webhooks.network import PublicNetwork, Resolver

logger = logging.getLogger(__name__)

RETRY_IN_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 3 * 3600.0, 6 * 3600.0, 12 * 3600.0)
"""Wait after the first failed attempt, the second, ...; nine attempts in about 23 hours. A tenth of jitter either way."""
MAX_RETRY_AFTER_S = RETRY_IN_S[-1]
"""Longest `Retry-After` that is honoured."""
AT_ONCE = 32
"""Deliveries under way in one loop: dead receivers cost `TIMEOUT_S` each, and the living must not wait for them."""
AT_ONCE_PER_RECEIVER = 2
LEASE_S = 3 * TIMEOUT_S
"""A delivery whose sender died is due again after this."""


class Courier:
    """Delivers what is due. Several may run at once: each delivery is taken under a lease."""

    def __init__(
        self, store: JobStore, deliverer: Deliverer, *, retry_in_s: Sequence[float] = RETRY_IN_S, lease_s: float = LEASE_S
    ) -> None:  # fmt: skip
        self._store = store
        self._deliverer = deliverer
        self._retry_in_s = retry_in_s
        self._lease_s = lease_s
        self._sending: dict[asyncio.Task[None], str] = {}

    @classmethod
    def of(cls, settings: Settings, store: JobStore) -> "Courier":
        """The courier of a service."""
        network = PublicNetwork(Resolver(AT_ONCE), allow_private=settings.webhook_allow_private)
        return cls(store, Deliverer(settings.webhook_secrets, network))

    async def turn(self) -> None:
        """Begin what is due, or wait for news. Raises `StoreUnavailable`."""
        load = Counter(self._sending.values())
        busy = [receiver for receiver, count in load.items() if count >= AT_ONCE_PER_RECEIVER]
        free = AT_ONCE - len(self._sending)
        due = await self._store.take_webhooks(limit=free, lease_s=self._lease_s, busy=busy) if free else []
        for delivery in due:
            task = asyncio.create_task(self._send(delivery))
            self._sending[task] = delivery.receiver
            task.add_done_callback(self._sending.pop)
        if not due:
            news = asyncio.create_task(self._store.wait("outbox", timeout_s=1.0))
            try:
                await asyncio.wait([news, *self._sending], return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()

    async def _send(self, delivery: Delivery) -> None:
        """One attempt, and its place in the record. Where that cannot be written, the delivery is due again later."""
        job = delivery.job
        try:
            attempt = await self._deliverer.attempt(job)
        except Exception:
            logger.exception("job %s: its webhook could not be sent", job.id)
            attempt = Attempt("the service failed to send it; its log says why")
        try:
            webhook, retry_in_s = self._after(delivery.webhook, attempt)
            log = logger.info if attempt.error is None else logger.warning
            log("job %s: webhook to %s, attempt %d: %s", job.id, delivery.receiver, webhook.attempts,
                attempt.error or "delivered")  # fmt: skip
            if not await self._store.settle_webhook(delivery, webhook, retry_in_s=retry_in_s):
                logger.warning("job %s: its webhook was taken by another sender, or the job is gone", job.id)
        except StoreUnavailable as error:
            logger.warning("job %s: the webhook's attempt is not written down: %s", job.id, error)

    def _after(self, before: Webhook, attempt: Attempt) -> tuple[Webhook, float | None]:
        """What the record says after an attempt, and in how many seconds to try again (None: never)."""
        attempts = before.attempts + 1
        state, retry_in_s = WebhookState.PENDING, None
        if attempt.error is None:
            state = WebhookState.DELIVERED
        elif attempt.gone or attempts > len(self._retry_in_s):
            state = WebhookState.FAILED
        else:
            asked_s = min(attempt.retry_after_s, MAX_RETRY_AFTER_S)
            retry_in_s = max(self._retry_in_s[attempts - 1], asked_s) * random.uniform(0.9, 1.1)
        return Webhook(url=before.url, state=state, attempts=attempts, last_error=attempt.error), retry_in_s

    async def close(self) -> None:
        """Stop. What is under way is due again, for any courier, once its lease has run out."""
        while self._sending:
            for task in self._sending:
                task.cancel()  # again, because a store's client that is just connecting swallows a cancellation
            await asyncio.wait(list(self._sending), timeout=0.2)

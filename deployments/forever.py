"""Loops of a replica that nothing ends but the replica's own end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from deployments.measures import StoreStanding
from serve_app.errors import StoreUnavailable

logger = logging.getLogger(__name__)

PAUSE_S = 1.0
"""After a turn that failed."""


async def forever(turn: Callable[[], Awaitable[object]], every_s: float = 0.0) -> None:
    """Call `turn` again and again, with a pause in between; whatever it raises is logged, an outage of the job store once."""
    store, who = StoreStanding(), getattr(turn, "__qualname__", repr(turn))
    while True:
        try:
            await turn()
            store.answers()
            await asyncio.sleep(every_s)
        except StoreUnavailable as error:
            store.is_away(who, error)
            await asyncio.sleep(PAUSE_S)
        except Exception:
            logger.exception("%s failed; going on", who)
            await asyncio.sleep(PAUSE_S)

"""A video's frames through the Upscaler's replicas: in order, a few blocks at a time, each again where its replica died."""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import tenacity
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.thread_work import ThreadWork

logger = logging.getLogger(__name__)

BLOCK_FRAMES = 2
"""What is sent at once, and what a killed upscaler costs: few, since a frame takes seconds on a CPU; more than one, since a call costs
some milliseconds and a frame no more on a GPU."""
BLOCKS_IN_FLIGHT = 8
"""Of one job, over all replicas: 16 frames, 236 MB of 2560x1920. So many replicas can work on one job."""

again = tenacity.retry(
    retry=tenacity.retry_if_exception_type((RayActorError, ObjectLostError)),
    wait=tenacity.wait_exponential_jitter(initial=0.5, max=8.0),
    stop=tenacity.stop_after_attempt(5),
    before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
    reraise=True,
)
"""For calls whose replica died, perhaps more than once: until Serve has heard of it, it may well send them there again."""


class Upscaling:
    """The Upscaler, as a finisher uses it."""

    def __init__(self, upscaler: DeploymentHandle) -> None:
        self._upscaler = upscaler

    @again
    async def about(self) -> dict[str, Any]:
        """What a receipt tells of the network."""
        return await self._upscaler.about.remote()

    def upscaled(self, work: ThreadWork, blocks: Iterable[np.ndarray], factor: int) -> Iterator[np.ndarray]:
        """The frames of `blocks` in order, upscaled, in blocks of their own. To be called in the thread of `work`.

        Raises concurrent.futures.CancelledError once the work is stopped, RayActorError where a block killed replica after replica.
        """
        in_flight: deque[Future[np.ndarray]] = deque()
        for block in blocks:
            for start in range(0, len(block), BLOCK_FRAMES):
                in_flight.append(work.ask(self._upscaled(block[start : start + BLOCK_FRAMES], factor)))
                if len(in_flight) == BLOCKS_IN_FLIGHT:
                    yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()

    @again
    async def _upscaled(self, frames: np.ndarray, factor: int) -> np.ndarray:
        call = self._upscaler.upscale.remote(frames, factor)
        try:
            return await call
        except asyncio.CancelledError:
            call.cancel()
            raise
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error

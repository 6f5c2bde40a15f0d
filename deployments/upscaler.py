"""Replicas that make frames larger: on a GPU of their own, or on the CPU. Bound only where `upscale_model` is set."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray import serve

from serve_app import logs
from serve_app.settings import Settings
from serve_app.upscale_weights import find_weights


# A second block waits at the replica while the first is on its way; what is more waits at the callers, where the autoscaler counts it.
@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=2)
class Upscaler:
    """Upscales blocks of frames, one frame at a time. Knows no job: a caller that goes away costs it the frame that it is at."""

    async def __init__(self, settings: Settings) -> None:
        from serve_app.media.upscale import Upscaler as Network  # only where wan-serve[upscale] is installed

        logs.join()
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        self._weights = await asyncio.to_thread(find_weights, settings)
        self._network = await asyncio.to_thread(
            Network, self._weights.path, tile_px=settings.upscale_tile_px, threads=cores, device=settings.device
        )
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def about(self) -> dict[str, Any]:
        """What a receipt tells of the network."""
        return {
            "model": self._weights.name,
            "sha256": self._weights.sha256,
            "model_scale": self._network.scale,
            "provider": self._network.provider,
        }

    async def upscale(self, frames: np.ndarray, factor: int) -> np.ndarray:
        """The frames (uint8 RGB [frames, height, width, 3]), each `factor` times as wide and as high."""
        loop = asyncio.get_running_loop()
        larger = [await loop.run_in_executor(self._thread, self._network.upscale, frame, factor) for frame in frames]
        return np.stack(larger)

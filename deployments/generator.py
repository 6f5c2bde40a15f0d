"""GPU replicas that hold the model: an Engine each, behind one streaming method."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.clip_trace import ClipTrace
from deployments.forever import forever
from deployments.measures import ReplicaWatch
from serve_app import logs
from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipReceipt, ClipRequest
from serve_app.jobs.presets import PRESETS, size_of
from serve_app.jobs.replica import ClipReport, ReplicaReport
from serve_app.jobs.store import JobStore, Lease
from serve_app.scheduling.cost import ARCHITECTURES, CARDS
from serve_app.settings import ModelSettings, Settings
from serve_app.tracing import Tracing

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine
    from serve_app.engine.load import ModelSource
    from serve_app.engine.paced import PacedEngine

    Opened = tuple[Engine | PacedEngine, str, ModelSource]
    """With the device that it runs on and the model that it holds."""

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
DRAIN_TIMEOUT_S = 10.0
"""For the checkpoints of clips that are still here when the replica goes."""


@dataclass(frozen=True)
class ClipReady:
    """A finished clip whose frames lie in the object store. They die with this replica, so use them soon.

    `frames`: reference to a uint8 RGB array of shape [frames, height, width, 3]; zero copy on the same node.
    """

    clip_id: str
    frames: ray.ObjectRef
    receipt: ClipReceipt


def preset_clips() -> list[ClipRequest]:
    """A clip of each preset's shape: what a replica makes fast before it takes work."""
    return [
        ClipRequest(
            clip_id=f"warm-up-{name}",
            prompt="",
            negative_prompt="",
            width=size_of(preset.resolution)[0],
            height=size_of(preset.resolution)[1],
            frames=preset.video_length,
            steps=preset.sample_steps,
            guidance_scale=preset.guidance_scale,
            flow_shift=preset.sample_shift,
            seed=0,
            deadline=0.0,
        )
        for name, preset in PRESETS.items()
    ]


def lease_of(clip_id: str) -> Lease:
    """The lease under which a clip is made: `{job id}.{fencing token}.{clip and try}`."""
    job_id, token, _ = clip_id.split(".")
    return Lease(job_id, int(token))


def _open_engine(settings: Settings, model: ModelSettings) -> "Opened":
    import torch

    from serve_app.engine.checkpoints import CheckpointStore
    from serve_app.engine.engine import Engine
    from serve_app.engine.load import pick_device, resolve_model

    device = pick_device(settings.device)
    source = resolve_model(model.source, model.revision, device, settings.data_dir)
    engine = Engine(
        source,
        device=device,
        checkpoints=CheckpointStore(settings.resolved_checkpoint_url),
        checkpoint_every_s=settings.checkpoint_every_s,
        text_encoder_place=model.text_encoder_place,
        vae_dtype=None if model.vae_dtype == "auto" else getattr(torch, model.vae_dtype),
        warm_up=preset_clips() if device == "cuda" and model.warm_up else (),
    )
    return engine, device, source


def _open_paced_engine(_: Settings, model: ModelSettings) -> "Opened":
    from serve_app.engine.load import ModelSource
    from serve_app.engine.paced import PacedEngine

    assert model.paced is not None
    card, architecture = CARDS[model.reference_card], ARCHITECTURES[model.architecture]
    engine = PacedEngine(card, architecture, speedup=model.paced)
    return engine, f"paced as {card.name}", ModelSource("none", None, trained=False)


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=64,
    health_check_timeout_s=120,
    request_router_config=RequestRouterConfig(request_router_class="deployments.routing:BacklogRouter"),
)
class Generator:
    """Turns clips into frames with one of the settings' models. The engine, not Serve, decides what runs next, so Serve may
    hand over many clips."""

    async def __init__(self, settings: Settings, model_name: str) -> None:
        logs.join()
        began, model = time.monotonic(), settings.models[model_name]
        opened = _open_engine if model.paced is None else _open_paced_engine
        self._engine, device, source = await asyncio.to_thread(opened, settings, model)
        self._engine.start()
        self._tracing = Tracing.of(settings, "Generator")
        self._store = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
        context = serve.get_replica_context()
        self._identity = ReplicaReport(
            id=context.replica_id.unique_id,
            cluster=ray.get_runtime_context().get_session_name(),
            node=ray.util.get_node_ip_address(),
            device=device,
            model=model_name,
            source=source.name_or_path,
            trained=source.trained,
        )
        self._held: dict[str, asyncio.Event] = {}
        """Finished clips whose frames are still wanted, by id; set where the job turns out to have another conductor."""
        self._watch = ReplicaWatch(model_name, model, began)
        self._reporting = asyncio.create_task(forever(self._report, REPORT_EVERY_S))

    async def generate(
        self, request: ClipRequest, traceparent: str | None = None
    ) -> AsyncIterator[ClipEvent | ClipReady]:
        """The clip's events as they happen, ending with `ClipReady` or `ClipFailed`. Closing the stream frees the GPU."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[ClipEvent]()
        self._engine.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        trace = ClipTrace(self._tracing, request, traceparent, replica=self._identity.id)
        try:
            while True:
                event = await events.get()
                self._watch.event(request, event)
                trace.event(event)
                if isinstance(event, ClipDone):
                    logger.info("clip %s is made: %.1f GPU-seconds", request.clip_id, event.receipt.gpu_s)
                    frames, receipt = ray.put(event.frames), replace(event.receipt, replica=self._identity.id)
                    del event  # with the engine's copy of the frames
                    done = self._held[request.clip_id] = asyncio.Event()
                    yield ClipReady(request.clip_id, frames, receipt)
                    # Frames live as long as a reference here does: until the job is done with them, and closes the stream.
                    await done.wait()
                    return
                yield event
                if isinstance(event, ClipFailed):
                    return
        finally:
            trace.end()
            self._engine.cancel(request.clip_id)
            self._held.pop(request.clip_id, None)

    def check_health(self) -> None:
        """Serve replaces the replica when its engine has stopped."""
        self._engine.check()

    async def _report(self) -> None:
        """Tell the store which clips are here; hear which of them are watched, and stop those whose job was cancelled or is
        driven by another now.

        A conductor stops its clips by itself; this is for one that hangs or is cut off.
        """
        report = self._engine.report()
        self._watch.report(report)
        progress, running = report.clips, report.running
        leases = [lease_of(clip.clip_id) for clip in progress]
        clips = [
            ClipReport(
                clip_id=clip.clip_id,
                job_id=lease.job_id,
                deadline=clip.deadline,
                step=clip.step,
                steps=clip.steps,
                remaining_s=clip.remaining_s,
            )
            for clip, lease in zip(progress, leases, strict=True)
        ]
        news = {"clips": clips, "running": running and running.clip_id, "busy_share": self._watch.busy_share}
        await self._store.report_replica(self._identity.model_copy(update=news))
        for clip, standing in zip(clips, await self._store.standings(leases), strict=True):
            if standing != "ok":
                logger.warning("clip %s stops: its job's lease is %s", clip.clip_id, standing)
                self._engine.cancel(clip.clip_id)
        held = list(self._held)
        for clip_id, standing in zip(held, await self._store.standings([lease_of(id) for id in held]), strict=True):
            if standing != "ok" and clip_id in self._held:
                self._held[clip_id].set()
        for clip, wanted in zip(clips, await self._store.watched([lease.job_id for lease in leases]), strict=True):
            self._engine.listen(clip.clip_id, wanted)

    async def __del__(self) -> None:
        if hasattr(self, "_reporting"):
            self._reporting.cancel()
            await asyncio.to_thread(self._engine.drain, DRAIN_TIMEOUT_S)
            await asyncio.to_thread(self._engine.close)
            await asyncio.to_thread(self._tracing.close)
            await self._store.close()

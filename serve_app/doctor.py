"""`wan-serve doctor`: is everything here that the service needs, and what to do where it is not."""

import asyncio
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path

import httpx
import redis

from serve_app.errors import WanServeError
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.store import JobStore
from serve_app.settings import ModelSettings, Settings, socket_path
from serve_app.storage import open_store
from serve_app.tracing import Tracing

EXPIRES_SOON = timedelta(days=30)


class Verdict(StrEnum):
    """How a check ended: `note` is for what works but should be known."""

    OK = "ok"
    NOTE = "note"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One checked thing, what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Check each thing in turn; an unexpected error of a check is its finding. Blocks for a few seconds."""
    checks: list[tuple[str, Callable[[Settings], Finding]]] = [
        ("Python", _python),
        ("Ray", _ray),
        ("FFmpeg", _ffmpeg),
        ("signing", _signing),
        ("GPU", _gpu),
        *((f"model {name}", partial(_model, f"model {name}", model)) for name, model in settings.models.items()),
        ("upscaling", _upscaling),
        ("job store", _store),
        ("storage", _storage),
        ("tracing", _tracing),
    ]
    for name, check in checks:
        try:
            yield check(settings)
        except WanServeError as error:
            yield Finding(name, Verdict.FAILED, error.message, error.hint)
        except Exception as error:
            yield Finding(name, Verdict.FAILED, f"{type(error).__name__}: {error}", "Reinstall: pip install -e .")


def _python(_: Settings) -> Finding:
    version = sys.version.split()[0]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", Verdict.FAILED, version, "Use Python 3.11 or 3.12.")
    return Finding("Python", Verdict.OK, version)


def _ray(_: Settings) -> Finding:
    version = importlib.metadata.version("ray")
    if not version.startswith("2.60."):
        advice = "Install the version that this release is tested with: pip install 'ray[serve]>=2.60,<2.61'."
        return Finding("Ray", Verdict.FAILED, version, advice)
    return Finding("Ray", Verdict.OK, version)


def _ffmpeg(_: Settings) -> Finding:
    from imageio_ffmpeg import get_ffmpeg_exe

    binary = get_ffmpeg_exe()
    said = subprocess.run([binary, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30, check=True)
    if "libx264" not in said.stdout:
        advice = "Unset IMAGEIO_FFMPEG_EXE to use the packaged FFmpeg, or name one that was built with libx264."
        return Finding("FFmpeg", Verdict.FAILED, f"{binary} has no libx264", advice)
    version = subprocess.run([binary, "-version"], capture_output=True, text=True, timeout=30, check=True).stdout
    return Finding("FFmpeg", Verdict.OK, version.split(" Copyright")[0])


def _signing(settings: Settings) -> Finding:
    from serve_app.media.certificates import development_root
    from serve_app.media.provenance import ready_certificate

    certificate = ready_certificate(settings)
    left = certificate.not_after - datetime.now(UTC)
    found = f"{certificate.common_name}, {certificate.organization}; until {certificate.not_after:%Y-%m-%d}"
    if certificate.is_development:
        advice = (
            "Nobody else trusts this certificate. For a public service set c2pa_certificate and c2pa_private_key. "
            f"On this machine its files verify against {development_root(settings.provenance_dir)}."
        )
        return Finding("signing", Verdict.NOTE, found, advice)
    if left < EXPIRES_SOON:
        advice = f"It expires in {left.days} days, and then nothing is delivered any more: renew c2pa_certificate."
        return Finding("signing", Verdict.NOTE, found, advice)
    return Finding("signing", Verdict.OK, found)


def _gpu(settings: Settings) -> Finding:
    import torch

    if not torch.cuda.is_available():
        built_for = f"torch {torch.__version__}"
        if settings.device == "cuda":
            advice = "Check nvidia-smi, and install a CUDA build of torch (README, 'GPU')."
            return Finding("GPU", Verdict.FAILED, f"device is 'cuda' but {built_for} sees none", advice)
        return Finding("GPU", Verdict.NOTE, f"none seen by {built_for}", "Without a GPU only a small model is of use.")
    card, memory_gb = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 1e9
    if memory_gb < 10:
        return Finding("GPU", Verdict.FAILED, f"{card}, {memory_gb:.0f} GB", "Wan 2.1 1.3B needs 8.2 GB free.")
    return Finding("GPU", Verdict.OK, f"{torch.cuda.device_count()} x {card}, {memory_gb:.0f} GB")


def _model(name: str, model: ModelSettings, settings: Settings) -> Finding:
    from huggingface_hub import try_to_load_from_cache

    from serve_app.engine.load import WAN_SHAPES, pick_device, resolve_model

    source = resolve_model(model.source, model.revision, pick_device(settings.device), settings.data_dir)
    where = source.name_or_path
    if Path(where).is_dir():
        if Path(where) == WAN_SHAPES:
            return Finding(
                name, Verdict.NOTE, where, "This is the bundled demonstration model: it knows coloured shapes alone."
            )
        if source.trained:
            return Finding(name, Verdict.OK, where)
        return Finding(name, Verdict.NOTE, where, "This is the untrained test model: it makes noise.")
    if Path(where).is_absolute() or where.count("/") != 1:
        advice = "Set its `source` to a folder with a model_index.json, or to a hub id such as owner/name."
        return Finding(name, Verdict.FAILED, f"{where} is neither a folder nor a hub id", advice)
    if isinstance(try_to_load_from_cache(where, "model_index.json", revision=source.revision), str):
        return Finding(name, Verdict.OK, f"{where} at {source.revision}, in the hub's cache")
    advice = "The first start downloads it (about 29 GB); or fetch it before: hf download " + where
    return Finding(name, Verdict.NOTE, f"{where} is not on this machine", advice)


def _upscaling(settings: Settings) -> Finding:
    if settings.upscale_model is None:
        return Finding("upscaling", Verdict.OK, "off (upscale_model is not set)")
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return Finding("upscaling", Verdict.FAILED, "ONNX Runtime is missing", "Run: pip install 'wan-serve[upscale]'")

    from serve_app.media.upscale import Upscaler
    from serve_app.upscale_weights import find_weights

    weights = find_weights(settings)
    upscaler = Upscaler(weights.path, tile_px=settings.upscale_tile_px)
    found = f"{weights.name}, x{upscaler.scale}, on {upscaler.provider.removesuffix('ExecutionProvider')}"
    if settings.upscale_model_sha256 is None and settings.upscale_model.startswith("https://"):
        return Finding(
            "upscaling", Verdict.NOTE, found, f"To be sure of it, set upscale_model_sha256: {weights.sha256}"
        )
    return Finding("upscaling", Verdict.OK, found)


def _store(settings: Settings) -> Finding:
    if settings.store_url is None:
        if not socket_path(settings.data_dir).exists():
            EmbeddedStore(settings.data_dir).stop()
            return Finding("job store", Verdict.OK, f"embedded, starts and stops under {settings.data_dir}")
        return Finding("job store", Verdict.OK, f"embedded, at {_ping(settings)}")
    server = redis.Redis.from_url(settings.store_url, socket_timeout=5, decode_responses=True)
    address = _ping(settings)
    version = str(server.info("server").get("redis_version", "0"))
    if int(version.split(".", maxsplit=1)[0]) < 7:
        return Finding("job store", Verdict.FAILED, f"Redis {version}", "Use Redis 7 or later, or Valkey.")
    try:
        kept = {name: server.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")}
    except redis.ResponseError:
        advice = "Ask its operator: appendonly yes, appendfsync always, maxmemory-policy noeviction."
        return Finding("job store", Verdict.NOTE, f"{address} does not tell its configuration", advice)
    losses = []
    if kept["appendonly"] != "yes":
        losses.append("a restart loses every job since the last snapshot (set appendonly yes)")
    elif kept["appendfsync"] != "always":
        losses.append("a power cut loses the last second's accepted jobs (set appendfsync always)")
    if kept["maxmemory-policy"] != "noeviction":
        losses.append("under memory pressure it throws jobs away (set maxmemory-policy noeviction)")
    if losses:
        return Finding("job store", Verdict.NOTE, address, "; ".join(losses))
    return Finding("job store", Verdict.OK, f"{address}, version {version}, syncs each write and never evicts")


def _ping(settings: Settings) -> str:
    async def ping() -> None:
        store = JobStore(settings.resolved_store_url)
        try:
            await store.ping()
        finally:
            await store.close()

    asyncio.run(ping())
    return settings.resolved_store_url.rsplit("@", 1)[-1]


def _storage(settings: Settings) -> Finding:
    open_store(settings).check()
    where = (
        f"Supabase bucket {settings.supabase_bucket!r}" if settings.storage == "supabase" else settings.artifacts_dir
    )
    return Finding("storage", Verdict.OK, f"{where}: a file was written and removed")


def _tracing(settings: Settings) -> Finding:
    if settings.otlp_endpoint is None:
        return Finding("tracing", Verdict.OK, "off (otlp_endpoint is not set)")
    Tracing.of(settings, "doctor").close()
    address = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces"
    try:  # no bytes are a valid message without spans
        httpx.post(address, headers={"Content-Type": "application/x-protobuf"}, timeout=5).raise_for_status()
    except httpx.HTTPError as error:
        advice = (
            "Jobs go on without traces. Is it OTLP over HTTP (port 4318 as a rule, not 4317), and reached from here?"
        )
        return Finding("tracing", Verdict.NOTE, f"{address}: {error}", advice)
    return Finding("tracing", Verdict.OK, f"{address} takes spans")

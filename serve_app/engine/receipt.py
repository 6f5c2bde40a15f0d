"""The engine's part of a job's receipt: what ran, and how long it took."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from serve_app.engine.clip import ClipReceipt
from serve_app.engine.clip_state import ClipState
from serve_app.engine.load import ModelSource
from serve_app.engine.model_runner import ModelRunner


def receipt_of(clip: ClipState, source: ModelSource, runner: ModelRunner) -> ClipReceipt:
    """The receipt of a finished clip."""
    return ClipReceipt(
        model=source.name_or_path,
        model_revision=source.revision,
        trained=source.trained,
        profile=clip.request.profile,
        device=torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else "cpu",
        dtype=str(runner.pipeline.transformer.dtype).removeprefix("torch."),
        seed=clip.request.seed,
        steps=clip.request.steps,
        gpu_s=clip.gpu_s,
        step_ms=1000 * median(clip.step_s),
        decode_ms=1000 * clip.decode_s,
        resumed_from_steps=clip.resumed_from_steps,
        kernels=runner.kernels_of(clip.request),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of what computes a clip."""
    import diffusers
    import transformers

    from serve_app import __version__

    found = {
        "wan-serve": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    for package in ("flash-attn-4", "flash-attn-3"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

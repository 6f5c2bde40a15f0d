"""Which model, and the one way it is loaded: `WanPipeline.from_pretrained(directory or hub id)`."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.engine.quiet import quiet_progress_bars
from serve_app.engine.tiny import build_tiny_model, is_untrained
from serve_app.errors import EngineError, ModelNotLoadable

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline

_log = logging.getLogger(__name__)

DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
DEFAULT_REVISION = "0fad780a534b6463e45facd96134c9f345acfa5b"
"""The commit of `DEFAULT_MODEL` that the service was measured with; pinned so that a push to the hub changes nothing."""

WAN_SHAPES = Path(__file__).parents[1] / "models" / "wan_shapes"
"""The bundled demonstration model: it knows a small world of coloured shapes (training/README.md)."""

TINY_MODEL = "tiny"
"""The `source` of the tiny untrained model, which tests run."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a directory or a hub id, the hub revision if any, and whether its weights are trained."""

    name_or_path: str
    revision: str | None
    trained: bool


def pick_device(device: str) -> str:
    """`cuda` or `cpu` for a device setting of `auto`, `cuda` or `cpu`.

    Raises `EngineError` if the setting is `cuda` and torch sees no GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"device is 'cuda', but torch {torch.__version__} sees no GPU",
            param="device",
            hint="Check nvidia-smi and that a CUDA build of torch is installed, or set device to 'auto'.",
        )
    return device


def resolve_model(model: str | None, revision: str | None, device: str, data_dir: Path) -> ModelSource:
    """The model that the settings mean. `device` is `cuda` or `cpu`.

    Without a `model`: Wan 2.1 T2V 1.3B at its pinned revision on `cuda`, the bundled wan-shapes on `cpu`. `tiny` is the
    untrained test model, built under `data_dir/models/tiny` if it is not there. Raises `ModelNotLoadable` for a directory
    that does not exist.
    """
    if model is None and device == "cpu":
        return ModelSource(str(WAN_SHAPES), None, trained=True)
    if model == TINY_MODEL:
        return ModelSource(str(build_tiny_model(data_dir / "models" / "tiny")), None, trained=False)
    if model is None or model == DEFAULT_MODEL:
        return ModelSource(DEFAULT_MODEL, revision or DEFAULT_REVISION, trained=True)
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource(str(path.resolve()), None, trained=not is_untrained(path))
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ModelNotLoadable(
            f"model is {model!r}: no such directory",
            param="model",
            hint="Give a directory made by save_pretrained, or a hub id such as " + DEFAULT_MODEL + ".",
        )
    return ModelSource(model, revision, trained=True)


def load_pipeline(
    source: ModelSource, device: str, dtype: "torch.dtype", *, vae_dtype: "torch.dtype | None" = None
) -> "WanPipeline":
    """Load `source` with its transformer and text encoder in `dtype`; transformer and VAE onto `device`.

    The text encoder stays on the CPU: `TextEncoder` puts it where it is to be. The VAE is float32 unless `vae_dtype` says
    otherwise, as diffusers advises for Wan. Raises `ModelNotLoadable` with what to do: offline, gated, not found, a missing
    file, a broken install, or another kind of model.
    """
    import torch

    _log.info(
        "loading %s (revision %s) onto %s; from the hub, a first time takes minutes",
        source.name_or_path,
        source.revision,
        device,
    )
    with quiet_progress_bars():
        try:
            from diffusers import WanPipeline

            pipeline = WanPipeline.from_pretrained(
                source.name_or_path,
                revision=source.revision,
                dtype={"default": dtype, "vae": vae_dtype or torch.float32},
                use_safetensors=True,
            )
            for part in (pipeline.transformer, pipeline.vae):
                if part is not None:
                    part.to(device)
        except Exception as error:
            raise _not_loadable(source, error) from error
    pipeline.set_progress_bar_config(disable=True)
    _check_kind(source, pipeline)
    return pipeline


def _check_kind(source: ModelSource, pipeline: "WanPipeline") -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    wanted: dict[str, type] = {
        "transformer": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "scheduler": UniPCMultistepScheduler,
        "transformer_2": type(None),
    }
    for part, kind in wanted.items():
        found = getattr(pipeline, part)
        if not isinstance(found, kind):
            raise ModelNotLoadable(
                f"{source.name_or_path}: {part} is a {type(found).__name__}, not a {kind.__name__}",
                param="model",
                hint="Only Wan 2.1 text-to-video models run here (Wan 2.2 has two transformers).",
            )
    if pipeline.config.expand_timesteps or pipeline.transformer.config.image_dim is not None:
        raise ModelNotLoadable(
            f"{source.name_or_path} is not a plain text-to-video model (expand_timesteps or image inputs)",
            param="model",
            hint="Only Wan 2.1 text-to-video models run here.",
        )


def _not_loadable(source: ModelSource, error: Exception) -> ModelNotLoadable:
    name = source.name_or_path
    reason = " ".join(str(error).split())[:500]
    return ModelNotLoadable(
        f"{name} (revision {source.revision}) could not be loaded: {type(error).__name__}: {reason}",
        param="model",
        hint=_what_to_do(source, error),
    )


def _what_to_do(source: ModelSource, error: Exception) -> str:
    import torch
    from huggingface_hub import errors as hub

    name = source.name_or_path
    chain = list(_chain(error))

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    broken_import = "could not import module" in " ".join(map(str, chain)).lower()
    revision = f" --revision {source.revision}" if source.revision else ""
    remedies = (
        (
            broken_import,
            "A package that transformers imports is broken here, most often a torchvision that does not match torch: "
            "`pip uninstall torchvision` (the service does not use it), or install the matching one.",
        ),
        (
            is_a(torch.OutOfMemoryError),
            "The model does not fit this GPU's memory: free it of other processes, or take a larger card.",
        ),
        (
            is_a(hub.GatedRepoError),
            f"Accept the model's terms on https://huggingface.co/{name} and set HF_TOKEN.",
        ),
        (
            is_a(hub.RevisionNotFoundError),
            f"The hub has no revision {source.revision!r} of {name}: correct its `revision`.",
        ),
        (
            is_a(hub.RepositoryNotFoundError),
            f"Check the spelling of {name}; if it is private, set HF_TOKEN.",
        ),
        (
            is_a(hub.LocalEntryNotFoundError) or is_a(hub.OfflineModeIsEnabled),
            "The hub cannot be reached and the model is not in the local cache. Where there is a connection, run "
            f"`hf download {name}{revision}` and bring the cache (HF_HOME) here, or set its `source` to a directory that "
            "holds the model.",
        ),
        (Path(name).is_dir(), f"Files are missing or damaged in {name}: save or download the model again."),
    )
    return next(
        (remedy for applies, remedy in remedies if applies), "`wan-serve doctor` checks model and installation."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

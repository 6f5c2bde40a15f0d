"""Which exact attention kernel is fastest here, found by timing. Exact: softmax attention to bf16 rounding, no approximation.

diffusers calls attention through a dispatch with named backends. This file times the ones that are usable for a model's
self-attention at one length, and sets the winner. FlashAttention 4 comes from its own package (`flash-attn-4`): diffusers
would fetch it from the hub, so the package's function is put where diffusers keeps the fetched one.
"""

import importlib.util
import logging
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch

from serve_app.engine.device_span import DeviceSpan

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_log = logging.getLogger(__name__)

DEFAULT = "native"
"""torch's scaled_dot_product_attention, which picks among its own kernels."""

_MARGIN = 0.98
"""A kernel must take less than this share of the default's time to replace it."""

_MAX_ERROR = 1e-2
"""Largest ||difference from the default|| / ||default|| in bf16 that counts as exact; a right kernel has 2e-3 to 4e-3."""

_WARM_RUNS, _RUNS = 2, 7


def usable_backends() -> list[str]:
    """Names of diffusers' attention backends that can be tried on this machine, the default first."""
    backends = [DEFAULT, "_native_cudnn", "_native_flash"]
    if importlib.util.find_spec("flash_attn_interface") is not None:
        backends.append("_flash_3")
    if importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None:
        _provide_flash_attention_4()
        backends.append("flash_4_hub")
    return backends


def time_backends(
    *, rows: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Milliseconds of self-attention by backend, for `rows` sequences. A backend that fails or is wrong is left out."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(rows, tokens, heads, head_dim, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    milliseconds: dict[str, float] = {}
    reference: torch.Tensor | None = None
    for name in usable_backends():

        def attend(name: str = name) -> torch.Tensor:
            return dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))

        try:
            out = attend().float()
            if reference is None:
                reference = out
            error = float((out - reference).norm() / reference.norm())
            if not error <= _MAX_ERROR:
                raise RuntimeError(f"differs from {DEFAULT} by {error:.1e}")
            milliseconds[name] = _median_ms(attend, device)
        except Exception as failure:
            if name == DEFAULT:
                raise
            _log.info("attention backend %s is not used here: %s", name, " ".join(str(failure).split())[:200])
    return milliseconds


def fastest(milliseconds: dict[str, float]) -> str:
    """The backend to use, given `time_backends`."""
    name = min(milliseconds, key=lambda backend: milliseconds[backend])
    return name if milliseconds[name] < _MARGIN * milliseconds[DEFAULT] else DEFAULT


def set_self_attention(transformer: "WanTransformer3DModel", backend: str) -> None:
    """Make every block's self-attention use `backend`; attention to the text, which is short, stays as it is."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    name = AttentionBackendName(backend)
    for block in transformer.blocks:
        block.attn1.processor._attention_backend = name


def _provide_flash_attention_4() -> None:
    from diffusers.models import attention_dispatch

    kernel = attention_dispatch._HUB_KERNELS_REGISTRY[attention_dispatch.AttentionBackendName.FLASH_4_HUB]
    if kernel.kernel_fn is None:
        kernel.kernel_fn = _flash_attention_4


def _flash_attention_4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None, causal: bool
) -> torch.Tensor:
    assert softmax_scale is None
    assert not causal
    return _flash_attention_4_op(q, k, v)


@torch.library.custom_op("wan_serve::flash_attention_4", mutates_args=())
def _flash_attention_4_op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Opaque to torch.compile, which cannot look into the package's own just-in-time compiler. [rows, tokens, heads, dim]."""
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    out = flash_attn_func(query, key, value)
    return out[0] if isinstance(out, tuple) else out


@_flash_attention_4_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _median_ms(work: Callable[[], object], device: torch.device) -> float:
    spans = []
    for _ in range(_WARM_RUNS + _RUNS):
        with DeviceSpan(device) as span:
            work()
        span.wait()
        spans.append(span.seconds)
    return 1000 * median(spans[_WARM_RUNS:])

"""The cost model: GPU-seconds of a clip on a card. The one source for deadlines, prices, routing and autoscaling.

FLOPs are counted from the architecture (two for each multiply-add of every matrix product, attention included; the
rest is under 1%). Seconds are FLOPs over the rate that a card reaches on this model, plus the decode's seconds.
"""

import re
import statistics
from collections import deque
from dataclasses import dataclass, field

TEXT_TOKENS = 512
"""Length to which Wan pads its text embeddings (WanPipeline, max_sequence_length)."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a Wan transformer and the compression of its VAE. Source: the model's own config.json files."""

    layers: int
    dim: int
    ffn_dim: int
    patch: tuple[int, int, int] = (1, 2, 2)
    spatial_compression: int = 8
    temporal_compression: int = 4

    def latent_frames(self, frames: int) -> int:
        """Frames of the latents of a clip: the first alone, then one for each `temporal_compression`."""
        return (frames - 1) // self.temporal_compression + 1

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Tokens of one clip: latent frames x patches of a latent frame."""
        rows = height // self.spatial_compression // self.patch[1]
        columns = width // self.spatial_compression // self.patch[2]
        return self.latent_frames(frames) // self.patch[0] * rows * columns

    def forward_flops(self, width: int, height: int, frames: int) -> float:
        """FLOPs of one transformer forward for one guidance branch."""
        length, d = self.tokens(width, height, frames), self.dim
        linear = 2 * length * (6 * d * d + 2 * d * self.ffn_dim)
        text_keys_values = 2 * TEXT_TOKENS * 2 * d * d
        attention = 4 * length * (length + TEXT_TOKENS) * d
        return float(self.layers * (linear + text_keys_values + attention))

    def step_flops(self, width: int, height: int, frames: int) -> float:
        """FLOPs of one denoising step: both branches of classifier-free guidance."""
        return 2 * self.forward_flops(width, height, frames)


WAN_1_3B = Architecture(layers=30, dim=1536, ffn_dim=8960)
WAN_14B = Architecture(layers=40, dim=5120, ffn_dim=13824)
ARCHITECTURES = {"1.3B": WAN_1_3B, "14B": WAN_14B}
"""Wan 2.1's text-to-video models by size. Source: transformer/config.json of Wan2.1-T2V-1.3B and -14B."""


@dataclass(frozen=True)
class Card:
    """What one accelerator does on this model: sustained matrix rate while denoising, and VAE decode (fp32) time."""

    name: str
    tflops: float
    """Sustained TFLOP/s on the transformer in bf16."""
    decode_s_per_megapixel: float
    """Seconds of fp32 VAE decode for a million output pixels (frames x width x height)."""


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        # H100: measured with the true architecture (video_high 27.6 s in 40 steps, decode 2.48 s; DESIGN.md section 7).
        Card("H100", 529.0, 0.100),
        # The rest are estimates until measured: 60% of the vendor's dense bf16 peak, decode scaled with that peak.
        Card("H200", 529.0, 0.100),
        Card("A100", 187.0, 0.25),
        Card("L40S", 217.0, 0.25),
        Card("RTX 4090", 99.0, 0.40),
        # Two ordinary cores; only the tiny and demo models run there, so this is for orders of magnitude alone.
        Card("CPU", 0.05, 0.3),
    )
}


MODEL_SHARE_OF_MATMUL = 0.68
"""Rate on the model over the card's measured bf16 matrix-product peak: 529 of 778 TFLOP/s on an H100 (DESIGN.md section 7)."""


def card_for(device_name: str, matmul_tflops: float | None = None) -> Card:
    """The table's card for a device name such as `NVIDIA GeForce RTX 4090` (`torch.cuda.get_device_name`), or `CPU`.

    PCIe and NVL boards count as their SXM sisters until steps are measured. A card that is not in the table (nor are
    `RTX 4090 D` and laptops') is estimated from its measured
    bf16 matrix-product rate, as the H100's share of it; its decode, too. Raises ValueError if there is no such rate.
    """
    for name, card in CARDS.items():
        if re.search(rf"\b{name}\b(?!.*(?: D\b|Laptop))", device_name, re.IGNORECASE):
            return card
    if matmul_tflops is None or not matmul_tflops > 0:
        raise ValueError(
            f"no costs are known for {device_name!r} (known: {', '.join(CARDS)}); measure its bf16 matrix-product rate "
            f"and pass it as matmul_tflops, which is {matmul_tflops}"
        )
    tflops = MODEL_SHARE_OF_MATMUL * matmul_tflops
    known = CARDS["H100"]
    return Card(device_name, tflops, known.decode_s_per_megapixel * known.tflops / tflops)


def step_gpu_s(card: Card, architecture: Architecture, *, width: int, height: int, frames: int) -> float:
    """GPU-seconds of one denoising step with guidance."""
    return architecture.step_flops(width, height, frames) / (card.tflops * 1e12)


def decode_gpu_s(card: Card, *, width: int, height: int, frames: int) -> float:
    """GPU-seconds of the VAE decode of a whole clip."""
    return card.decode_s_per_megapixel * frames * width * height / 1e6


def clip_gpu_s(card: Card, architecture: Architecture, *, width: int, height: int, frames: int, steps: int) -> float:
    """GPU-seconds that one clip needs on `card`: denoising with guidance, then decoding."""
    step_s = step_gpu_s(card, architecture, width=width, height=height, frames=frames)
    return steps * step_s + decode_gpu_s(card, width=width, height=height, frames=frames)


UPSCALE_S_PER_MEGAPIXEL = 17.0
"""Seconds that upscaling takes for a million generated pixels (frames x width x height), x2 or x4: realesr-animevideov3 in ONNX
Runtime on two CPU cores, measured by `python -m benchmarks.upscale`. The setting of that name replaces it where the network or
the device is another."""


def upscale_s(*, width: int, height: int, frames: int, s_per_megapixel: float) -> float:
    """Seconds that one upscaler takes for a job's frames; the size is that before upscaling."""
    return s_per_megapixel * frames * width * height / 1e6


def deadline(submitted_at: float, promised_s: float, gpu_s: float, preset_gpu_s: float) -> float:
    """Moment (Unix seconds) by which a job is promised: the promise grows with the work beyond the preset's (DESIGN.md section 1)."""
    return submitted_at + promised_s * max(1.0, gpu_s / preset_gpu_s)


# ---- what this card really takes


@dataclass(frozen=True)
class Shape:
    """What decides how long a step takes."""

    width: int
    height: int
    frames: int
    guided: bool = True
    """Whether a step is two forwards (classifier-free guidance) or one."""


class CostModel:
    """GPU-seconds of steps and decodes on one card: at first from the table, then from what they really took.

    Measurements of a shape replace its guess; of other shapes, they correct it by as much as theirs was wrong.
    """

    def __init__(self, card: Card, architecture: Architecture) -> None:
        self._card = card
        self._architecture = architecture
        self._steps = _Measured()
        self._decodes = _Measured()

    def step_s(self, shape: Shape) -> float:
        """GPU-seconds of one denoising step."""
        return self._steps.estimate_s(shape, self._table_step_s(shape))

    def decode_s(self, shape: Shape) -> float:
        """GPU-seconds to decode one latent frame."""
        return self._decodes.estimate_s(shape, self._table_decode_s(shape))

    def remaining_s(self, shape: Shape, steps: int, latent_frames: int) -> float:
        """GPU-seconds of so many denoising steps and of the decode of so many latent frames."""
        return steps * self.step_s(shape) + latent_frames * self.decode_s(shape)

    def clip_gpu_s(self, shape: Shape, steps: int) -> float:
        """GPU-seconds of a whole clip."""
        return self.remaining_s(shape, steps, self._architecture.latent_frames(shape.frames))

    def observe_step(self, shape: Shape, seconds: float) -> None:
        """Learn from a denoising step. Raises ValueError unless it took time."""
        self._steps.observe(shape, seconds, self._table_step_s(shape))

    def observe_decode(self, shape: Shape, seconds: float) -> None:
        """Learn from the decode of one latent frame. Raises ValueError unless it took time."""
        self._decodes.observe(shape, seconds, self._table_decode_s(shape))

    def _table_step_s(self, shape: Shape) -> float:
        size = {"width": shape.width, "height": shape.height, "frames": shape.frames}
        return step_gpu_s(self._card, self._architecture, **size) / (1 if shape.guided else 2)

    def _table_decode_s(self, shape: Shape) -> float:
        whole = decode_gpu_s(self._card, width=shape.width, height=shape.height, frames=shape.frames)
        return whole / self._architecture.latent_frames(shape.frames)


_KEPT = 9
"""Measurements that count. Odd, so that the median is one of them."""


@dataclass
class _Measured:
    """The last measurements, by shape, and how far off the table was over all shapes. Medians, so that one step that
    compiled or was disturbed counts for nothing, and a lasting change counts within a few steps."""

    seconds: dict[Shape, deque[float]] = field(default_factory=dict)
    over_table: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def estimate_s(self, shape: Shape, table_s: float) -> float:
        if shape in self.seconds:
            return statistics.median(self.seconds[shape])
        return table_s * (statistics.median(self.over_table) if self.over_table else 1.0)

    def observe(self, shape: Shape, seconds: float, table_s: float) -> None:
        if not seconds > 0:
            raise ValueError(f"a step or decode took {seconds} s; it must be more than zero")
        self.seconds.setdefault(shape, deque(maxlen=_KEPT)).append(seconds)
        self.over_table.append(seconds / table_s)

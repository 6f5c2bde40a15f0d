"""How the transformer runs on this card: compiled blocks, CUDA graphs, attention kernel, clips in one forward.

All of it is decided once, at start, by trying it for the shapes that matter (`warm_up`). Any other shape runs uncompiled,
so that no request ever waits for a compiler or meets dynamo's recompile limit.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from serve_app.engine.attention import DEFAULT, fastest, set_self_attention, time_backends
from serve_app.engine.denoise import PAIR_UP_TO_TOKENS, StepBatch, StepResult, denoise
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.progress import progress_line
from serve_app.engine.solver import TERMS
from serve_app.engine.step_graph import StepGraph
from serve_app.errors import EngineError

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_log = logging.getLogger(__name__)

_BATCH_SIZES = (2, 4)
"""Numbers of clips in one forward that are tried for small shapes."""

_BATCH_MARGIN = 0.95
"""A batch must take less than this share of its clips' time one by one to be used: each clip waits for the others."""

_PAIR_MARGIN = 0.98
"""The same for both guidance branches in one forward, which takes more memory than one after the other."""

_RUNS = 5

_NAMES = {DEFAULT: "torch scaled_dot_product_attention", "flash_4_hub": "flash-attn-4", "_flash_3": "flash-attn-3"}
"""What a receipt calls a backend."""


@dataclass(frozen=True)
class StepShape:
    """What clips must agree in to share a forward: the latents' size (frames, height, width), and whether guidance is on."""

    latent_frames: int
    latent_height: int
    latent_width: int
    guided: bool

    @classmethod
    def of(cls, batch: StepBatch) -> "StepShape":
        """The shape of `batch`."""
        frames, height, width = batch.latents.shape[2:]
        return cls(frames, height, width, guided=batch.negative_prompt_embeds is not None)


@dataclass
class _Plan:
    """What was found best for one shape."""

    paired: bool
    """Whether both guidance branches share a forward."""
    step_ms: float
    """Median of one clip's step as it will run."""
    batch_ms: dict[int, float] = field(default_factory=dict)
    """The same for a batch of so many clips, for each size that was tried."""


class Kernels:
    """Runs denoising steps on `transformer`, which it changes. Uncompiled and one clip at a time until `warm_up`."""

    def __init__(self, transformer: "WanTransformer3DModel", device: torch.device) -> None:
        _fuse_projections(transformer)
        self._transformer = transformer
        self._device = device
        self._compiled: set[tuple[int, int]] = set()
        """(sequences, tokens) that the blocks are compiled for."""
        self._graphs: dict[tuple[StepShape, int], StepGraph] = {}
        self._plans: dict[StepShape, _Plan] = {}
        self.attention_ms: dict[int, dict[str, float]] = {}
        """Tokens -> milliseconds of self-attention by backend."""

    # ---- every step

    def step(self, batch: StepBatch) -> StepResult:
        """One denoising step of `batch`."""
        graph = self._graphs.get((StepShape.of(batch), len(batch.latents)))
        return graph(batch) if graph is not None else self._run(batch)

    def clips_together(self, shape: StepShape, waiting: int) -> int:
        """How many of `waiting` clips of `shape` to step in one forward: as many as measured faster than one by one."""
        plan = self._plans.get(shape)
        return max((size for size in self._faster_batches(plan) if size <= waiting), default=1) if plan else 1

    def describe(self, shape: StepShape, clips: int = 1) -> dict[str, Any]:
        """What a step of `shape` runs on, for a receipt."""
        tokens, paired = self._tokens(shape), self._paired(shape)
        attention = self._attention(tokens)
        return {
            "attention": _NAMES.get(attention, attention),
            "blocks": "compiled" if (clips * (1 + paired), tokens) in self._compiled else "eager",
            "cuda_graph": (shape, clips) in self._graphs,
            "guidance": ("paired" if paired else "sequential") if shape.guided else "off",
            "solver": "UniPC from a table",
        }

    def batches(self) -> list[dict[str, Any]]:
        """The table of verdicts on cross-clip batches: milliseconds of a step of each size, and which sizes are used."""
        return [
            {
                "shape": asdict(shape),
                "paired": plan.paired,
                "step_ms": plan.step_ms,
                "batch_ms": plan.batch_ms,
                "used": self._faster_batches(plan),
            }
            for shape, plan in self._plans.items()
        ]

    def _run(self, batch: StepBatch) -> StepResult:
        shape = StepShape.of(batch)
        tokens, paired = self._tokens(shape), self._paired(shape)
        rows = len(batch.latents) * (1 + paired)
        if self.attention_ms:
            set_self_attention(self._transformer, self._attention(tokens))
        with self._compiled_or_eager(rows, tokens):
            return denoise(self._transformer, batch, paired=paired)

    def _compiled_or_eager(self, rows: int, tokens: int) -> AbstractContextManager[object]:
        if not self._compiled or (rows, tokens) in self._compiled:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _paired(self, shape: StepShape) -> bool:
        plan = self._plans.get(shape)
        return shape.guided and (plan.paired if plan else self._tokens(shape) <= PAIR_UP_TO_TOKENS)

    def _attention(self, tokens: int) -> str:
        """The backend that was fastest at the measured length nearest to `tokens`."""
        if not self.attention_ms:
            return DEFAULT
        return fastest(self.attention_ms[min(self.attention_ms, key=lambda measured: abs(measured - tokens))])

    def _tokens(self, shape: StepShape) -> int:
        frames, height, width = self._transformer.config.patch_size
        return shape.latent_frames // frames * (shape.latent_height // height) * (shape.latent_width // width)

    def _faster_batches(self, plan: _Plan) -> list[int]:
        return [size for size, ms in plan.batch_ms.items() if ms < _BATCH_MARGIN * size * plan.step_ms]

    # ---- once, at start

    def warm_up(self, shapes: Sequence[StepShape], *, compiler: str = "inductor") -> None:
        """Time attention, compile, capture and time batches for `shapes`; takes some seconds for each.

        `compiler` is torch.compile's backend. Raises `EngineError` if the blocks cannot be compiled here.
        """
        if not shapes:
            return
        started = time.perf_counter()
        heads, head_dim = (
            self._transformer.config.num_attention_heads,
            self._transformer.config.attention_head_dim,
        )
        for tokens in sorted({self._tokens(shape) for shape in shapes}):
            self.attention_ms[tokens] = time_backends(
                rows=1,
                tokens=tokens,
                heads=heads,
                head_dim=head_dim,
                dtype=self._transformer.dtype,
                device=self._device,
            )
        runs = [(shape, clips) for shape in shapes for clips in self._sizes(shape)]
        # One compilation for each shape, two where both ways of guidance are tried: dynamo's limit is meant for accidents.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(runs) + 2)
        self._transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=compiler)
        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        for shape, clips in progress_line(runs, "warming up", lambda run: _name(*run)):
            try:
                self._warm_up_one(shape, clips, pool)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise EngineError(
                    f"the transformer's blocks could not be compiled for {_name(shape, clips)}: {str(error)[:500]}",
                    hint="torch.compile needs a C++ compiler and Python's headers; or set warm_up to false.",
                ) from error
        _log.info("warmed %d shapes in %.0f s", len(runs), time.perf_counter() - started)

    def _warm_up_one(self, shape: StepShape, clips: int, pool: Any) -> None:
        batch = self._example(shape, clips)
        small = self._tokens(shape) <= PAIR_UP_TO_TOKENS
        with torch.inference_mode():
            if clips > 1:
                self._compile(batch, pool)
                plan = self._plans[shape]
                plan.batch_ms[clips] = self._step_ms(batch)
                if clips not in self._faster_batches(plan):
                    self._graphs.pop((shape, clips), None)
            elif small or not shape.guided:
                self._plans[shape] = _Plan(paired=shape.guided, step_ms=0.0)
                self._compile(batch, pool if small else None)
                self._plans[shape].step_ms = self._step_ms(batch)
            else:
                self._plans[shape] = self._sequential_or_paired(shape, batch)

    def _sequential_or_paired(self, shape: StepShape, batch: StepBatch) -> _Plan:
        """The faster of the two; with too little memory for the pair it is sequential."""
        sequential = self._plans[shape] = _Plan(paired=False, step_ms=0.0)
        self._compile(batch, None)
        sequential.step_ms = self._step_ms(batch)
        paired = self._plans[shape] = _Plan(paired=True, step_ms=0.0)
        try:
            self._compile(batch, None)
            paired.step_ms = self._step_ms(batch)
        except torch.OutOfMemoryError:
            _log.info("%s: too little memory for both guidance branches in one forward", _name(shape, 1))
            return sequential
        return paired if paired.step_ms < _PAIR_MARGIN * sequential.step_ms else sequential

    def _compile(self, batch: StepBatch, pool: Any) -> None:
        """Compile the blocks for `batch`, and capture its step if there is a `pool` for graphs."""
        shape, clips = StepShape.of(batch), len(batch.latents)
        self._compiled.add((clips * (1 + self._paired(shape)), self._tokens(shape)))
        for _ in range(2):
            self._run(batch)
        if pool is not None:
            self._graphs[shape, clips] = StepGraph(self._run, batch, pool)

    def _step_ms(self, batch: StepBatch) -> float:
        return 1000 * median(self._seconds(batch) for _ in range(_RUNS))

    def _seconds(self, batch: StepBatch) -> float:
        with DeviceSpan(self._device) as span:
            self.step(batch)
        span.wait()
        return span.seconds

    def _sizes(self, shape: StepShape) -> tuple[int, ...]:
        return (1, *_BATCH_SIZES) if self._tokens(shape) <= PAIR_UP_TO_TOKENS else (1,)

    def _example(self, shape: StepShape, clips: int) -> StepBatch:
        config, device = self._transformer.config, self._device
        size = (clips, config.in_channels, shape.latent_frames, shape.latent_height, shape.latent_width)
        latents = torch.randn(size, device=device)
        embeds = torch.randn(clips, 512, config.text_dim, device=device, dtype=self._transformer.dtype)
        return StepBatch(
            latents=latents,
            last_sample=torch.zeros_like(latents),
            last_x0=torch.zeros_like(latents),
            older_x0=torch.zeros_like(latents),
            rows=torch.full((clips, 1 + 2 * TERMS), 0.2, device=device),
            timesteps=torch.full((clips,), 500, device=device),
            guidance_scale=torch.full((clips,), 6.0, device=device),
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds.flip(1) if shape.guided else None,
        )


def _fuse_projections(transformer: "WanTransformer3DModel") -> None:
    """One matrix product for query, key and value, and one for the text's keys and values. Frees the separate weights."""
    transformer.fuse_qkv_projections()
    for block in transformer.blocks:
        for attention, replaced in ((block.attn1, ("to_q", "to_k", "to_v")), (block.attn2, ("to_k", "to_v"))):
            for name in replaced:
                if hasattr(attention, name):
                    delattr(attention, name)


def _name(shape: StepShape, clips: int) -> str:
    size = f"{shape.latent_width}x{shape.latent_height}, {shape.latent_frames} latent frames"
    return size if clips == 1 else f"{size}, {clips} clips"

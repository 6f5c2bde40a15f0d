"""The engine against plain WanPipeline, in one run on one card: the four presets, denoising and decoding apart.

    python -m benchmarks.engine            # one GPU with 24 GB or more; about four minutes on an H100
    python -m benchmarks.engine --tiny     # any CPU, under a minute: shows that it runs; its times mean nothing

Both sides run the same weights (random, of the true 1.3B architecture) on the same prompt embeddings, warm. A denoising time
is the median of `--repeats` runs; video runs are cut to `--video-steps` steps and scaled to the preset's, since every step
costs the same. Memory is the most that torch had allocated during the run, model included and text encoder excluded.
"""

import argparse
import copy
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table

from benchmarks.true_model import build_pipeline
from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.decode import Decoder
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.receipt import versions
from serve_app.engine.solver import SolverState
from serve_app.jobs.presets import PRESETS, size_of

RESULTS = Path(__file__).parent / "results"
console = Console()


@dataclass(frozen=True)
class Timed:
    """Seconds: median, fastest and slowest."""

    median_s: float
    min_s: float
    max_s: float


@dataclass
class Row:
    """One preset."""

    preset: str
    tflop: float
    """TFLOP of the whole denoising (scheduling/cost.py)."""
    plain_denoise: Timed | None = None
    plain_decode: Timed | None = None
    plain_peak_gb: float = 0.0
    denoise: Timed | None = None
    decode_fp32: Timed | None = None
    decode_bf16: Timed | None = None
    denoise_peak_gb: float = 0.0
    decode_fp32_peak_gb: float = 0.0
    decode_bf16_peak_gb: float = 0.0
    latents_difference: float = 0.0
    """||engine - plain|| / ||plain|| of the final latents, both in the GPU's bf16; of one run of the measured steps."""
    kernels: dict[str, Any] = field(default_factory=dict)

    @property
    def denoise_speedup(self) -> float:
        """Times faster than WanPipeline."""
        return self.plain_denoise.median_s / self.denoise.median_s  # type: ignore[union-attr]

    @property
    def decode_speedup(self) -> float:
        """bf16 decode, times faster than WanPipeline's float32 decode."""
        return self.plain_decode.median_s / self.decode_bf16.median_s  # type: ignore[union-attr]


@dataclass
class Side:
    """What both sides share."""

    pipeline: WanPipeline
    device: torch.device
    repeats: int
    steps: dict[str, int]
    """Steps that are run, by preset."""
    requests: dict[str, ClipRequest]
    embeds: tuple[torch.Tensor, torch.Tensor]

    def noise(self, request: ClipRequest) -> torch.Tensor:
        """The first latents of `request`."""
        return self.pipeline.prepare_latents(
            1,
            16,
            request.height,
            request.width,
            request.frames,
            torch.float32,
            self.device,
            torch.Generator("cpu").manual_seed(request.seed),
        )

    def timed(self, work: Callable[[], object], *, scale: float = 1.0) -> Timed:
        """Time `work`, once warm, `repeats` times."""
        work()
        times = []
        for _ in range(self.repeats):
            with DeviceSpan(self.device) as span:
                work()
            span.wait()
            times.append(span.seconds * scale)
        return Timed(median(times), min(times), max(times))

    def peak_gb(self, work: Callable[[], object]) -> float:
        """The most memory (10^9 bytes) that torch had allocated during `work`; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9


def measure_plain(side: Side, rows: list[Row]) -> dict[str, torch.Tensor]:
    """WanPipeline as it comes. Returns its final latents."""
    finals: dict[str, torch.Tensor] = {}
    prompt, negative = side.embeds
    for row in rows:
        request, steps = side.requests[row.preset], side.steps[row.preset]

        def denoise(request: ClipRequest = request, steps: int = steps) -> torch.Tensor:
            latents: torch.Tensor = side.pipeline(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                width=request.width,
                height=request.height,
                num_frames=request.frames,
                num_inference_steps=steps,
                guidance_scale=request.guidance_scale,
                latents=side.noise(request),
                output_type="latent",
            ).frames
            return latents

        finals[row.preset] = denoise()
        row.plain_denoise = side.timed(denoise, scale=request.steps / steps)
        latents = side.noise(request).to(side.pipeline.vae.dtype)

        @torch.inference_mode()
        def decode(latents: torch.Tensor = latents) -> None:
            side.pipeline.vae.decode(latents, return_dict=False)

        row.plain_decode = side.timed(decode)
        row.plain_peak_gb = max(side.peak_gb(denoise), side.peak_gb(decode))
        console.log(f"WanPipeline, {row.preset}: {row.plain_denoise}, decode {row.plain_decode}")
    return finals


def measure_engine(side: Side, rows: list[Row], finals: dict[str, torch.Tensor]) -> ModelRunner:
    """The engine's runner, denoising and float32 decode."""
    runner = ModelRunner(side.pipeline, side.device.type, exact_bits=False)
    started = time.perf_counter()
    if side.device.type == "cuda":
        runner.warm_up(list(side.requests.values()))
    console.log(
        f"warmed up in {time.perf_counter() - started:.0f} s; attention (ms by tokens):", runner.kernels.attention_ms
    )
    for row in rows:
        request, steps = side.requests[row.preset], side.steps[row.preset]

        @torch.inference_mode()
        def denoise(request: ClipRequest = request, steps: int = steps) -> torch.Tensor:
            clip = _clip(side, runner, dataclasses.replace(request, steps=steps))
            while clip.phase is Phase.DENOISE:
                runner.denoise_step([clip])
            assert clip.latents is not None
            return clip.latents

        final, plain = denoise().float(), finals[row.preset].float()
        row.latents_difference = float((final - plain).norm() / plain.norm())
        row.denoise = side.timed(denoise, scale=request.steps / steps)
        row.denoise_peak_gb = side.peak_gb(denoise)
        row.kernels = runner.kernels_of(request)
        row.decode_fp32, row.decode_fp32_peak_gb = _measure_decode(side, runner.decoder, request)
        console.log(f"engine, {row.preset}: {row.denoise}, decode {row.decode_fp32}, {row.kernels}")
    return runner


def _measure_decode(side: Side, decoder: Decoder, request: ClipRequest) -> tuple[Timed, float]:
    latents = side.noise(request)

    @torch.inference_mode()
    def decode() -> None:
        clip = ClipState(request, print, arrived_at=0.0, last_ran_at=0.0, phase=Phase.DECODE)
        clip.latents = latents
        while clip.phase is Phase.DECODE:
            decoder.decode_latent_frame(clip)

    return side.timed(decode), side.peak_gb(decode)


def _clip(side: Side, runner: ModelRunner, request: ClipRequest) -> ClipState:
    """A clip as it is after its text phase, with the benchmark's embeddings."""
    clip = ClipState(request, print, arrived_at=0.0, last_ran_at=0.0, phase=Phase.DENOISE)
    clip.prompt_embeds, clip.negative_prompt_embeds = side.embeds
    clip.latents = side.noise(request)
    clip.schedule = runner.schedule(request)
    clip.solver = SolverState.at_start(clip.latents)
    return clip


def matmul_peak_tflops(device: torch.device, size: int) -> float:
    """TFLOP/s of a square matrix product of random numbers in the dtype that the model runs in."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    spans = []
    for _ in range(13):
        with DeviceSpan(device) as span:
            a @ b
        span.wait()
        spans.append(span.seconds)
    return 2 * size**3 / median(spans[3:]) / 1e12


def show(rows: list[Row], peak: float) -> None:
    """Print the table."""
    table = Table(title=f"Denoising and decoding, seconds (medians); matmul peak {peak:.0f} TFLOP/s")
    for heading in (
        "preset",
        "WanPipeline",
        "engine",
        "times faster",
        "of peak",
        "decode plain fp32",
        "engine fp32",
        "engine bf16",
        "times faster",
        "peak GB denoise / fp32 / bf16 decode",
        "difference",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        assert row.plain_denoise
        assert row.denoise
        assert row.plain_decode
        assert row.decode_fp32
        assert row.decode_bf16
        table.add_row(
            row.preset,
            f"{row.plain_denoise.median_s:.2f}",
            f"{row.denoise.median_s:.3f}",
            f"{row.denoise_speedup:.2f}x",
            f"{row.tflop / row.denoise.median_s / peak:.0%}",
            f"{row.plain_decode.median_s:.3f}",
            f"{row.decode_fp32.median_s:.3f}",
            f"{row.decode_bf16.median_s:.3f}",
            f"{row.decode_speedup:.2f}x",
            f"{row.denoise_peak_gb:.1f} / {row.decode_fp32_peak_gb:.1f} / {row.decode_bf16_peak_gb:.1f}",
            f"{row.latents_difference:.1e}",
        )
    Console(width=150).print(table)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Bars of both sides, denoising and decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, what, series in (
        (axes[0], "denoising", (("WanPipeline", "plain_denoise"), ("engine", "denoise"))),
        (
            axes[1],
            "VAE decode",
            (("WanPipeline fp32", "plain_decode"), ("engine fp32", "decode_fp32"), ("engine bf16", "decode_bf16")),
        ),
    ):
        width = 0.8 / len(series)
        for index, (label, name) in enumerate(series):
            heights = [getattr(row, name).median_s for row in rows]
            bars = axis.bar([place + index * width for place in range(len(rows))], heights, width, label=label)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))], [row.preset for row in rows])
        axis.set_yscale("log")
        axis.set_ylabel("seconds")
        axis.set_title(what)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, small sizes, few steps, for a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--video-steps", type=int, default=8, help="steps of a video run; the time is scaled to all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    device = torch.device("cpu" if arguments.tiny else "cuda")
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    name = "CPU, tiny model" if arguments.tiny else torch.cuda.get_device_name()
    peak = matmul_peak_tflops(device, 512 if arguments.tiny else 8192)
    pipeline = build_pipeline(device, dtype, small=arguments.tiny)
    requests = {job_type.value: _request(job_type.value, tiny=arguments.tiny) for job_type in PRESETS}
    side = Side(
        pipeline=pipeline,
        device=device,
        repeats=arguments.repeats,
        steps={key: min(r.steps, arguments.video_steps) if r.frames > 1 else r.steps for key, r in requests.items()},
        requests=requests,
        embeds=tuple(
            torch.randn(1, 512, pipeline.transformer.config.text_dim, device=device, dtype=dtype) for _ in range(2)
        ),
    )
    fast_vae = copy.deepcopy(pipeline.vae).to("cpu", torch.bfloat16)  # not on the card while others are measured
    architecture = ModelRunner(pipeline, device.type).architecture
    rows = [
        Row(key, r.steps * architecture.step_flops(r.width, r.height, r.frames) / 1e12) for key, r in requests.items()
    ]
    finals = measure_plain(side, rows)
    runner = measure_engine(side, rows, finals)
    pipeline.vae.to("cpu")
    pipeline.vae = fast_vae.to(device)
    fast_decoder = runner.decoder = Decoder(fast_vae, device, exact_bits=False)
    for row in rows:
        row.decode_bf16, row.decode_bf16_peak_gb = _measure_decode(side, fast_decoder, requests[row.preset])

    show(rows, peak)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = "engine_tiny_cpu" if arguments.tiny else "engine_" + name.lower().replace(" ", "_")
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.engine", *sys.argv[1:]]),
        "device": name,
        "versions": versions(),
        "matmul_peak_tflops": peak,
        "steps_measured": side.steps,
        "repeats": side.repeats,
        "attention_ms": runner.kernels.attention_ms,
        "batches": runner.kernels.batches(),
        "presets": [
            dataclasses.asdict(row) | {"denoise_speedup": row.denoise_speedup, "decode_speedup": row.decode_speedup}
            for row in rows
        ],
    }
    (arguments.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, f"{name}, torch {torch.__version__}", arguments.out / f"{stem}.png")


def _request(preset_name: str, *, tiny: bool) -> ClipRequest:
    preset = next(preset for job_type, preset in PRESETS.items() if job_type.value == preset_name)
    width, height = size_of(preset.resolution)
    frames = preset.video_length
    return ClipRequest(
        clip_id=preset_name,
        prompt="",
        negative_prompt="",
        width=width // 10 // 16 * 16 if tiny else width,
        height=height // 10 // 16 * 16 if tiny else height,
        frames=min(frames, 5) if tiny else frames,
        steps=4 if tiny else preset.sample_steps,
        guidance_scale=preset.guidance_scale,
        flow_shift=preset.sample_shift,
        seed=0,
        deadline=0.0,
    )


if __name__ == "__main__":
    main()

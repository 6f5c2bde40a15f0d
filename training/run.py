"""What both training runs share: a budget of minutes, a learning rate that ends with it, averaged weights, checkpoints."""

import json
import math
import os
import platform
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from training.muon import Muon

console = Console()


def pick_device() -> torch.device:
    """The GPU if there is one. TF32 where float32 is left."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def channels_last(module: nn.Module) -> None:
    """Lay out the kernels of `module`'s convolutions, two- and three-dimensional, as the GPU's matrix units read them."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)


def seed_everything(seed: int) -> None:
    """Weights and noise. Scenes have generators of their own."""
    random.seed(seed)
    torch.manual_seed(seed)


@dataclass
class Budget:
    """Minutes to train, those before a restart counted. The clock starts when it is first looked at."""

    minutes: float
    spent_s: float = 0.0
    _started: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds trained so far."""
        if self._started is None:
            self._started = time.monotonic()
        return self.spent_s + time.monotonic() - self._started

    @property
    def share(self) -> float:
        """Of the budget that is used, 0 to 1."""
        return min(self.elapsed_s / (60 * self.minutes), 1.0)


def learning_rate(peak: float, step: int, share: float, warmup_steps: int) -> float:
    """Linear warm-up over steps, then half a cosine over the time budget down to 1% of `peak`."""
    return peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


class Average:
    """An exponential moving average of parameters; its memory grows to about 1 / (1 - `decay`) steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self._parameters], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their averages; a second call exchanges them back."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Trainer:
    """Steps, logs and saves one run in `folder` until its `budget` is spent; goes on from a checkpoint found there.

    `muon` trains the matrices inside transformer blocks with Muon (Jordan et al. 2024), which learns rare signals faster at
    this size; AdamW trains the rest. At SIGTERM it saves and ends the process.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        modules: dict[str, nn.Module],
        *,
        minutes: float,
        peak_rate: float,
        device: torch.device,
        warmup_steps: int = 200,
        decay: float = 0.9995,
        muon: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        self._modules, self._peak, self._warmup = modules, peak_rate, warmup_steps
        named = [pair for module in modules.values() for pair in module.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        inner = [p for name, p in named if muon and p.ndim == 2 and "block" in name and "bias" not in name]
        rest = [p for p in self.parameters if all(p is not other for other in inner)]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        on_gpu = device.type == "cuda"
        # On the device, so that a recorded step (graphs.py) reads the rate of the day.
        self._rate = torch.tensor(0.0, device=device)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self._rate, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu)
        ]
        if inner:
            self.optimizers.append(Muon(inner, lr=self._rate))
        # Gradients keep their place for the same reason.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.average = Average(self.parameters, decay)
        self.step = 0
        self.budget = Budget(minutes)
        self._checkpoint = folder / "checkpoint.pt"
        if self._checkpoint.exists():
            self._load()
        self._record(settings)
        self._saved_at = self._logged_at = time.monotonic()
        self._told_to_stop = False
        signal.signal(signal.SIGTERM, self._stop_soon)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since = 0

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.share >= 1.0

    def descend(self, loss: torch.Tensor) -> torch.Tensor:
        """One step of the optimizers down `loss`'s gradient, whose norm it returns. What is not finite in it counts as 0.

        Nothing of it waits for the device.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_zero_(gradients)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for gradient in gradients:
            gradient.nan_to_num_(0.0, 0.0, 0.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def set_rate(self) -> None:
        """Set the learning rate of the next step."""
        self._rate.fill_(learning_rate(self._peak, self.step, self.budget.share, self._warmup))

    def count(self, metrics: dict[str, torch.Tensor], every_s: float = 5.0) -> None:
        """Take note of a step that was done: average, log, save."""
        self.average.update(self.step)
        self.step += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self.device)) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._since += 1
        now = time.monotonic()
        if now - self._logged_at > every_s:
            self._log(now)
        if now - self._saved_at > 60 or self._told_to_stop:
            self.save()
        if self._told_to_stop:
            raise SystemExit(f"stopped after step {self.step}; the same command goes on from there")

    def _stop_soon(self, _signal: int, _frame: object) -> None:
        self._told_to_stop = True

    def _log(self, now: float) -> None:
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        rate = self._since / (now - self._logged_at)
        line = {"step": self.step, "seconds": round(self.budget.elapsed_s, 1), "steps_per_s": round(rate, 2), **means}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        console.print(f"{100 * self.budget.share:5.1f}%  step {self.step}  {rate:.2f}/s  {shown}", highlight=False)
        self._sums, self._counts, self._since, self._logged_at = {}, {}, 0, now

    def save(self) -> None:
        """Write weights, averages, optimizer, step and time spent; the file appears whole."""
        state = {
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "average": self.average.values,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "spent_s": self.budget.elapsed_s,
        }
        unfinished = self._checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self._checkpoint)
        self._saved_at = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        if state["modules"].keys() != self._modules.keys():
            raise ValueError(
                f"{self._checkpoint} is of another version of this training: it holds {', '.join(state['modules'])}, where "
                f"{', '.join(self._modules)} are trained now; name another folder, and a model to begin with by --init"
            )
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        self.average.values = state["average"]
        for optimizer, saved in zip(self.optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] = self._rate
        self.step = state["step"]
        self.budget.spent_s = state["spent_s"]
        console.print(f"going on after step {self.step}, {self.budget.spent_s:.0f} s spent")

    def _record(self, settings: dict[str, Any]) -> None:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "CPU"
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in self._modules.items()}
        record = settings | {"device": device, "torch": torch.__version__, "parameters": sizes}
        (self.folder / "settings.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


def report(folder: Path, figures: dict[str, Any]) -> None:
    """Write and show a run's last word."""
    (folder / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    console.print(figures)


def cycle(choose: Callable[[random.Random], int], seed: int, start: int) -> Iterable[int]:
    """An endless, reproducible stream of choices; a run that goes on after `start` steps gets the rest of it."""
    step = start
    while True:
        yield choose(random.Random(f"{seed} {step}"))
        step += 1

"""A denoising step as one CUDA graph: for small shapes, whose kernels are shorter than their launches."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from serve_app.engine.denoise import StepBatch, StepResult


class StepGraph:
    """`step` captured for batches of one shape. Inputs are copied in and results copied out, so that clips own theirs.

    `pool` is the memory pool that graphs share; it is theirs alone, and only one of them may run at a time.
    """

    def __init__(self, step: Callable[[StepBatch], StepResult], example: StepBatch, pool: Any) -> None:
        self._inputs = replace(example, **{name: value.clone() for name, value in _tensors(example).items()})
        self._graph = torch.cuda.CUDAGraph()
        # The other threads of a replica may use CUDA meanwhile (pinned memory, another engine).
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = step(self._inputs)

    def __call__(self, batch: StepBatch) -> StepResult:
        """`step(batch)`."""
        given = _tensors(batch)
        for name, static in _tensors(self._inputs).items():
            static.copy_(given[name])
        self._graph.replay()
        return replace(self._outputs, **{name: value.clone() for name, value in _tensors(self._outputs).items()})


def _tensors(of: StepBatch | StepResult) -> dict[str, torch.Tensor]:
    return {field.name: value for field in fields(of) if (value := getattr(of, field.name)) is not None}

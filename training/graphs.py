"""A training step as a CUDA graph: a small model's step is thousands of small kernels, which the host launches more slowly than
the GPU runs them."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

_EAGER_STEPS = 3
"""Before a step is recorded: what compiles, allocates or looks for the best kernel does so in them."""

Metrics = dict[str, torch.Tensor]


class Graphs:
    """Runs `step`, which takes tensors and returns tensors: on a GPU as a graph for each kind of input, else as it is.

    `step` must not look at a tensor's values from the host. What it returns is good until the next call.
    """

    def __init__(self, step: Callable[..., Metrics], device: torch.device) -> None:
        self._step, self._device = step, device
        self._seen: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[Any, tuple[torch.Tensor, ...], Metrics]] = {}
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def __call__(self, kind: Hashable, inputs: tuple[torch.Tensor, ...]) -> Metrics:
        """`step` on `inputs`; those of one `kind` have the same shapes and dtypes."""
        if self._device.type != "cuda":
            return self._step(*inputs)
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        if seen <= _EAGER_STEPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                metrics = self._step(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return metrics
        if kind not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            own = tuple(value.clone() for value in inputs)
            # Other threads pin memory meanwhile, which the default would forbid.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                metrics = self._step(*own)
            self._recorded[kind] = graph, own, metrics
        graph, own, metrics = self._recorded[kind]
        torch._foreach_copy_(own, inputs)
        graph.replay()
        return metrics

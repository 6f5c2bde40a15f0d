"""Muon for many small matrices: torch.optim.Muon's update, of all matrices of one shape at once.

torch's takes one matrix after the other, some twenty kernels each: for a small model more time than its forward and backward pass.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as torch.optim.Muon has them."""
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon with Nesterov momentum and `adjust_lr_fn="match_rms_adamw"`; `lr` may be a tensor on the device."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float | torch.Tensor,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix; all must have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                alike.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in alike.items():
                gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                state = self.state[matrices[0]]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradients)
                buffer = state["momentum_buffer"]
                buffer.lerp_(gradients, 1 - group["momentum"])
                update = orthogonal(gradients.lerp(buffer, group["momentum"])).to(gradients.dtype)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for matrix, own in zip(matrices, (update * rate).unbind(), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(own)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """bfloat16 [n, rows, columns]: each of `matrices` with all singular values near 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

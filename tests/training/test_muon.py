"""Muon of many matrices at once does what torch's does with one after the other."""

import torch
from torch import nn

from training.muon import Muon


def test_it_is_torchs_own() -> None:
    torch.manual_seed(0)
    sizes = [(12, 12), (12, 12), (12, 40), (40, 12), (40, 12)]
    ours = [nn.Parameter(torch.randn(size)) for size in sizes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    here = Muon(ours, lr=torch.tensor(0.01), weight_decay=0.1)
    there = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        here.step()
        there.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # bfloat16 inside, in another order

"""Attention to the text without its padding, for training: the same result for an eighth of the text's work or less.

Wan pads a prompt's embeddings with zeros to 512 rows, and attends to all. The rows of padding are all alike, so a few stand
for all of them if their weight is multiplied by how many each stands for: by a logarithm added to their logits.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn

from training.model import PADDED_TOKENS


class FoldedPadding:
    """Makes `transformer` take embeddings that are padded less far, for prompts given to `fold` beforehand."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        self._processor = _Processor()
        for block in transformer.blocks:
            block.attn2.set_processor(self._processor)

    def fold(self, ids: torch.Tensor) -> None:
        """Weigh the padding (0) of token ids [prompts, tokens], which every prompt must have some of."""
        padding = ids == 0
        each = padding.sum(dim=1, keepdim=True)
        weight = torch.log((each + PADDED_TOKENS - ids.shape[1]) / each)
        self._processor.bias = torch.where(padding, weight, 0.0)[:, None, None]

    def embed(self, text_encoder: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """[prompts, tokens, text_dim], zeros for padding; `fold`s."""
        self.fold(ids)
        mask = ids != 0
        # As transformers would make it, but without looking from the host whether any padding is there.
        logits = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(-1, 1, ids.shape[1], -1)
        hidden: torch.Tensor = text_encoder(ids, attention_mask=logits).last_hidden_state
        return hidden * mask[..., None]


class _Processor(WanAttnProcessor):
    bias: torch.Tensor | None = None
    """float32 [prompts, 1, 1, tokens]: what is added to the logits."""

    def __call__(self, attn: WanAttention, hidden_states: torch.Tensor, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        encoder_hidden_states, _, rotary = (*inputs, None, None, None)[:3]
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary, **kwargs)

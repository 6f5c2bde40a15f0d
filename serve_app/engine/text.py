"""Prompts to embeddings: computed without padding, cached, with the text encoder on the GPU, on the CPU, or streamed."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import WanPipeline

TEXT_TOKENS = 512
"""Length to which Wan pads and cuts its text embeddings (WanPipeline's max_sequence_length)."""

TextEncoderPlace = Literal["gpu", "cpu", "offload"]
"""Where the text encoder lives. `gpu`: on the model's device (UMT5-XXL takes 11.4 GB there). `cpu`: computed on the CPU.
`offload`: its blocks wait in host memory and are streamed to the GPU while a prompt is embedded; its token table, a fifth of it,
is looked up on the CPU."""

_CACHED_PROMPTS = 128
"""Prompts kept; about 0.5 MB each in bf16 (text_dim 4096, some 60 tokens)."""


class TextEncoder:
    """The pipeline's tokenizer and text encoder. `place` has no meaning where `device` is the CPU.

    `exact_bits` embeds with padding, as WanPipeline does; without it each row is the same to rounding (8e-7) for an eighth of
    the work.
    """

    def __init__(
        self, pipeline: "WanPipeline", device: torch.device, *, place: TextEncoderPlace, exact_bits: bool
    ) -> None:
        self._tokenizer = pipeline.tokenizer
        self._encoder = pipeline.text_encoder
        self._dtype = pipeline.transformer.dtype
        self._device = device
        self._streamed = device.type != "cpu" and place == "offload"
        self._encoder_device = torch.device("cpu") if place == "cpu" else device
        self._exact_bits = exact_bits
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.reused = self.computed = 0
        """Prompts that were found in the cache, and that were not."""
        if self._encoder is None:
            return  # A pipeline without one serves those who bring their own embeddings (benchmarks).
        if self._streamed:
            _stream_blocks(self._encoder, device)
        else:
            self._encoder.to(self._encoder_device)

    def embed(self, prompt: str) -> torch.Tensor:
        """[1, 512, text_dim] on the model's device, in the transformer's dtype; zeros after the prompt's last token."""
        rows = self._cache.get(prompt)
        if rows is not None:
            self.reused += 1
        else:
            self.computed += 1
            rows = self._cache[prompt] = self._embed(prompt)
            if len(self._cache) > _CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return functional.pad(rows, (0, 0, 0, TEXT_TOKENS - len(rows)))[None]

    def _embed(self, prompt: str) -> torch.Tensor:
        """[tokens, text_dim] of the real tokens alone."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self._tokenizer(
            [prompt_clean(prompt)],
            padding="max_length" if self._exact_bits else False,
            max_length=TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
        if self._streamed:
            looked_up = self._encoder.get_input_embeddings()(ids)
            hidden = self._encoder.encoder(
                inputs_embeds=looked_up.to(self._device), attention_mask=mask.to(self._device)
            ).last_hidden_state
        else:
            place = self._encoder_device
            hidden = self._encoder(ids.to(place), mask.to(place)).last_hidden_state
        rows: torch.Tensor = hidden[0, : int(mask.sum())]
        return rows.to(self._device, self._dtype)


def _stream_blocks(encoder: "torch.nn.Module", device: torch.device) -> None:
    """Leave the token table on the CPU and stream the blocks, by diffusers' group offloading (pinned, with prefetch)."""
    from diffusers.hooks import apply_group_offloading

    stack = encoder.encoder
    for block in stack.block:  # type: ignore[union-attr]
        apply_group_offloading(
            block, onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True
        )
    stack.final_layer_norm.to(device)  # type: ignore[union-attr]

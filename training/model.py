"""The architecture of wan-shapes: Wan 2.1's own diffusers classes, sized for two CPU cores. Sizes were chosen by measuring.

A latent pixel covers 32x32 pixels (4x4 unfolded, then three halvings) and 4 frames, and is one token: 300 for a picture of
640x480, 6300 for 81 frames. Attention over those 6300 is most of the cost, so the transformer is wide rather than deep, and
has two large heads, which are quicker than three of 64.
"""

import io
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

Z_DIM = 32
TEXT_DIM = 192
SPATIAL, TEMPORAL = 32, 4
"""Pixels and frames of a latent pixel."""
PROMPT_TOKENS = 64
"""Longest caption in training."""
PADDED_TOKENS = 512
"""What WanPipeline pads embeddings to, with zeros."""


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """`mean` and `std` are those of the latents, by channel; 0 and 1 until they are measured."""
    return AutoencoderKLWan(
        base_dim=24,
        decoder_base_dim=32,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        # Time is halved early and doubled late, so that most layers see a quarter of the frames.
        temperal_downsample=[True, True, False],
        latents_mean=mean or [0.0] * Z_DIM,
        latents_std=std or [1.0] * Z_DIM,
        is_residual=True,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
    )


def build_transformer() -> WanTransformer3DModel:
    """Starts out as the identity of its residual stream, with the text's padding out of attention's way."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=96,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=5,
        rope_max_seq_len=64,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    for block in transformer.blocks:
        # Padding embeds to zero, so its key is the bias alone, which normalisation makes as long as any other: opposite to a
        # part that all queries share, some 490 rows of padding weigh no more than the words.
        common = torch.randn(block.attn2.to_k.bias.shape)
        common /= common.norm()
        block.attn2.to_k.bias.data.copy_(-0.05 * common)
        block.attn2.to_q.bias.data.copy_(12.0 * common)
    return transformer


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Two layers; trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=32, d_ff=384, num_layers=2, num_heads=6, dropout_rate=0.0
    )
    return UMT5EncoderModel(config)


def build_scheduler() -> UniPCMultistepScheduler:
    """As on the hub, but for the shift, which the service sets for each job."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=2.0
    )


def train_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """A T5 tokenizer on a SentencePiece model with UMT5's control tokens (pad 0, eos 1, unk 2, bos 3). Folds case.

    It is shown the captions' words in no order and all alike, so that each becomes a piece, and letters for the rest.
    """
    import sentencepiece

    words = sorted(
        {word.strip(".,").lower() for text in captions for word in text.split()} | set(string.ascii_lowercase)
    )
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([rng.choice((" ", ", ", ". ")).join(rng.choices(words, k=3)) for _ in range(20_000)]),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=3,
        num_threads=1,
        minloglevel=2,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=0, legacy=False)
    path.unlink()
    return tokenizer


def embed(text_encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """[prompts, 512, text_dim] of token ids [prompts, tokens]: zeros after each prompt's last, as WanPipeline has it."""
    mask = ids != 0
    hidden = text_encoder(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    return nn.functional.pad(hidden, (0, 0, 0, PADDED_TOKENS - ids.shape[1]))


def save_pipeline(
    folder: Path,
    *,
    tokenizer: Any,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the four parts in the layout of the real model. Half precision on disk; loading makes them what it wants."""
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(dtype).eval(),
        transformer=transformer.to(dtype).eval(),
        vae=vae.to(dtype).eval(),
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(folder)

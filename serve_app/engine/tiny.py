"""A tiny untrained model of Wan's own classes, built on the spot, for tests.

It goes through the same loading and the same code as the real model and makes noise of the right size. It is quick at
full size because its VAE ends at a quarter of the resolution and unfolds each pixel into 4x4 (`patch_size`), so that a
latent pixel covers 16x16 pixels, not Wan 2.1's 8x8, and a video has a quarter of the tokens.
"""

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from serve_app.engine.quiet import quiet_progress_bars

UNTRAINED_MARKER = "UNTRAINED.txt"
"""A file of this name in a model folder says that the weights are random."""

_SEED = 20250225
_VOCABULARY = 128
"""Tokens: four control tokens, and what SentencePiece finds in `_CORPUS` (anything else is read as unknown)."""

_CORPUS = (
    "a red fox runs across a snowy field at dawn, soft light, slow camera pan",
    "waves break on black rocks under a stormy sky, wide shot, cinematic",
    "a paper boat drifts down a rainy street, close up, shallow focus",
    "an old lighthouse on a cliff, clouds racing by, time lapse",
    "a cup of coffee steams on a wooden table near a window, morning light",
    "blurry, low quality, overexposed, jpeg artifacts, watermark, text, deformed hands, extra limbs",
)


def build_tiny_model(folder: Path) -> Path:
    """Build the tiny model in `folder` unless it is there already, and return `folder`.

    The same weights every time. Safe to call from many processes at once: the folder appears whole, and whoever comes
    second uses it. Raises `OSError` if `folder` cannot be written or holds something else.
    """
    if is_untrained(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save_tiny_pipeline(unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not is_untrained(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def is_untrained(folder: Path) -> bool:
    """Whether `folder` holds a model whose weights are random."""
    return (folder / UNTRAINED_MARKER).is_file()


def _save_tiny_pipeline(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=1,
            attention_head_dim=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=64,
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            in_channels=48,
            out_channels=48,
            patch_size=4,
            scale_factor_spatial=16,
        )
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=_VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        )
    pipeline = WanPipeline(
        tokenizer=_train_tokenizer(folder),
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )
    with quiet_progress_bars():
        pipeline.save_pretrained(folder)
    (folder / UNTRAINED_MARKER).write_text(
        "The weights in this folder are random: what this model makes is noise. It serves tests and demonstrations.\n"
    )
    for path in folder.rglob("*"):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)


def _train_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer on a SentencePiece model with UMT5's control tokens (pad 0, eos 1, unk 2, bos 3)."""
    import sentencepiece
    from transformers import T5TokenizerFast

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_writer=model,
        vocab_size=_VOCABULARY,
        hard_vocab_limit=False,
        model_type="unigram",
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

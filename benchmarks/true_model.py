"""Wan 2.1 T2V 1.3B with random weights, made where it will run: its true architecture without its 17 GB download."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
"""transformer/config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the rest is the class's default. The VAE's is all default."""

SMALL_TRANSFORMER = TRANSFORMER | {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 64, "num_layers": 2}
SMALL_VAE = {"base_dim": 8, "num_res_blocks": 1}
"""The same classes, small enough for a CPU."""


def build_pipeline(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> WanPipeline:
    """WanPipeline without a text encoder, with what `from_pretrained(torch_dtype=dtype)` keeps in float32 in float32."""
    with torch.device(device):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(**(SMALL_TRANSFORMER if small else TRANSFORMER)).eval()
        vae = AutoencoderKLWan(**(SMALL_VAE if small else {})).eval()
    for name, parameter in transformer.named_parameters():
        if not any(kept in name.split(".") for kept in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, transformer=transformer, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

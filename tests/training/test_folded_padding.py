"""Training attends to a few rows of padding in the place of all; the service attends to all 512. Both must be the same."""

import torch

from training.folded_padding import FoldedPadding
from training.model import build_text_encoder, build_transformer, embed


def test_folded_padding_is_the_same_as_all_of_it() -> None:
    torch.manual_seed(0)
    transformer, text_encoder = build_transformer().eval(), build_text_encoder(40).eval()
    for parameter in transformer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # nothing stays zero as at the start
    ids = torch.zeros(3, 16, dtype=torch.int64)
    for row, length in enumerate((1, 7, 15)):
        ids[row, :length] = torch.randint(4, 40, (length,))
    latents, timestep = torch.randn(3, 32, 2, 3, 4), torch.tensor([10.0, 500.0, 990.0])
    with torch.inference_mode():
        padded = transformer(latents, timestep, embed(text_encoder, ids), return_dict=False)[0]
        folded = FoldedPadding(transformer)
        short = transformer(latents, timestep, folded.embed(text_encoder, ids), return_dict=False)[0]
    assert float(padded.std()) > 0.01
    torch.testing.assert_close(short, padded, rtol=1e-4, atol=1e-5)

"""How the embedded SAM's decoder starts: positions of prompts and of the image mean the same from the first step on."""

from typing import Any

import torch

HARMONICS = (1, 3, 5, 7)  # of an eighth of a turn per half frame


def align_positions(sam: Any, gain: float = 2.0) -> None:
    """Start the attention between tokens and image so that positions mean something from the first step on, in place.

    Queries and keys are projected alike, and little else is in them: a point's token then finds the same place of the
    image (the product of two Fourier encodings falls with their distance). Where the image asks the tokens, half of
    the heads get a direction instead: they look at the tokens to the left, right, above or below of a place, from
    which the inside of a box follows. From independent projections all this takes longer than the whole training.
    """
    transformer = sam.mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.zeros_(attention.q_proj.bias)
        torch.nn.init.zeros_(attention.k_proj.bias)
    prompts, decoder = sam.prompt_encoder, sam.mask_decoder
    with torch.no_grad():
        frequencies = prompts.pe_layer.positional_encoding_gaussian_matrix  # (2, C/2), turns per half frame, x and y
        frequencies.mul_(1.5)
        for place, harmonic in enumerate(HARMONICS):
            frequencies[:, place] = torch.tensor([harmonic / 8, 0.0])
            frequencies[:, len(HARMONICS) + place] = torch.tensor([0.0, harmonic / 8])
        for layer in transformer.layers:
            _point_heads(layer.cross_attn_image_to_token)
        for table in (*prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed):
            table.weight.mul_(0.1)
        for table in (decoder.iou_token, decoder.mask_tokens):
            table.weight.mul_(0.3)
        sam.image_encoder.neck.norm2.weight.fill_(0.4)


def _point_heads(attention: Any, strength: float = 17.0) -> None:
    """Four heads whose score rises with x, falls with it, and the same for y, from a token to a place of the image.

    sin(p - t) = sin p cos t - cos p sin t, over odd harmonics with falling weights: nearly a step from -1 to 1.
    """
    head_size = attention.q_proj.weight.shape[0] // attention.num_heads
    half = attention.q_proj.weight.shape[1] // 2  # sines first, then cosines
    asked, given = attention.q_proj.weight, attention.k_proj.weight
    for head, (axis, sign) in enumerate(((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0))):
        for number in range(min(len(HARMONICS), head_size // 2)):
            row, column = head * head_size + 2 * number, axis * len(HARMONICS) + number
            weight = (strength / HARMONICS[number]) ** 0.5
            for one in (asked, given):
                one[row : row + 2] = 0.0
            asked[row, column], given[row, half + column] = weight, sign * weight
            asked[row + 1, half + column], given[row + 1, column] = weight, -sign * weight

"""BLIP's image and text towers with cross-attention (Li et al. 2022), as ImageReward uses them (Xu et al. 2023).

The towers are transformers'; weights come in the original layout and are renamed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.pretrained import MissingWeightsError
from sana.reward.mlp import Head


@dataclass(frozen=True)
class Sizes:
    """Sizes of the towers; ImageReward's are the defaults.

    Attributes:
        side, patch, vision_width, vision_depth, vision_heads: of the image tower (ViT-L/16 at 224 px).
        width, depth, heads, inner: of the text tower (BERT-base).
        words: of the vocabulary, the two added ones included.
    """

    side: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_depth: int = 24
    vision_heads: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    inner: int = 3072
    words: int = 30524


IMAGE_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class Blip(nn.Module):
    """Image and text to one number: the first token of the text that has looked at the image, through a `Head`."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.image: Any = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=sizes.vision_width,
                intermediate_size=4 * sizes.vision_width,
                num_hidden_layers=sizes.vision_depth,
                num_attention_heads=sizes.vision_heads,
                image_size=sizes.side,
                patch_size=sizes.patch,
                layer_norm_eps=1e-6,
            )
        )
        self.text: Any = BlipTextModel(
            BlipTextConfig(
                vocab_size=sizes.words,
                hidden_size=sizes.width,
                encoder_hidden_size=sizes.vision_width,
                intermediate_size=sizes.inner,
                num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.heads,
                is_decoder=True,  # which only says that the layers have cross-attention
                layer_norm_eps=1e-12,
            ),
            add_pooling_layer=False,
        )
        self.head = Head(sizes.width)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels (b, 3, side, side), tokens and mask (b, l) -> (b,)."""
        seen = self.image(pixel_values=pixels).last_hidden_state
        rows = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=rows
        ).last_hidden_state
        return self.head(read[:, 0])

    def fill(self, state: Mapping[str, Tensor], source: str) -> Blip:
        """Load ImageReward.pt's tensors (``blip.visual_encoder``, ``blip.text_encoder``, ``mlp``).

        Raises:
            MissingWeightsError: a tensor is missing, left over or of another shape.
        """
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.startswith("blip.visual_encoder."):
                short = name.removeprefix("blip.visual_encoder.")
                for pattern, new in IMAGE_NAMES:
                    short, count = re.subn(pattern, new, short)
                    if count:
                        break
                renamed[f"image.{short}"] = value
            elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
                renamed[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
            elif name.startswith("mlp."):
                renamed[f"head.{name.removeprefix('mlp.')}"] = value
        own = {k: v for k, v in self.state_dict().items() if not k.endswith("position_ids")}
        wrong = sorted(own.keys() ^ renamed.keys()) or [k for k in own if own[k].shape != renamed[k].shape]
        if wrong:
            raise MissingWeightsError(f"{source}: not ImageReward's weights ({wrong[0]} and {len(wrong) - 1} more)")
        self.load_state_dict(renamed, strict=False)
        return self

"""CLIP (Radford et al. 2021) by open_clip: unit embeddings of images and texts, for metrics and rewards.

The architecture is one of open_clip's names, such as ``ViT-L-14-quickgelu`` (OpenAI's weights use the quick GELU; with
a tag the right one is taken anyway) or ``ViT-H-14``, or a JSON file in open_clip's form. The weights
are a tag of open_clip such as ``openai``, which the hub keeps, a path, ``hf://...`` or ``random:SEED``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana.pretrained import Located, MissingWeightsError, Published, locate, place, seeded

BATCH = 16


class Clip:
    """Embeddings in float32, without gradients, whatever autocast surrounds them.

    Args:
        model: name or JSON file of the architecture.
        weights: see the module.
        device: "auto", or a torch device.
        key: of the setting that names the weights, for messages.

    Attributes:
        scale: exp of the trained logit scale; about 100 for the published models.
        dim: length of an embedding.
        settings: architecture and weights, for the record.

    Raises:
        MissingWeightsError: the weights are not here, or not of this architecture.
        ValueError: no such architecture.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        weights: str | None = "openai",
        device: str = "auto",
        key: str = "weights",
    ) -> None:
        import open_clip

        if model.endswith(".json"):
            open_clip.add_model_config(model)
        name = Path(model).stem if model.endswith(".json") else model
        if open_clip.get_model_config(name) is None:
            raise ValueError(f"CLIP model {model!r}: open_clip has no such architecture; expected such as ViT-L-14")
        self.device = place(device)
        self.network, said = _load(open_clip, name, weights, key)
        self.network = self.network.to(self.device).float().eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(name)
        self.transform: Any = open_clip.image_transform(
            self.network.visual.image_size,
            is_train=False,
            mean=getattr(self.network.visual, "image_mean", None),
            std=getattr(self.network.visual, "image_std", None),
        )
        self.scale = float(self.network.logit_scale.exp())
        self.dim = int(self.network.text_projection.shape[-1]) if hasattr(self.network, "text_projection") else 0
        self.settings: dict[str, Any] = {"clip": name, "clip_weights": said}

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (h, w, 3) each -> unit embeddings (n, d) on the CPU; bicubic to the network's side, centre crop."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = [self.transform(Image.fromarray(np.asarray(x))) for x in images[start : start + BATCH]]
            parts.append(self._run(self.network.encode_image, torch.stack(pixels)))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit embeddings (n, d) on the CPU; what is longer than the context is cut."""
        parts = []
        for start in range(0, len(texts), BATCH):
            parts.append(self._run(self.network.encode_text, self.tokenize(list(texts[start : start + BATCH]))))
        return torch.cat(parts)

    def _run(self, encode: Any, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(encode(x.to(self.device)).float(), dim=-1).cpu()


def _load(open_clip: Any, name: str, weights: str | None, key: str) -> tuple[Any, str]:
    plain = name.removesuffix("-quickgelu")
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if weights in tags:
        # The activation belongs to the weights; open_clip only warns where it is not that of the architecture.
        quick = bool(open_clip.get_pretrained_cfg(plain, weights).get("quick_gelu", False))
        try:
            network = open_clip.create_model(plain, pretrained=weights, force_quick_gelu=quick)
            return network, f"{weights} (open_clip {open_clip.__version__})"
        except Exception as error:  # huggingface_hub, urllib and torch each raise their own
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise MissingWeightsError(
                f"{key}={weights}: the weights of {name} could not be downloaded ({line}); fetch them on a machine "
                f"with access and give {key}=PATH, or {key}=random:0 to try the path without them"
            ) from None
    known = Published(f"CLIP {name}", "a checkpoint of it", f"open_clip's tags: {', '.join(tags) or 'none'}")
    located: Located = locate(weights, known, key)
    if located.path is None:
        assert located.seed is not None
        with seeded(located.seed):
            return open_clip.create_model(name, pretrained=None), located.said
    try:
        return open_clip.create_model(name, pretrained=str(located.path)), located.said
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0][:160]
        raise MissingWeightsError(f"{key}={weights}: not the weights of {name} ({line})") from None

"""The head that ImageReward and the LAION aesthetic predictor share: five linear layers with nothing between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sana.pretrained import MissingWeightsError

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers among the dropouts, which names in checkpoints count


class Head(nn.Module):
    """An affine map (b, width) -> (b,); its dropouts do nothing where it is used and are left out."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        sizes = (width, *WIDTHS)
        self.layers = nn.ModuleDict(
            {str(p): nn.Linear(a, b) for p, a, b in zip(PLACES, sizes[:-1], sizes[1:], strict=True)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """One number per row."""
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(-1)

    def fill(self, state: Mapping[str, Tensor], source: str) -> Head:
        """Load a checkpoint's ``layers.<n>.weight`` and ``.bias``.

        Raises:
            MissingWeightsError: it is not of this head.
        """
        try:
            self.load_state_dict(dict(state))
        except RuntimeError as error:
            line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise MissingWeightsError(f"{source}: not the five layers of this head ({line[:160]})") from None
        return self


def read_tensors(path: str) -> dict[str, Tensor]:
    """Tensors by name from a .pth, .pt, .ckpt or .safetensors file; no code in it is run."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("state_dict", content)

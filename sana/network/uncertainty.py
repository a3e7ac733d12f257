"""How large an error is to be expected at a time: the learned weight of a loss."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from sana.nn.embed import GuidanceEmbedding, TimeEmbedding
from sana.nn.initialise import initialise


class LogVariance(nn.Module):
    """Logarithm of a loss's scale by time and guidance (Kendall et al. 2018, arXiv:1705.07115; in continuous-time
    consistency arXiv:2410.11081): dividing by it evens the times out. Starts at 0.

    SANA-Sprint reads it off the student's own embedding of time by one more layer; here it has an embedding of its own,
    so that the student is the same network in training and in use.

    Args:
        width: of its embedding.
        guidance: whether the scale of guidance is given.
    """

    def __init__(self, width: int = 64, guidance: bool = True) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.guidance = GuidanceEmbedding(width) if guidance else None
        self.out = nn.Linear(width, 1)
        initialise(self)
        nn.init.normal_(self.time.fc1.get_parameter("weight"), std=0.5)  # t in [0, 1] alone would hardly bend it
        nn.init.zeros_(self.out.weight)

    def forward(self, t: Float[Tensor, "b f"], guidance: Float[Tensor, " b"] | None = None) -> Float[Tensor, "b f"]:
        """t in [0, 1] of the linear path; guidance if the module was built with it."""
        embedded = self.time(t, self.out.weight.dtype)
        if self.guidance is not None and guidance is not None:
            embedded = embedded + self.guidance(guidance, self.out.weight.dtype).unsqueeze(1)
        return self.out(embedded).squeeze(-1).float()

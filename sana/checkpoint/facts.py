"""What is known of a SANA network apart from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from sana.checkpoint.error import CheckpointError


@dataclass(frozen=True)
class Facts:
    """A network's hyper-parameters, and how it is to be sampled. None: not known.

    The first group is told by tensors, the second only by words: a configuration, a header, a name.

    Attributes:
        family: "sana" (1.0), "sana15" (q/k norms), "sprint" (guidance embedding).
        depth, width, hidden: blocks; channels of the tokens; hidden channels of the Mix-FFN after its gate.
        in_channels, patch: of the latent; latent pixels per token side.
        text_channels: of the caption features.
        self_norm, cross_norm, text_norm: whether the attentions norm q and k, and whether the caption is normed.
        guidance: whether the guidance scale is embedded.
        base: side of the position table that original files carry, in tokens at the trained size.
        head_dim, heads: channels per head of the self-attention; heads of the cross-attention.
        position: whether a position table is added to the tokens.
        interpolation: of that table.
        guidance_scale: multiplies the guidance scale before it is embedded.
        time_scale: the network sees t times this.
        size, ratio: pixels of a side in training; pixels per latent pixel.
        flow_shift: of training and sampling.
        recipe: the experiment of conf/ that it was trained like.
        release: its published name.
    """

    family: str
    depth: int
    width: int
    hidden: int
    in_channels: int | None = None
    patch: int | None = None
    text_channels: int = 2304
    self_norm: bool = False
    cross_norm: bool = False
    text_norm: bool = True
    guidance: bool = False
    base: int | None = None
    head_dim: int | None = None
    heads: int | None = None
    position: bool | None = None
    interpolation: float | None = None
    guidance_scale: float | None = None
    time_scale: float | None = None
    size: int | None = None
    ratio: int | None = None
    flow_shift: float | None = None
    recipe: str | None = None
    release: str | None = None

    def told(self) -> dict[str, Any]:
        """What is known, as JSON stores it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def with_words(self, words: Mapping[str, Any], source: str) -> Self:
        """These facts and what a header or sidecar says beside the tensors.

        Raises:
            CheckpointError: it contradicts the tensors, or a value is not of the right kind.
        """
        known = {field.name: field for field in fields(self)}
        given = {}
        for name, value in words.items():
            if name not in known or value is None:
                continue  # a later version may say more
            kinds = (
                (bool,)
                if "bool" in str(known[name].type)
                else (str,)
                if "str" in str(known[name].type)
                else (int, float)
            )
            if not isinstance(value, kinds) or (kinds != (bool,) and isinstance(value, bool)):
                raise CheckpointError(f"{source}: {name} is {value!r}; expected {kinds[0].__name__}")
            mine = getattr(self, name)
            if mine is not None and mine != value and name in TOLD_BY_TENSORS:
                raise CheckpointError(f"{source}: says {name} {value!r}, but the tensors say {mine!r}")
            given[name] = value
        return replace(self, **given)


TOLD_BY_TENSORS = (
    "family", "depth", "width", "hidden", "in_channels", "patch", "text_channels", "self_norm", "cross_norm",
    "text_norm", "guidance",
)  # fmt: skip

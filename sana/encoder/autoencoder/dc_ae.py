"""DC-AE, the deep compression autoencoder of SANA: (b, 3, H, W) in [-1, 1] <-> (b, c, H/r, W/r) of unit order.

Architecture: Chen et al. 2024 (arXiv 2410.10733), as SANA 1.0/1.1 and DC-AE-Lite publish it; the presets are in
conf/encoder/autoencoder/. The latent is deterministic, and scaling is part of `encode` and `decode`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.encoder.autoencoder.blending import blend_tiles, check_blending
from sana.encoder.autoencoder.blocks import (
    Downsample,
    EViTBlock,
    ResBlock,
    RMSNorm2d,
    Upsample,
    average_channels,
    repeat_channels,
)
from sana.encoder.autoencoder.plan import Plan, make_plan
from sana.encoder.autoencoder.tiles import Layer, convolution, layer_of, modules, run
from sana.ops.decoding.op import convolve_to_few, kernels_for

CONFIG_KEY = "config"


def _check_stages(part: str, widths: Sequence[int], depths: Sequence[int], attention: Sequence[bool]) -> None:
    if not len(widths) == len(depths) == len(attention) >= 2:
        raise ValueError(f"{part}: widths, depths and attention must name the same two or more stages, "
                         f"got {len(widths)}, {len(depths)} and {len(attention)}")  # fmt: skip
    if any(depth < 1 for depth in depths[1:]) or depths[0] < 0:
        raise ValueError(f"{part}: depths {list(depths)}: only the first stage (full resolution) may be empty")


def _blocks(width: int, depth: int, attention: bool, head_dim: int, kernels: Sequence[int]) -> list[nn.Module]:
    return [EViTBlock(width, head_dim, kernels) if attention else ResBlock(width) for _ in range(depth)]


class Encoder(nn.Module):
    """Pixels to unscaled latents. Stage s works at 1 / 2^s of the resolution; stage 0 may be empty."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        attention: Sequence[bool],
        head_dim: int,
        kernels: Sequence[int],
        shuffle: bool,
        latent_shortcut: bool,
    ) -> None:
        super().__init__()
        _check_stages("encoder", widths, depths, attention)
        last = len(widths) - 1
        if depths[0] > 0:
            self.input = nn.Conv2d(3, widths[0], 3, padding=1)
        else:
            self.input = Downsample(3, widths[1], shuffle, shortcut=False)
        self.stages = nn.ModuleList()
        for s, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = _blocks(width, depth, attention[s], head_dim, kernels)
            if s < last and depth > 0:
                stage.append(Downsample(width, widths[s + 1], shuffle))
            self.stages.append(nn.Sequential(*stage))
        self.output = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.shortcut_channels = channels if latent_shortcut else None

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        x = self.input(x)
        for stage in self.stages:
            x = stage(x)
        return self._leave(x)

    def chain(self) -> list[Layer]:
        """The layers that `forward` applies one after the other."""
        first = layer_of(self.input) if isinstance(self.input, Downsample) else convolution(self.input, reach=1)
        return [first, *modules(list(self.stages)), convolution(self._leave, reach=1)]

    def _leave(self, x: Tensor) -> Tensor:
        y = self.output(x)
        return y if self.shortcut_channels is None else y + average_channels(x, self.shortcut_channels)


class Decoder(nn.Module):
    """Unscaled latents to pixels; the stages run from the last (coarsest) to stage 0, which may be empty."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        attention: Sequence[bool],
        head_dim: int,
        kernels: Sequence[int],
        shuffle: bool,
        latent_shortcut: bool,
        silu_output: bool,
    ) -> None:
        super().__init__()
        _check_stages("decoder", widths, depths, attention)
        last = len(widths) - 1
        self.input = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()
        for s, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = _blocks(width, depth, attention[s], head_dim, kernels)
            if s < last and depth > 0:
                stage.insert(0, Upsample(widths[s + 1], width, shuffle))
            self.stages.append(nn.Sequential(*stage))
        width = widths[0] if depths[0] > 0 else widths[1]
        self.norm = RMSNorm2d(width)
        self.silu_output = silu_output
        if depths[0] > 0:
            self.output = nn.Conv2d(width, 3, 3, padding=1)
        else:
            self.output = Upsample(width, 3, shuffle, shortcut=False)
        self.shortcut_channels = widths[-1] if latent_shortcut else None

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution that makes pixels."""
        return self.output if isinstance(self.output, nn.Conv2d) else self.output.conv

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        x = self._enter(z)
        for stage in reversed(self.stages):
            x = stage(x)
        return self._leave(self._activate(x))

    def chain(self) -> list[Layer]:
        """The layers that `forward` applies one after the other."""
        last = layer_of(self.output) if isinstance(self.output, Upsample) else convolution(self._leave, reach=1)
        stages = modules(list(reversed(self.stages)))
        return [convolution(self._enter, reach=1), *stages, convolution(self._activate, reach=0), last]

    def _enter(self, z: Tensor) -> Tensor:
        x = self.input(z)
        return x if self.shortcut_channels is None else x + repeat_channels(z, self.shortcut_channels)

    def _leave(self, x: Tensor) -> Tensor:
        last = self.output
        if isinstance(last, nn.Conv2d) and last.bias is not None and kernels_for(x, last.weight, last.bias):
            return convolve_to_few(x, last.weight, last.bias)
        return last(x)

    def _activate(self, x: Tensor) -> Tensor:
        return self.norm(x, activation="silu" if self.silu_output else "relu")


class DCAE(nn.Module):
    """Deep compression autoencoder. The defaults are SANA's f32c32 (versions 1.0 and 1.1): 312,250,275 parameters.

    Args:
        channels: c, channels of the latent.
        scale: latents are multiplied by it in `encode` and divided by it in `decode`; 1 / RMS of the raw latents.
        encoder_widths, decoder_widths: channels per stage, from full resolution to the coarsest; the ratio r is
            2^(stages - 1).
        encoder_depths, decoder_depths: blocks per stage; 0 at stage 0 merges it into the first or last resampling
            (then widths[0] is unused).
        encoder_attention, decoder_attention: per stage, EViT blocks (True) or residual convolutions (False).
        head_dim: channels per attention head.
        kernels: odd sizes of the aggregated copies of q, k, v in the attention.
        encoder_shuffle: resample by pixel-unshuffle instead of strided convolution.
        decoder_shuffle: resample by pixel-shuffle instead of nearest-neighbour enlargement.
        latent_shortcut: channel means into, and repeated channels out of, the latent.
        silu_output: SiLU instead of ReLU before the last convolution.
        weights: file written by `save` to start from; None: random weights. Not read on the meta device.
        max_memory_gib: what encoding or decoding may take, weights included; beyond it they work in tiles, with the
            same result (`sana.encoder.autoencoder.tiles`). None: no limit. Where gradients are wanted it does not
            hold, as everything is kept then.
        blending: (tile, stride) in pixels: diffusers' way to save memory, for parity only. Larger images are worked on
            in tiles that know nothing of each other and are cross-faded where they overlap; the result depends on the
            tiles.

    Raises:
        ValueError: stages that do not match each other, widths that no shortcut can join, weights of another
            architecture, or both max_memory_gib and blending.
        FileNotFoundError: no such file of weights.
    """

    def __init__(
        self,
        channels: int = 32,
        scale: float = 0.41407,
        encoder_widths: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        encoder_depths: Sequence[int] = (2, 2, 2, 3, 3, 3),
        encoder_attention: Sequence[bool] = (False, False, False, True, True, True),
        decoder_widths: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        decoder_depths: Sequence[int] = (3, 3, 3, 3, 3, 3),
        decoder_attention: Sequence[bool] = (False, False, False, True, True, True),
        head_dim: int = 32,
        kernels: Sequence[int] = (5,),
        encoder_shuffle: bool = False,
        decoder_shuffle: bool = False,
        latent_shortcut: bool = True,
        silu_output: bool = False,
        weights: str | Path | None = None,
        max_memory_gib: float | None = None,
        blending: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(encoder_widths) != len(decoder_widths):
            raise ValueError(f"encoder and decoder must have the same number of stages, "
                             f"got {len(encoder_widths)} and {len(decoder_widths)}")  # fmt: skip
        if latent_shortcut and (encoder_widths[-1] % channels or decoder_widths[-1] % channels):
            raise ValueError(f"latent_shortcut needs channels={channels} to divide the last widths "
                             f"{encoder_widths[-1]} and {decoder_widths[-1]}")  # fmt: skip
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels must be odd, got {list(kernels)}")
        self.config: dict[str, Any] = {
            "channels": channels,
            "scale": scale,
            "encoder_widths": list(encoder_widths),
            "encoder_depths": list(encoder_depths),
            "encoder_attention": list(encoder_attention),
            "decoder_widths": list(decoder_widths),
            "decoder_depths": list(decoder_depths),
            "decoder_attention": list(decoder_attention),
            "head_dim": head_dim,
            "kernels": list(kernels),
            "encoder_shuffle": encoder_shuffle,
            "decoder_shuffle": decoder_shuffle,
            "latent_shortcut": latent_shortcut,
            "silu_output": silu_output,
        }
        self.channels = channels
        self.ratio = 2 ** (len(encoder_widths) - 1)
        self.scale = scale
        self.limit_memory(max_memory_gib, blending)
        self.encoder = Encoder(channels, encoder_widths, encoder_depths, encoder_attention, head_dim, kernels,
                               encoder_shuffle, latent_shortcut)  # fmt: skip
        self.decoder = Decoder(channels, decoder_widths, decoder_depths, decoder_attention, head_dim, kernels,
                               decoder_shuffle, latent_shortcut, silu_output)  # fmt: skip
        for parameter in self.parameters():  # as `.to(memory_format=...)`, which fake tensors refuse
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if weights is not None and not next(self.parameters()).is_meta:
            config, state = _read(weights)
            differing = sorted(key for key in self.config if self.config[key] != config.get(key))
            if differing:
                raise ValueError(f"{weights}: made with other settings of {', '.join(differing)}")
            self.load_state_dict(state)

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Pixels in [-1, 1] to latents of unit order (already multiplied by `scale`); h = H / r, w = W / r.

        Raises:
            ValueError: not three channels, a side that is no multiple of r, or more memory needed than max_memory_gib.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % self.ratio or image.shape[3] % self.ratio:
            raise ValueError(f"encode: image must be (b, 3, H, W) with H and W multiples of {self.ratio}, "
                             f"got {tuple(image.shape)}")  # fmt: skip
        return self._run("encode", image) * self.scale

    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Latents as `encode` gives them to pixels, nominally in [-1, 1] (not clipped).

        Raises:
            ValueError: not (b, c, h, w), or more memory needed than max_memory_gib.
        """
        if latent.ndim != 4 or latent.shape[1] != self.channels:
            raise ValueError(f"decode: latent must be (b, {self.channels}, h, w), got {tuple(latent.shape)}")
        return self._run("decode", latent / self.scale)

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        """The reconstruction decode(encode(image))."""
        return self.decode(self.encode(image))

    def limit_memory(self, max_memory_gib: float | None = None, blending: Sequence[int] | None = None) -> None:
        """Set how images too large for the memory are worked on; the arguments are those of the constructor.

        Raises:
            ValueError: both are given, or one is out of range.
        """
        if max_memory_gib is not None and not max_memory_gib > 0:
            raise ValueError(f"max_memory_gib must be positive, or null for no limit, got {max_memory_gib}")
        if blending is not None:
            if max_memory_gib is not None:
                raise ValueError("max_memory_gib (exact tiles) and blending (diffusers' tiles) exclude each other")
            check_blending(blending, self.ratio)
        self.max_memory_gib, self.blending = max_memory_gib, blending
        self._plans: dict[Any, Plan] = {}

    def plan(self, part: Literal["encode", "decode"], like: Tensor, tile: int | None = None) -> Plan:
        """The memory that encoding images, or decoding latents, takes, and the tiles that `max_memory_gib` leads to.

        Args:
            part: which.
            like: what the input (b, c, h, w) is like: shape, dtype, device. Its numbers are not looked at.
            tile: side in pixels of all tiles, whatever the budget; None: as large as the budget allows.

        Raises:
            ValueError: the budget does not hold even the smallest tiles.
        """
        half, device = self.encoder if part == "encode" else self.decoder, like.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (part, tuple(like.shape), like.dtype, like.device, autocast, self.max_memory_gib, tile)
        if key not in self._plans:
            weights = sum(t.numel() * t.element_size() for t in self.state_dict().values())
            budget = None if self.max_memory_gib is None else int(self.max_memory_gib * 2**30)
            try:
                with torch.compiler.set_stance("force_eager"):  # compiled blocks would take fake tensors for real ones
                    self._plans[key] = make_plan(half.chain(), like, weights, budget, tile)
            except ValueError as error:
                raise ValueError(f"autoencoder.max_memory_gib: to {part} {tuple(like.shape)}, {error}") from None
        return self._plans[key]

    def _run(self, part: Literal["encode", "decode"], x: Tensor) -> Tensor:
        """A half of the autoencoder within the memory it may take."""
        half = self.encoder if part == "encode" else self.decoder
        if self.blending is not None:
            pixels = self.blending[0], self.blending[1]
            places = pixels[0] // self.ratio, pixels[1] // self.ratio
            return blend_tiles(half, x, *((pixels, places) if part == "encode" else (places, pixels)))
        trained = torch.is_grad_enabled() and (x.requires_grad or next(half.parameters()).requires_grad)
        if self.max_memory_gib is None or trained:
            return half(x)
        plan = self.plan(part, x)
        with torch.no_grad():
            return run(plan.segments, x, plan.batch)


def save(model: DCAE, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes weights and constructor arguments (in the header) as one safetensors file, cast to dtype where given."""
    state = {name: tensor.detach().to(dtype=dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={CONFIG_KEY: json.dumps(model.config)})


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    max_memory_gib: float | None = None,
    blending: Sequence[int] | None = None,
) -> DCAE:
    """Reads what `save` wrote: a DCAE in evaluation mode on the CPU, channels last, its weights cast to dtype.

    Args:
        path: the file.
        dtype: of the weights.
        max_memory_gib, blending: as in `DCAE`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the header holds no configuration, or the limits of memory are out of range.
    """
    config, state = _read(path)
    with torch.device("meta"):
        model = DCAE(**config, max_memory_gib=max_memory_gib, blending=blending)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.eval().to(memory_format=torch.channels_last)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and state dict of a file that `save` wrote."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"autoencoder weights: no file {path}")
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        if CONFIG_KEY not in header:
            raise ValueError(f"{path}: no {CONFIG_KEY!r} in the safetensors header; write autoencoders with "
                             "sana.encoder.autoencoder.dc_ae.save")  # fmt: skip
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return json.loads(header[CONFIG_KEY]), state

"""``bench.py autoencoder``: one decode of DC-AE against diffusers' with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana.bench.counts import decoder_kernels
from sana.bench.measure import Bench, Case, captured, exact, measure, one_line, relative, set_floors, wide
from sana.bench.parts import SIZES, made, our_autoencoder, their_autoencoder
from sana.bench.rows import Row
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.ops.choice import set_kernels


@dataclass(frozen=True)
class Picture:
    """One row: resolution, batch, and what it has to reach."""

    px: int
    batch: int
    bars: tuple[tuple[str, float], ...] = ()
    size: str = "1600m"

    @property
    def text(self) -> str:
        """For the row."""
        return f"{self.px}px b{self.batch}"


PICTURES = (Picture(1024, 1, (("ms", 20.0),)), Picture(512, 1), Picture(1024, 4))
TINY = (Picture(64, 1, size="tiny"),)


def cases(tiny: bool) -> list[Case]:
    """All rows, and one more side of the first: compiled."""
    pictures = TINY if tiny else PICTURES
    found = [Case("autoencoder", "decode", p.text, _Decode(p), 12) for p in pictures]
    return [*found, Case("autoencoder", "decode", pictures[0].text, _Compiled(pictures[0]), 60, "compiled")]


class Decoders:
    """Our autoencoder and diffusers' with the same weights, without gradients."""

    def __init__(self, size: str, dtype: torch.dtype, device: torch.device) -> None:
        from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers

        self.size, self.dtype, self.device = SIZES[size], dtype, device
        self.theirs = their_autoencoder(self.size, dtype, device).eval().requires_grad_(False)
        self.ours: DCAE = our_autoencoder(self.size, dtype, device).eval().requires_grad_(False)
        self.ours.load_state_dict(dc_ae_from_diffusers(self.theirs.state_dict()))

    def latent(self, picture: Picture) -> Tensor:
        """Of unit order."""
        with made(self.dtype, self.device, seed=2):
            return torch.randn(picture.batch, 32, picture.px // 32, picture.px // 32)

    def run_ours(self, z: Tensor) -> Callable[[], Tensor]:
        """A decode."""

        def run() -> Tensor:
            with torch.no_grad():
                return self.ours.decode(z)

        return run

    def run_theirs(self, z: Tensor, autoencoder: Any = None) -> Callable[[], Tensor]:
        """A decode of diffusers' autoencoder, or of another one like it."""
        autoencoder = self.theirs if autoencoder is None else autoencoder
        unscaled = z.to(next(autoencoder.parameters()).dtype) / autoencoder.config.scaling_factor

        def run() -> Tensor:
            with torch.no_grad():
                return autoencoder.decode(unscaled, return_dict=False)[0]

        return run


def decoders(bench: Bench, size: str) -> Decoders:
    """Both autoencoders, held."""
    return bench.hold(f"autoencoders {size}", lambda: Decoders(size, bench.dtype, bench.device))


class _Decode:
    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    def __call__(self, bench: Bench, row: Row) -> None:
        both, picture = decoders(bench, self.picture.size), self.picture
        z = both.latent(picture)
        set_floors(row, lambda: decoder_kernels(both.size, picture.px, picture.batch, bench.dtype.itemsize))
        row.bars |= dict(picture.bars)
        ours, theirs = both.run_ours(z), both.run_theirs(z)
        with exact():
            expected = both.run_theirs(z, copy.deepcopy(both.theirs).to(wide(bench.dtype)))()
        row.error = {"ours": relative(ours(), expected), "eager": relative(theirs(), expected)}
        set_kernels("naive")
        try:
            row.error["naive"] = relative(ours(), expected)
            naive = Row("", "", "", "")
            measure(bench, naive, {"ours": ours}, repeats=3)
            row.facts["naive_ms"] = naive.ms["ours"]["median"]
        finally:
            set_kernels("auto")
        sides = {"ours": ours, "eager": theirs, "ours without a graph": ours}
        try:
            sides["ours"] = captured(ours, bench.device)
            row.error["ours"] = max(row.error["ours"], relative(sides["ours"](), expected))
        except Exception as error:  # then as it is, and said
            row.failed["graph"] = one_line(error)
        measure(bench, row, sides)
        row.ratio.pop("ours without a graph", None)
        row.facts["ours_without_graph_ms"] = row.ms.pop("ours without a graph")["median"]


class _Compiled:
    """diffusers' decoder compiled whole, and ours as well: it pays or it does not."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    def __call__(self, bench: Bench, row: Row) -> None:
        both = decoders(bench, self.picture.size)
        z = both.latent(self.picture)
        fast = copy.deepcopy(both.theirs)
        fast.decoder = torch.compile(fast.decoder, fullgraph=True, dynamic=False)
        ours = both.run_ours(z)
        again = Row("", "", "", "")
        sides = {"ours": captured(ours, bench.device), "compiled": both.run_theirs(z, fast)}
        row.error["compiled"] = relative(sides["compiled"](), both.run_theirs(z)())
        measure(bench, again, sides)
        row.ms = again.ms | row.ms
        row.ms["compiled"], row.ratio["compiled"] = again.ms["compiled"], again.ratio["compiled"]

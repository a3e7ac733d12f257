"""Runs that begin with other weights: grown, pruned or as they are, from every layout that weights come in."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))
from weights import CHANNELS, DEPTH, HEADS, TEXT, WIDTH, diffusers_model, full, native_state, save

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.record import Record
from sana.checkpoint.tensors import from_dict
from sana.checkpoint.transformer import sana_from_native
from sana.checkpoint.write import write_consolidated
from sana.model.start import AsIs, Grow, Prune, start_from
from sana.network.growth import Constant, Cyclic, Expand, Interpolation, Random, prune_depth
from sana.run.build import build
from sana.run.compose import compose
from sana.run.error import ConfigError
from sana.run.importance import Importance, write_importance
from sana.run.saved import prepare
from sana.run.sidecar import file_digest
from sana.types import Condition

SMALL = ["network=sana15_1600m", f"network.width={WIDTH}", f"network.text_channels={TEXT}",
         f"network.in_channels={CHANNELS}", f"block.cross.heads={HEADS}", "network.checkpoint_every=0",
         "network.text_norm=1.0"]  # fmt: skip
LAYOUTS = ("native", "diffusers", "ours")
HERE = Path(__file__).resolve().parents[2]


@cache
def network_node(depth: int, *more: str) -> Any:
    return compose("train", [*SMALL, f"network.depth={depth}", *more]).config.network


def module(depth: int, *more: str, meta: bool = True) -> Any:
    """What `start_from` sees of a recipe, whose network has no memory, or a start of its own."""
    torch.manual_seed(5)
    with torch.device("meta" if meta else "cpu"):
        return SimpleNamespace(network=build(network_node(depth, *more), "network"))


def state_of(seed: int) -> dict[str, Tensor]:
    return sana_from_native({n: t for n, t in native_state("sana15", seed).items() if n != "pos_embed"})


def source(layout: str, folder: Path, seed: int = 0) -> Path:
    """The same weights in a layout."""
    if layout == "native":
        torch.save({"state_dict": native_state("sana15", seed)}, folder / "x.pth")
        return folder / "x.pth"
    if layout == "ours":
        write_consolidated(folder / "x.safetensors", from_dict(state_of(seed)), Record(updates=7))
        return folder / "x.safetensors"
    from sana.checkpoint.diffusers import sana_to_diffusers

    model = diffusers_model("sana15")
    model.load_state_dict(sana_to_diffusers({n: t for n, t in state_of(seed).items() if not n.startswith("extra.")}))
    model.save_pretrained(folder / "x")
    return folder / "x"


def output(network: Any, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, CHANNELS, 1, 5, 7, generator=g), torch.randn(2, 6, TEXT, generator=g)
    with torch.no_grad():
        return network.eval()(x, torch.tensor([[0.1], [0.9]]), Condition(text, torch.ones(2, 6, dtype=torch.bool)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_identities_change_no_bit_whatever_the_layout(layout: str, seed: int, tmp_path: Path) -> None:
    place = str(source(layout, tmp_path, seed))
    plain = state_of(seed)
    truncated = module(2, meta=False)
    own = {n: t for n, t in plain.items() if not n.startswith("extra.")}
    truncated.network.load_state_dict(prune_depth(own, [0, 1]))
    wanted = output(truncated.network)
    for growth, depth in ((Constant(), 5), (Cyclic(zero_gate=True), 5), (Expand(zero_gate=True), 6)):
        grown = module(depth)
        facts = start_from(grown, place, Grow(2, growth))
        assert torch.equal(output(grown.network), wanted), growth
        assert (facts["kept"], facts["source_depth"], facts["depth"]) == (2, DEPTH, depth)
        assert facts["new_blocks"] == ([1, 2, 4, 5] if depth == 6 else [2, 3, 4])
        assert facts["source_updates"] == (7 if layout == "ours" else None)
        assert all(not p.is_meta and p.dtype == torch.float32 and p.requires_grad for p in grown.network.parameters())
    pruned = module(2)
    assert start_from(pruned, place, Prune(keep=[0, 1]))["keep"] == [0, 1]
    assert torch.equal(output(pruned.network), wanted)


def test_random_keeps_the_start_of_the_network(tmp_path: Path) -> None:
    place, fresh, grown = source("native", tmp_path), module(5, meta=False), module(5, meta=False)
    facts = start_from(grown, str(place), Grow(2, Random()))
    assert not Grow(2, Random()).whole
    assert len(facts["own_start"]) == 3 * len(fresh.network.blocks[0].state_dict())  # type: ignore[index]
    old, new, start = state_of(0), grown.network.state_dict(), fresh.network.state_dict()
    for name, value in new.items():
        own = name.startswith(("blocks.2.", "blocks.3.", "blocks.4."))
        assert torch.equal(value, (start if own else old)[name]), name
    with pytest.raises(CheckpointError, match="nothing else gives it a value"):
        start_from(module(5), str(place), Grow(2, Random()))


def test_half_precision_is_grown_in_single(tmp_path: Path) -> None:
    torch.save({"state_dict": native_state("sana15", dtype=torch.bfloat16)}, tmp_path / "x.pth")
    grown = module(5)
    start_from(grown, str(tmp_path / "x.pth"), Grow(2, Interpolation()))
    one, two = (native_state("sana15", dtype=torch.bfloat16)[f"blocks.{i}.attn.qkv.weight"].double() for i in (0, 1))
    between = grown.network.state_dict()["blocks.1.mixer.qkv.weight"].double()  # place 1 * 2 / 5 of the source
    np.testing.assert_allclose(between, 0.6 * one + 0.4 * two, rtol=1e-6, atol=1e-7)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """Of a growth only the network itself takes memory: what is made is gone when the next is made."""
    import weakref

    from sana.checkpoint.tensors import Tensors
    from sana.model.load import fill

    taken = Grow(2, Constant()).take(from_dict(state_of(0)).renamed(
        lambda n: None if n.startswith("extra.") else n), tmp_path, 9)  # fmt: skip
    made: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        assert sum(ref() is not None for ref in made) <= 1
        tensor = taken.state[name].clone()
        made.append(weakref.ref(tensor))
        return tensor

    network = module(9).network
    fill(network, Tensors(taken.state.like, read), "x")
    assert len(made) == len(network.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("growth", [Constant(), Interpolation()], ids=str)
def test_growth_of_the_published_size_without_memory(layout: str, growth: Any, tmp_path: Path) -> None:
    from sana.checkpoint.transformer import from_ours, to_ours

    native = full(2240, 20, norms=True)
    ours = to_ours(native, "native")
    if layout == "diffusers":
        ours = to_ours(from_ours({n: t for n, t in ours.items() if not n.startswith("extra.")}, "diffusers")[0], layout)
    elif layout == "ours":
        ours = to_ours(dict(ours), "sana")
    ours = ours.renamed(lambda n: None if n.startswith("extra.") else n)
    with torch.device("meta"):
        network = build(compose("train", ["model=sana15_4800m"]).config.network, "network")
    taken = Grow(18, growth).take(ours, tmp_path, 60)
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in taken.state.like.items()} == wanted
    assert not taken.fresh


def test_a_published_file_of_full_size_is_read_as_a_plan(tmp_path: Path) -> None:
    """Names and shapes through the file itself: 1.6 B numbers that take no room."""
    from sana.model.load import read_weights

    state, _ = read_weights(save(tmp_path / "SANA1.5_1.6B_1024px.pth", full(2240, 20, norms=True)))
    taken = Grow(18, Constant()).take(state, tmp_path, 60)
    assert sum(t.numel() for t in taken.state.like.values()) == 4_721_825_952


def test_a_source_without_norms_says_what_helps(tmp_path: Path) -> None:
    torch.save({"state_dict": native_state("sana")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: has no q/k norms, as SANA 1\.0.*allow_missing=\[\*_norm"):
        start_from(module(5), str(tmp_path / "x.pth"), Grow(2, Constant()))
    allowed = Grow(2, Constant(), allow_missing=["*_norm.weight"])
    assert not allowed.whole
    grown = module(5, meta=False)
    facts = start_from(grown, str(tmp_path / "x.pth"), allowed)
    assert len(facts["own_start"]) == 5 * 4
    assert all((grown.network.state_dict()[name] == 1).all() for name in facts["own_start"])
    without = module(5, "block.mixer.qk_norm=false", "block.cross.qk_norm=false")
    start_from(without, str(tmp_path / "x.pth"), Grow(2, Constant()))


def test_rates_of_new_blocks() -> None:
    network = module(6).network
    assert Grow(4, Constant()).rates(network) == {}
    rates = Grow(2, Expand(), new_lr=2.0).rates(network)
    names = {name for name, _ in network.named_parameters()}
    assert rates.keys() == {name for name in names if name.startswith(tuple(f"blocks.{i}." for i in (1, 2, 4, 5)))}
    assert set(rates.values()) == {2.0}
    with pytest.raises(ValueError, match="new_lr"):
        Grow(2, Constant(), new_lr=0.0)
    with pytest.raises(ValueError, match="6 blocks are not a multiple of the 4"):
        Grow(4, Expand()).rates(network)


def test_a_report_about_other_weights_is_refused(tmp_path: Path) -> None:
    place = source("native", tmp_path)
    digest = file_digest(place)
    good = write_importance(tmp_path / "good", Importance([0.3, 0.1, 0.2], {"digest": digest}))
    pruned = module(2)
    facts = start_from(pruned, str(place), Prune(importance=str(good)))
    assert (facts["keep"], facts["digest"]) == ([0, 2], digest)
    own = {n: t for n, t in state_of(0).items() if not n.startswith("extra.")}
    for name, value in prune_depth(own, [0, 2]).items():
        assert torch.equal(pruned.network.state_dict()[name], value)
    other = write_importance(tmp_path / "other", Importance([0.3, 0.1, 0.2], {"digest": "0" * 16}, "y.pth"))
    with pytest.raises(ValueError, match=rf"is about other weights \(y\.pth, digest 0+\) than init=.*{digest}"):
        start_from(module(2), str(place), Prune(importance=str(other)))
    short = write_importance(tmp_path / "short", Importance([0.3, 0.1], {"digest": digest}))
    with pytest.raises(ValueError, match=r"ranks 2 blocks, .* has 3"):
        start_from(module(2), str(place), Prune(importance=str(short)))


REFUSED: Mapping[str, str] = {
    "start=grow start.kept=4": "init: has to be given: the weights that are to be grown",
    "start=prune start.keep=[0,1]": "init: has to be given: the weights that are to be pruned",
    "start=grow start.kept=4 resume=auto": "init: has to be given",
    "start.allow_missing=[x]": "start.allow_missing: has no effect without init=",
    "init=scenes start=grow": "start.kept: has to be given",
    "init=scenes start=grow start.kept=7": "start.kept: 7 blocks cannot stay in a network of 6",
    "init=scenes start=grow start.kept=0": "start.kept: 0 blocks",
    "init=scenes start=grow start.kept=4 start.growth=cyclic": "names no growth; choose one by start=, of grow, grow_c",
    "init=scenes start.kept=4": "start.kept: unknown key",
    "init=scenes start=prune": "start.importance, start.keep: neither is given",
    "init=scenes start=prune start.keep=[0,1]": "start.keep: 2 blocks are to stay, network.depth is 6",
    "init=scenes start=prune start.keep=[0,1] start.importance=x": "both are given",
    "init=scenes start=prune start.importance=nowhere": "start.importance: nowhere does not exist",
    f"init=scenes start=prune start.importance={HERE}/experiments/scenes/results.json": "is no report of scripts/imp",
    "init=scenes start=growth": "no such option; did you mean grow",
    "experiment=sana15/grow_1600m_to_4800m data.folder=.": "init: has to be given",
    "experiment=sana15/prune_4800m_to_1600m data.folder=. init=scenes": "start.importance, start.keep: neither",
}


@pytest.mark.parametrize("line", REFUSED)
def test_one_line_says_what_is_wrong(line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        prepare("train", line.split())
    message = str(raised.value)
    assert "\n" not in message
    assert REFUSED[line] in message


def test_init_may_stand_beside_resume_auto(tmp_path: Path) -> None:
    composed = prepare("train", ["init=scenes", "resume=auto", f"run.dir={tmp_path}"])
    assert composed.config.init == "scenes"


def test_as_is_says_what_it_did(tmp_path: Path) -> None:
    facts = start_from(module(DEPTH), str(source("ours", tmp_path)), AsIs())
    assert json.loads(json.dumps(facts))["how"] == "as is"
    with pytest.raises(CheckpointError, match=r"weights do not fit the network: missing: blocks\.3"):
        start_from(module(DEPTH + 1), str(tmp_path / "x.safetensors"), AsIs())

"""What tensors are: families told apart by their names, facts by their shapes, and the rest never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weights import VARIANTS, diffusers_model, full, native_state, save, words

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.facts import Facts
from sana.checkpoint.published import RELEASES, release_of, warning_for
from sana.checkpoint.recognise import kind_of, recognise
from sana.checkpoint.record import Record
from sana.checkpoint.source import open_source
from sana.checkpoint.tensors import from_dict
from sana.checkpoint.transformer import from_ours, to_ours
from sana.checkpoint.write import write_consolidated
from sana.run.error import ConfigError
from sana.run.groups import list_options
from sana.run.match import match
from sana.run.recipe import recipe_of
from sana.run.saved import prepare


def meta(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "width", "depth", "norms", "base", "recipe", "shift", "heads"),
    [
        ("a.pth", 1152, 28, False, 16, "image/sana_600m_512px", 3.0, 16),
        ("a.pth", 1152, 28, False, 32, "image/sana_600m_1024px", 4.0, 16),
        ("a.pth", 2240, 20, False, 32, "image/sana_1600m_1024px", 3.0, 20),
        ("a.pth", 2240, 20, False, 64, "image/sana_1600m_2048px", 3.0, 20),
        ("a.pth", 2240, 20, False, 128, "image/sana_1600m_4096px", 6.0, 20),
        ("a.pth", 2240, 20, True, 32, "image/sana15_1600m_1024px", 3.0, 20),
        ("a.pth", 2240, 60, True, 32, "image/sana15_4800m_1024px", 3.0, 20),
        ("Sana_600M_1024px_MultiLing.pth", 1152, 28, False, None, "image/sana_600m_1024px", 4.0, 16),
        ("Sana_1600M_512px.pth", 2240, 20, False, None, "image/sana_1600m_512px", 3.0, 20),
        ("Sana_1600M_4Kpx_BF16.pth", 2240, 20, False, None, "image/sana_1600m_4096px", 6.0, 20),
        ("SANA1.5_4.8B_1024px.pth", 2240, 60, True, None, "image/sana15_4800m_1024px", 3.0, 20),
    ],
)
def test_published_shapes_lead_to_their_recipes(
    tmp_path: Path,
    name: str,
    width: int,
    depth: int,
    norms: bool,
    base: int | None,
    recipe: str,
    shift: float,
    heads: int,
) -> None:
    facts, composed, _ = match(open_source(save(tmp_path / name, full(width, depth, norms, base=base))))
    assert (facts.recipe, facts.flow_shift, facts.heads, facts.depth) == (recipe, shift, heads, depth)
    config = composed.resolved
    assert config["timestep"]["shift"] == shift
    assert (config["network"]["width"], config["network"]["depth"]) == (width, depth)
    position = config["network"]["position"]
    assert (None if position is None else (position["base"], position["interpolation"])) == {
        2048: (64, 1.0),
        4096: (128, 2.0),
    }.get(facts.size or 0)


@pytest.mark.parametrize(("depth", "norms"), [(7, False), (18, True), (40, True)])
def test_any_depth_is_recognised(tmp_path: Path, depth: int, norms: bool) -> None:
    """Pruned and grown networks keep the recipe of their width."""
    facts, composed, _ = match(open_source(save(tmp_path / "a.pth", full(2240, depth, norms, base=32))))
    assert facts.family == ("sana15" if norms else "sana")
    network = composed.resolved["model"]["network"]
    assert network["depth"] == depth
    assert network["blocks"][0]["mixer"]["qk_norm"] is norms
    assert composed.resolved["timestep"]["shift"] == 3.0


def test_ambiguity_is_refused_with_the_candidates(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.pth", full(2240, 20))
    with pytest.raises(ConfigError) as caught:
        match(open_source(path))
    for size in (512, 1024, 2048, 4096):
        assert f"image/sana_1600m_{size}px" in str(caught.value)
    assert "differ in position, interpolation, flow_shift, size" in str(caught.value)
    assert "--recipe NAME" in str(caught.value)
    facts, composed, _ = match(open_source(path), "image/sana_1600m_4096px")
    assert (facts.flow_shift, facts.size, composed.resolved["network"]["position"]["base"]) == (6.0, 4096, 128)
    (tmp_path / "mine.pth.json").write_text(json.dumps({"recipe": "image/sana_1600m_512px"}))
    assert match(open_source(path))[0].size == 512
    with pytest.raises(ConfigError, match="width is 2240 in the file, 1152 in the recipe"):
        match(open_source(path), "image/sana_600m_512px")
    with pytest.raises(ConfigError, match="self_norm is False in the file, True in the recipe"):
        match(open_source(path), "sana15_1600m_1024px")
    with pytest.raises(ConfigError, match="no recipe image/nothing; recipes: image/"):
        match(open_source(path), "image/nothing")


def test_heads_of_odd_widths_are_not_guessed(tmp_path: Path) -> None:
    path = save(tmp_path / "odd.pth", full(1536, 4, base=32))
    with pytest.raises(ConfigError, match=r"no recipe .* has width 1536 .* number of heads"):
        match(open_source(path))
    told = {"heads": 12, "head_dim": 32, "size": 1024, "position": False, "flow_shift": 2.5}
    (tmp_path / "odd.pth.json").write_text(json.dumps(told))
    facts, composed, _ = match(open_source(path))
    assert facts.recipe is None
    block = composed.resolved["model"]["network"]["blocks"][0]
    assert (block["cross"]["heads"], composed.resolved["timestep"]["shift"]) == (12, 2.5)
    (tmp_path / "odd.pth.json").write_text(json.dumps({**told, "width": 1152}))
    with pytest.raises(CheckpointError, match="says width 1152, but the tensors say 1536"):
        open_source(path)
    (tmp_path / "odd.pth.json").write_text(json.dumps({**told, "heads": "many"}))
    with pytest.raises(CheckpointError, match="heads is 'many'"):
        open_source(path)


def test_sprint_and_its_teacher(tmp_path: Path) -> None:
    for width, depth, heads in ((1152, 28, 16), (2240, 20, 20)):
        facts, composed, _ = match(
            open_source(save(tmp_path / f"{width}.pth", full(width, depth, True, True, base=32)))
        )
        assert (facts.family, facts.heads, facts.time_scale, facts.size) == ("sprint", heads, 1.0, 1024)
        network = composed.resolved["network"]
        assert (network["time_scale"], network["floor_time"], network["guidance_embed"]) == (1.0, False, True)
        assert composed.resolved["sampler"]["_target_"] == "sana.sampler.guided.FewStep"
        filled = prepare("sample", [f"ckpt={tmp_path / f'{width}.pth'}", "prompt=x", "sampler.steps=1"]).resolved
        assert (filled["sampler"]["grid"]["middle"], filled["sampler"]["steps"], filled["size"]) == (1.3, 1, 1024)
    teacher = save(tmp_path / "Sana_Sprint_0.6B_1024px_teacher.pth", full(1152, 28, True))
    facts, composed, _ = match(open_source(teacher))
    assert (facts.family, facts.time_scale) == ("sana15", 1.0)
    assert composed.resolved["network"]["time_scale"] == 1.0
    with pytest.raises(ConfigError, match="teachers of Sprint"):
        match(open_source(save(tmp_path / "unnamed.pth", full(1152, 28, True, base=32))))


OTHERS = {
    "ControlNet": {"controlnet.0.copied_block.attn.qkv.weight": (6, 2), "blocks.0.attn.qkv.weight": (6, 2)},
    "a ControlNet": {"controlnet_blocks.0.weight": (2, 2), "transformer_blocks.0.attn1.to_q.weight": (2, 2)},
    "SANA-Video;": {"blocks.0.mlp.t_conv.weight": (2, 2, 3, 1), "x_embedder.proj.weight": (2, 16, 1, 2, 2)},
    "is SANA-Video": {"transformer_blocks.0.ff.conv_temp.weight": (2, 2, 3, 1)},
    "SANA-WM": {"blocks.0.attn.A_log": (20,), "blocks.0.attn.beta_proj.weight": (20, 2)},
    "SANA-Video 2": {"blocks.0.attn.beta_proj.weight": (20, 2), "x_embedder.proj.weight": (2, 128, 1, 1, 1)},
    "LoRA": {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 2)},
    "text encoder": {"model.layers.0.self_attn.q_proj.weight": (2, 2)},
    "batch norms": {"decoder.stages.0.op_list.0.main.conv1.norm.running_mean": (2,)},
    "no weights that are known": {"conv1.weight": (2, 2)},
}


@pytest.mark.parametrize("says", OTHERS)
def test_other_families_are_named(tmp_path: Path, says: str) -> None:
    state = meta(**OTHERS[says])
    with pytest.raises(CheckpointError, match=says):
        kind_of(state)
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{says}"):
        open_source(save(tmp_path / "x.pth", state))


def test_longsana_is_named(tmp_path: Path) -> None:
    torch.save({"generator": {"a": torch.ones(1)}, "critic": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="LongSANA"):
        open_source(tmp_path / "x.pth")


@pytest.mark.parametrize("variant", VARIANTS)
def test_facts_are_the_same_in_every_layout(variant: str) -> None:
    native = native_state(variant, depth=5)
    norms, guidance, _ = VARIANTS[variant]
    want = Facts(
        "sprint" if guidance else "sana15" if norms else "sana", 5, 64, 160, 6, 1, 10, norms, norms, True, guidance
    )
    found = recognise(from_dict(native).like, "native")
    assert kind_of(native) == ("transformer", "native")
    assert (found.base, found.told() | {"base": None}) == (8, {**want.told(), "base": None})
    theirs = from_ours(to_ours(native, "native"), "diffusers")[0]
    assert kind_of(theirs) == ("transformer", "diffusers")
    assert recognise(theirs.like, "diffusers") == want
    assert recognise(diffusers_model(variant, depth=5).state_dict(), "diffusers") == want
    ours = to_ours(native, "native")
    assert kind_of(list(ours)) == ("transformer", "sana")
    assert recognise(ours.like, "sana").told() == {
        k: v for k, v in found.told().items() if k not in ("in_channels", "patch")
    }


def test_wrapped_and_averaged_state_dicts(tmp_path: Path) -> None:
    live, average = native_state("sana", 0), native_state("sana", 1)
    path = tmp_path / "a.pth"
    wrapped = {f"module.{name}": value for name, value in live.items()}
    torch.save({"state_dict": wrapped, "state_dict_ema": average, "epoch": 3, "optimizer": {}}, path)
    (tmp_path / "a.pth.json").write_text(json.dumps(words("sana")))
    for weights, state in (("ema", average), ("live", live)):
        source = open_source(path, weights)
        assert torch.equal(source.tensors["final.linear.bias"], state["final_layer.linear.bias"])
        assert any("epoch, optimizer" in note for note in source.notes)
    torch.save(live, path)
    assert torch.equal(open_source(path).tensors["final.linear.bias"], live["final_layer.linear.bias"])


def test_names_of_releases() -> None:
    assert {release.recipe for release in RELEASES.values()} - {None} <= set(list_options("experiment"))
    cases = {
        "Sana_600M_512px_MultiLing.pth": "Sana_600M_512px",
        "x/Sana_1600M_1024px_BF16_diffusers": "Sana_1600M_1024px_BF16",
        "Sana_1600M_1024px_BF16/checkpoints/renamed.pth": "Sana_1600M_1024px_BF16",
        "hub/models--Efficient-Large-Model--Sana_1600M_2Kpx_BF16/snapshots/0/checkpoints/a.pth": "Sana_1600M_2Kpx_BF16",
        "Sana_1600M_1024px_diffusers/transformer": "Sana_1600M_1024px",
        "SANA1.5_1.6B_1024px_diffusers": "SANA1.5_1.6B_1024px",
        "Sana_600M_512px/mine.pth": None,
        "Sana_600M_512px_mine.pth": None,
        "sana.pth": None,
    }
    for path, name in cases.items():
        release = release_of(path)
        assert (release and release.name) == name, path


def test_the_checkpoint_that_draws_badly_is_warned_of(tmp_path: Path) -> None:
    for name in ("Sana_1600M_1024px.pth", "Sana_1600M_1024px_MultiLing.pth"):
        notes = open_source(save(tmp_path / name, full(2240, 20, base=32))).notes
        assert any("Efficient-Large-Model/Sana_1600M_1024px_BF16" in note for note in notes)
        with pytest.warns(UserWarning, match="use Efficient-Large-Model/Sana_1600M_1024px_BF16 instead"):
            prepare("sample", [f"ckpt={tmp_path / name}", "prompt=x"])
    facts, composed, _ = match(open_source(tmp_path / "Sana_1600M_1024px.pth"))
    record = Record(recipe_of(composed.resolved, []), facts.told())
    write_consolidated(tmp_path / "mine.safetensors", {"x": torch.ones(1)}, record)  # only its header is read here
    with pytest.warns(UserWarning, match="use Efficient-Large-Model/Sana_1600M_1024px_BF16 instead"):
        prepare("sample", [f"ckpt={tmp_path / 'mine.safetensors'}", "prompt=x"])
    assert [r.name for r in RELEASES.values() if warning_for(r)] == ["Sana_1600M_1024px"]
    assert not open_source(save(tmp_path / "Sana_1600M_1024px_BF16.pth", full(2240, 20, base=32))).notes

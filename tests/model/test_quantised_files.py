"""Quantised checkpoints: the same pictures as quantising while drawing, nothing of full precision in them, and one line
for what is wrong with a file."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import read_header
from sana.checkpoint.record import read_quantisation, read_record
from sana.checkpoint.tensors import read_safetensors
from sana.model.load import load_weights
from sana.model.quantise import narrowed, quantise, quantise_to_file
from sana.quant.rebuild import LAYERS, describe, rebuild
from sana.run.build import build
from sana.run.error import ConfigError
from sana.run.groups import list_options
from sana.run.restore import restore
from sana.run.saved import prepare

KINDS = sorted(LAYERS)


def written(folder: Path, kind: str = "int8_weight", ckpt: str = "scenes_sprint", *more: str) -> Path:
    out = folder / f"{kind}.safetensors"
    settings = [f"ckpt={ckpt}", f"quant={kind}", f"out={out}", "prompt=[a ring,two stars]", "device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sana.model.quantise.build", build_checked)
        quantise_to_file(prepare("quantise", [*settings, "precision=32-true", "sampler.steps=2", *more]))
    return out


def build_checked(node: Any, name: str) -> Any:
    """`build`, for the tests' type checks, which know no lists of YAML for tuples."""
    if name == "sampler":
        node = node.copy()
        del node.interval  # the default
    return build(node, name)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("quantised"))


def network_of(*overrides: str) -> nn.Module:
    """As sample.py makes it, up to where it is placed."""
    composed = prepare("sample", ["prompt=a ring", "device=cpu", "precision=32-true", *overrides])
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sana.model.quantise.build", build_checked)
        quantise(composed, restored)
    return restored.module.network


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long if kind.startswith("svd") else ()) for kind in KINDS]
)
def test_a_file_holds_what_quantising_gives(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    now, loaded = network_of("ckpt=scenes_sprint", f"quant={kind}"), network_of(f"ckpt={path}")
    assert describe(now) == describe(loaded)
    ours, theirs = now.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.float(), theirs[name].float()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "option", "setting"), [("int8", "rotate=16", {"rotate": 16}), ("nvfp4", "search=true", {"search": True})]
)
def test_a_file_keeps_how_tokens_are_rounded(kind: str, option: str, setting: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, kind, "scenes_sprint", f"quant.{option}")
    now, loaded = network_of("ckpt=scenes_sprint", f"quant={kind}", f"quant.{option}"), network_of(f"ckpt={path}")
    assert describe(now) == describe(loaded)
    assert all(setting.items() <= layer.items() for layer in describe(loaded).values())
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in now.state_dict().items())


def test_the_file_is_small_and_says_what_it_is(file: Path) -> None:
    full = Path("experiments/sprint_scenes/scenes_sprint.safetensors")
    assert file.stat().st_size < 0.55 * full.stat().st_size
    tensors, _ = read_safetensors(file)
    record, original = read_record(file), read_record(full)
    assert record is not None
    assert original is not None
    assert (record.recipe, record.updates) == (original.recipe, original.updates)
    layers = record.quant["layers"]
    for name in layers:
        assert tensors[f"{name}.weight"].dtype == torch.int8
    report = json.loads(file.with_suffix(".report.json").read_text())
    network = network_of("ckpt=scenes_sprint")
    linear = {name for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    assert report["converted"].keys() == layers.keys() == linear
    matrices = {n for n, m in network.named_modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))}
    assert report["converted"].keys() | report["skipped"].keys() == matrices
    assert report["outputs"].keys() <= linear  # those that drawing runs
    assert 0 < report["output"] < 0.05
    assert report["file_bytes"] == file.stat().st_size
    sizes = sum(t.numel() * t.element_size() for t in network_of(f"ckpt={file}").state_dict().values())
    assert report["bytes_after"] == sizes


def test_errors_are_those_of_the_layers(file: Path) -> None:
    """The error of a weight, in float64, from both files."""
    report = json.loads(file.with_suffix(".report.json").read_text())
    full, tensors = network_of("ckpt=scenes_sprint").state_dict(), read_safetensors(file)[0]
    for name in ("blocks.0.mixer.qkv", "blocks.3.ffn.point", "final.linear"):
        w = full[f"{name}.weight"].double().numpy()
        q = tensors[f"{name}.weight"].double().numpy() * tensors[f"{name}.scale"].double().numpy()
        assert report["converted"][name] == pytest.approx(np.linalg.norm(q - w) / np.linalg.norm(w), rel=1e-6)


def test_weights_are_never_in_full_precision_in_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    real = torch.empty_like

    def watched(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("device") == "cpu" and tensor.ndim == 2 and tensor.dtype == torch.float32:
            made.append(tensor.shape)
        return real(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", watched)
    network = network_of(f"ckpt={file}")
    linear = [m for m in network.modules() if isinstance(m, tuple(LAYERS.values()))]
    assert not {(m.out_features, m.in_features) for m in linear} & {tuple(shape) for shape in made}


def test_full_precision_is_asked_for_in_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantised already \(int8_weight\); leave quant out"):
        prepare("sample", [f"ckpt={file}", "prompt=x", "quant=int8"])
    with pytest.raises(CheckpointError, match="give the weights that it was made of"):
        quantise_to_file(prepare("quantise", [f"ckpt={file}", f"out={tmp_path / 'b.safetensors'}"]))
    from sana.checkpoint.source import open_source
    from sana.model.load import read_weights

    for reader in (open_source, read_weights):
        with pytest.raises(CheckpointError, match=r"which serves sample\.py and eval\.py only"):
            reader(file)


@pytest.mark.parametrize(
    ("out", "message"), [("a.pth", "has to end in .safetensors"), ("there.safetensors", "exists already")]
)
def test_where_it_may_be_written(out: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        quantise_to_file(prepare("quantise", ["ckpt=scenes", f"out={tmp_path / out}"]))
    with pytest.raises(ConfigError, match="nothing to do"):
        quantise_to_file(prepare("quantise", ["ckpt=scenes", "quant=none", f"out={tmp_path / 'n.safetensors'}"]))


def edited(file: Path, path: Path, change: Any) -> Path:
    """A copy whose record of the quantisation went through `change`."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    quant = json.loads(header["__metadata__"]["quant"])
    header["__metadata__"]["quant"] = change(quant)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def _with(layer: Any, name: str = "final.linear") -> Any:
    def change(quant: dict[str, Any]) -> str:
        quant["layers"][name] = layer
        return json.dumps(quant)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: "{", "the record in its header is damaged"),
        (lambda q: json.dumps({"layers": {}}), "the record in its header is damaged"),
        (lambda q: json.dumps(q["layers"]), "the record in its header is damaged"),
        (_with({"bits": 3}), "the record in its header is damaged"),
        (_with({"kind": "int3"}), "'int3' is no format of this version"),
        (_with({"kind": "int8_weight", "group": 4}), "int8_weight cannot be built with"),
        (_with({"kind": "w4a16", "group": 3}), "must be an even number"),
        (_with({"kind": "w4a16"}), "weights do not fit the network"),
        (_with({"kind": "fp8"}), "weights do not fit the network.*int8, not .*float8_e4m3fn"),
        (_with({"kind": "int8_weight"}, "blocks.0.nothing"), "no linear layer 'blocks.0.nothing'"),
    ],
)
def test_a_wrong_record_is_one_line(file: Path, change: Any, message: str, tmp_path: Path) -> None:
    path = edited(file, tmp_path / "wrong.safetensors", change)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        network_of(f"ckpt={path}")
    assert "\n" not in str(caught.value)


def test_a_file_without_the_record_does_not_load_as_another_network(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["quant"]
    text = json.dumps(header).encode()
    path = tmp_path / "bare.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"extra: .*\.scale.*int8, not"):
        network_of(f"ckpt={path}")


def test_a_truncated_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="truncated or damaged"):
        network_of(f"ckpt={path}")


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_noticed(file: Path, bit: int, tmp_path: Path) -> None:
    entry = read_header(file).entries["blocks.0.mixer.qkv.weight"]
    data = bytearray(file.read_bytes())
    assert entry.dtype == "I8", "every byte is a number"
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(data)
    network_of(f"ckpt={path}")
    data[(entry.begin + entry.end) // 2] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        network_of(f"ckpt={path}")
    assert str(caught.value).startswith(f"{path}: the checksum of blocks.0.mixer.qkv.weight does not fit")
    assert "\n" not in str(caught.value)


def test_the_header_holds_text_only(file: Path) -> None:
    header = read_header(file)
    assert {entry.dtype for entry in header.entries.values()} <= {"I8", "F32", "BF16"}
    assert read_quantisation(file) == json.loads(header.metadata["quant"])
    assert read_quantisation("experiments/scenes/model.safetensors") is None


def test_narrowed_keeps_every_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(50)
    assert narrowed(x).dtype == torch.float32
    assert narrowed(x.bfloat16().float()).dtype == torch.bfloat16
    assert torch.equal(narrowed(x.bfloat16().float()).float(), x.bfloat16().float())
    assert narrowed(torch.tensor([1e-45])).dtype == torch.float32, "a subnormal of float32 alone"
    assert narrowed(torch.ones(3, dtype=torch.int8)).dtype == torch.int8


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilding_gives_layers_of_the_same_state(kind: str) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(18, 34), nn.SiLU(), nn.Linear(34, 5, bias=False))
    for i in (0, 2):
        network[i] = LAYERS[kind].from_linear(network[i])
    with torch.device("meta"):
        other = rebuild(nn.Sequential(nn.Linear(18, 34), nn.SiLU(), nn.Linear(34, 5, bias=False)), describe(network))
    assert all(t.is_meta for t in other.state_dict().values())
    other.load_state_dict(network.state_dict(), assign=True)
    x = torch.randn(3, 18)
    assert torch.equal(other(x), network(x))


def test_every_option_of_the_group_is_known() -> None:
    """A format that files cannot hold would be found out only when somebody's file does not load."""
    assert {option for option in list_options("quant") if option not in ("none", "fp8_train")} == set(LAYERS)


def test_the_report_speaks_of_the_device_that_draws(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network is quantised on the CPU and drawn with on a card that multiplies in FP8."""
    monkeypatch.setattr("sana.quant.fp8.capability", lambda device: (9, 0) if device.type == "cuda" else (0, 0))
    for ckpt, extra, device, said in (
        ("scenes_sprint", ["quant=fp8"], "cuda", "FP8 products, bf16 results"),
        ("scenes_sprint", ["quant=fp8"], "cpu", "emulated: FP8"),
        (str(file), [], "cpu", "int8_weight, as in the file; weights are dequantised"),
    ):
        composed = prepare("sample", ["prompt=a ring", "device=cpu", "precision=32-true", f"ckpt={ckpt}", *extra])
        restored = replace(restore(composed), device=torch.device(device))
        load_weights(restored.module, restored.checkpoint)
        quantise(composed, restored)
        assert said in capsys.readouterr().err

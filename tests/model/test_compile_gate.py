"""When blocks are compiled: as told, or as measured once per shape and kept on disk, whatever becomes of the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sana.model.compile_gate import CompileGate, Padded, Regions, digest, use_compiled
from sana.model.generate import Painter
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition, Edits


def network(seed=0, depth=2) -> Sana:
    torch.manual_seed(seed)
    block = partial(
        Block, mixer=partial(LinearAttention, head_dim=8), cross=partial(CrossAttention, heads=2), ffn=MixFFN
    )
    return Sana(4, 16, depth, 10, [block], text_norm=1.0).eval().requires_grad_(False)


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, log: list[str], name: str):
        def call(x: torch.Tensor) -> torch.Tensor:
            self.now += seconds
            log.append(name)
            return 2 * x

        return call


def gate(folder: Path, plain: float, compiled: float, mode="auto", width=3):
    clock, log = Clock(), []
    module = nn.ModuleList([nn.Linear(width, width)])
    calls = clock.taking(plain, log, "plain"), clock.taking(compiled, log, "compiled")
    return CompileGate(module, Regions([module]), *calls, mode, folder, clock), log


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("plain", "compiled", "answer"), [(1.0, 0.5, True), (1.0, 0.96, True), (1.0, 0.98, False), (1.0, 2.0, False)]
)
def test_the_faster_one_is_taken_and_remembered(tmp_path, plain, compiled, answer):
    first, log = gate(tmp_path, plain, compiled)
    name = "compiled" if answer else "plain"
    assert torch.equal(first(X), 2 * X)
    assert log[-1] == name
    assert {"plain", "compiled"} == set(log)
    log.clear()
    first(X)
    assert log == [name]
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert (content["compiled"], content["plain_ms"]) == (answer, pytest.approx(1e3))
    assert content["first_call_s"] == pytest.approx(compiled)
    second, log = gate(tmp_path, compiled, plain)  # another process goes by the file
    second(X)
    assert log == [name]


def test_each_shape_type_module_and_setting_is_measured_for_itself(tmp_path):
    one, _ = gate(tmp_path, 1.0, 0.5)
    for x in (X, torch.ones(4, 3), X.double()):
        one(x)
    with torch.autocast("cpu", torch.bfloat16):
        one(X)
    gate(tmp_path, 1.0, 0.5, width=4)[0](X)
    assert len(list(tmp_path.iterdir())) == 5
    assert digest(network()) == digest(network(seed=1)) != digest(network(depth=3))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 3, "compiled": true}', "null", "compiled"])
def test_a_damaged_file_is_measured_and_written_again(tmp_path, damage):
    gate(tmp_path, 1.0, 0.5)[0](X)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    text = json.dumps(json.loads(whole) | {"compiled": "yes"}) if damage == "compiled" else damage
    file.write_text(text)
    again, log = gate(tmp_path, 1.0, 0.5)
    again(X)
    assert log.count("plain") > 1
    assert file.read_text() == whole
    file.write_bytes(b"\xff\xfe\x00")
    gate(tmp_path, 1.0, 0.5)[0](X)
    assert file.read_text() == whole
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    one, log = gate(tmp_path / "file" / "cache", 1.0, 0.5)
    for _ in range(3):
        one(X)
    assert log.count("plain") == 7  # measured once
    assert "is not kept" in caplog.text


def test_where_the_compiler_fails_blocks_stay_plain(tmp_path, caplog):
    one, _ = gate(tmp_path, 1.0, 0.5)

    def fail(x):
        raise RuntimeError("InvalidCxxCompiler: none here\nmore")

    one.compiled = fail
    assert torch.equal(one(X), 2 * X)
    assert not list(tmp_path.iterdir())
    assert "stays plain: InvalidCxxCompiler: none here" in caplog.text
    one.mode = True
    with pytest.raises(RuntimeError, match="InvalidCxxCompiler"):
        one(X)


def test_always_measures_nothing(tmp_path):
    one, log = gate(tmp_path, 1.0, 2.0, mode=True)
    one(X)
    assert log == ["compiled"]
    assert not list(tmp_path.iterdir())


def test_regions_share_their_parameters():
    net = network()
    plain, regions, names = list(net.blocks), Regions([net.blocks]), list(net.state_dict())
    weight = net.blocks[0].mixer.qkv.weight
    regions.use(True)
    assert list(net.state_dict()) == names
    assert all(a is not b for a, b in zip(net.blocks, plain, strict=True))
    assert net.blocks[0].mixer.qkv.weight is weight
    assert all(block._compiled_call_impl is not None for block in net.blocks)
    regions.use(False)
    assert all(a is b for a, b in zip(net.blocks, plain, strict=True))
    assert all(block._compiled_call_impl is None for block in plain)


@torch.no_grad()
def test_captions_are_padded_once_per_prompt():
    net = network()
    x, t = torch.randn(2, 4, 1, 3, 5), torch.full((2, 1), 0.5)
    run, lengths = Padded(net), []
    hook = net.blocks[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[3].shape[1]))
    for length in (3, 7, 65):
        text = net.prepare(Condition(torch.randn(2, length, 10), torch.ones(2, length, dtype=torch.bool)))
        for edits in ((), (Edits(frozenset({1})),)):
            torch.testing.assert_close(run(x, t, text, *edits), net(x, t, text, *edits), rtol=1e-4, atol=1e-5)
    hook.remove()
    assert lengths == [64, 3, 64, 3, 64, 7, 64, 7, 128, 65, 128, 65]


def test_offload_refuses_to_be_compiled():
    painter = Painter(network(), None, None, lambda c: c)
    assert use_compiled(painter, False).velocity is None
    painter.offload = type("Offload", (), {"mode": "model"})()
    with pytest.raises(ValueError, match=r"compile: auto with offload=model; .* compile=false"):
        use_compiled(painter, "auto")


REAL = """
import sys, torch
from functools import partial
sys.path.insert(0, "tests/model")
from test_compile_gate import network
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.model.compile_gate import use_compiled
from sana.model.generate import Painter
from sana.types import Condition

net, stages = network(depth=3), dict(widths=(8, 8, 16), depths=(1, 1, 2), attention=(False, False, False))
torch.manual_seed(0)
autoencoder = DCAE(4, 1.0, *stages.values(), *stages.values()).eval().requires_grad_(False)
painter = use_compiled(Painter(net, autoencoder, None, lambda c: c), "auto")
x, t = torch.randn(2, 4, 1, 4, 6), torch.full((2, 1), 0.5)
with torch.no_grad():
    text = net.prepare(Condition(torch.randn(2, 7, 10), torch.ones(2, 7, dtype=torch.bool)), torch.tensor([0.5]))
    want, pixels = net(x, t, text), autoencoder.decode(x[:, :, 0])
    torch.testing.assert_close(painter.velocity(x, t, text), want, rtol=1e-4, atol=1e-5)
    painter.velocity.mode = painter.pixels.mode = True
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(painter.velocity(x, t, text), want, rtol=1e-4, atol=1e-5)
    print("graphs", torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
    torch.testing.assert_close(painter.pixels(x[:, :, 0]), pixels, rtol=1e-4, atol=1e-5)
    autoencoder.plan("decode", x[:, :, 0])
"""


@pytest.mark.long
def test_real_compilation_gives_the_same_numbers_and_one_measurement(tmp_path):
    """In a process of its own: the shape checks of the tests cannot be traced."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REAL], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "sana" / "compile").iterdir()
    content = json.loads(file.read_text())
    assert isinstance(content["compiled"], bool)
    assert content["key"]["inputs"][2]["caption"] == [2, 64, "torch.float32"]
    assert done.stdout.split()[-1] == "0"  # compiled before: no shape was traced again

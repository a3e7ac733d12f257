"""The plan of a run: exact counts, states as in closed form, activations as real tensors give them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.run.activations import Shape, saved_bytes
from sana.run.build import build
from sana.run.compose import compose
from sana.run.error import ConfigError
from sana.run.plan import gemma2_parameters, make_plan, state_bytes
from sana.types import Condition, Grid

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "network.width=64",
    "block.cross.heads=2",
    "network.patch=1",
    "network.in_channels=4",
    "network.text_channels=64",
]
COUNTS = {
    "sana_600m": 591_747_872,
    "sana_1600m": 1_604_462_752,
    "sana15_1600m": 1_604_641_952,
    "sana15_4800m": 4_721_825_952,
}
AUTOENCODER, GEMMA = 312_250_275, 2_614_341_888


@pytest.mark.parametrize("model", COUNTS)
def test_published_counts(model: str) -> None:
    plan = make_plan(compose("train", [f"model={model}", "strategy=fsdp", "data.batch_size=8"]))
    counts = {"network": COUNTS[model], "autoencoder": AUTOENCODER, "text encoder": GEMMA}
    assert plan.parameters == counts
    assert plan.weights == plan.gradients == 4 * COUNTS[model]
    assert (plan.tokens, plan.text_tokens) == (1024, 300)
    assert plan.average == 0
    assert plan.frozen == 4 * AUTOENCODER + 2 * GEMMA
    # CAME: the momentum of every parameter, and for the rest less than one percent of that.
    assert 4 * COUNTS[model] < plan.states < 4.04 * COUNTS[model]
    # The published price list (spec A2): forward of one 1024 px image; x4 with every block recomputed.
    forward = {"sana_600m": 1.121e12, "sana_1600m": 3.0e12, "sana15_1600m": 3.0e12, "sana15_4800m": 9.0e12}[model]
    assert plan.flops == pytest.approx(8 * 4 * forward, rel=0.03)


def test_flops_follow_the_formula() -> None:
    """Spec A2: 27 C^2 + 36 r C + (32 + 1) 4 C + 4 T C per token and layer, 4 C^2 T per layer, and the caption MLP."""
    plan = make_plan(compose("train", ["model=sana_600m", "data.batch_size=4", "network.checkpoint_every=0"]))
    width, layers, n, text = 1152, 28, 1024, 300
    layer = n * (27 * width**2 + 36 * 2.5 * width + 132 * width + 4 * text * width) + 4 * width**2 * text
    forward = layers * layer + 2 * text * (2304 * width + width**2)
    assert plan.flops == pytest.approx(4 * 3 * forward, rel=2e-3)


def came_state_bytes(shapes: list[tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes:
        size = 1
        for s in shape:
            size *= s
        factored = len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
        total += 4 * (size + (2 * (shape[0] + shape[1]) if factored else size))
    return total


@pytest.mark.parametrize("optimizer", ["came", "adamw", "tiny"])
def test_optimizer_states_are_those_of_the_formula(optimizer: str) -> None:
    config = compose("train", [*SMALL, "network.depth=2", f"optimizer={optimizer}"]).config
    with torch.device("meta"):
        network = build(config.network, "network")
    shapes = [tuple(p.shape) for p in network.parameters()]
    count = sum(p.numel() for p in network.parameters())
    expected = came_state_bytes(shapes) if optimizer == "came" else 8 * count + 4 * len(shapes)
    assert state_bytes(build(config.optimizer, "optimizer"), network) == expected


def real_saved_bytes(network: torch.nn.Module, shape: Shape, bf16: bool) -> int:
    """Bytes that autograd keeps in a forward pass of real tensors."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            sizes[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(shape.batch, shape.channels, 1, shape.side, shape.side)
    text = torch.randn(shape.batch, shape.text_tokens, shape.text_channels)
    mask = torch.ones(shape.batch, shape.text_tokens, dtype=torch.bool)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        output = network(x, torch.rand(shape.batch, 1), Condition(text, mask))
    assert output.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_activations_are_those_of_real_tensors(depth: int, bf16: bool) -> None:
    config = compose("train", [*SMALL, f"network.depth={depth}"]).config

    def network(layers: int) -> torch.nn.Module:
        changed = config.copy()
        changed.network.depth = layers
        return build(changed.network, "network")

    shape = Shape(batch=3, channels=4, side=6, text_tokens=7, text_channels=64)
    estimate = saved_bytes(network, depth, 0, shape, bf16)
    assert estimate == pytest.approx(real_saved_bytes(network(depth), shape, bf16), rel=0.05)


def test_recomputation_leaves_inputs_and_one_block() -> None:
    config = compose("train", SMALL).config

    def network(layers: int) -> torch.nn.Module:
        changed = config.copy()
        changed.network.depth = layers
        return build(changed.network, "network")

    shape = Shape(2, 4, 8, 7, 64)
    whole, none = saved_bytes(network, 12, 1, shape, False), saved_bytes(network, 12, 0, shape, False)
    one = saved_bytes(network, 1, 0, shape, False)
    tokens = 2 * 64 * 64 * 4
    assert whole == one + 12 * tokens
    assert none > 3 * whole
    half = saved_bytes(network, 12, 2, shape, False)
    assert whole < half < none


def test_devices_and_accumulation_divide_the_batch() -> None:
    line = ["model=sana_600m", "strategy=fsdp", "trainer.devices=4", "trainer.num_nodes=2", "data.micro_batch=4"]
    plan = make_plan(compose("train", [*line, "data.batch_size=64"]))
    assert (plan.devices, plan.micro, plan.batch, plan.sharded) == (8, 4, 64, True)
    states = plan.weights + plan.gradients + plan.states
    assert plan.per_device == states // 8 + plan.frozen + plan.activations
    whole = make_plan(compose("train", [*(t.replace("fsdp", "ddp") for t in line), "data.batch_size=64"]))
    assert whole.per_device == states + plan.frozen + plan.activations
    with pytest.raises(ConfigError, match="does not divide"):
        make_plan(compose("train", [*line, "data.batch_size=60"]))


def test_a_size_that_does_not_fit_the_autoencoder() -> None:
    with pytest.raises(ConfigError, match="size: 1000 is not a multiple"):
        make_plan(compose("train", ["model=sana_600m", "size=1000"]))


def test_gemma_counts_from_numbers() -> None:
    from transformers import Gemma2Config, Gemma2Model

    numbers = {
        "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 80,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    }  # fmt: skip
    with torch.device("meta"):
        real = Gemma2Model(Gemma2Config(**numbers))
    assert gemma2_parameters(numbers) == sum(p.numel() for p in real.parameters())


def test_network_flops_agree_with_the_plan() -> None:
    composed = compose("train", ["model=sana15_1600m", "data.batch_size=2", "network.checkpoint_every=0"])
    with torch.device("meta"):
        network = build(composed.config.network, "network")
    assert make_plan(composed).flops == 2 * 3 * network.flops(Grid(1, 32, 32), 300)


# Started from here a process would inherit this one's peak memory; from a small one it inherits little.
WEIGH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime, usage.ru_maxrss, flush=True)
sys.exit(code)
"""


def test_the_biggest_plan_fits_a_small_machine() -> None:
    line = ["train.py", "model=sana15_4800m", "strategy=fsdp", "dry_run=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WEIGH, sys.executable, *line], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said, _, usage = done.stdout.strip().rpartition("\n")
    for text in (
        "4,721,825,952",
        "312,250,275",
        "2,614,341,888",
        "optimizer states",
        "activations",
        "FLOPs per update",
    ):
        assert text in said
    seconds, kib = map(float, usage.split())
    # 20 s are asked for; processor time, because the machine may be busy with other tests.
    assert seconds < 20
    assert kib / 2**20 < 4

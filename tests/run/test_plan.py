"""The plan of a run: exact counts, states as in closed form, activations as real tensors give them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sana.run.activations import Shape, kept_bytes
from sana.run.build import build
from sana.run.compose import compose
from sana.run.error import ConfigError
from sana.run.plan import gemma2_parameters, make_plan, state_bytes, switches
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
    # CAME: the momentum of every parameter (4.8B: in 8 bits), and for the rest less than a twentieth of a byte.
    momentum = 1 if model == "sana15_4800m" else 4
    assert momentum * COUNTS[model] < plan.states < (momentum + 0.05) * COUNTS[model]
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


MID = ["network.width=288", "block.cross.heads=9", "network.patch=1", "network.in_channels=16",
       "network.text_channels=320", "network.depth=7"]  # fmt: skip


def shallow(config) -> Callable[[int, int], torch.nn.Module]:
    def network(layers: int, every: int) -> torch.nn.Module:
        changed = config.copy()
        changed.network.depth, changed.network.checkpoint_every = layers, every
        return build(changed.network, "network")

    return network


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", ["tiny", "small", "mid"])
def test_activations_are_those_of_real_tensors(size: str, bf16: bool) -> None:
    line, shape = {
        "tiny": ([], Shape(batch=5, channels=8, side=8, text_tokens=13, text_channels=96)),
        "small": ([*SMALL, "network.depth=3"], Shape(batch=3, channels=4, side=6, text_tokens=7, text_channels=64)),
        "mid": (MID, Shape(batch=2, channels=16, side=11, text_tokens=19, text_channels=320)),
    }[size]
    config = compose("train", line).config
    depth = config.network.depth
    estimate = kept_bytes(shallow(config), depth, 0, shape, bf16)
    assert estimate.recomputed == 0
    real = real_saved_bytes(build(config.network, "network"), shape, bf16)
    assert estimate.forward == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(("every", "keep"), [(1, "input"), (3, "input"), (1, "products"), (2, "products")])
def test_recomputed_blocks_keep_what_real_ones_keep(every: int, keep: str) -> None:
    """What is held by closures escapes the hooks of autograd: here all memory that is alive after a forward pass."""
    config = compose("train", [*MID, f"network.checkpoint_keep={keep}"]).config
    shape = Shape(batch=2, channels=16, side=11, text_tokens=19, text_channels=320)
    network = shallow(config)
    estimate, whole = (kept_bytes(network, 7, n, shape, False) for n in (every, 0))
    real = {n: alive_bytes(network(7, n), shape) for n in (every, 0)}
    assert estimate.forward == pytest.approx(real[every], rel=0.05)
    assert whole.forward == pytest.approx(real[0], rel=0.05)
    assert estimate.forward < estimate.peak < whole.forward
    if keep == "input":  # tokens are all that a block keeps
        blocks = len(range(0, 7, every))
        saved = whole.forward - estimate.forward
        assert saved == pytest.approx(blocks * estimate.recomputed, rel=1e-6)


def alive_bytes(network: torch.nn.Module, shape: Shape) -> int:
    """Bytes of all tensors that Python's collector or autograd's graph holds after a forward pass, but for weights."""
    x = torch.randn(shape.batch, shape.channels, 1, shape.side, shape.side)
    text = torch.randn(shape.batch, shape.text_tokens, shape.text_channels)
    mask = torch.ones(shape.batch, shape.text_tokens, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        output = network(x, torch.rand(shape.batch, 1), Condition(text, mask))
    assert output.requires_grad
    changes = sum(event.self_cpu_memory_usage for event in trace.events())
    return changes + sum(t.numel() * t.element_size() for t in (x, text, mask))


def test_recomputation_changes_no_gradient() -> None:
    shape = Shape(2, 16, 6, 5, 320)
    grads = []
    for line in (
        [],
        ["network.checkpoint_every=1"],
        ["network.checkpoint_every=2", "network.checkpoint_keep=products"],
    ):
        torch.manual_seed(0)
        network = build(compose("train", [*MID, "network.depth=3", *line]).config.network, "network")
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape.batch, shape.channels, 1, shape.side, shape.side, generator=generator)
        text = torch.randn(shape.batch, shape.text_tokens, shape.text_channels, generator=generator)
        for p in network.parameters():  # zeros would hide what is behind them
            p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
        network(x, torch.full((2, 1), 0.3), Condition(text)).square().mean().backward()
        grads.append([p.grad for p in network.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize(("line", "optimizer"), [([], "came"), (MID, "came_8bit")], ids=["tiny", "mid"])
def test_weights_gradients_and_states_are_those_of_real_tensors(line: list[str], optimizer: str) -> None:
    composed = compose("train", [*line, f"optimizer={optimizer}", "data.batch_size=2"])
    plan = make_plan(composed)
    network = build(composed.config.network, "network")
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    step = build(composed.config.optimizer, "optimizer")(network.parameters())
    step.step()
    assert plan.weights == sum(p.numel() * p.element_size() for p in network.parameters())
    assert plan.gradients == sum(p.grad.numel() * p.grad.element_size() for p in network.parameters())
    states = [v for state in step.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert plan.states == sum(v.numel() * v.element_size() for v in states)


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


@pytest.mark.long
def test_each_way_of_saving_memory_says_what_it_saves() -> None:
    assert switches(compose("train", ["data.cache_latents=false"])) == []
    line = [*MID, "data.batch_size=64", "data.cache_text=true"]
    saving = ["network.checkpoint_every=1", "optimizer=came_8bit", "model.frozen=offload", "model.compile=true"]
    plan, whole = make_plan(compose("train", [*line, *saving])), make_plan(compose("train", line))
    said = {text.split(":")[0]: text for text in switches(compose("train", [*line, *saving]))}
    assert set(said) == {"recomputation", "optimizer states", "frozen encoders", "compile", "data.cache_latents",
                         "data.cache_text"}  # fmt: skip
    gib = 2**30
    assert f"{(plan.whole - plan.activations) / gib:.3f} GiB less" in said["recomputation"]
    assert f"{(8 * plan.weights / 4 - plan.states) / gib:.3f} GiB less than AdamW" in said["optimizer states"]
    assert f"{(whole.frozen - plan.frozen) / gib:.3f} GiB less on each device" in said["frozen encoders"]
    counts = plan.parameters
    assert whole.frozen == 4 * counts["autoencoder"] + 2 * counts["text encoder"]
    assert plan.frozen == max(4 * counts["autoencoder"], 2 * counts["text encoder"])
    assert plan.activations < whole.activations == plan.whole


def test_the_grown_network_takes_what_its_parts_take() -> None:
    """SANA-1.5 4.8B under 8-bit CAME, counted by hand from the published shapes (spec 2 and 6.4)."""
    from sana.optimizer.came_8bit import blocks_per_row

    d, m = 2240, 5600

    def matrix(rows: int, columns: int) -> int:
        """Bytes of a large matrix: a code per element, a scale per block of a row, four statistics in float32."""
        return rows * columns + 4 * rows * blocks_per_row(columns, 2048) + 4 * 2 * (rows + columns)

    def rest(numbers: int) -> int:
        """Momentum and second moment in float32."""
        return 8 * numbers

    def small(rows: int, columns: int) -> int:
        """A factored matrix of at most 16,384 elements: momentum in float32."""
        return 4 * rows * columns + 8 * (rows + columns)

    block = small(6, d) + matrix(3 * d, d) + 3 * matrix(d, d) + matrix(2 * d, d) + matrix(2 * m, d) + matrix(d, m)
    block += rest(d + d + 2 * d + d + 2 * m + 9 * 2 * m + 2 * m + 4 * d)
    other = matrix(d, 32) + matrix(d, 256) + matrix(d, d) + matrix(6 * d, d) + matrix(d, 2304) + matrix(d, d)
    other += matrix(32, d) + small(2, d) + rest(d + d + d + 6 * d + d + d + d + 32)
    plan = make_plan(compose("train", ["experiment=sana15/grow_1600m_to_4800m", "strategy=fsdp", "trainer.devices=64"]))
    assert plan.parameters["network"] == 4_721_825_952
    assert plan.weights == plan.gradients == 4 * 4_721_825_952
    assert plan.states == 60 * block + other
    assert plan.average == 0
    assert plan.per_device == (plan.weights + plan.gradients + plan.states) // 64 + plan.frozen + plan.activations

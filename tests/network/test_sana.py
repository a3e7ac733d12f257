"""SANA's trunk: parameter counts, time, state, edits, precision, forward derivative, checkpointing, FLOPs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.embed import SinCos2d
from sana.nn.linear_attention import CausalLinearAttention, LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition, Edits, Grid

CHANNELS, TEXT = 4, 10


def block(heads=2, mixer=LinearAttention, qk_norm=False):
    return partial(
        Block,
        mixer=partial(mixer, qk_norm=qk_norm),
        cross=partial(CrossAttention, heads=heads, qk_norm=qk_norm),
        ffn=MixFFN,
    )


def tiny(seed=0, mixer=LinearAttention, dtype=torch.float64, width=64, depth=3, **settings):
    torch.manual_seed(seed)
    blocks = settings.pop("blocks", [block(mixer=mixer, qk_norm=True)])
    return Sana(CHANNELS, width, depth, TEXT, blocks=blocks, **settings).to(dtype)


def inputs(b=2, f=1, h=3, w=5, length=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, CHANNELS, f, h, w, generator=g, dtype=dtype)
    t = torch.rand(b, f, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    text = torch.randn(b, length, TEXT, generator=g, dtype=dtype)
    mask = torch.arange(length) < torch.tensor([[length], [length - 1]])
    return x, t, Condition(text, mask)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "qk_norm", "count"),
    [
        (1152, 28, 16, False, 591_747_872),
        (2240, 20, 20, False, 1_604_462_752),
        (2240, 20, 20, True, 1_604_641_952),
        (2240, 60, 20, True, 4_721_825_952),
    ],
)
def test_published_parameter_counts(width, depth, heads, qk_norm, count):
    with torch.device("meta"):
        network = Sana(32, width, depth, 2304, blocks=[block(heads, qk_norm=qk_norm)])
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count


def test_prepared_condition_gives_the_same_velocity():
    network, (x, t, cond) = tiny(), inputs()
    prepared = network.prepare(cond)
    assert len(prepared.text_kv) == 3
    torch.testing.assert_close(network(x, t, prepared), network(x, t, cond), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float64), (1, torch.float32)])
def test_prepared_times_give_the_same_velocity(seed, dtype, guided):
    network, (_, _, cond) = tiny(seed, dtype=dtype, guidance_embed=guided), inputs(dtype=dtype, seed=seed)
    x = torch.randn(2, CHANNELS, 2, 3, 5, dtype=dtype)
    if guided:
        nn.init.normal_(network.guidance_embed.fc2.weight)
        cond = dataclasses.replace(cond, guidance=torch.tensor([4.0, 5.0], dtype=dtype))
    times = torch.tensor([0.9, 0.7, 0.35, 0.1], dtype=torch.float64)
    prepared = network.prepare(cond, times)
    for rows in ([[0, 0], [0, 0]], [[1, 3], [2, 0]]):  # one time for all, and one per sample and frame
        t = times[torch.tensor(rows)].to(dtype)
        want = network(x, t, cond)
        torch.testing.assert_close(
            network(x, t, prepared), want, rtol=1e-5, atol=1e-6 if dtype.itemsize == 4 else 1e-12
        )
    with pytest.raises(RuntimeError, match="not among those"):
        network(x, t + 0.01, prepared)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_chunks_equal_one_pass_with_time_per_frame(seed):
    network = tiny(seed, CausalLinearAttention)
    x, t, cond = inputs(f=5, seed=seed)
    whole = network(x, t, cond)
    first, state = network.stream(x[:, :, :2], t[:, :2], cond, None)
    kept = [[part.clone() for part in layer if part is not None] for layer in state]
    second, _ = network.stream(x[:, :, 2:], t[:, 2:], cond, state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-10, atol=1e-12)
    for layer, copy in zip(state, kept, strict=True):  # the state given is not written to
        torch.testing.assert_close([part for part in layer if part is not None], copy, rtol=0, atol=0)


def test_later_frames_and_times_do_not_reach_earlier_ones():
    network = tiny(0, CausalLinearAttention)
    x, t, cond = inputs(f=3)
    changed, other_t = x.clone(), t.clone()
    changed[:, :, 2] += 1
    other_t[:, 2] = 0.5
    before, after = network(x, t, cond), network(changed, other_t, cond)
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2], rtol=0, atol=0)
    assert (after[:, :, 2] - before[:, :, 2]).abs().min() > 0


def test_time_of_a_frame_modulates_that_frame():
    """With one frame the causal network is the image network; frames at equal content differ only by their time."""
    causal, (x, t, cond) = tiny(0, CausalLinearAttention), inputs(f=1)
    image = tiny(0, LinearAttention)
    image.load_state_dict(causal.state_dict())
    torch.testing.assert_close(causal(x, t, cond), image(x, t, cond), rtol=1e-10, atol=1e-12)


def test_bidirectional_network_cannot_continue():
    network, (x, t, cond) = tiny(), inputs()
    v, state = network.stream(x, t, cond, None)
    torch.testing.assert_close(v, network(x, t, cond), rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot continue a stream"):
        network.stream(x, t, cond, state)


def test_time_scale_and_floor():
    x, _, cond = inputs()
    network = tiny(time_scale=1000.0, floor_time=True)
    a, b = torch.tensor([[0.5321], [0.1]]).double(), torch.tensor([[0.5329], [0.1]]).double()
    assert torch.equal(network(x, a, cond), network(x, b, cond))
    assert torch.equal(network(x, torch.floor(a * 1000) / 1000 + 1e-9, cond), network(x, a, cond))
    network.floor_time = False
    assert not torch.equal(network(x, a, cond), network(x, b, cond))
    scaled = tiny(time_scale=1.0)
    scaled.load_state_dict(network.state_dict())
    torch.testing.assert_close(scaled(x, a * 1000, cond), network(x, a, cond))
    with pytest.raises(ValueError, match="would leave no time"):
        tiny(time_scale=1.0, floor_time=True)


def test_floor_keeps_whole_steps_of_fp32_times():
    network, seen = tiny(floor_time=True, dtype=torch.float32, depth=1), {}
    network.time_embed.register_forward_pre_hook(lambda m, a: seen.update(t=a[0]))
    steps = torch.arange(1001).float()
    _, _, cond = inputs(dtype=torch.float32)
    one = Condition(cond.text[:1], None)
    for t, want in [(steps / 1000, steps), ((steps + 0.99) / 1000, steps)]:
        network(torch.zeros(1, CHANNELS, 1001, 1, 1), t[None], one)
        assert torch.equal(seen["t"][0], want)


COMPILED = """
from functools import partial
import torch
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import CausalLinearAttention, LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition

block = partial(Block, cross=partial(CrossAttention, heads=2, qk_norm=True), ffn=MixFFN)
mixers = [partial(kind, qk_norm=True) for kind in (LinearAttention, CausalLinearAttention)]
network = Sana(4, 64, 2, 10, [partial(block, mixer=mixer) for mixer in mixers])
x, t = torch.randn(2, 4, 2, 3, 5), torch.rand(2, 2)
cond = Condition(torch.randn(2, 6, 10), torch.ones(2, 6, dtype=torch.bool))
compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x, t, cond), network(x, t, cond))
"""


@pytest.mark.slow
def test_compiles_without_a_break():
    """In a process of its own, without the type checks of the tests, which torch.compile cannot see through."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("mixer", "every"), [(LinearAttention, 0), (CausalLinearAttention, 1)])
def test_forward_derivative_equals_central_differences(mixer, every):
    network = tiny(3, mixer, time_scale=1.0, guidance_embed=True, checkpoint_every=every)
    x, t, cond = inputs(f=2)
    cond = dataclasses.replace(cond, guidance=torch.tensor([4.0, 5.0]).double())
    dx, dt = torch.randn_like(x), torch.rand_like(t)
    v, tangent = torch.func.jvp(lambda x, t: network(x, t, cond), (x, t), (dx, dt))
    torch.testing.assert_close(v, network(x, t, cond), rtol=1e-10, atol=1e-12)
    h = 1e-6
    central = (network(x + h * dx, t + h * dt, cond) - network(x - h * dx, t - h * dt, cond)) / (2 * h)
    assert ((tangent - central).norm() / central.norm()).item() < 1e-7


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_keeps_gradients(every):
    x, t, cond = inputs()
    grads = []
    for setting in (0, every):
        network = tiny(checkpoint_every=setting)
        leaf = x.clone().requires_grad_()
        network(leaf, t, cond).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in network.parameters())])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_recomputes_every_nth_block():
    network, (x, t, cond) = tiny(depth=5, checkpoint_every=2), inputs()
    calls = []
    for i, layer in enumerate(network.blocks):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    network(x.requires_grad_(), t, cond).sum().backward()
    assert sorted(calls[5:]) == [0, 2, 4]


def test_features_are_the_tokens_after_a_block():
    network, (x, t, cond) = tiny(), inputs()
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out[0]))
        for i, layer in enumerate(network.blocks)
    ]
    network(x, t, cond)
    for handle in handles:
        handle.remove()
    found = network.features(x, t, cond, [0, 2])
    assert found.keys() == {0, 2}
    for i, tokens in found.items():
        assert torch.equal(tokens, seen[i])
    calls = []
    network.blocks[2].register_forward_pre_hook(lambda *_: calls.append(2))
    network.features(x, t, cond, {1})
    assert not calls
    with pytest.raises(ValueError, match=r"layers \[3\]; the network has layers 0 to 2"):
        network.features(x, t, cond, [3])
    with pytest.raises(ValueError, match="no layers"):
        network.features(x, t, cond, [])


def test_edits():
    network, (x, t, cond) = tiny(), inputs()
    plain = network.features(x, t, cond, [0, 1, 2])
    added = torch.randn_like(plain[1])
    residual = Edits(residual={1: added})
    # A residual after the last block but one is the same as starting the last block from there.
    with torch.no_grad():
        captured = {}
        handle = network.blocks[2].register_forward_pre_hook(lambda m, a: captured.update(x=a[0]))
        network(x, t, cond, residual)
        handle.remove()
    torch.testing.assert_close(captured["x"], plain[1] + added, rtol=1e-12, atol=1e-14)

    perturbed = network(x, t, cond, Edits(identity_attention=frozenset({0})))
    copy = tiny()
    mixer = copy.blocks[0].mixer
    mixer.step = lambda x, ctx, state: (mixer.proj(mixer.qkv(x)[..., 2 * 64 :]), state)
    torch.testing.assert_close(perturbed, copy(x, t, cond), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"edits.residual names layers \[7\]"):
        network(x, t, cond, Edits(residual={7: added}))
    with pytest.raises(ValueError, match=r"edits.identity_attention names layers \[3\]"):
        network(x, t, cond, Edits(identity_attention=frozenset({3})))


def test_blocks_are_cycled_over_depth():
    network = tiny(depth=5, blocks=[block(), block(), block(mixer=CausalLinearAttention)])
    kinds = [type(layer.mixer) for layer in network.blocks]
    assert kinds == [
        LinearAttention,
        LinearAttention,
        CausalLinearAttention,
        LinearAttention,
        LinearAttention,
    ]


def test_linear_factory_makes_every_matrix():
    class Marked(nn.Linear):
        pass

    network = tiny(linear=Marked, guidance_embed=True)
    plain = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Marked)]
    assert plain == []
    other = [name for name, p in network.named_parameters() if p.ndim == 2 and not name.endswith("table")]
    assert all(isinstance(network.get_submodule(name.rpartition(".")[0]), Marked) for name in other)


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_bf16_is_near_fp32(mode):
    network = tiny(dtype=torch.float32, width=96, depth=4)
    x, t, cond = inputs(b=2, h=5, w=7, dtype=torch.float32)
    want = network(x, t, cond)
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = network(x, t, cond)
    else:
        got = network.to(torch.bfloat16)(x, t, cond)
    assert got.dtype == torch.float32
    assert 0 < ((got - want).norm() / want.norm()).item() < 2e-2


@pytest.mark.parametrize("grid", [Grid(1, 9, 7), Grid(1, 3, 5), Grid(2, 6, 7)])
def test_flops_equal_the_counter(grid):
    network = tiny(
        dtype=torch.float32,
        width=96,
        guidance_embed=True,
        blocks=[block(), block(mixer=CausalLinearAttention)],
    )
    x, t, cond = inputs(b=2, f=grid.f, h=grid.h, w=grid.w, dtype=torch.float32)
    cond = dataclasses.replace(cond, guidance=torch.tensor([4.0, 5.0]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t, cond)
    assert 2 * network.flops(grid, 4) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "size", "tflop"),
    [(1152, 28, 16, 32, 1.121), (2240, 20, 20, 32, 2.967), (2240, 60, 20, 64, 34.45)],
)
def test_flops_of_published_models(width, depth, heads, size, tflop):
    with torch.device("meta"):
        network = Sana(32, width, depth, 2304, blocks=[block(heads)])
    assert network.flops(Grid(1, size, size), 300) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_position_is_added_to_every_frame():
    network, (x, t, cond) = tiny(position=partial(SinCos2d, base=8)), inputs(f=2)
    captured = {}
    network.blocks[0].register_forward_pre_hook(lambda m, a: captured.update(x=a[0]))
    network(x, t, cond)
    table = network.position(Grid(2, 3, 5), "cpu", torch.float64)
    want = network.patch_embed(x).unflatten(1, (2, -1)) + table
    torch.testing.assert_close(captured["x"], want.flatten(1, 2))


def test_wrong_inputs_are_named():
    network, (x, t, cond) = tiny(), inputs()
    with pytest.raises(ValueError, match="takes c = 4"):
        network(x[:, :3], t, cond)
    with pytest.raises(ValueError, match="divisible by 2"):
        tiny(patch=2)(x, t, cond)
    with pytest.raises(ValueError, match=r"one time per sample and frame, \(2, 1\)"):
        network._enter(x, t.repeat(1, 2), cond, Edits())  # below forward's annotations, which refuse it in tests
    with pytest.raises(ValueError, match="10"):
        network(x, t, Condition(cond.text[..., :5], cond.mask))
    with pytest.raises(ValueError, match="guidance_embed=False"):
        network(x, t, dataclasses.replace(cond, guidance=torch.ones(2).double()))
    with pytest.raises(ValueError, match="has no guidance"):
        tiny(guidance_embed=True)(x, t, cond)
    with pytest.raises(ValueError, match="at least one"):
        tiny(depth=0)
    with pytest.raises(ValueError, match="checkpoint_every"):
        tiny(checkpoint_every=-1)

"""CUDA graphs of drawing: when one is recorded, replayed, filled and dropped, and that the numbers stay.

There is no GPU where these tests usually run. So recording is played by a stand-in, which notes the operations of one
call with the very tensors that they read and wrote; replaying repeats exactly those. Like a graph it sees no Python, no
new inputs and no new addresses, and an operation that waits for its result is refused. What it cannot show (streams,
memory pools, what else CUDA refuses to record) is left to the last tests, on a device.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.gemma_random import gemma_random
from sana.flow.grid import dpm_grid
from sana.model import graphs
from sana.model.generate import Painter
from sana.model.graphs import DecoderGraphs, NetworkGraphs, PromptGraphs, padded
from sana.model.text_graphs import TextGraphs
from sana.model.use_graphs import use_graphs
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.quant.int8_weight import int8_weight
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler
from sana.types import Condition, Edits

TIMES = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Tape(TorchDispatchMode):
    """Notes operations with the tensors that they read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        fresh = [x.untyped_storage().data_ptr() not in given for x in outputs]  # the others are views, or written to
        self.notes.append((func, args, kwargs, outputs, fresh))
        return result

    def replay(self) -> None:
        for func, args, kwargs, outputs, fresh in self.notes:
            results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for place, result, new in zip(outputs, results, fresh, strict=True):
                if new:
                    place.copy_(result)


class StandIn:
    """Plays `CudaCapture`; counts what is recorded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run):
        self.count += 1
        with Tape() as tape:
            output = run()
        for note in tape.notes:  # recording computes nothing: only replaying does
            for place, new in zip(note[3], note[4], strict=True):
                if new and place.is_floating_point():
                    place.fill_(torch.nan)
        return tape.replay, output


def network(seed=0, dtype=torch.float64, text=10, **settings) -> Sana:
    torch.manual_seed(seed)
    block = partial(
        Block, mixer=partial(LinearAttention, head_dim=8), cross=partial(CrossAttention, heads=2), ffn=MixFFN
    )
    return Sana(4, 16, 3, text, [block], text_norm=1.0, **settings).to(dtype).eval().requires_grad_(False)


def prompt(net: Sana, length: int, b=2, seed=0, times: Tensor | None = TIMES, masked=True, guidance=None):
    g = torch.Generator().manual_seed(seed)
    like = net.final.table
    text = torch.randn(b, length, 10, generator=g, dtype=torch.float64).to(like)
    mask = (torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])[:b]).to(like.device)
    if guidance is not None:
        guidance = torch.full((b,), guidance, dtype=like.dtype, device=like.device)
    return net.prepare(Condition(text, mask if masked else None, guidance), times)


def latents(net: Sana, b=2, h=3, w=5, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, 4, 1, h, w, generator=g, dtype=torch.float64).to(net.final.table)


def at(x: Tensor, t: float) -> Tensor:
    return torch.full((x.shape[0], 1), t, dtype=x.dtype, device=x.device)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("times", [None, TIMES])
@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float64), (1, torch.float32)])
def test_prompts_of_all_lengths_replay_one_graph(seed, dtype, times, guided):
    net, capture = network(seed, dtype, guidance_embed=guided), StandIn()
    if guided:
        nn.init.normal_(net.guidance_embed.fc2.weight)
    replayed = NetworkGraphs(net, capture)
    for k, length in enumerate((7, 64, 1, 33, 7)):
        text = prompt(net, length, seed=k, times=times, guidance=k + 1.0 if guided else None)
        for step, t in enumerate((0.9, 0.5, 0.2)):
            x = latents(net, seed=10 * k + step)
            got = replayed(x, at(x, t), text)
            assert torch.equal(got, net(x, at(x, t), padded(text)))
            torch.testing.assert_close(
                got, net(x, at(x, t), text), rtol=1e-5, atol=1e-5 if dtype.itemsize == 4 else 1e-12
            )
    assert capture.count == 1


def test_a_graph_per_shape_type_edit_and_mask():
    net, capture = network(), StandIn()
    replayed = NetworkGraphs(net, capture, limit=99)
    calls = [
        dict(),
        dict(b=1),
        dict(h=5, w=3),
        dict(length=65),
        dict(length=64, masked=False),
        dict(times=None),
        dict(times=TIMES[:2]),
        dict(edits=Edits(frozenset({1}))),
        dict(edits=Edits(frozenset({0, 2}))),
        dict(floor_time=True, times=None),
    ]
    for again in range(2):
        for k, call in enumerate(calls):
            settings = {"length": 7, "times": TIMES, "masked": True, "b": 2} | call
            edits, net.floor_time = settings.pop("edits", Edits()), settings.pop("floor_time", False)
            shape = {name: settings.pop(name) for name in ("h", "w") if name in settings}
            text, x = prompt(net, **settings), latents(net, b=settings["b"], seed=k + again, **shape)
            assert torch.equal(replayed(x, at(x, 0.5), text, edits), net(x, at(x, 0.5), padded(text), edits))
            assert capture.count == (len(calls) if again else k + 1)
    net.floor_time = False


def test_a_prompt_is_copied_once_and_a_new_one_again(monkeypatch):
    net, copies = network(), []
    replayed, fill = NetworkGraphs(net, StandIn()), graphs._fill_prompt
    monkeypatch.setattr(graphs, "_fill_prompt", lambda *a: copies.append(1) or fill(*a))
    first, second, x = prompt(net, 7), prompt(net, 9, seed=1), latents(net)
    for text in (first, first, second, second, first, first):
        got = replayed(x, at(x, 0.5), text)
        assert torch.equal(got, net(x, at(x, 0.5), graphs.padded(text)))
    assert len(copies) == 3 + 6  # six are the test's own
    del text, first
    third = prompt(net, 8, seed=2)  # it may get the address of one that is gone
    assert torch.equal(replayed(x, at(x, 0.5), third), net(x, at(x, 0.5), graphs.padded(third)))


def test_nothing_of_an_earlier_prompt_is_left():
    net, capture = network(), StandIn()
    replayed, x = NetworkGraphs(net, capture), latents(net)
    broken, after, unseen = prompt(net, 40), prompt(net, 7, seed=1), prompt(net, 9, seed=2)
    for layer in broken.text_kv:
        layer.fill_(torch.nan)
    assert unseen.mask is not None
    unseen.mask[1] = False  # attends to all there is
    assert replayed(x, at(x, 0.5), broken).isnan().any()
    for text in (after, unseen):
        got = replayed(x, at(x, 0.5), text)
        assert torch.equal(got, net(x, at(x, 0.5), padded(text)))
        assert got.isfinite().all()
    assert capture.count == 1


def test_results_stay_when_the_graph_is_replayed():
    net = network()
    replayed, text = NetworkGraphs(net, StandIn()), prompt(net, 7)
    a, b = latents(net, seed=1), latents(net, seed=2)
    first = replayed(a, at(a, 0.9), text)
    kept = first.clone()
    second = replayed(b, at(b, 0.5), text)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_the_graph_used_longest_ago_goes_first():
    net, capture = network(), StandIn()
    replayed, text = NetworkGraphs(net, capture, limit=2), prompt(net, 7)
    for h, count in ((3, 1), (4, 2), (3, 2), (5, 3), (3, 3), (4, 4)):
        x = latents(net, h=h)
        assert torch.equal(replayed(x, at(x, 0.5), text), net(x, at(x, 0.5), padded(text)))
        assert (capture.count, len(replayed.graphs.kept)) == (count, min(count, 2))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        NetworkGraphs(net, capture, limit=0)


def test_no_graph_where_it_would_be_wrong(monkeypatch):
    net, capture = network(), StandIn()
    replayed, text, x = NetworkGraphs(net, capture), prompt(net, 7), latents(net)
    t = at(x, 0.5)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(replayed(leaf, t, text).square().sum(), leaf)
        (want,) = torch.autograd.grad(net(leaf, t, text).square().sum(), leaf)
        assert torch.equal(gradient, want)
    _, tangent = torch.func.jvp(lambda x: replayed(x, t, text), (x,), (torch.ones_like(x),))
    h = 1e-6
    ahead, behind = net(x + h, t, text), net(x - h, t, text)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)
    added = Edits(residual={1: torch.ones(2, 15, 16, dtype=x.dtype)})
    assert torch.equal(replayed(x, t, text, added), net(x, t, text, added))
    monkeypatch.setattr(graphs, "LATENT_PIXELS", 29)  # two samples of 15 are more
    assert torch.equal(replayed(x, t, text), net(x, t, text))
    assert capture.count == 0
    assert not NetworkGraphs(net).graphs.possible(x)  # on a CPU, without the stand-in
    monkeypatch.setattr(graphs, "LATENT_PIXELS", 30)
    replayed(x, t, text)
    assert capture.count == 1


def test_moved_parameters_are_recorded_anew_and_changed_ones_are_seen():
    net, capture = network(), StandIn()
    replayed, x = NetworkGraphs(net, capture), latents(net)
    t = at(x, 0.5)
    replayed(x, t, prompt(net, 7))
    net.patch_embed.linear.weight.mul_(2)  # in place: the same address
    text = prompt(net, 7)
    assert torch.equal(replayed(x, t, text), net(x, t, padded(text)))
    assert capture.count == 1
    net.patch_embed.linear.weight.data = net.patch_embed.linear.weight * 2
    text = prompt(net, 7)
    assert torch.equal(replayed(x, t, text), net(x, t, padded(text)))
    assert capture.count == 2


def halved(net: Sana) -> None:
    net.blocks[1].ffn.inverted.weight = nn.Parameter(net.blocks[1].ffn.inverted.weight / 2, requires_grad=False)


def adapted(net: Sana) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    register_parametrization(net.blocks[0].ffn.point, "weight", Doubled())


def replaced_twice(net: Sana) -> None:
    for _ in range(2):
        net.blocks[2] = network(seed=1, dtype=torch.float32).blocks[2]


def removed(net: Sana) -> None:
    del net.blocks[2]


def converted(net: Sana) -> None:
    int8_weight(net)


@pytest.mark.parametrize("change", [halved, adapted, replaced_twice, removed, converted])
def test_parts_that_are_replaced_later_are_recorded_anew(change):
    net, capture = network(dtype=torch.float32), StandIn()
    replayed, keys, x = NetworkGraphs(net, capture), PromptGraphs(net, capture), latents(net)
    features, t = torch.ones(2, 7, 10), at(x, 0.5)
    before = replayed(x, t, prompt(net, 7))
    keys(features)
    for times in (1, 1, 2):  # a part that was put in is watched, too
        if times == 2:
            for parameter in net.blocks[0].ffn.parameters():
                parameter.data = parameter.data * 3
        elif capture.count == 2:
            change(net)
        text = prompt(net, 7)
        got, want = replayed(x, t, text), net(x, t, padded(text))
        assert torch.equal(got, want)
        assert not torch.equal(got, before)
        torch.testing.assert_close(keys(features), net.prepare(Condition(features)).text_kv)
        assert capture.count == 2 * (times + 1)


def test_what_the_device_refuses_to_record_is_run_without(caplog):
    def refuse(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    net = network()
    replayed, text, x = NetworkGraphs(net, refuse), prompt(net, 7), latents(net)
    with caplog.at_level(logging.WARNING, logger="sana.model.graphs"):
        for _ in range(3):
            assert torch.equal(replayed(x, at(x, 0.5), text), net(x, at(x, 0.5), text))
    assert [record.getMessage() for record in caplog.records] == [
        "graphs: Sana is run without: operation not permitted when stream is capturing"
    ]


def test_a_time_that_was_not_prepared_is_still_noticed():
    net = network()
    replayed, text, x = NetworkGraphs(net, StandIn()), prompt(net, 7), latents(net)
    replayed(x, at(x, 0.5), text)
    with pytest.raises(RuntimeError, match="not among those"):
        replayed(x, at(x, 0.51), text)


@pytest.fixture(scope="module")
def painter() -> Painter:
    torch.manual_seed(0)
    autoencoder = DCAE(
        channels=4,
        scale=1.0,
        encoder_widths=(8, 8, 16),
        encoder_depths=(1, 1, 1),
        encoder_attention=(False, False, False),
        decoder_widths=(8, 8, 16),
        decoder_depths=(1, 1, 1),
        decoder_attention=(False, False, False),
    ).eval()
    encoder = gemma_random(64, 1, max_tokens=24, dtype="float32", trim=True)
    return Painter(network(dtype=torch.float32, text=64), autoencoder.requires_grad_(False), encoder,
                   lambda c: encoder.null(len(c.text), c.text.shape[1]))  # fmt: skip


@pytest.mark.parametrize(("guidance", "interval"), [(2.0, (0.0, 1.0)), (2.0, (0.0, 0.6)), (1.0, (0.0, 1.0))])
def test_a_painter_draws_the_same_with_graphs(painter, guidance, interval):
    sampler = Sampler(flow_dpm, partial(dpm_grid, shift=3.0), steps=4, guidance=guidance, interval=interval)
    sampler = Sampler(**{**vars(sampler), "pag_scale": 1.5, "pag_layers": [1]})
    arguments = (["a red circle", "two blue squares and a star"], [1, 2], sampler, 16, 20)
    painter.velocity = painter.pixels = None
    plain, latent = painter.draw(*arguments), painter.latents(*arguments)
    capture, decode = StandIn(), StandIn()
    painter.velocity, painter.pixels = (
        NetworkGraphs(painter.network, capture),
        DecoderGraphs(painter.autoencoder, decode),
    )
    torch.testing.assert_close(painter.latents(*arguments), latent, rtol=1e-4, atol=1e-4)
    for _ in range(2):
        drawn = painter.draw(*arguments)
        assert abs(drawn.astype(int) - plain.astype(int)).max() <= 1
    kinds = 2 + (guidance != 1.0) - (interval == (0.0, 1.0) and guidance != 1.0)  # alone, pair, perturbed
    assert (capture.count, decode.count) == (kinds, 1)
    painter.velocity = painter.pixels = None


@pytest.mark.parametrize("instruction", [None, "say what you see: "])
def test_features_of_prompts_by_graph(instruction):
    parts = gemma_random(64, 2, dtype="float32")
    encoder = GemmaEncoder.from_parts(parts.model, parts.tokenizer, 100, instruction, trim=True)
    capture = StandIn()
    by_graph = TextGraphs(encoder, capture)
    prompts = ["a red circle", "two blue squares and a star", "", "a ring " * 13, "a star"]
    for _ in range(2):
        for got, want in zip(by_graph.rows(prompts), encoder.rows(prompts), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert capture.count == 2, "two lengths"
    alone, among = by_graph.rows([prompts[1]])[0], by_graph.rows(prompts[::-1])[3]
    assert torch.equal(alone, among), "features of a prompt depend on it alone"
    if instruction is not None:  # read again, it may have the identity of the old one, which graphs have read
        old, encoder._prefix = id(encoder._prefix), None
        assert by_graph.rows(prompts[:1])
        assert id(encoder._prefix) != old
        assert capture.count == 3
    encoder.model.config.sliding_window = 20
    by_graph = TextGraphs(encoder, capture := StandIn())
    for got, want in zip(by_graph.rows(prompts), encoder.rows(prompts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert capture.count == 1, "what is longer than the window goes the usual way"


@pytest.mark.parametrize("number", [1, 3])
def test_keys_and_values_by_graph(number, monkeypatch):
    net, capture = network(), StandIn()
    by_graph = PromptGraphs(net, capture)
    for seed, length in enumerate((7, 64, 9, 70)):
        text = torch.randn(number, length, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            for got, want in zip(by_graph(text), net.prepare(Condition(text)).text_kv, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert capture.count == 2
    with torch.enable_grad():
        assert len(by_graph(text)) == len(net.blocks)
    monkeypatch.setattr(graphs, "PROMPT_TOKENS", 63)  # what is larger goes the usual way
    for got, want in zip(by_graph(text[:, :9]), net.prepare(Condition(text[:, :9])).text_kv, strict=True):
        assert torch.equal(got, want)
    assert capture.count == 2


def test_decoding_by_graph(painter, monkeypatch):
    autoencoder, capture = painter.autoencoder, StandIn()
    decode = DecoderGraphs(autoencoder, capture)
    for seed in (0, 1):
        for shape in ((1, 4, 3, 5), (2, 4, 4, 4)):
            z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(decode(z), autoencoder.decode(z))
    assert capture.count == 2
    tiles = DecoderGraphs(autoencoder, capture)
    z = torch.randn(1, 4, 32, 32)
    needed = autoencoder.plan("decode", z, tile=64).bytes / 2**30
    autoencoder.limit_memory(needed * 1.001)
    assert torch.equal(tiles(z), autoencoder.decode(z))
    autoencoder.limit_memory(None, [64, 48])
    assert torch.equal(DecoderGraphs(autoencoder, capture)(z), autoencoder.decode(z))
    autoencoder.limit_memory()
    monkeypatch.setattr(graphs, "DECODED_PIXELS", 128 * 128 - 1)
    assert torch.equal(DecoderGraphs(autoencoder, capture)(z), autoencoder.decode(z))
    assert capture.count == 2


def test_graphs_are_used_on_cuda_only_and_not_with_offload(painter):
    assert use_graphs(painter, "auto").velocity is None
    assert use_graphs(painter, False).velocity is None


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_equal_the_network_on_a_device(dtype, autocast):
    net = network(dtype=dtype).cuda()
    replayed = NetworkGraphs(net)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for k, (length, h, edits) in enumerate([(7, 3, ()), (64, 3, ()), (7, 8, (1,)), (9, 3, ()), (70, 3, ())]):
            text = prompt(net, length, seed=k)
            for step, t in enumerate((0.9, 0.5, 0.2)):
                x, edit = latents(net, h=h, seed=10 * k + step).float(), Edits(frozenset(edits))
                want = net(x, at(x, t), padded(text), edit)
                assert torch.equal(replayed(x, at(x, t), text, edit), want)
    assert len(replayed.graphs.kept) == 3


@pytest.mark.parametrize("shape", [pytest.param(s, marks=gpu) for s in ((1, 4, 8, 8), (2, 4, 5, 7))])
def test_decoding_by_graph_on_a_device(painter, shape):
    autoencoder = DCAE(**painter.autoencoder.config).eval().requires_grad_(False).cuda()
    decode = DecoderGraphs(autoencoder)
    for seed in range(3):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(decode(z), autoencoder.decode(z))
    assert len(decode.graphs.kept) == 1

"""CUDA graphs of a whole drawing and of its parts, by a stand-in; and of both on a device, where there is one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graph_stand_in import StandIn, at, latents, network, prompt

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.gemma_random import gemma_random
from sana.flow.grid import dpm_grid
from sana.model import graphs
from sana.model.generate import Painter
from sana.model.graphs import DecoderGraphs, NetworkGraphs, PromptGraphs, padded
from sana.model.text_graphs import TextGraphs
from sana.model.use_graphs import use_graphs
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler
from sana.types import Condition, Edits

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


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

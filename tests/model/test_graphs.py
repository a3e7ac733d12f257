"""CUDA graphs of drawing: when one is recorded, replayed, filled and dropped, and that the numbers stay.

There is no GPU where these tests usually run, so recording is played by a stand-in. What it cannot show (streams,
memory pools, what else CUDA refuses to record) is left to the tests on a device in `test_graphs_of_parts`.
"""

from __future__ import annotations

import logging

import pytest
import torch
from graph_stand_in import TIMES, StandIn, at, latents, network, prompt
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from sana.model import graphs
from sana.model.graphs import NetworkGraphs, PromptGraphs, padded
from sana.network.sana import Sana
from sana.quant.int8_weight import int8_weight
from sana.types import Condition, Edits


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

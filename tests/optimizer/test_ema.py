from __future__ import annotations

import pytest
import torch
from torch import nn

from sana.optimizer.ema import EMA


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)
    module[2].bias.requires_grad_(False)
    return module


def perturb(module: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype))


@pytest.mark.parametrize(("decay", "warmup"), [(0.99, False), (0.3, True), (0.9999, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_equals_its_closed_form(decay, warmup, dtype):
    module = network(dtype)
    ema = EMA(module, decay, warmup)
    values = [module[0].weight.detach().double().clone()]
    weights = [1.0]
    for n in range(1, 9):
        perturb(module, n)
        ema.update()
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        weights = [w * d for w in weights] + [1 - d]
        values.append(module[0].weight.detach().double().clone())
    expected = sum(w * v for w, v in zip(weights, values, strict=True))
    shadow = ema.shadow["0.weight"]
    assert shadow.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(shadow.double(), expected, rtol=tolerance, atol=tolerance)


def test_only_trained_parameters_are_followed():
    ema = EMA(network())
    assert set(ema.shadow) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear"):
        EMA(frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_and_restores_even_after_an_error(dtype):
    module = network(dtype)
    ema = EMA(module, 0.5, warmup=False)
    perturb(module, 1)
    ema.update()
    live = {k: v.clone() for k, v in module.state_dict().items()}
    storage = module[0].weight.data_ptr()
    shadow = ema.shadow["0.weight"].clone()
    with ema.applied():
        assert torch.equal(module[0].weight, ema.shadow["0.weight"].to(dtype))
        assert module[0].weight.data_ptr() == storage  # compiled code and captured graphs stay valid
        assert module[0].weight.requires_grad
        assert torch.equal(module[2].bias, live["2.bias"])
        with pytest.raises(RuntimeError, match="nest"), ema.applied():
            pass
        with pytest.raises(RuntimeError, match="average"):
            ema.update()
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    for name, value in module.state_dict().items():
        assert torch.equal(value, live[name])
    assert torch.equal(ema.shadow["0.weight"], shadow)
    ema.update()


def test_resuming_is_bit_exact(tmp_path):
    module = network(torch.bfloat16)
    ema = EMA(module, 0.9)
    for n in range(5):
        perturb(module, n)
        ema.update()
    torch.save({"module": module.state_dict(), "ema": ema.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    twin = network(torch.bfloat16, seed=1)
    twin.load_state_dict(saved["module"])
    resumed = EMA(twin, 0.9)
    resumed.load_state_dict(saved["ema"])
    assert resumed.updates == 5
    for n in range(5, 9):
        perturb(module, n)
        perturb(twin, n)
        ema.update()
        resumed.update()
    for name, value in ema.shadow.items():
        assert torch.equal(value, resumed.shadow[name])


def test_loading_copies():
    module = network()
    ema, other = EMA(module), EMA(module)
    other.load_state_dict(ema.state_dict())
    perturb(module, 0)
    before = ema.shadow["0.weight"].clone()
    other.update()
    assert torch.equal(ema.shadow["0.weight"], before)


def test_a_state_that_does_not_fit_is_refused_by_name():
    ema = EMA(network())
    good = ema.state_dict()
    lacking = {**good, "shadow": {k: v for k, v in good["shadow"].items() if k != "1.weight"}}
    extra = {**good, "shadow": {**good["shadow"], "3.weight": torch.zeros(2)}}
    reshaped = {**good, "shadow": {**good["shadow"], "0.weight": torch.zeros(4, 3)}}
    for state, message in (
        (lacking, "1.weight"),
        (extra, "3.weight"),
        (reshaped, r"0.weight.*\(4, 3\).*\(5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(network(), decay)


def test_a_parameter_that_disappeared_is_named():
    module = network()
    ema = EMA(module)
    del module[2]
    with pytest.raises(ValueError, match=r"2\.weight"):
        ema.update()

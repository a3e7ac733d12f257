from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sana.quant.w4a16 import W4A16Linear, w4a16


@pytest.mark.parametrize(("inputs", "group"), [(128, 64), (37, 8), (100, 64), (1, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_and_scales_by_hand(seed: int, inputs: int, group: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, 9)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = W4A16Linear.from_linear(linear, group=group)
    w = linear.weight.detach().double().numpy()
    for row in range(9):
        for g in range(-(-inputs // group)):
            part = w[row, g * group : (g + 1) * group]
            scale = torch.tensor(np.abs(part).max() / 7.5).to(torch.bfloat16).double().item() or 1.0
            assert layer.scale[row, g].item() == scale
            codes = np.clip(np.rint(part / scale), -8, 7)
            for i, code in enumerate(codes):
                byte = layer.weight[row, (g * group + i) // 2].item()
                assert (byte >> 4 if i % 2 else byte & 15) - 8 == code
            np.testing.assert_allclose(layer.dequantise()[row, g * group : (g + 1) * group], codes * scale, rtol=1e-6)
            # Half a step, but for what bf16 rounds the scale down by at the largest weight.
            assert np.abs(codes * scale - part).max() <= 0.54 * scale


def test_the_product_is_that_of_the_dequantised_weight() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(70, 11), torch.randn(2, 5, 70)
    layer = W4A16Linear.from_linear(linear, group=64)
    expected = x.double() @ layer.dequantise().double().mT + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_error_is_that_of_torchao_s_symmetric_groups(group: int) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    torch.manual_seed(0)
    linear = nn.Linear(1024, 64)
    nn.init.normal_(linear.weight)
    layer = w4a16(linear, group=group)
    w, block = linear.weight.detach(), (1, group)
    scale, zero = choose_qparams_affine(w, MappingType.SYMMETRIC, block, torch.int8, -8, 7)
    codes = quantize_affine(w, block, scale, zero, torch.int8, -8, 7)
    theirs = dequantize_affine(codes, block, scale, zero, torch.int8, -8, 7)
    assert layer.quantization.converted[""] == pytest.approx(((theirs - w).norm() / w.norm()).item(), rel=0.01)
    assert layer.quantization.bytes_after == 64 * (1024 // 2 + 2 * 1024 // group + 4)


@pytest.mark.parametrize("group", [0, 1, 7, -2])
def test_odd_groups_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        w4a16(nn.Linear(8, 8), group=group)

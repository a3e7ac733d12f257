"""A block's ops by Triton under torch.compile: one graph, the same numbers, also with checkpointing."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMPILED = """
import os
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from torch.utils.checkpoint import checkpoint
from sana.ops.adaln.op import gated_residual, modulated_layer_norm, residual_modulated_layer_norm
from sana.ops.choice import set_kernels
from sana.ops.depthwise_gate.op import depthwise_gate
from sana.ops.rms_norm.op import rms_norm

torch.backends.cudnn.allow_tf32 = False
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def layer(x, vectors, gain, kernel, bias):
    shift, scale, gate = vectors.unbind(2)
    y = rms_norm(modulated_layer_norm(x, shift, scale), gain, 1e-5, gain, "silu", x)
    x, y = residual_modulated_layer_norm(gated_residual(x, gate, y), y, shift, scale)
    hidden = depthwise_gate(torch.cat([y, x], dim=-1).view(2, 6, 16), kernel, bias, 2, 3)
    return gated_residual(x, gate, hidden.view(1, 12, 8))

torch.manual_seed(0)
shapes = (1, 12, 8), (1, 2, 3, 8), (8,), (16, 1, 3, 3), (16,)
arguments = [torch.randn(shape, device=device) for shape in shapes]

def results(function):
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]

set_kernels("naive")
plain = results(layer)
set_kernels("triton")
want = results(layer)
for a, c in zip(want, plain, strict=True):
    torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
for way in (compiled, lambda *x: checkpoint(compiled, *x, use_reentrant=False)):
    assert all(torch.equal(a, c) for a, c in zip(results(way), want, strict=True))
with torch.no_grad():
    assert torch.equal(compiled(*arguments), want[0])
    assert torch.equal(layer(*arguments), want[0])

leaves = [x.clone().requires_grad_() for x in arguments]
gradient = torch.autograd.grad(layer(*leaves).sum(), leaves[0], create_graph=True)[0]
try:
    gradient.sum().backward()
except RuntimeError as error:
    assert "no autograd formula" in str(error) or "not implemented" in str(error), error
else:
    raise AssertionError("a second derivative came out of kernels that have none")
"""


@pytest.mark.slow
@pytest.mark.long
def test_compiled_without_breaks():
    """In a process of its own, without the type checks of the tests, which torch.compile cannot see through."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

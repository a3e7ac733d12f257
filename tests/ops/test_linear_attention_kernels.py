"""The Triton kernels of ReLU linear attention against plain torch in float64: values, gradients, tangents."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sana.ops import choice
from sana.ops.linear_attention import naive, plan
from sana.ops.linear_attention.op import (
    relu_linear_attention,
    relu_linear_attention_jvp,
    relu_linear_attention_packed,
)

# b, n, heads, dh, and how q, k and v lie in memory
SHAPES = [
    (1, 1, 1, 32, "apart"),
    (3, 5, 2, 32, "thirds"),
    (1, 31, 3, 32, "thirds"),
    (3, 33, 1, 32, "by head"),
    (1, 64, 2, 32, "thirds"),
    (1, 127, 2, 32, "channels first"),
    (3, 129, 1, 32, "thirds"),
    (1, 300, 4, 32, "thirds"),
    (1, 255, 1, 32, "every other token"),
    pytest.param((1, 9, 70, 32, "thirds"), marks=pytest.mark.slow),
    (3, 40, 2, 16, "thirds"),
    (1, 17, 3, 16, "by head"),
    (1, 70, 2, 64, "thirds"),
    (3, 33, 1, 64, "channels first"),
    (1, 21, 2, 7, "apart"),
    (1, 35, 1, 48, "thirds"),
    (1, 2, 1, 32, "by head"),
    (3, 16, 2, 32, "channels first"),
    (3, 65, 2, 32, "every other token"),
    (1, 63, 1, 16, "channels first"),
    (1, 128, 1, 64, "every other token"),
    (1, 32, 5, 8, "thirds"),
]
SPLIT = [(1, 300, 2, 32, "thirds"), (3, 150, 1, 32, "by head"), (1, 257, 1, 16, "apart"), (1, 260, 1, 64, "thirds")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2, torch.float16: 1.2}
NAMES = ["y", "dq", "dk", "dv"]

pytestmark = pytest.mark.usefixtures("triton_kernels")


def draw(b, n, heads, dh, layout, dtype, device, seed):
    """q, k and v as views of one buffer that lies in memory as `layout` says, but for "apart"."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    if layout == "apart":
        return [normal(b, n, heads, dh) for _ in range(3)]
    if layout == "thirds":
        return list(normal(b, n, 3, heads, dh).unbind(2))
    if layout == "by head":
        return list(normal(b, n, heads, 3, dh).unbind(3))
    if layout == "channels first":
        return list(normal(b, heads, 3, dh, n).movedim(-1, 1).unbind(3))
    return list(normal(b, 2 * n, 3, heads, dh)[:, ::2].unbind(2))


def error(got, want, least=0.0):
    return ((got.double() - want).norm() / max(want.norm().item(), least)).item()


def results(function, tensors, weight):
    """The result and the gradients, for leaves that lie in memory as the tensors do."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, weight)]


def compare(got, near, want, dtype):
    """Against float64: fp32 within 1e-5; 16 bits within 1.2 x the error of plain torch for the same inputs."""
    least = want[0].norm().item()  # the gradients of q and k are exactly 0 where there is one token
    slack = 0.0 if dtype == torch.float32 else 1e-5
    for name, ours, theirs, exact in zip(NAMES, got, near, want, strict=False):
        assert ours.dtype == dtype, name
        bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else error(theirs, exact, least))
        assert error(ours, exact, least) <= bound + slack, (name, error(ours, exact, least), bound)


def check(shape, dtype, device, seed, eps=1e-15):
    tensors = draw(*shape, dtype, device, seed)
    weight = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)
    got = results(lambda *x: relu_linear_attention(*x, eps=eps), tensors, weight)
    near = results(lambda *x: naive.relu_linear_attention(*x, eps=eps), tensors, weight)
    want = results(lambda *x: naive.relu_linear_attention(*x, eps=eps), [x.double() for x in tensors], weight.double())
    compare(got, near, want, dtype)
    with torch.no_grad():  # another way to the same kernel
        assert torch.equal(relu_linear_attention(*tensors, eps=eps), got[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, kernel_device, nan_buffers):
    check(shape, dtype, kernel_device, seed=shape[1])
    assert len(nan_buffers) >= 6


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[10]], ids=str)
def test_values_and_gradients_in_fp16(shape, kernel_device, nan_buffers):
    check(shape, torch.float16, kernel_device, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_tokens_that_are_split_over_programs(shape, dtype, kernel_device, nan_buffers, monkeypatch):
    monkeypatch.setattr(plan, "TOKENS", 64)
    assert plan.plan("forward", *shape[:4], dtype).splits > 1
    check(shape, dtype, kernel_device, seed=5)


def test_splits_fill_a_card_and_cover_every_token():
    for b, n, heads in [(1, 1024, 70), (1, 4096, 70), (16, 1024, 70), (1, 16384, 32), (1, 16385, 1), (1, 5, 1)]:
        for kernel in plan.ROWS:
            shape = plan.plan(kernel, b, n, heads, 32, torch.bfloat16)
            assert (shape.splits - 1) * shape.per_split < n <= shape.splits * shape.per_split
            assert shape.per_split % shape.block_n == 0
    assert plan.plan("forward", 16, 1024, 70, 32, torch.bfloat16).splits == 1
    assert plan.plan("forward", 1, 4096, 70, 32, torch.bfloat16).splits == 4
    assert plan.plan("forward", 1, 16384, 32, 32, torch.bfloat16).splits == 9


@pytest.mark.parametrize("eps", [1e-15, 1e-2])
def test_eps_and_queries_without_positive_features(eps, kernel_device, nan_buffers):
    q, k, v = draw(1, 37, 2, 32, "thirds", torch.float32, kernel_device, seed=2)
    q[:, 3] = -q[:, 3].abs()
    q[:, 4], k[:, 5] = 0.0, 0.0  # the derivative of ReLU at 0 is 0
    weight = torch.ones_like(v)
    got = results(lambda *x: relu_linear_attention(*x, eps=eps), (q, k, v), weight)
    want = results(
        lambda *x: naive.relu_linear_attention(*x, eps=eps), [x.double() for x in (q, k, v)], weight.double()
    )
    compare(got, got, want, torch.float32)
    assert not got[0][:, 3:5].any()
    assert not got[1][:, 3:5].any()
    assert not got[2][:, 5].any()


def test_what_is_not_a_number_stays_visible(kernel_device):
    q, k, v = draw(1, 20, 2, 32, "thirds", torch.float32, kernel_device, seed=2)
    q[0, 3, 0, 5] = float("nan")
    assert relu_linear_attention(q, k, v)[0, 3, 0].isnan().all()
    k[0, 7, 1, 0] = float("nan")
    assert relu_linear_attention(q, k, v)[0, :, 1].isnan().all()


def test_large_numbers_of_fp16_do_not_overflow(kernel_device):
    q, k, v = (x * 1e4 for x in draw(1, 200, 1, 32, "thirds", torch.float16, kernel_device, seed=4))
    want = naive.relu_linear_attention(*(x.double() for x in (q, k, v)))
    assert error(relu_linear_attention(q, k, v), want) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 33, 2, 32), (1, 70, 3, 16), (1, 5, 1, 64)], ids=str)
def test_packed_equals_its_thirds(shape, dtype, kernel_device, nan_buffers):
    b, n, heads, dh = shape
    x = torch.cat(draw(b, n, heads, dh, "apart", dtype, kernel_device, seed=7), 2).flatten(2)
    weight = torch.randn(b, n, heads * dh, generator=torch.Generator().manual_seed(1)).to(x)
    got = results(lambda x: relu_linear_attention_packed(x, heads), [x], weight)
    ours = results(
        lambda x: relu_linear_attention(*naive.unpack(x, heads)).flatten(2), [x], weight
    )  # autograd concatenates
    for a, c in zip(got, ours, strict=True):
        assert torch.equal(a, c)
    with torch.no_grad():
        assert torch.equal(relu_linear_attention_packed(x, heads), got[0])


def test_packed_refuses_a_width_that_is_no_multiple():
    with pytest.raises(ValueError, match="width 64 is no multiple of 3 x 2 heads"):
        relu_linear_attention_packed(torch.zeros(1, 2, 64), 2)


JVP = [(1, 40, 2, 32, "thirds"), (3, 7, 1, 32, "by head"), (1, 300, 1, 16, "apart"), (1, 20, 1, 64, "channels first")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", JVP, ids=str)
def test_forward_derivative(shape, dtype, kernel_device, nan_buffers, monkeypatch):
    if shape[1] == 300:
        monkeypatch.setattr(plan, "TOKENS", 64)
    x = draw(*shape, dtype, kernel_device, seed=1)
    t = draw(*shape, dtype, kernel_device, seed=2)
    got = torch.func.jvp(relu_linear_attention, tuple(x), tuple(t))
    near = torch.func.jvp(naive.relu_linear_attention, tuple(x), tuple(t))
    wide = [[a.double() for a in part] for part in (x, t)]
    want = torch.func.jvp(naive.relu_linear_attention, *map(tuple, wide))
    compare(got, near, want, dtype)
    for a, c in zip(relu_linear_attention_jvp(*x, *t), got, strict=True):
        assert torch.equal(a, c)
    h = 1e-6  # and against differences in float64, where no entry changes its sign on the way
    steps = [[a + s * h * d for a, d in zip(*wide, strict=True)] for s in (1, -1)]
    ahead, behind = (naive.relu_linear_attention(*step) for step in steps)
    assert error(got[1], (ahead - behind) / (2 * h)) <= {torch.float32: 1e-5}.get(dtype, 0.02)


def test_forward_derivative_of_some_inputs_and_of_packed(kernel_device):
    x = draw(1, 33, 2, 32, "apart", torch.float32, kernel_device, seed=1)
    t = draw(1, 33, 2, 32, "apart", torch.float32, kernel_device, seed=2)
    for which in range(3):

        def only(part, which=which, attention=relu_linear_attention):
            return attention(*(part if i == which else x[i].to(part) for i in range(3)))

        got = torch.func.jvp(only, (x[which],), (t[which],))
        want = torch.func.jvp(
            lambda part, only=only: only(part, attention=naive.relu_linear_attention),
            (x[which].double(),),
            (t[which].double(),),
        )
        assert error(got[1], want[1]) < 1e-5
    packed, turn = (torch.cat(part, 2).flatten(2) for part in (x, t))
    got = torch.func.jvp(lambda x: relu_linear_attention_packed(x, 2), (packed,), (turn,))
    want = relu_linear_attention_jvp(*x, *t)
    for a, c in zip(got, want, strict=True):
        assert torch.equal(a, c.flatten(2))


def test_forward_derivative_beside_a_backward_one_and_twice(kernel_device):
    """Both at once, and the derivative of a derivative, are plain torch's: slower, never zero."""
    x = draw(1, 12, 1, 16, "apart", torch.float32, kernel_device, seed=1)
    t = draw(1, 12, 1, 16, "apart", torch.float32, kernel_device, seed=2)

    def slope(attention):
        leaves = [a.clone().requires_grad_() for a in x]
        return torch.autograd.grad(torch.func.jvp(attention, tuple(leaves), tuple(t))[1].square().sum(), leaves)

    def twice(attention):
        def once(*x):
            return torch.func.jvp(attention, x, tuple(t))[1]

        return torch.func.jvp(once, tuple(x), tuple(t))[1]

    for a, c in zip(slope(relu_linear_attention), slope(naive.relu_linear_attention), strict=True):
        torch.testing.assert_close(a, c)
    torch.testing.assert_close(twice(relu_linear_attention), twice(naive.relu_linear_attention))
    assert twice(relu_linear_attention).abs().max() > 1e-3


@pytest.mark.slow
def test_custom_ops_hold_their_promises(kernel_device):
    from sana.ops.linear_attention import triton

    x = draw(2, 20, 2, 16, "thirds", torch.float32, kernel_device, seed=1)
    leaves = [a.clone().requires_grad_() for a in x]
    torch.library.opcheck(triton.attention, (*leaves, 1e-15))
    torch.library.opcheck(triton.attention, (*x, 1e-15))
    packed = torch.cat(x, 2).flatten(2).requires_grad_()
    torch.library.opcheck(triton.packed, (packed, 2, 1e-15))
    torch.library.opcheck(triton.attention_jvp, (*x, *x, 1e-15))


def test_under_checkpoint_and_autocast(kernel_device, nan_buffers):
    x = draw(1, 40, 2, 32, "apart", torch.bfloat16, kernel_device, seed=1)
    weight = torch.ones_like(x[2])
    want = results(relu_linear_attention, x, weight)
    again = results(lambda *x: checkpoint(relu_linear_attention, *x, use_reentrant=False), x, weight)
    for a, c in zip(again, want, strict=True):
        assert torch.equal(a, c)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        for inputs in (x, [a.float() for a in x]):
            assert results(relu_linear_attention, inputs, weight.to(inputs[0]))[0].dtype == inputs[0].dtype


COMPILED = """
import torch
from torch.utils.checkpoint import checkpoint
from sana.ops.choice import set_kernels
from sana.ops.linear_attention.op import relu_linear_attention, relu_linear_attention_packed

set_kernels("triton")
device = "cuda" if torch.cuda.is_available() else "cpu"
x = [torch.randn(1, 40, 2, 32, device=device, dtype=torch.bfloat16) for _ in range(3)]

def layer(q, k, v):
    y = relu_linear_attention(2 * q, k, v)
    return y + relu_linear_attention_packed(torch.cat([q, k, v], 2).flatten(2), 2).view_as(y)

def results(function):
    leaves = [a.clone().requires_grad_() for a in x]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.float().sum(), leaves)]

compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
want = results(layer)
for way in (compiled, lambda *x: checkpoint(compiled, *x, use_reentrant=False)):
    assert all(torch.equal(a, c) for a, c in zip(results(way), want))
with torch.no_grad():
    assert torch.equal(compiled(*x), want[0])
"""


@pytest.mark.slow
@pytest.mark.long
def test_compiled_without_breaks():
    """In a process of its own, without the type checks of the tests, which torch.compile cannot see through."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inputs_of_several_types_give_the_type_of_the_values(kernel_device):
    q, k, v = draw(1, 20, 2, 32, "apart", torch.float32, kernel_device, seed=1)
    got = results(relu_linear_attention, (q, k, v.bfloat16()), v.bfloat16())
    want = results(naive.relu_linear_attention, (q, k, v.bfloat16()), v.bfloat16())
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-2, atol=1e-2)


def test_kernels_that_are_naive_are_plain_torch(kernel_device):
    x = draw(1, 20, 2, 32, "thirds", torch.bfloat16, kernel_device, seed=1)
    choice.set_kernels("naive")
    assert torch.equal(relu_linear_attention(*x), naive.relu_linear_attention(*x))


def test_wide_heads_and_no_tokens_are_plain_torch(kernel_device):
    wide = draw(1, 3, 1, 80, "apart", torch.float32, kernel_device, seed=1)
    assert torch.equal(relu_linear_attention(*wide), naive.relu_linear_attention(*wide))
    assert relu_linear_attention(*(x[:0] for x in wide)).shape == (0, 3, 1, 80)

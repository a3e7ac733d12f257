from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sana.optimizer import came
from sana.optimizer.came import CAME, is_factored

SHAPES = {
    "matrix": (6, 5),
    "row": (1, 7),
    "column": (7, 1),
    "1x1": (4, 3, 1, 1),
    "3x3": (4, 1, 3, 3),
    "vector": (5,),
    "scalar": (),
    "3-D": (2, 3, 4),
}


def reference(weight, grads, lr=1e-4, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip=1.0, weight_decay=0.0):
    """CAME in float64, entry by entry as its formulas are written, without any state of ours."""
    shape = weight.shape
    factored = len(shape) == 2 or (len(shape) == 4 and shape[2] == shape[3] == 1)
    w = weight.double().reshape(shape[0], -1) if factored else weight.double().reshape(1, -1)
    out, inn = w.shape
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    r, c, big_r, big_c = ([0.0] * k for k in (out, inn, out, inn))
    b1, b2, b3 = betas
    for gradient in grads:
        g = gradient.double().reshape(w.shape)
        squares = g * g + eps[0]
        u = torch.empty_like(w)
        if factored:
            r = [b2 * r[i] + (1 - b2) * sum(squares[i].tolist()) / inn for i in range(out)]
            c = [b2 * c[j] + (1 - b2) * sum(squares[:, j].tolist()) / out for j in range(inn)]
            for i in range(out):
                for j in range(inn):
                    u[i, j] = g[i, j] / math.sqrt(r[i] / (sum(r) / out)) / math.sqrt(c[j])
        else:
            v = b2 * v + (1 - b2) * squares
            u = g / v.sqrt()
        rms = math.sqrt(sum(x * x for x in u.flatten().tolist()) / u.numel())
        u = u / max(1.0, rms / clip)
        m = b1 * m + (1 - b1) * u
        step = m.clone()
        if factored:
            squares = (u - m) ** 2 + eps[1]
            big_r = [b3 * big_r[i] + (1 - b3) * sum(squares[i].tolist()) / inn for i in range(out)]
            big_c = [b3 * big_c[j] + (1 - b3) * sum(squares[:, j].tolist()) / out for j in range(inn)]
            for i in range(out):
                for j in range(inn):
                    step[i, j] = m[i, j] / math.sqrt(big_r[i] / (sum(big_r) / out)) / math.sqrt(big_c[j])
        w = w - lr * weight_decay * w
        w = w - lr * step
    return w.reshape(shape)


def draws(shape: tuple[int, ...], steps: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(steps, generator=g) * 4 - 3)
    return torch.randn(shape, generator=g), [size * torch.randn(shape, generator=g) for size in sizes]


def run(weights: list[torch.Tensor], grads: list[list[torch.Tensor]], **options) -> list[torch.Tensor]:
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = CAME(params, **options)
    for step in zip(*grads, strict=True):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone().to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": 3e-2, "betas": (0.8, 0.9, 0.95), "eps": (1e-8, 1e-4), "clip": 0.5, "weight_decay": 0.1},
    ],
    ids=["published", "other"],
)
def test_updates_equal_the_formulas(name, options, seed):
    weight, grads = draws(SHAPES[name], 6, seed)
    (got,) = run([weight], [grads], **options)
    torch.testing.assert_close(got.double(), reference(weight, grads, **options), rtol=2e-5, atol=2e-6)


def test_tensors_updated_together_are_updated_as_alone():
    names = ["matrix", "vector", "matrix", "1x1", "3x3", "matrix", "vector", "1x1", "row"]
    pairs = [draws(SHAPES[name], 4, seed) for seed, name in enumerate(names)]
    together = run([w for w, _ in pairs], [g for _, g in pairs], lr=1e-2)
    for (weight, grads), got in zip(pairs, together, strict=True):
        torch.testing.assert_close(got, run([weight], [grads], lr=1e-2)[0], rtol=1e-6, atol=1e-7)


def test_the_size_of_a_stack_changes_nothing(monkeypatch):
    pairs = [draws((6, 5), 4, seed) for seed in range(7)]
    whole = run([w for w, _ in pairs], [g for _, g in pairs], lr=1e-2)
    monkeypatch.setattr(came, "_STACK", 3 * 30)
    parts = run([w for w, _ in pairs], [g for _, g in pairs], lr=1e-2)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(300, 200), (64, 32, 1, 1)])
def test_the_first_update_of_a_matrix_has_the_golden_size(shape):
    """No bias correction: rms(update) is 0.1 / (sqrt(1 - 0.9999) 0.9) = 11.1 times the learning rate."""
    weight, grads = draws(shape, 1, 0)
    (got,) = run([weight], [grads], lr=1.0)
    assert (got - weight).square().mean().sqrt().item() == pytest.approx(11.1, abs=0.15)


def test_the_first_update_of_a_vector_is_a_tenth():
    """Not factored: u = g / sqrt(0.001 g^2), clipped to rms 1, times 1 - beta1; every entry is +-0.1."""
    weight, grads = draws((50,), 1, 0)
    (got,) = run([weight], [grads], lr=1.0)
    torch.testing.assert_close(got - weight, -0.1 * grads[0].sign(), rtol=1e-5, atol=1e-6)


def test_state_is_that_of_the_paper_and_small():
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES.values()]
    optimizer = CAME(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in params:
        shapes = {name: tuple(value.shape) for name, value in optimizer.state[p].items()}
        if is_factored(p):
            out, inn = p.shape[:2]
            assert shapes == {
                "momentum": tuple(p.shape),
                "row": (out,),
                "column": (inn,),
                "row_instability": (out,),
                "column_instability": (inn,),
            }
        else:
            assert shapes == {"momentum": tuple(p.shape), "second_moment": tuple(p.shape)}
    assert [is_factored(p) for p in params] == [True, True, True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(dtype, tmp_path):
    names = ["matrix", "matrix", "1x1", "3x3", "vector"]
    pairs = [draws(SHAPES[name], 6, seed) for seed, name in enumerate(names)]
    params = [nn.Parameter(w.to(dtype)) for w, _ in pairs]

    def advance(optimizer, steps):
        for k in steps:
            for p, (_, grads) in zip(optimizer.param_groups[0]["params"], pairs, strict=True):
                p.grad = grads[k].to(dtype)
            optimizer.step()

    optimizer = CAME(params, lr=1e-2, weight_decay=0.01)
    advance(optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed_params = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = CAME(resumed_params, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.param_groups[0]["lr"] == 1e-2
    assert all(v.dtype == torch.float32 for s in resumed.state.values() for v in s.values())
    advance(optimizer, range(3, 6))
    advance(resumed, range(3, 6))
    for a, b in zip(params, resumed_params, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, resumed.state[b][name])


def test_loading_does_not_tie_two_optimizers_together():
    p = nn.Parameter(torch.randn(3, 4))
    p.grad = torch.randn(3, 4)
    optimizer = CAME([p], lr=1e-2)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    twin = nn.Parameter(p.detach().clone())
    resumed = CAME([twin], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    twin.grad = torch.randn(3, 4)
    resumed.step()
    for name, value in kept["state"][0].items():
        assert torch.equal(optimizer.state[p][name], value)


def test_bfloat16_parameters_have_float32_statistics():
    weight, grads = draws((6, 5), 5, 0)
    grads = [g.bfloat16() for g in grads]
    (got,) = run([weight.bfloat16()], [grads], lr=1e-2)
    assert got.dtype == torch.bfloat16
    expected = reference(weight.bfloat16(), grads, lr=1e-2)
    # Five roundings of weights of order one.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5 * 2**-8)


def test_gradients_that_are_zero_or_missing_leave_the_weight_alone():
    weight = torch.randn(4, 3)
    (got,) = run([weight], [[torch.zeros(4, 3)] * 3], lr=1e-2)
    assert torch.equal(got, weight)
    p, q = nn.Parameter(weight.clone()), nn.Parameter(torch.empty(0, 3))
    optimizer = CAME([p, q], lr=1e-2)
    q.grad = torch.empty(0, 3)
    optimizer.step()
    assert torch.equal(p, weight)


def test_a_row_without_gradient_stays_finite():
    weight, grads = draws((6, 5), 4, 0)
    for g in grads:
        g[2], g[:, 1] = 0, 0
    (got,) = run([weight], [grads], lr=1e-2)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), reference(weight, grads, lr=1e-2), rtol=2e-5, atol=2e-6)


def test_weights_in_another_memory_layout_are_updated_alike():
    weight, grads = draws((4, 3, 3, 3), 3, 0)
    (plain,) = run([weight], [grads], lr=1e-2)
    (last,) = run(
        [weight.to(memory_format=torch.channels_last)],
        [[g.to(memory_format=torch.channels_last) for g in grads]],
        lr=1e-2,
    )
    torch.testing.assert_close(last, plain)


def test_groups_keep_their_own_options_and_closures_are_evaluated():
    p, q = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = CAME([{"params": [p], "lr": 1e-2}, {"params": [q], "lr": 0.0}], lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum() + (q**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 24.0
    assert not torch.equal(p, torch.ones(3, 4))
    assert torch.equal(q, torch.ones(3, 4))


def test_it_minimises():
    torch.manual_seed(0)
    target = torch.randn(8, 5)
    p = nn.Parameter(torch.zeros(8, 5))
    optimizer = CAME([p], lr=1e-2)
    for k in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (k + 1) / 100) * (1 - k / 400)
        p.grad = 2 * (p.detach() - target)
        optimizer.step()
    assert (p - target).square().mean() < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (0.9, 0.999)},
        {"betas": (0.9, 0.999, 1.0)},
        {"eps": (1e-30, 0.0)},
        {"clip": 0.0},
        {"weight_decay": -0.1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        CAME([nn.Parameter(torch.zeros(2, 2))], **options)


def test_sparse_gradients_are_refused():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        CAME([p]).step()

"""Which kernels an op takes: by setting, device and type; said once; nothing that torch.compile stumbles over."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.ops import choice
from sana.ops.choice import chosen, set_kernels, use_triton


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = chosen()
    yield
    set_kernels(before)


@pytest.fixture
def compiled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class OnCuda(torch.Tensor):
    """Says that it is on a CUDA device; there may be none here."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


def on_cuda(*dtypes: torch.dtype) -> list[torch.Tensor]:
    return [torch.ones(2, 3, dtype=dtype).as_subclass(OnCuda) for dtype in dtypes]


def test_auto_is_the_start_and_naive_on_processors():
    assert chosen() == "auto"
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert not use_triton(torch.ones(2, dtype=dtype), None)


def test_auto_stays_naive_on_processors_even_where_triton_could_interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not use_triton(torch.ones(2))


@pytest.mark.parametrize(
    ("dtypes", "answer"),
    [
        ([torch.float32], True),
        ([torch.bfloat16, torch.float32], True),
        ([torch.float16], True),
        ([torch.float64], False),
        ([torch.bfloat16, torch.float64], False),
    ],
)
def test_auto_takes_triton_for_what_it_can_read_on_cuda(monkeypatch, dtypes, answer):
    monkeypatch.setattr(choice, "_installed", lambda: True)
    monkeypatch.setattr(choice, "_capable", lambda index: True)
    tensors = on_cuda(*dtypes)
    assert use_triton(*tensors) is answer
    assert not use_triton(*tensors, torch.ones(2))  # one of them elsewhere
    set_kernels("naive")
    assert not use_triton(*tensors)


@pytest.mark.parametrize("missing", ["_installed", "_capable"])
def test_auto_is_naive_where_triton_cannot_run(monkeypatch, missing):
    for name in ("_installed", "_capable"):
        monkeypatch.setattr(choice, name, lambda *index, name=name: name != missing)
    tensors = on_cuda(torch.float32)
    assert not use_triton(*tensors)
    set_kernels("triton")
    with pytest.raises(ValueError, match=r"kernels=triton: .*triton is not installed|kernels=triton: .*8.0"):
        use_triton(*tensors)


def test_nothing_is_launched_for_plans_of_memory(monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda: True)
    monkeypatch.setattr(choice, "_capable", lambda index: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(2, 3, device="cuda")
    for kernels in ("auto", "triton"):
        set_kernels(kernels)
        assert not use_triton(fake)


def test_triton_raises_where_it_cannot(compiled_only, monkeypatch):
    set_kernels("triton")
    with pytest.raises(ValueError, match=r"kernels=triton: a tensor is on cpu; .*TRITON_INTERPRET=1"):
        use_triton(torch.ones(2))
    assert not use_triton(torch.ones(2, device="meta"))  # where nothing is computed
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="kernels=triton: float64 is not among"):
        use_triton(torch.ones(2, dtype=torch.float64))
    monkeypatch.setattr(choice, "_installed", lambda: True)
    assert use_triton(torch.ones(2), None)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="kernels: 'cuda'; expected one of auto, naive, triton"):
        set_kernels("cuda")
    assert chosen() == "auto"


SAID = """
import logging, torch
from sana.ops.choice import set_kernels
logging.basicConfig(level=logging.INFO, format="%(message)s")
ops = []
for name in ("first", "second"):
    scope = {"__name__": f"sana.ops.{name}.op"}
    code = "from sana.ops.choice import use_triton" + chr(10) + "def op(x): return use_triton(x)"
    exec(compile(code, f"{name}/op.py", "exec"), scope)
    ops.append(scope["op"])
for kernels in ("auto", "auto", "naive"):
    set_kernels(kernels) if kernels == "naive" else None
    for _ in range(3):
        for op in ops:
            op(torch.ones(1))
            op(torch.ones(1).double())
"""


@pytest.mark.slow
def test_each_op_says_its_choice_once():
    """In a process of its own: here every call comes from the shape checks."""
    done = subprocess.run([sys.executable, "-c", SAID], check=True, capture_output=True, text=True, timeout=120)
    lines = [f"{op}: naive kernels (kernels={kernels})" for kernels in ("auto", "naive") for op in ("first", "second")]
    assert done.stderr.splitlines() == lines


TRACED = """
import torch
from sana.ops.choice import set_kernels, use_triton
run = torch.compile(lambda x: x * 2 if use_triton(x) else x * 3, backend="eager", fullgraph=True)
x = torch.ones(1)
for kernels in ("auto", "naive"):
    set_kernels(kernels)
    assert run(x).item() == 3
set_kernels("triton")  # traced again, and refused
try:
    run(x)
except Exception as error:
    assert "kernels=triton: a tensor is on cpu" in str(error), error
else:
    raise AssertionError("the old trace went on")
"""


@pytest.mark.slow
def test_the_choice_does_not_break_a_compiled_graph_and_is_made_again(compiled_only):
    """In a process of its own: the shape checks of the tests cannot be traced."""
    subprocess.run([sys.executable, "-c", TRACED], check=True, timeout=120)

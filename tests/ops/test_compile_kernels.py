"""Kernels compile for cards that are not here, without spills; what is read from the machine code is what is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana.ops.ahead import CAPABILITIES, KernelCase, Resources, offences

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}

SPILLS = """
import triton, triton.language as tl
from sana.ops.ahead import CAPABILITIES, KernelCase, compile_case, offences

@triton.jit
def product(x, y, n: tl.constexpr):
    i, j = tl.arange(0, n)[:, None], tl.arange(0, n)[None, :]
    a = tl.load(x + i * n + j)
    tl.store(y + i * n + j, tl.dot(a, tl.trans(a), input_precision="ieee"))

def case(n, budget=255):
    return KernelCase(f"product {n}", product, {"x": "*fp32:16", "y": "*fp32:16"}, {"n": n}, 1, 1, budget)

small, large = compile_case(case(16), 90), compile_case(case(64), 90)
assert offences(case(16), 90, small) == [], small
assert 0 < small.registers < 255, small
assert [("stack" in line) for line in offences(case(64), 90, large)] == [True], large
assert len(offences(case(16, budget=8), 90, small)) == 1
"""


def run(*line: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *line], cwd=ROOT, env=WITHOUT, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize("card", CAPABILITIES)
def test_all_kernels_keep_their_budgets(card):
    """A minute per card: every kernel, in every type, without spills and within its registers."""
    done = run("scripts/compile_kernels.py", "--sm", str(card))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f" on sm_{card}: ") >= 165


@pytest.mark.slow
def test_a_spill_is_seen_and_a_small_kernel_passes(tmp_path):
    path = tmp_path / "spills.py"
    path.write_text(SPILLS)
    done = run(str(path))
    assert done.returncode == 0, done.stderr


def test_offences_name_kernel_card_and_limit():
    case = KernelCase("k", None, {}, {}, 4, 3, budget_registers=100)
    assert offences(case, 90, Resources(100, 0, 0, 1000)) == []
    lines = offences(case, 89, Resources(101, 8, 0, 200_000))
    assert [line.split(":")[0] for line in lines] == ["k on sm_89"] * 3
    assert "8 bytes of stack" in lines[0]
    assert "101 registers; the budget is 100" in lines[1]
    assert "200000 bytes of shared memory" in lines[2]

"""The scenes model that ships, drawn in low precision by one option."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.quant.int8 import Int8Linear

ROOT = Path(__file__).resolve().parents[2]

# sample.py once per quantisation, and how often each operator ran in it.
COUNTED = """
import json, sys
from collections import Counter
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import sample
from sana.quant.int8 import Int8Linear
from sana.run.launch import launch

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        count[func.name()] += 1
        return func(*args, **(kwargs or {}))

def counted(composed):
    with Count():
        sample.sample(composed)

Int8Linear.arithmetic(torch.device("cpu"))  # tries the processor's products, once per process
folder, *common = sys.argv[1:]
found = {}
for quant in ("none", "int8", "fp8", "nvfp4", "w4a16"):
    count = Counter()
    if launch("sample", counted, [*common, f"quant={quant}", f"out={folder}/{quant}"]):
        raise SystemExit(1)
    found[quant] = count
json.dump(found, open(f"{folder}/counts.json", "w"))
"""
COMMON = [
    "ckpt=scenes",
    "prompt=a red circle left of a blue square",
    "n=1",
    "seed=0",
    "precision=32-true",
    "device=cpu",
]
LAYERS = 36  # linear layers of the six blocks but for cross-attention's keys and values


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    command = [sys.executable, "-c", COUNTED, str(folder), *COMMON]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def picture(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.long
@pytest.mark.skipif(
    Int8Linear.arithmetic(torch.device("cpu")).startswith("emulated"),
    reason="this processor has no exact int8 products",
)
def test_int8_draws_by_integer_products(drawn: Path) -> None:
    counts = json.loads((drawn / "counts.json").read_text())
    assert all("aten::_int_mm" not in counts[quant] for quant in ("none", "fp8", "nvfp4", "w4a16"))
    before, after = counts["none"], counts["int8"]
    steps, rest = divmod(after["aten::_int_mm"], LAYERS)
    assert rest == 0
    assert steps > 1
    # They are in the place of floating-point products.
    names = ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise")
    assert sum(before.get(name, 0) - after.get(name, 0) for name in names) == LAYERS * steps


@pytest.mark.long
@pytest.mark.parametrize(("quant", "most"), [("int8", 5), ("fp8", 10), ("nvfp4", 25), ("w4a16", 25)])
def test_low_precision_draws_nearly_the_same(quant: str, most: float, drawn: Path) -> None:
    assert 0 < np.abs(picture(drawn / quant) - picture(drawn / "none")).mean() < most

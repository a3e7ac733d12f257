"""Errors of every format on the scenes network, and time of int8 against fp32 on this CPU; writes results.json.

``OMP_NUM_THREADS=1 python experiments/quant_formats/measure.py``. Times are of one thread's processor, the least of
several in turns, because the machine may have other work.
"""

from __future__ import annotations

import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.model.load import load_weights
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.inference import for_inference
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.quant.report import measure_errors
from sana.run.build import build
from sana.run.environment import cpu_name
from sana.run.restore import restore
from sana.run.saved import prepare
from sana.types import Condition

FORMATS = ("int8_weight", "int8", "fp8", "nvfp4", "w4a16")
WIDTHS = {1152: 16, 2240: 20}  # of 0.6B and 1.6B, heads of cross-attention
TURNS = 6
Given = tuple[Tensor, Tensor, Condition]


def option(line: str) -> Any:
    """The function that an option of conf/quant builds."""
    return build(prepare("sample", ["ckpt=scenes", "prompt=a star", *line.split()]).config.quant, "quant")


def scenes() -> tuple[nn.Module, Given]:
    """The shipped network, and a batch of 16 along its path."""
    restored = restore(prepare("sample", ["ckpt=scenes", "prompt=a star"]))
    load_weights(restored.module, restored.checkpoint)
    net = restored.module.network.eval()
    prompts = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "black") for shape in
               ("circle", "square", "star", "triangle")]  # fmt: skip
    encoder = restored.module.frozen.text_encoder
    rows = encoder.rows(prompts)
    mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
    text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    g = torch.Generator().manual_seed(0)
    side = 64 // restored.module.frozen.autoencoder.ratio
    x = torch.randn(16, net.in_channels, 1, side, side, generator=g)
    return net, (x, torch.linspace(0.2, 1, 16)[:, None], Condition(text, mask))


def published(width: int) -> tuple[nn.Module, Given]:
    """Two blocks of a published width with random weights, at 512 px and 40 tokens of text, a guided pair."""
    torch.manual_seed(0)
    mixer, cross = partial(LinearAttention, head_dim=32), partial(CrossAttention, heads=WIDTHS[width])
    net = Sana(32, width, 2, 2304, [partial(Block, mixer=mixer, cross=cross, ffn=MixFFN)]).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    condition = Condition(torch.randn(2, 40, 2304), torch.ones(2, 40, dtype=torch.bool))
    return net, (torch.randn(2, 32, 1, 16, 16), torch.full((2, 1), 0.5), condition)


@torch.no_grad()
def seconds(nets: dict[str, nn.Module], given: Given) -> dict[str, float]:
    """Processor time of a forward with prepared text, by name."""
    x, t, condition = given
    prepared = {name: net.prepare(condition) for name, net in nets.items()}  # type: ignore[operator]
    found = {name: float("inf") for name in nets}
    for _ in range(TURNS):
        for name, net in nets.items():
            start = time.process_time()
            net(x, t, prepared[name])
            found[name] = min(found[name], time.process_time() - start)
    return found


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"cpu": cpu_name(), "torch": torch.__version__, "errors": {}, "seconds": {}}
    base, given = scenes()
    lines = {name: f"quant={name}" for name in FORMATS} | {
        "int8, rotated": "quant=int8 quant.rotate=16",
        "nvfp4, searched": "quant=nvfp4 quant.search=true",
        "nvfp4, weights only": "quant=nvfp4 quant.activations=false",
        "nvfp4, weights only, searched": "quant=nvfp4 quant.activations=false quant.search=true",
    }
    for name, line in lines.items():
        report = measure_errors(base, option(line)(copy.deepcopy(base)), given)
        errors = list(report.outputs.values())
        results["errors"][name] = {
            "layers": len(report.converted),
            "skipped": len(report.skipped),
            "bytes": [report.bytes_before, report.bytes_after],
            "weight_mean": sum(report.converted.values()) / len(errors),
            "layer_mean": sum(errors) / len(errors),
            "layer_most": max(errors),
            "whole": report.output,
            "arithmetic": report.arithmetic,
        }
        print(name, json.dumps(results["errors"][name]), flush=True)
    for name, (net, batch) in {"scenes": (base, given), **{str(w): published(w) for w in WIDTHS}}.items():
        copies = {"fp32": copy.deepcopy(net)}
        copies |= {key: option(lines[key])(copy.deepcopy(net)) for key in (*FORMATS[:2], "int8, rotated")}
        results["seconds"][name] = seconds({key: for_inference(value) for key, value in copies.items()}, batch)
        print(name, results["seconds"][name], flush=True)
    path = Path(__file__).with_name("results.json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

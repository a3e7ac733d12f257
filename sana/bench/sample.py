"""``scripts/bench.py sample``: latency, images per second and memory of drawing, ours and diffusers' in turns."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sana.allocator import DRAWING, keep_pages, one_arena
from sana.bench.parts import SIZES
from sana.bench.roofline import DECODE_FLOPS, Rates, denoiser_bytes, measure_rates, wait
from sana.bench.sides import STAGES, Side, Work, make_both, make_one
from sana.bench.turns import Turns
from sana.run.environment import cpu_name, describe_git, peak_rss_gib
from sana.types import Grid

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--size",
        choices=[n for n in SIZES if not SIZES[n].guidance],
        default="600m",
        help="network (tiny: to try the command)",
    )
    parser.add_argument("--px", type=int, default=512, help="side of the images")
    parser.add_argument("--steps", type=int, default=20, help="of DPM-Solver++, with guidance")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--tokens", type=int, nargs="+", default=[40, 300], help="lengths of the prompts")
    parser.add_argument("--repeats", type=int, default=1, help="pairs per length")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--text-layers", type=int, default=2, help="of the random Gemma-2 (published: 26)")
    parser.add_argument("--peer", choices=["diffusers"], default="diffusers")
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    parser.add_argument("--alone", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # the child that is weighed


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    wrong = _refusal(options)
    if wrong is not None:
        print(f"bench.py sample: {wrong}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    work = Work(options.size, options.px, options.steps, options.batch, options.text_layers,
                DTYPES[options.dtype], torch.device(options.device))  # fmt: skip
    if options.alone is not None:
        print(json.dumps(weigh(options.alone, work, max(options.tokens))))
        return 0
    memory = {}
    for side in ("ours", "theirs"):
        _say(f"memory of {side}, in a fresh process")
        memory[side] = _in_child(side, options)
    _say("the same weights on both sides, and a warm-up")
    results = measure(work, options.tokens, options.repeats)
    results["ratio_peak_memory"] = memory["ours"]["peak_gib"] / memory["theirs"]["peak_gib"]
    results |= {"peak_memory": memory, "settings": _settings(options), "environment": _environment(work.device)}
    print(report(results))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(work: Work, lengths: list[int], repeats: int) -> dict[str, Any]:
    """Both sides after a warm-up of one step: on CPUs in turns of a step, else one after the other; each pair in the
    other order.

    The warm-up is at the greatest length alone: a shorter prompt meets the same kernels and less memory.
    """
    keep_pages(DRAWING)  # as sample.py does; the peer, in the same process, has it too
    rates = measure_rates(work.device, work.dtype)
    ours, theirs = make_both(work)
    results: dict[str, Any] = {"raw": [], "max_rel_error": 0.0}
    turns, seed = Turns(), 0
    if work.device.type == "cpu":  # waiting for a GPU after each step would cost it its queue
        one_arena()
        turns.wrap(ours.painter.network, "forward")
        turns.wrap(theirs.pipeline.transformer, "forward")
    for side in (ours, theirs):
        side.draw(work.prompts(max(lengths), 9999), 9999, steps=1)
        side.clock.read()
    for tokens in lengths:
        pairs: list[dict[str, dict[str, float]]] = []
        for i in range(repeats):
            prompts, seed = work.prompts(tokens, seed), seed + 1
            _say(f"{tokens} tokens, pair {i + 1} of {repeats}")
            order = (("ours", ours), ("theirs", theirs))
            pairs.append(_timed(turns, dict(order if i % 2 == 0 else order[::-1]), prompts, seed))
            error = _relative_error(ours, theirs)
            results["max_rel_error"] = max(results["max_rel_error"], *error.values())
            results["raw"].append({"tokens": tokens, "relative_error": error, **pairs[-1]})
            _say(f"  ours {pairs[-1]['ours']['total']:.1f} s, diffusers {pairs[-1]['theirs']['total']:.1f} s")
        stages = ("total", *STAGES)
        results[f"ratio_latency_{tokens}"] = median(p["ours"]["total"] / p["theirs"]["total"] for p in pairs)
        results[f"tokens_{tokens}"] = {
            stage: {
                "ours": min(p["ours"][stage] for p in pairs),
                "theirs": min(p["theirs"][stage] for p in pairs),
                "ratio": median(p["ours"][stage] / p["theirs"][stage] for p in pairs),
                "floor": _floor(work, ours, tokens, rates)[stage],
            }
            for stage in stages
        }
    results["rates"] = {"flops_per_s": rates.flops, "bytes_per_s": rates.bytes}
    return results


def weigh(name: str, work: Work, tokens: int) -> dict[str, float]:
    """Peak memory of one side alone in this process, weights and a drawing of one step, in GiB."""
    if name == "ours":
        keep_pages(DRAWING)  # as sample.py does
    before = peak_rss_gib()
    make_one(name, work).draw(work.prompts(tokens, 0), 0, steps=1)
    if work.device.type == "cuda":
        return {"peak_gib": torch.cuda.max_memory_allocated(work.device) / 2**30}
    return {"peak_gib": peak_rss_gib(), "before_weights_gib": before}


def report(results: dict[str, Any]) -> str:
    """The results as text."""
    settings, rates = results["settings"], results["rates"]
    lines = [
        f"{settings['size']} at {settings['px']} px, {settings['steps']} steps, batch {settings['batch']}, "
        f"{settings['dtype']}, {results['environment']['machine']}, {results['environment']['threads']} threads",
        f"text encoder: random Gemma-2, {settings['text_layers']} of 26 layers, byte tokenizer, no instruction",
        f"rates: product {rates['flops_per_s'] / 1e9:.0f} GFLOP/s, copy {rates['bytes_per_s'] / 1e9:.1f} GB/s",
        f"{'':22}{'ours s':>10}{'diffusers s':>13}{'ratio':>8}{'floor s':>9}",
    ]
    for tokens in settings["tokens"]:
        for stage, row in results[f"tokens_{tokens}"].items():
            lines.append(f"{tokens:>4} tokens {stage:11}{row['ours']:>10.3f}{row['theirs']:>13.3f}"
                         f"{row['ratio']:>8.3f}{row['floor']:>9.3f}")  # fmt: skip
        total = results[f"tokens_{tokens}"]["total"]
        rate = [settings["batch"] / total[side] for side in ("ours", "theirs")]
        lines.append(f"{tokens:>4} tokens {'images/s':11}{rate[0]:>10.3f}{rate[1]:>13.3f}{rate[0] / rate[1]:>8.3f}")
    memory = results["peak_memory"]
    peaks = [memory[side]["peak_gib"] for side in ("ours", "theirs")]
    lines.append(f"{'peak memory, GiB':22}{peaks[0]:>10.3f}{peaks[1]:>13.3f}{results['ratio_peak_memory']:>8.3f}")
    lines.append(f"largest relative error {results['max_rel_error']:.2e} (latents and images, max |a - b| / max |b|)")
    return "\n".join(lines)


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _timed(turns: Turns, sides: dict[str, Side], prompts: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Seconds of each side and of its stages."""

    def draw(side: Side) -> None:
        side.draw(prompts, seed)
        wait(side.work.device)

    totals = turns.run({name: partial(draw, side) for name, side in sides.items()})
    seconds = {}
    for name, side in sides.items():
        stages = side.clock.read()
        seconds[name] = {"total": totals[name], **{stage: stages.get(stage, 0.0) for stage in STAGES}}
    return seconds


def _relative_error(ours: Side, theirs: Side) -> dict[str, float]:
    return {
        name: ((ours.seen[name] - theirs.seen[name]).abs().max() / theirs.seen[name].abs().max()).item()
        for name in ("latent", "image")
    }


def _floor(work: Work, ours: Any, tokens: int, rates: Rates) -> dict[str, float]:
    """Least seconds per stage at the measured rates: keys and values of the caption once, not once per step."""
    network, autoencoder = ours.painter.network, ours.painter.autoencoder
    size, side, itemsize = SIZES[work.size], work.px // 32, work.dtype.itemsize
    grid, rows = Grid(1, side, side), 2 * work.batch
    once = network.flops(grid, tokens) - network.flops(grid, 0)
    attention = 4 * grid.tokens * size.width * tokens * size.depth
    flops = rows * (work.steps * (network.flops(grid, 0) + attention) + once - attention)
    count = sum(p.numel() for p in network.parameters())
    moved = work.steps * denoiser_bytes(count, grid.tokens, size.width, size.depth, rows, itemsize)
    model = ours.painter.text_encoder.model
    layers = sum(p.numel() for p in model.layers.parameters())
    decoder = sum(p.numel() for p in autoencoder.decoder.parameters())
    share = DECODE_FLOPS if work.size != "tiny" else 0.0
    floors = {
        "text": rates.seconds(2 * layers * (tokens * work.batch + 1), itemsize * layers),
        "denoiser": rates.seconds(flops, moved),
        "autoencoder": rates.seconds(share * work.px**2 * work.batch, itemsize * decoder),
    }
    return {"total": sum(floors.values()), **floors}


def _in_child(side: str, options: argparse.Namespace) -> dict[str, float]:
    """`weigh` in a fresh process."""
    command = [sys.executable, "-m", "sana.bench", "sample", "--alone", side]
    for name in ("size", "px", "batch", "dtype", "device", "text_layers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--tokens", str(max(options.tokens))]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _refusal(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, in one line."""
    if options.px < 32 or options.px % 32:
        return f"--px {options.px} is not a positive multiple of 32, the autoencoder's ratio"
    for name in ("steps", "batch", "repeats", "text_layers"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
    if not all(8 <= tokens <= 300 for tokens in options.tokens):
        return f"--tokens must be from 8 to 300, got {options.tokens}"
    if options.device.split(":")[0] not in ("cpu", "cuda"):
        return f"--device {options.device}: cpu or cuda"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        return f"--device {options.device}: this machine has no CUDA device"
    try:
        version("diffusers")
    except ImportError:
        return "--peer diffusers is not installed; it comes with the extra `dev` (make setup)"
    return None


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if isinstance(v, str | int | list) and k not in ("alone", "command")}


def _environment(device: torch.device) -> dict[str, Any]:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "machine": machine,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "commit": (describe_git()[0] or {}).get("commit"),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }

"""Measures an autoencoder of the scenes: ``PYTHONPATH=. python experiments/dc_ae_tiny/measure.py WEIGHTS``.

Prints and writes: PSNR of reconstructions of scenes that no training saw, how often the oracle finds the prompt in them
(and in the originals), the same after noise on the latent, moments of the latent, and the time per image.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from sana.data.synthetic import example
from sana.encoder.autoencoder.dc_ae import DCAE, load
from sana.encoder.autoencoder.fold import moments
from sana.metric.psnr import psnr
from sana.metric.scenes import oracle

SEED = 7_000_000  # of no training or validation shards


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measure an autoencoder on held-out scenes.")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--count", type=int, default=1200, help="scenes; every fourth states a held-out combination")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--run", type=Path, help="run directory that made the weights: adds seconds, seed and commit")
    parser.add_argument("--sheet", type=Path, help="write a PNG: originals above reconstructions")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.weights)
    pixels, metadata = scenes(arguments.count)
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    result = {"weights": arguments.weights.name, "scenes": arguments.count, "bytes": arguments.weights.stat().st_size}
    result |= quality(model, image, metadata) | speed(model)
    if arguments.run:
        result |= origin(arguments.run)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.sheet:
        sheet(image[:32], mapped(model, image[:32]), arguments.sheet)


def origin(run: Path) -> dict[str, object]:
    """Where the weights come from, as the run's records say."""
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "seconds": json.loads((run / "status.json").read_text(encoding="utf-8"))["seconds"],
        "seed": OmegaConf.load(run / "config.yaml").seed,  # type: ignore[union-attr]
        "commit": environment["git"]["commit"],
        "dirty": environment["git"]["dirty"],
    }


def scenes(count: int) -> tuple[np.ndarray, list[dict]]:
    """Pictures uint8 (count, 64, 64, 3) and their metadata."""
    rows = [example(SEED, i, held_out=i % 4 == 0) for i in range(count)]
    return np.stack([row[0] for row in rows]), [row[1] for row in rows]


@torch.no_grad()
def mapped(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A function of images or latents, in batches."""
    return torch.cat([function(part) for part in images.split(64)])


def found(images: Tensor, metadata: list[dict]) -> float:
    """Share of pictures in which the oracle finds what the prompt says."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return sum(oracle(picture, facts)[0] for picture, facts in zip(pixels, metadata, strict=True)) / len(metadata)


def quality(model: DCAE, image: Tensor, metadata: list[dict]) -> dict[str, object]:
    """Everything that is not time."""
    latent = mapped(model.encode, image)
    restored = mapped(model.decode, latent)
    decibel = psnr(image, restored)
    mean, covariance = moments(latent)
    result: dict[str, object] = {
        "psnr": decibel.mean().item(),
        "psnr_percentile_1": decibel.quantile(0.01).item(),
        "oracle_originals": found(image, metadata),
        "oracle": found(restored, metadata),
        "latent_shape": list(latent.shape[1:]),
        "latent_mean_largest": mean.abs().max().item(),
        "latent_variance": [covariance.diagonal().min().item(), covariance.diagonal().max().item()],
        "latent_correlation_largest": (covariance - covariance.diagonal().diag()).abs().max().item(),
        "latent_kurtosis": (latent.double() ** 4).mean().item() / (latent.double() ** 2).mean().item() ** 2,
    }
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.1, 0.2, 0.3):
        noisy = mapped(model.decode, latent + sigma * torch.randn(latent.shape, generator=generator))
        result[f"noise_{sigma}"] = {"psnr": psnr(image, noisy).mean().item(), "oracle": found(noisy, metadata)}
    low = model.bfloat16()
    restored = mapped(lambda part: low(part.bfloat16()).float(), image)
    result["bfloat16"] = {"psnr": psnr(image, restored).mean().item(), "oracle": found(restored, metadata)}
    model.float()
    return result


@torch.no_grad()
def speed(model: DCAE, batch: int = 64, repeats: int = 20) -> dict[str, object]:
    """Milliseconds per image, the median of some batches."""
    result: dict[str, object] = {"threads": torch.get_num_threads()}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model.to(dtype)
        image = torch.rand(batch, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        latent = model.encode(image)
        for part, function, argument in (("encode", model.encode, image), ("decode", model.decode, latent)):
            function(argument)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                function(argument)
                times.append(time.perf_counter() - start)
            result[f"{part}_ms_{name}"] = 1000 * float(np.median(times)) / batch
    model.float()
    return result


def sheet(images: Tensor, restored: Tensor, path: Path, columns: int = 8, scale: int = 2) -> None:
    """Rows of originals, each with the row of its reconstructions below."""
    rows = []
    for first in range(0, len(images), columns):
        for part in (images, restored):
            rows.append(torch.cat(list(part[first : first + columns]), dim=2))
    grid = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(grid).resize((grid.shape[1] * scale, grid.shape[0] * scale), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()

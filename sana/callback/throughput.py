"""What a device could compute at best, for the utilisation in the records, and the memory in use."""

from __future__ import annotations

import time

import torch

from sana.run.environment import peak_rss_gib

# Dense bfloat16 products with float32 sums, per second, from the makers' data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
         "A10G": 70e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 5090": 210e12, "MI300X": 1307e12}  # fmt: skip
SIDE, REPEATS = 384, 5  # of the product that is timed where no data sheet is known: some 20 ms on a CPU core


def peak_flops(device: torch.device, bf16: bool) -> float:
    """Operations per second: of the data sheet for known GPUs in bfloat16, else of the fastest of a few products."""
    if device.type == "cuda" and bf16:
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAKS if key in name]
        if known:
            return PEAKS[max(known, key=len)]
    side = SIDE if device.type == "cpu" else 4096
    a, b = (torch.ones(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def memory_numbers(device: torch.device) -> dict[str, float]:
    """Peaks so far in GiB: of this process's main memory, and of what it allocated and reserved on a GPU."""
    numbers = {"memory/peak_rss_gib": peak_rss_gib()}
    if device.type == "cuda":
        numbers["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        numbers["memory/peak_gpu_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return numbers

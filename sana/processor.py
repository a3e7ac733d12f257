"""What the processor of this machine is, and whether it is fast in bf16."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, such as "vendor_id" and "flags"; empty on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the processor, as Linux names them; empty elsewhere."""
    facts = cpu_facts()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


@cache
def fast_in_bf16() -> bool:
    """Whether matrix products in bf16 take less time than in fp32.

    With tiles (AMX), on Arm with its bf16 extension, and with AVX512-BF16 on AMD processors, where its dot product has
    twice the rate of fp32. A core of a Xeon whose tiles were hidden took 1.5 to 1.8 times as long by AVX512-BF16 as in
    fp32 at the shapes of SANA. Without any of these bf16 is emulated, four times slower and more.
    """
    flags = cpu_flags()
    amd = cpu_facts().get("vendor_id") == "AuthenticAMD"
    return bool(flags & {"amx_bf16", "bf16"}) or ("avx512_bf16" in flags and amd)

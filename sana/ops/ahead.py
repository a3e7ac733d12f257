"""Kernels compiled ahead of time for cards that are not here, and what the machine code asks of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 89, 90, 100, 120)
"""sm_80 (A100), 89 (4090, L40), 90 (H100, H200), 100 (B200), 120 (5090)."""


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of a Triton kernel, as the launcher would ask for it.

    Args:
        name: of the case, in messages.
        function: the jit function.
        signature: argument -> "*bf16", "*fp32", "i32", "fp32", ...; with ":16" after it where the launcher passes a
            multiple of 16 (pointers nearly always), for which better loads are made.
        constexprs: argument -> value; also those that are specialised because they are 1, such as a stride.
        num_warps, num_stages: of the launch.
        budget_registers: most registers per thread that the case may take.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    budget_registers: int = 255


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, bytes of stack and of local memory (spills); shared: bytes per program."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_case(case: KernelCase, capability: int) -> Resources:
    """Compile for a card of this compute capability (90: sm_90), which need not be here.

    Raises:
        RuntimeError: in a process in which Triton interprets, so that there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(case.function, "create_binder"):
        raise RuntimeError("kernels are interpreted in this process; compile them in one without TRITON_INTERPRET")
    names = case.function.arg_names
    types = {name: text.partition(":") for name, text in case.signature.items()}
    signature = {name: "constexpr" if name in case.constexprs else types[name][0] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name, (_, _, by) in types.items() if by == "16"}
    source = ASTSource(case.function, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return resources(kernel.asm["cubin"], kernel.metadata.shared)


def resources(cubin: bytes, shared: int) -> Resources:
    """What the code of one kernel takes, as the disassembler that comes with Triton reads it.

    Args:
        cubin: machine code.
        shared: bytes of shared memory, which are asked for at launch and not in the code.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        line = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (_number(key, text) for key in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack, local, shared)


def offences(case: KernelCase, capability: int, found: Resources) -> list[str]:
    """One line for each thing that the case may not do on this card; none when all is well."""
    where, limit = f"{case.name} on sm_{capability}", SHARED[capability]
    lines = []
    if found.stack or found.local:
        lines.append(f"{where}: {found.stack} bytes of stack and {found.local} of local memory; expected none (spills)")
    if found.registers > case.budget_registers:
        lines.append(f"{where}: {found.registers} registers; the budget is {case.budget_registers}")
    if found.shared > limit:
        lines.append(f"{where}: {found.shared} bytes of shared memory; the card has {limit}")
    return lines


SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of compute capabilities)."""


def _number(key: str, text: str) -> int:
    match = re.search(rf"\b{key}:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of {key}: {text!r}")
    return int(match[1])

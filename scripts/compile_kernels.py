"""Compile all Triton kernels for cards that need not be here, and hold them to their budgets.

python scripts/compile_kernels.py [--sm 80,89,90,100,120] [--match TEXT]

One line per kernel and card with registers and shared memory; exit code 1 and one line per offence where machine code
spills, uses a stack, or takes more registers or shared memory than it may.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as at run time; Triton 3.9 asks that it be said

import sana.ops
from sana.ops.ahead import CAPABILITIES, KernelCase, compile_case, offences


def every_case() -> list[KernelCase]:
    """The table KERNELS of every sana.ops.<op>.triton."""
    folders = sorted(path.parent.name for path in Path(sana.ops.__path__[0]).glob("*/triton.py"))
    modules = [importlib.import_module(f"sana.ops.{name}.triton") for name in folders]
    return [case for module in modules for case in module.KERNELS]


def main() -> int:
    """0 when every kernel keeps its budget, 1 when not, 2 when no kernel is meant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cards = ",".join(map(str, CAPABILITIES))
    parser.add_argument("--sm", default=cards, help=f"compute capabilities, separated by commas; default {cards}")
    parser.add_argument("--match", default="", help="only the cases whose names contain this")
    arguments = parser.parse_args()
    cases = [case for case in every_case() if arguments.match in case.name]
    if not cases:
        print(f"no kernel's name contains {arguments.match!r}", file=sys.stderr)
        return 2
    found = []
    for case in cases:
        for capability in map(int, arguments.sm.split(",")):
            try:
                used = compile_case(case, capability)
            except Exception as error:  # a failure of the compiler is one more offence
                found.append(
                    f"{case.name} on sm_{capability}: does not compile: {str(error).strip().splitlines()[-1:]}"
                )
                continue
            found += offences(case, capability, used)
            print(f"{case.name} on sm_{capability}: {used.registers} registers, {used.shared} bytes shared", flush=True)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

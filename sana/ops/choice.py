"""The one choice between kernels: plain torch ("naive", the truth) or Triton, for every op and the whole process.

Set once, before anything is built, from the key `kernels` of a configuration; the public function of each op asks
`use_triton` at every call and nobody else decides.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Kernels = Literal["auto", "naive", "triton"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What the Triton kernels read and write; they sum in fp32."""
CAPABILITY = (8, 0)
"""The oldest cards that the kernels are built for: bf16 in tensor cores."""

OPS = "sana.ops."
_logger = logging.getLogger(__name__)
_chosen: Kernels = "auto"
_told: set[tuple[str, bool]] = set()
_answers: dict[tuple[Any, ...], bool] = {}  # by calling file and the tensors' types and places


def set_kernels(kernels: str) -> None:
    """Choose for all ops from now on; what torch.compile has traced already is traced again.

    Args:
        kernels: "auto": Triton for tensors on CUDA of `DTYPES`, else naive. "naive": never Triton. "triton": always,
            with an error where that cannot be; on CPUs only in Triton's interpreter (TRITON_INTERPRET=1).

    Raises:
        ValueError: any other word.
    """
    global _chosen
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels: {kernels!r}; expected one of {', '.join(get_args(Kernels))}")
    _chosen = cast(Kernels, kernels)
    _told.clear()
    _answers.clear()


def chosen() -> str:
    """What `set_kernels` was told last; "auto" at first."""
    return _chosen


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether an op shall compute these tensors with its Triton kernels; said once per op in the log.

    Args:
        tensors: all that the kernels would read, None where an optional one is not given. On the meta device and for
            fake tensors (plans of memory) nothing is computed, and the answer is no.

    Raises:
        ValueError: "triton" was chosen, and the kernels cannot compute these.
    """
    if torch.compiler.is_compiling():
        return _choose(tensors)
    # The question is asked some hundred times per step, so what was answered is looked up.
    key = (sys._getframe(1).f_code.co_filename, *[None if x is None else (type(x), x.dtype, x.device) for x in tensors])
    answer = _answers.get(key)
    if answer is None:
        answer = _choose(tensors)
        _tell(answer)
        if _chosen != "triton":  # whose answer on CPUs depends on the environment too
            _answers[key] = answer
    return answer


def _choose(tensors: tuple[Tensor | None, ...]) -> bool:
    if _chosen == "naive" or any(x is not None and (x.is_meta or isinstance(x, FakeTensor)) for x in tensors):
        return False
    reason = _obstacle([x for x in tensors if x is not None])
    if reason is not None and _chosen == "triton":
        raise ValueError(f"kernels=triton: {reason}; choose kernels=auto or kernels=naive")
    return reason is None


def _obstacle(tensors: list[Tensor]) -> str | None:
    """Why Triton cannot take these, None where it can."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')} is not among the kernels' types (fp32, bf16, fp16)"
        if not x.is_cuda and (_chosen == "auto" or x.device.type != "cpu" or not _interpreted()):
            return (
                f"a tensor is on {x.device.type}; the kernels need CUDA (on CPUs, TRITON_INTERPRET=1 interprets them)"
            )
    if len({x.device for x in tensors}) > 1:
        return f"tensors are on several devices: {', '.join(sorted({str(x.device) for x in tensors}))}"
    if not _installed():
        return "triton is not installed"
    if tensors and tensors[0].is_cuda and not _capable(tensors[0].get_device()):
        return "the kernels need an NVIDIA card of compute capability 8.0 or newer"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return _found()


@torch.compiler.assume_constant_result
def _capable(index: int) -> bool:
    return _new_enough(index)


# Behind plain functions: torch 2.11 traces what `cache` wraps even where the result is to be taken as a constant.
@cache
def _found() -> bool:
    return find_spec("triton") is not None


@cache
def _new_enough(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= CAPABILITY


def _tell(answer: bool) -> None:
    """Log the choice of the op that asked: the folder in sana/ops/ of the calling module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not _is_op(frame.f_globals.get("__name__", "")):
        frame = frame.f_back  # past this module, and what tests wrap functions in
    op = frame.f_globals.get("__name__", "").removeprefix(OPS).partition(".")[0]
    if (op, answer) not in _told:
        _told.add((op, answer))
        _logger.info("%s: %s kernels (kernels=%s)", op, "triton" if answer else "naive", _chosen)


def _is_op(module: str) -> bool:
    return module.startswith(OPS) and module != __name__

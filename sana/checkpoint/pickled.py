"""Files of ``torch.save``, read without running anything in them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.tensors import Tensors, from_dict


def read_pickle(path: str | Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``. ``weights_only=True``: tensors, numbers and text, never code.

    Tensors are memory of the file wherever its format allows, so they cost nothing until they are used, and must not
    be written to.

    Raises:
        CheckpointError: no such file, a truncated one, one that names code to run, or no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of older pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is truncated or damaged, or was not written by torch.save ({_first(error)}); fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary with a state_dict")
    return content


def state_in(content: Mapping[str, Any], key: str, path: str | Path) -> Tensors:
    """The state dict under a key of what `read_pickle` gave.

    Raises:
        CheckpointError: not there, or not a mapping of names to tensors.
    """
    state = content.get(key)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: has no {key!r} (it has {', '.join(sorted(map(str, content))[:6])})")
    odd = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path}: {key}[{odd[0]!r}] is no tensor")
    return from_dict(state)


def _refusal(path: Path, message: str) -> str:
    code = re.search(r"(?:Unsupported (?:global|class)|GLOBAL|global)[: ]+([\w.]+\.[\w.]+)", message)
    if code is None:
        what = message.split("Please")[0].strip().splitlines()[-1][:120] if message.strip() else "unreadable"
        return f"{path}: is no file of plain tensors: damaged, or it holds Python objects ({what})"
    return (
        f"{path}: names Python code to run on loading ({code.group(1)}); only tensors are read, so it is refused. "
        "Save it again as {'state_dict': ...} of tensors where you trust it"
    )


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]

"""Where Gemma-2 comes from: a folder, the hub's local cache or the hub; else one message with the steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PROJECT = Path(__file__).parents[3]

STEPS = """Gemma-2 is not available: {reason}
Do one of these, then run the same command again:
  1. The original weights (gated; Gemma terms of use):
       open https://huggingface.co/google/gemma-2-2b-it and accept the terms
       hf auth login
       hf download google/gemma-2-2b-it --local-dir models/gemma-2-2b-it
     and add  encoder.text.path=models/gemma-2-2b-it
  2. The copy that ships with the published SANA pipelines (same terms, no login):
       hf download Efficient-Large-Model/Sana_600M_512px_diffusers --include "text_encoder/*" "tokenizer/*" \
--local-dir models/sana_text
     and add  encoder.text.path=models/sana_text
  3. On a machine without network: copy either folder from another machine and give its path in the same way.
  4. Without Gemma at all, offline: encoder/text=gemma_tiny (small and trained, for the scenes) or
     encoder/text=gemma_random (random weights of any width, to exercise a recipe)."""


class GemmaUnavailableError(RuntimeError):
    """Gemma-2's weights or tokenizer are neither here nor reachable; the message lists the steps that help."""


@contextmanager
def without(package: str) -> Iterator[None]:
    """Inside, imports take a package for not installed, unless it was imported before.

    transformers imports torchao wherever it finds it: three seconds of every start, for nothing that is used here.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def load_gemma(path: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The Gemma-2 decoder (without language-model head) and its tokenizer.

    Args:
        path: a folder (config.json, safetensors, tokenizer; or a diffusers pipeline with text_encoder/ and
            tokenizer/), absolute, relative to the working directory or to the project; else a name on the hub.
        dtype: of the weights.

    Raises:
        GemmaUnavailableError: the files are not here and cannot be fetched.
        ValueError: they hold another architecture, or lack weights.
    """
    with without("torchao"):
        from transformers import AutoConfig, AutoTokenizer, Gemma2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar per tensor, done in a blink
    model_path, tokenizer_path = _locate(path)
    try:
        config = AutoConfig.from_pretrained(model_path)
        if config.model_type != "gemma2":
            raise ValueError(
                f"text encoder {path!r}: architecture is {config.model_type!r}, expected 'gemma2' (Gemma-2)"
            )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        load: Any = Gemma2Model.from_pretrained  # eager: the attention that applies logit soft-capping
        model, info = load(
            model_path,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            use_safetensors=True,
            variant=_variant(Path(model_path)),
        )
    except OSError as error:
        raise GemmaUnavailableError(STEPS.format(reason=_first_line(error, path))) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"text encoder {path!r}: {len(missing)} weights are missing, first {missing[0]!r}")
    return model, tokenizer


def _locate(path: str) -> tuple[str, str]:
    """Folder of the model and folder of the tokenizer, or twice the hub's name."""
    for folder in (Path(path).expanduser(), PROJECT / path):
        if (folder / "text_encoder" / "config.json").is_file():
            return str(folder / "text_encoder"), str(folder / "tokenizer")
        if (folder / "config.json").is_file():
            return str(folder), str(folder)
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or Path(path).exists():
        raise GemmaUnavailableError(STEPS.format(reason=f"no config.json in the folder {path!r}"))
    return path, path


def _variant(folder: Path) -> str | None:
    """The precision in the names of the weight files, where a folder has no unnamed ones."""
    if folder.is_dir() and not list(folder.glob("model.safetensors")) + list(folder.glob("model-*.safetensors")):
        for variant in ("bf16", "fp32", "fp16"):
            if list(folder.glob(f"model.{variant}*.safetensors")):
                return variant
    return None


def _first_line(error: BaseException, path: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{path!r} could not be loaded ({lines[0] if lines else type(error).__name__})"

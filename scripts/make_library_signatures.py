"""Writes sana/run/library_signatures.json: the library names that a configuration may build, and their
arguments.

    python scripts/make_library_signatures.py

Run it after changing NAMES or upgrading one of the libraries; a test compares the file with what is
installed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

from sana.run.allow import identity

TABLE = Path(__file__).resolve().parents[1] / "sana" / "run" / "library_signatures.json"

NAMES = (
    "lightning.Trainer",
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.Timer",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.profilers.AdvancedProfiler",
    "lightning.pytorch.profilers.PyTorchProfiler",
    "lightning.pytorch.profilers.SimpleProfiler",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.ModelParallelStrategy",
    "lightning.pytorch.strategies.SingleDeviceStrategy",
    "torch.nn.GELU",
    "torch.nn.Linear",
    "torch.nn.ReLU",
    "torch.nn.SiLU",
    "torch.optim.Adam",
    "torch.optim.AdamW",
    "torch.optim.SGD",
    "torchao.optim.AdamW8bit",
)

LIBRARIES = ("lightning", "torch", "torchao", "wandb")

# Where **kwargs of a class go, so that a misspelt name among them is found too.
FORWARDED = {
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    "lightning.pytorch.strategies.DDPStrategy": "torch.nn.parallel.DistributedDataParallel",
}


def find(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def annotation_text(annotation: Any) -> str | None:
    """An annotation as a Python expression, or None."""
    if annotation is inspect.Parameter.empty:
        return None
    text = annotation if isinstance(annotation, str) else _render(annotation)
    try:
        return ast.unparse(ast.parse(text, mode="eval"))
    except SyntaxError:
        return None


def _render(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is ...:
        return "..."
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return getattr(annotation, "__name__", None) or str(annotation).removeprefix("typing.")
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is typing.Union or type(annotation).__name__ == "UnionType":
        # Sorted, because typing's caches give equal unions the order of whichever module was imported first.
        return " | ".join(sorted(set(map(_render, arguments)), key=lambda text: (text == "None", text)))
    if origin.__name__ == "Callable":
        return "Callable"
    return f"{origin.__name__}[{', '.join(map(_render, arguments))}]"


def read(name: str) -> dict[str, Any]:
    """Where one target is defined, its arguments (name -> [annotation, required]), and whether others are taken."""
    parameters, is_open = {}, False
    for parameter in inspect.signature(find(name)).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            required = parameter.default is parameter.empty
            parameters[parameter.name] = [annotation_text(parameter.annotation), required]
    if name in FORWARDED:
        for key, (text, _) in read(FORWARDED[name])["parameters"].items():
            parameters.setdefault(key, [text, False])
        is_open = False
    return {"identity": identity(find(name)), "parameters": parameters, "open": is_open}


def table() -> dict[str, Any]:
    """The whole table, from the libraries installed here."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"versions": versions, "targets": {name: read(name) for name in sorted(NAMES)}}


def main() -> None:
    """Write the table in one step."""
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(table(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, TABLE)
    print(f"{TABLE}: {len(NAMES)} names")


if __name__ == "__main__":
    main()

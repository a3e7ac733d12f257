"""What to draw: prompts from the command line, from a list, or from a text, JSON or JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.run.error import ConfigError

SUFFIXES = (".txt", ".json", ".jsonl")
TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative": (str,),
    "seed": (int, list),
    "width": (int,),
    "height": (int,),
}


@dataclass(frozen=True)
class Request:
    """One prompt and what its line of a file says of it; what is None is as the command line says.

    Attributes:
        prompt: the text.
        seed: of the first image, or one seed per image.
        negative: what to steer away from.
        width, height: pixels.
        metadata: the line itself where it says more, as GenEval's do.
    """

    prompt: str
    seed: int | Sequence[int] | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Sequence[str]) -> list[Request]:
    """The requests of a command line.

    Args:
        source: a prompt; a list of prompts; or the path of a file: one prompt per line (.txt, blank lines are
            skipped), one JSON string or object per line (.jsonl), or a JSON list of those or mapping to those
            (.json). An object has "prompt" and may have "negative", "seed" (an integer, or a list with one for
            each image), "width" and "height"; what else it has is kept as `metadata`. A name that ends in one
            of these suffixes and has no space is a file.

    Raises:
        ConfigError: no such file, nothing in it, or an entry that cannot be read, with its place.
    """
    if not isinstance(source, str):
        return [Request(text) for text in source] or _none("prompt: the list is empty; give at least one prompt")
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES or (" " in source and not path.is_file()):
        return [Request(source)]
    if not path.is_file():
        raise ConfigError(f"prompt: there is no file {source}; a prompt that ends in {path.suffix} needs a space in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt: {source} cannot be read as UTF-8 text: {error}") from None
    if path.suffix.lower() == ".txt":
        found = [Request(line.strip()) for line in text.splitlines() if line.strip()]
    elif path.suffix.lower() == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [_request(_parse(line, f"{source}:{i}"), f"{source}:{i}") for i, line in lines]
    else:
        found = [_request(value, f"{source}: {name}") for name, value in _entries(_parse(text, source), source)]
    return found or _none(f"prompt: {source} has no prompt in it")


def _none(message: str) -> list[Request]:
    raise ConfigError(message)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"prompt: {where} is not JSON: {error}") from None


def _entries(content: Any, source: str) -> list[tuple[str, Any]]:
    if isinstance(content, list):
        return [(f"entry {i}", value) for i, value in enumerate(content)]
    if isinstance(content, dict) and "prompt" in content:
        return [("the object", content)]
    if isinstance(content, dict):
        return [(f"{name!r}", value) for name, value in content.items()]
    raise ConfigError(f"prompt: {source} holds {type(content).__name__}, expected a list or a mapping of prompts")


def _request(value: Any, where: str) -> Request:
    if isinstance(value, str):
        return Request(value)
    if not isinstance(value, dict) or "prompt" not in value:
        raise ConfigError(f'prompt: {where} is {str(value)[:80]!r}, expected a text or an object with "prompt"')
    known: dict[str, Any] = {}
    for name, types in TYPES.items():
        entry = value.get(name)
        if entry is None and name != "prompt":
            continue
        whole = all(isinstance(s, int) and not isinstance(s, bool) for s in entry) if isinstance(entry, list) else True
        if not isinstance(entry, types) or isinstance(entry, bool) or not whole or entry == []:
            wanted = " or ".join({str: "text", int: "an integer", list: "a list of integers"}[t] for t in types)
            raise ConfigError(f"prompt: {where}: {name} is {str(entry)[:80]!r}, expected {wanted}")
        known[name] = entry
    return Request(**known, metadata=value if set(value) - set(TYPES) else {})

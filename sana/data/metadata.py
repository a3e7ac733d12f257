"""What the JSON or the text beside an image says: its captions, its scores, whether it is of high quality.

Every spelling that is met in published data sets is read here and nowhere else. Captions stand in ``captions`` (a list
of texts, a list of {"source", "text", "score"}, or {source: text}); where that is missing, in the fields ``prompt``,
``caption``, ``text``, those that begin with ``caption_`` and those that the caller names, each field one source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from sana.data.caption import Caption
from sana.data.record import storable

_FIELDS = ("prompt", "caption", "text")


class Facts(NamedTuple):
    """Captions (at least one, none empty), scores by name, and the high-quality flag."""

    captions: tuple[Caption, ...]
    scores: dict[str, float]
    hq: bool


def parse_text(data: bytes) -> str:
    """UTF-8, with or without byte order mark.

    Raises:
        ValueError: "not UTF-8".
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of a text") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: "not UTF-8" or "bad json", with a detail.
    """
    text = parse_text(data)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"bad json: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"bad json: expected an object, found {type(found).__name__}")
    return found


def facts(
    meta: Mapping[str, Any],
    text: str | None = None,
    *,
    fields: Collection[str] = (),
    caption_scores: Mapping[str, float] | None = None,
) -> Facts:
    """Captions, scores and flag of one sample.

    Args:
        meta: its JSON, or its row of a table.
        text: its text file; source "prompt", or "text" where the JSON has a prompt of its own.
        fields: further names of fields that are captions.
        caption_scores: source -> score of that caption, from elsewhere.

    Raises:
        ValueError: "no caption", "empty caption", "not UTF-8" (a lone surrogate) or "bad json", with a detail.
    """
    scores = caption_scores or {}
    found = list(_captions(meta, {*fields, *scores}))
    if text is not None and text.strip() not in [caption.text.strip() for caption in found]:
        found.append(Caption("text" if any(c.source == "prompt" for c in found) else "prompt", text))
    if not found:
        raise ValueError("no caption")
    kept = []
    for source, said, score in found:
        said = said.strip()
        try:
            (source + said).encode()
        except UnicodeEncodeError:
            raise ValueError(f"not UTF-8: half a character in the caption {source!r}") from None
        if said:
            kept.append(Caption(source, said, scores.get(source, score)))
    if not kept:
        raise ValueError("empty caption")
    return Facts(tuple(kept), _scores(meta), meta.get("version") == "high_quality" or meta.get("hq") in (True, 1))


def _captions(meta: Mapping[str, Any], fields: Collection[str]) -> Iterator[Caption]:
    several = meta.get("captions")
    if several:
        yield from _several(several)
        return
    for name, value in meta.items():
        if not (name in _FIELDS or name in fields or name.startswith("caption_")):
            continue
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str):
                yield Caption(name, text)


def _several(captions: Any) -> Iterator[Caption]:
    if isinstance(captions, str):
        captions = [captions]
    if isinstance(captions, dict):
        captions = [{"source": source, "text": text} for source, text in captions.items()]
    for caption in captions if isinstance(captions, list | tuple) else [captions]:
        if isinstance(caption, str):
            yield Caption("caption", caption)
        elif isinstance(caption, dict) and isinstance(caption.get("text"), str):
            score = caption.get("score")
            yield Caption(str(caption.get("source", "caption")), caption["text"], number(score))
        else:
            raise ValueError("bad json: a caption is a text or an object with 'text'")


def _scores(meta: Mapping[str, Any]) -> dict[str, float]:
    given = meta.get("scores")
    found = {name: value for name, value in meta.items() if name.endswith("score")}
    motion = meta.get("motion")  # of a video: a number, or one for each part of it
    if isinstance(motion, list) and motion and all(number(part) is not None for part in motion):
        motion = sum(motion) / len(motion)
    found["motion"] = motion
    found.update(given if isinstance(given, dict) else {})
    # A name that is no UTF-8 cannot be a column of the index.
    fit = (name for name in found if storable(name))
    return {name: value for name in fit if (value := number(found[name])) is not None}


def number(value: Any) -> float | None:
    """A finite number as float; anything else is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None

"""Tars that others wrote: any WebDataset, and the shards of SANA's released code (``wids-meta.json``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sana.data.formats.cached import Made, cached_index, reading
from sana.data.formats.files import longest_stems
from sana.data.index import table
from sana.data.metadata import Facts, facts, number, parse_json
from sana.data.record import BadSample, Limits
from sana.data.scan import Describe, scan_tar
from sana.data.source import Source
from sana.data.storage import LocalFolder, Storage, scheme

WIDS = "wids-meta.json"
_OTHER_SPLITS = ("val", "valid", "validation", "test", "eval", "train")


def tars_of_split(names: list[str], split: str) -> list[str]:
    """The tars that belong to a split: those that begin with its name; for "train" else those of no other split."""
    tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    mine = [name for name in tars if re.match(rf"{re.escape(split)}([-_.]|$)", name)]
    if mine or split != "train":
        return mine
    return [name for name in tars if re.split(r"[-_.]", name)[0] not in _OTHER_SPLITS]


def open_tars(storage: Storage, names: list[str], split: str, limits: Limits) -> Source:
    """WebDataset tars: samples KEY.jpg|png|webp with KEY.txt or KEY.json, in the order of names and places.

    Raises:
        ValueError: none of the tars can be read.
    """

    def make() -> Made:
        return _scan(storage, names, limits, None, last_dot=False)

    return _source(storage, f"tars-{split}", "webdataset", limits, names, make)


def open_wids(storage: Storage, file: str, limits: Limits) -> Source:
    """Shards as SANA's released code reads them.

    ``SHARD{suffix}.json`` beside a shard holds further captions, ``SHARD{suffix}_clip_score.json`` scores of captions,
    each {KEY: {caption: text or score}}. A caption file whose entries have a ``prompt`` adds it under the suffix, dots
    as underscores. The score of the prompt itself (``SHARD_prompt_clip_score.json``) is also the image's score
    "prompt_clip_score"; where any shard has such a file, a missing score counts 100, as in the released code.

    Raises:
        ValueError: the file is no list of shards, or none of them can be read.
    """
    listed = parse_json(storage.read(file)).get("shardlist")
    if not isinstance(listed, list) or not all(isinstance(s, dict) and isinstance(s.get("url"), str) for s in listed):
        raise ValueError(f'{storage.root}/{file}: expected {{"shardlist": [{{"url": "00000.tar"}}, ...]}}')
    names, unsafe = [], []
    for shard in listed:
        try:
            names.append(_safe(shard["url"], storage))
        except ValueError as error:
            unsafe.append(BadSample(shard["url"], "", str(error)))
    here = storage.names()
    stems = {name.removesuffix(".tar"): name for name in names}
    further = longest_stems([name for name in here if name.endswith(".json") and name != file], stems)
    images_scored = any(name.endswith("_prompt_clip_score.json") for found in further.values() for name in found)

    def describe(name: str) -> Describe:
        stem = name.removesuffix(".tar")
        captions, scores, image_scores = _beside(storage, stem, further.get(stem, []))

        def describe_one(key: str, meta: Mapping[str, Any], text: str | None) -> Facts:
            own = {**meta, **captions.get(key, {})}
            said = facts(
                own,
                text,
                fields={*limits.caption_fields, *captions.get(key, {})},
                caption_scores=scores.get(key, {}),
            )
            if images_scored:
                said.scores["prompt_clip_score"] = image_scores.get(key, 100.0)
            return said

        return describe_one

    def make() -> Made:
        pieces, shards, bad = _scan(storage, names, limits, describe, last_dot=True)
        return pieces, shards, [*unsafe, *bad]

    files = [*names, *(name for found in further.values() for name in found)]
    return _source(storage, "wids", "wids", limits, files, make)


def _beside(
    storage: Storage, stem: str, files: list[str]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, float]], dict[str, float]]:
    """Captions by key and source, their scores by key and source, and the scores of the images by key."""
    captions: dict[str, dict[str, str]] = {}
    scores: dict[str, dict[str, float]] = {}
    image_scores: dict[str, float] = {}
    for name in files:
        suffix = name.removeprefix(stem).removesuffix(".json")
        try:
            found = parse_json(storage.read(name))
        except ValueError as error:
            raise ValueError(f"{storage.root}/{name}: {error}") from None
        for key, entry in found.items():
            if not isinstance(entry, dict):
                continue
            if suffix.endswith("_clip_score"):
                known = {source: score for source, value in entry.items() if (score := number(value)) is not None}
                scores.setdefault(key, {}).update(known)
                if suffix == "_prompt_clip_score" and known:
                    image_scores[key] = known.get("prompt", next(iter(known.values())))
                continue
            texts = {source: text for source, text in entry.items() if isinstance(text, str)}
            if "prompt" in texts and suffix:
                texts = {suffix.replace(".", "_"): texts["prompt"]}
            captions.setdefault(key, {}).update(texts)
    return captions, scores, image_scores


def _safe(url: str, storage: Storage) -> str:
    """A shard's name as the list has it, if opening it can do no harm.

    Raises:
        ValueError: "unsafe url" or "unsafe name".
    """
    kind = scheme(url)
    local = isinstance(storage, LocalFolder)
    if kind and (local or kind == "file"):
        raise ValueError(f"unsafe url: {url[:80]!r}; expected a path relative to the list of shards")
    if ".." in re.split(r"[/\\]", url) or (url.startswith("/") and not local):
        raise ValueError("unsafe name: it leads out of the folder")
    return url


def _scan(storage: Storage, names: list[str], limits: Limits, describe: Any, *, last_dot: bool) -> Made:
    pieces, shards, bad = [], [], []
    for name in reading(names, "shards"):
        try:
            entries, unfit = scan_tar(
                storage, name, len(shards), limits, describe=describe and describe(name), last_dot=last_dot
            )
        except FileNotFoundError:
            bad.append(BadSample(name, "", "missing file"))
            continue
        except OSError as error:
            bad.append(BadSample(name, "", f"unreadable: {type(error).__name__}: {error}"))
            continue
        bad += unfit
        pieces.append(table(entries))
        shards.append({"name": name, "bytes": storage.stat(name).size, "count": len(entries)})
    return pieces, shards, bad


def _source(storage: Storage, name: str, kind: str, limits: Limits, files: list[str], make: Any) -> Source:
    def stamps() -> Any:
        for file in files:
            try:
                facts = storage.stat(file)
            except OSError:
                yield [file, "missing"]
            else:
                yield [file, facts.size, facts.stamp]

    index, bad = cached_index(storage, name, kind, limits, stamps(), make)
    if not len(index):
        first = f"; the first: {bad[0]}" if bad else ""
        raise ValueError(f"{storage.root}: no sample of {len(files)} files can be used{first}")
    return Source(index, storage, limits, bad)

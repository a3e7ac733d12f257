"""The tiny Gemma-2 that ships: its features hold what a caption says, and its script makes the same file twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sana import scenes
from sana.data import synthetic
from sana.encoder.text.gemma import GemmaEncoder

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "experiments" / "gemma_tiny"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_gemma_tiny", PROJECT / "scripts" / "make_gemma_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder():
    return GemmaEncoder(str(FOLDER), max_tokens=24, dtype="float32", trim=True)


def test_every_word_of_the_scenes_has_a_token(script, encoder):
    words = encoder.tokenizer.get_vocab()
    assert set(synthetic.vocabulary()) <= set(words)
    prompts = [e["prompt"] for h in (False, True) for e in scenes.eval_prompts(60, 0, h)]
    texts = [*prompts, *(" ".join(t) for held in (False, True) for t in script.captions(5, 300, held))]
    for text in texts:
        ids = encoder.tokenizer(text).input_ids
        assert ids[0] == script.BOS
        assert script.UNK not in ids
        assert len(ids) == 1 + len(text.split()) <= encoder.max_tokens
    known = [words[w] for w in ("<bos>", "a", "red", "circle", "<unk>")]
    assert encoder.tokenizer("A RED circle, please.").input_ids == known


def test_size_and_scale(encoder):
    files = sum(f.stat().st_size for f in FOLDER.iterdir())
    assert files < 2**20
    assert sum(p.numel() for p in encoder.parameters()) <= 400_000
    condition = encoder.encode([e["prompt"] for e in scenes.eval_prompts(50, 1)])
    assert condition.text[condition.mask].square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)


def test_said_reads_captions(script):
    text = "the image shows a large red ring to the left of an orange cross on a dark grey background"
    last = script.said(text.split())
    names = {"color1": "red", "shape1": "ring", "color2": "orange", "shape2": "cross"}
    tables = {"color": script.COLORS, "shape": script.NOUNS}
    assert {k: v for k, v in last[-1].items() if k in names} == {k: tables[k[:-1]][v] for k, v in names.items()}
    assert [last[-1][k] for k in ("relation", "count", "size1", "size2", "background")] == [2, 1, 1, 0, 3]
    assert last[0] == dict.fromkeys(script.SLOTS, 0)
    assert last[5]["color1"] == 0  # "red", but of what?
    assert last[7]["color1"] == script.COLORS["red"]
    three = script.said(["three", "stars"])[-1]
    assert (three["count"], three["shape1"], three["color1"]) == (3, script.NOUNS["star"], 0)
    odd = script.said(["something", "red", "and", "something", "blue"])[-1]
    assert (odd["color1"], odd["color2"]) == (script.COLORS["red"], script.COLORS["blue"])


def test_held_out_agrees_with_the_scenes(script):
    for held in (False, True):
        for line in scenes.eval_prompts(150, 3, held):
            assert script.held_out(line["prompt"].split()) == bool(scenes.combinations(line) & scenes.HELD_OUT)
    assert not any(map(script.held_out, script.captions(6, 500)))
    assert sum(map(script.held_out, script.captions(6, 100, held=True))) >= 200  # plain, photo and most of verbose


def test_probe_reads_every_slot(script, encoder):
    table = script.probe(encoder, 400, 100)
    for kind, least in (("last", 0.99), ("mean", 0.99), ("each", 0.98)):
        for split in ("seen", "held_out"):
            assert min(table[kind][split].values()) >= least, (kind, split, table[kind][split])


def test_probe_fails_without_meaning(script, encoder):
    """The probe itself is honest: features of the words alone, without order, do not pass it."""
    words = torch.randn(len(encoder.tokenizer), 96, generator=torch.Generator().manual_seed(0))

    class Bag:
        tokenizer = encoder.tokenizer

        def encode(self, captions):
            condition = encoder.encode(captions)
            ids, _ = encoder._tokenise(list(captions), "", longest=True)
            return type(condition)(text=words[ids], mask=condition.mask)

    table = script.probe(Bag(), 200, 40)
    assert table["mean"]["seen"]["background"] > 0.9  # a word of its own
    assert table["mean"]["held_out"]["color2"] < 0.8  # which of the two colours?
    assert table["mean"]["seen"]["all"] < 0.85
    assert table["last"]["seen"]["all"] < 0.5


def test_prompts_are_apart(script, encoder):
    distance = script.separation(encoder, ("red", "orange"))
    assert distance["prompts"] == 12 * 11 * 4
    assert distance["nearest"] >= 0.2
    assert distance["order"] >= 0.3
    recorded = json.loads((FOLDER / "results.json").read_text())["separation"]
    assert recorded["prompts"] == 48 * 47 * 4
    assert 0.25 <= recorded["nearest"] <= distance["nearest"] * 1.05


def test_same_seed_same_weights(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "separation", lambda encoder: {})  # of all prompts: seconds
    for name in ("a", "b"):
        torch.rand(3)
        script.main(["--out", str(tmp_path / name), "--steps", "3", "--scenes", "20", "--batch", "8", "--probe", "5"])
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    shipped = {p.name for p in FOLDER.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "results.json", "README.md", "run.sh"} <= shipped

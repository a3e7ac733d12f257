"""Prompts from the command line and from files, and what a broken file is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana.run.error import ConfigError
from sana.run.prompts import Request, read_prompts


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_text_and_a_list() -> None:
    assert read_prompts("a red circle") == [Request("a red circle")]
    assert read_prompts(["a", ""]) == [Request("a"), Request("")]
    assert read_prompts("a photo of notes.txt") == [Request("a photo of notes.txt")]


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path, "my prompts.txt", "\ufeffa cat, asleep\r\n\n  zwei Hündchen 🙂 \n")
    assert read_prompts(path) == [Request("a cat, asleep"), Request("zwei Hündchen 🙂")]


def test_geneval_lines_keep_what_they_say(tmp_path: Path) -> None:
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
    ]
    path = write(tmp_path, "evaluation_metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(path) == [Request(line["prompt"], metadata=line) for line in lines]


def test_json_lists_and_mappings(tmp_path: Path) -> None:
    full = {"prompt": "a", "seed": [1, 2], "negative": "b", "width": 96, "height": 64}
    want = Request("a", [1, 2], "b", 96, 64)
    assert read_prompts(write(tmp_path, "a.json", json.dumps(["x", full]))) == [Request("x"), want]
    assert read_prompts(write(tmp_path, "b.json", json.dumps({"one": full, "two": "y"}))) == [want, Request("y")]
    assert read_prompts(write(tmp_path, "c.json", json.dumps(full))) == [want]
    assert read_prompts(write(tmp_path, "d.jsonl", '"x"\n\n{"prompt": "a", "seed": 3}')) == [
        Request("x"),
        Request("a", 3),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "\n \n", "a.txt has no prompt in it"),
        ("a.json", "[]", "a.json has no prompt in it"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "3", "holds int, expected a list or a mapping"),
        ("a.json", '[{"text": "x"}]', 'entry 0 is .* expected a text or an object with "prompt"'),
        ("a.jsonl", '"x"\n{"prompt": 5}', "a.jsonl:2: prompt is '5', expected text"),
        ("a.jsonl", '{"prompt": "x", "seed": 1.5}', "a.jsonl:1: seed is '1.5', expected an integer or a list"),
        ("a.jsonl", '{"prompt": "x", "seed": [true]}', "expected an integer or a list of integers"),
        ("a.jsonl", '{"prompt": "x", "width": true}', "width is 'True', expected an integer"),
    ],
)
def test_broken_files_are_told_where(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_prompts(write(tmp_path, name, text))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file prompts.txt"):
        read_prompts("prompts.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_prompts(str(tmp_path / "a.txt"))
    with pytest.raises(ConfigError, match="list is empty"):
        read_prompts([])

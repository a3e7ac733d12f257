"""scripts/importance.py on the model that ships: the numbers of the definition, whoever shares the work, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from sana.model.calibration import PHOTOGRAPHS
from sana.model.importance import importance_of
from sana.model.load import load_weights, make_painter
from sana.run.build import build
from sana.run.error import ConfigError
from sana.run.importance import draw_importance, read_importance
from sana.run.restore import restore
from sana.run.runs import SHIPPED
from sana.run.saved import prepare
from sana.run.sidecar import file_digest, read_image

PROMPTS = ["a red circle", "two stars", "a blue ring left of a green cross"]


def line(out: Path, *more: str) -> list[str]:
    own = ["ckpt=scenes", f"prompt={json.dumps(PROMPTS)}", "sampler.steps=2", "batch_size=1", "precision=32-true"]
    return [*own, "device=cpu", f"out={out}", *more]


def expected(out: Path) -> list[float]:
    """Inputs and outputs of every block in float64 while the same prompts are drawn at the same seeds."""
    composed = prepare("importance", line(out))
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    painter, sampler = make_painter(restored.module, restored.device), build(composed.config.sampler, "sampler")
    cosines: list[list[torch.Tensor]] = [[] for _ in painter.network.blocks]
    for i, block in enumerate(painter.network.blocks):
        block.register_forward_hook(
            lambda _, given, found, i=i: cosines[i].append(
                torch.cosine_similarity(given[0].double(), found[0].double(), dim=-1).flatten()
            )
        )
    for seed, prompt in enumerate(PROMPTS):
        painter.latents([prompt], [seed], sampler, 64, 64)
    return [1 - torch.cat(some).mean().item() for some in cosines]


def work(number: int, home: str, jobs: list[list[str]]) -> None:
    """Two processes together, then the first alone; outside of the tests' type checks, which know no lists of YAML for
    tuples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=number, world_size=2)
    together, _, there = importance_of(prepare("importance", line(Path(home, "two"))))
    dist.destroy_process_group()
    Path(home, f"two{number}.json").write_text(json.dumps([together.values, there]))
    found: list[Any] = []
    for job in jobs if number == 0 else []:
        try:
            report, path, there = importance_of(prepare("importance", line(Path(home, "one"), *job)))
            found.append([report.values, str(path), there])
        except ValueError as error:
            found.append(str(error))
        if not job:
            found.append(expected(Path(home)))
            path.write_text(json.dumps(json.loads(path.read_text()) | {"values": [0.5] * 6}))
    if number == 0:
        Path(home, "one.json").write_text(json.dumps(found))


@pytest.mark.long
def test_report(tmp_path: Path) -> None:
    jobs = [[], ["recipe=null"], ["seed=1"], ["batch_size=0", "seed=2"], ["size=63"]]
    multiprocessing.spawn(work, (str(tmp_path), jobs), 2)  # type: ignore[attr-defined]
    first, wanted, again, other, no_batch, odd = json.loads((tmp_path / "one.json").read_text())
    values, path, there = first
    assert (Path(path), there) == (tmp_path / "one" / "importance.json", False)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=2e-7)
    assert again == [[0.5] * 6, path, True]  # what stands there is read, not measured again
    assert not other[2]
    assert other[0] != values
    assert "batch_size: 0" in no_batch
    assert "63x63 pixels are not multiples" in odd
    found = read_importance(path)
    assert found == read_importance(Path(path).parent)
    assert found.values == other[0]
    assert found.digest == file_digest(SHIPPED / "scenes" / "model.safetensors")
    assert (found.settings["prompts"], found.settings["sampler"]["steps"]) == (PROMPTS, 2)
    assert read_image(Path(path).with_name("importance.png")).std() > 0

    for number in range(2):
        assert json.loads((tmp_path / f"two{number}.json").read_text()) == [values, False]


def test_prompts_that_come_along() -> None:
    lines = PHOTOGRAPHS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 100


def test_settings_of_a_prompt_that_change_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star", "width": 32}\n')
    with pytest.raises(ConfigError, match="prompt: 'a star' has width, which has no effect here"):
        importance_of(prepare("importance", line(tmp_path, f"prompt={tmp_path / 'p.jsonl'}")))
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.txt"):
        importance_of(prepare("importance", line(tmp_path, "prompt=nowhere.txt")))
    with pytest.raises(ConfigError, match="grid: unknown key"):
        prepare("importance", line(tmp_path, "grid=true"))


def test_values_of_any_size_can_be_drawn(tmp_path: Path) -> None:
    for k, values in enumerate(([0.0], [2.0], [1e-9, 1.0], [-1e-17, 0.3] * 50)):
        assert draw_importance(tmp_path / f"{k}.png", values, "x").is_file()

"""The key `kernels`: refused where it is wrong, applied before anything is built, and no reason to start again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_going_on import start

from sana.model.start import start_model
from sana.ops.choice import chosen, set_kernels
from sana.run.begin import begin
from sana.run.compose import compose
from sana.run.error import ConfigError
from sana.run.lineage import continued_run
from sana.run.restore import restore
from sana.run.saved import load_saved, prepare


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = chosen()
    yield
    set_kernels(before)


@pytest.mark.parametrize("entry", ["train", "sample", "eval"])
def test_every_entry_has_the_key(entry: str) -> None:
    assert compose(entry, []).config.kernels == "auto"


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels: .*'cuda'"):
        prepare("train", ["kernels=cuda"])


def test_training_applies_it_before_it_builds(tmp_path: Path) -> None:
    composed = prepare("train", [f"run.folder={tmp_path}", "kernels=naive", "model.caption_dropout=2"])
    with pytest.raises(ConfigError, match="caption_dropout must be"):  # a constructor that refuses comes later
        start_model(composed.config, None)
    assert chosen() == "naive"


def test_drawing_applies_it_and_no_image_depends_on_it() -> None:
    facts = []
    for kernels in ("naive", "auto"):
        composed = prepare("sample", ["ckpt=scenes", "prompt=x", f"kernels={kernels}", "device=cpu"])
        restored = restore(composed)
        assert chosen() == kernels
        facts.append(restored.facts(composed))
    assert facts[0] == facts[1]


def test_a_run_goes_on_with_other_kernels_and_records_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANA_RUN_DIR", raising=False)
    run = start(tmp_path, "kernels=naive", step=20)
    assert yaml.safe_load((run / "config.yaml").read_text())["kernels"] == "naive"
    monkeypatch.delenv("SANA_RUN_DIR", raising=False)
    composed = compose("train", [f"run.folder={tmp_path}", "kernels=triton", "resume=auto"])
    assert continued_run(composed) == run


def test_older_runs_know_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANA_RUN_DIR", raising=False)
    config, record, _ = begin(prepare("train", [f"run.folder={tmp_path}"]))
    assert record.lock is not None
    record.lock.close()
    file = Path(config.run.dir) / "config.yaml"
    content = yaml.safe_load(file.read_text())
    del content["kernels"]
    file.write_text(yaml.safe_dump(content))
    assert load_saved(file.parent).config.kernels == "auto"
    assert prepare("train", rerun=file.parent).config.kernels == "auto"  # what it asks for has not changed

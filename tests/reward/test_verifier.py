"""The yes-no verifier: against transformers' own generation on a small random LLaVA, and with code of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.pretrained import MissingWeightsError
from sana.reward.verifier import GAP, Verifier
from sana.run.build import build
from sana.run.compose import compose

REQUEST = "Is it {prompt} ?"
PROMPTS = [{"prompt": "a circle"}, {"prompt": "red"}]

# As VILA's code answers: the text, and for each of its tokens the logits of a batch of one.
CODE = """
from transformers import AutoProcessor, LlavaForConditionalGeneration


class OwnModel(LlavaForConditionalGeneration):
    @classmethod
    def from_pretrained(cls, folder, **options):
        model = LlavaForConditionalGeneration.from_pretrained(FOLDER)
        model.__class__ = cls
        return model

    @property
    def tokenizer(self):
        return AutoProcessor.from_pretrained(FOLDER).tokenizer

    def generate_content(self, parts):
        processor = AutoProcessor.from_pretrained(FOLDER)
        inputs = processor(images=parts[0], text="USER: <image> " + parts[1] + " ASSISTANT:", return_tensors="pt")
        out = self.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return processor.tokenizer.decode(out.sequences[0, -1:]), out.logits
"""


def images(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40, 52, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 8)) for _ in range(n)]


def load(folder: str):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def inputs(processor, image: np.ndarray, line: dict[str, str]):
    text = f"USER: <image> {REQUEST.format(**line)} ASSISTANT:"
    return processor(images=Image.fromarray(image), text=text, return_tensors="pt")


@pytest.fixture(scope="module")
def decided(llava, tmp_path_factory) -> str:
    """The model with nothing but "yes" and "no" in its mind, and of mixed opinion over some images."""
    network, processor = load(llava)
    words = processor.tokenizer.get_vocab()
    with torch.no_grad():
        given = [inputs(processor, image, PROMPTS[0]) for image in images(8)]
        states = [network(**x, output_hidden_states=True).hidden_states[-1][0, -1] for x in given]
        mean, rows = torch.stack(states).mean(0), network.lm_head.weight
        direction = rows[words["yes"]] - rows[words["no"]]
        direction = direction - (direction @ mean) / (mean @ mean) * mean
        rows.zero_()
        rows[words["yes"]], rows[words["no"]] = direction, -direction
    folder = tmp_path_factory.mktemp("decided")
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def expected(network, processor, image: np.ndarray, line: dict[str, str]) -> float:
    """The published score of what transformers generates after the written-out prompt."""
    out = network.generate(
        **inputs(processor, image, line),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = processor.tokenizer.decode(out.sequences[0, -1:])
    logit = {word: float(out.logits[0][0, processor.tokenizer.get_vocab()[word]]) for word in ("yes", "no")}
    return GAP + logit["yes"] if answer == "yes" else -GAP - logit["no"]


def test_scores_are_those_of_generation(decided):
    judge = Verifier("v", decided, "cpu", REQUEST)
    pictures, lines = images(8) * 2, [PROMPTS[0]] * 8 + [PROMPTS[1]] * 8
    scores, model = judge.score(pictures, lines), load(decided)
    want = [expected(*model, x, line) for x, line in zip(pictures, lines, strict=True)]
    assert scores == pytest.approx(want, abs=1e-4)
    assert {*np.sign(scores)} == {-1, 1}, "both answers are shown"
    assert judge.settings == {"verifier": "decided0", "request": REQUEST}


def test_code_of_its_own_runs_only_where_it_is_trusted(decided, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own = shutil.copytree(decided, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "code.OwnModel"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "code.py").write_text(CODE.replace("FOLDER", repr(decided)))
    with pytest.raises(ValueError, match="trust_remote_code=true runs it"):
        Verifier("v", str(own), "cpu", REQUEST)
    pictures, lines = images(6), PROMPTS * 3
    scores = Verifier("v", str(own), "cpu", REQUEST, trust_remote_code=True).score(pictures, lines)
    assert scores == pytest.approx(Verifier("v", decided, "cpu", REQUEST).score(pictures, lines), abs=1e-4)


def test_refusals(llava, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for weights, request, said in (
        (None, REQUEST, r"hf://Efficient-Large-Model/NVILA-Lite-2B-Verifier and give judge\.weights=PATH"),
        (str(tmp_path / "model.safetensors"), REQUEST, "needs a folder"),
        ("random:0", REQUEST, "needs a folder"),
        (str(tmp_path), REQUEST, r"config\.json"),
        (llava, "Is it good?", r"judge\.request: .* has no \{prompt\}"),
    ):
        with pytest.raises(ValueError, match=said):
            Verifier("v", weights, "cpu", request)
    assert issubclass(MissingWeightsError, ValueError)


def test_the_config_builds_it(llava):
    composed = compose("sample", ["ckpt=x", "prompt=x", "judge=verifier", f"judge.weights={llava}", "device=cpu"])
    assert build(composed.config.judge, "judge").name == "verifier"
    assert Path(llava).name == "llava0"

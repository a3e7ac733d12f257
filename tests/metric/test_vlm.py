"""The yes-no model against transformers' own generation, on a small random LLaVA saved in its published layout."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sana.metric.dpg import DPG
from sana.metric.vlm import REQUEST, YesNo


@pytest.fixture
def folder(llava):
    return llava


def expected(folder: str, image: np.ndarray, question: str) -> float:
    """log p(yes) - log p(no) of the first token that transformers generates after the written-out prompt."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    network = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = f"USER: <image> {REQUEST.format(question=question)} ASSISTANT:"
    inputs = processor(images=Image.fromarray(image), text=prompt, return_tensors="pt")
    out = network.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    p = out.logits[0][0].double().softmax(0)
    words = processor.tokenizer.get_vocab()
    yes, no = p[[words["yes"], words["Yes"]]].sum(), p[[words["no"], words["No"]]].sum()
    return float((yes / no).log())


def test_answers_are_the_likelier_first_token_of_generation(folder):
    model = YesNo(folder, device="cpu")
    rng = np.random.default_rng(0)
    questions = ["Is it red ?", "Is there a circle ?"]
    seen = set()
    for _ in range(8):
        image = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 8))
        answers = model(image, questions)
        margins = [expected(folder, image, q) for q in questions]
        assert answers == ["yes" if m > 0 else "no" for m in margins], margins
        seen.update(answers)
    assert seen == {"yes", "no"}, "the seeds should show both answers"
    assert model.settings["answerer"] == "llava0"


def test_dpg_runs_with_it(folder, tmp_path):
    questions = tmp_path / "q.csv"
    questions.write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "a,a red circle,1,0,entity - whole (circle),Is there a circle ?\n"
        'a,a red circle,2,1,"attribute - color (circle, red)",Is it red ?\n'
    )
    metric = DPG(questions, YesNo(folder, device="cpu"))
    image = np.zeros((28, 28, 3), np.uint8)
    (row,) = metric.measure([image], [{"prompt": "a red circle"}])
    first, second = (m > 0 for m in (expected(folder, image, q) for q in ("Is there a circle ?", "Is it red ?")))
    assert row["score"] == pytest.approx(100 * (first + (first and second)) / 2)


def test_a_single_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="folder"):
        YesNo(str(tmp_path / "model.safetensors"))

"""The yes-no model against transformers' own generation, on a small random LLaVA saved in its published layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sana.metric.dpg import DPG
from sana.metric.vlm import REQUEST, YesNo

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", "yes", "Yes", "no", "No", "Is", "it", "red"]
WORDS += ["?", ".", "Answer", "with", "or", "a", "circle", "there"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes).to_dict(),
            text_config=LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes).to_dict(),
            image_token_index=4,
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5)  # far enough from uniform that the image decides
    out = tmp_path_factory.mktemp("llava")
    network.save_pretrained(out)
    processor.save_pretrained(out)
    return str(out)


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
    yes, no = p[[WORDS.index(w) for w in ("yes", "Yes")]].sum(), p[[WORDS.index(w) for w in ("no", "No")]].sum()
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

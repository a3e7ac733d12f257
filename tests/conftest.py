"""One thread per test process: the suite runs one process per core, and small tensors gain nothing from more. Kernels
are interpreted where there is no card. And a model that several packages test with."""

from __future__ import annotations

import importlib.abc
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch
from global_state import as_before, changed, state

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

torch.set_num_threads(1)


class PlainKernels(importlib.abc.MetaPathFinder):
    """Imports modules of Triton kernels without the type checks of the tests: a kernel is compiled from its source and
    the globals of its function, which a checking wrapper hides; custom ops read their schema from annotations."""

    def find_spec(self, fullname, path, target=None):
        spec = PathFinder.find_spec(fullname, path, target) if fullname.startswith("sana.ops.") else None
        text = Path(spec.origin).read_text() if spec is not None and spec.origin is not None else ""
        return spec if "@triton.jit" in text or "custom_op(" in text else None


def pytest_sessionstart() -> None:
    sys.meta_path.insert(0, PlainKernels())  # before the finder of jaxtyping, which is there by now


@pytest.fixture(autouse=True)
def nothing_global_is_left_changed():
    """Fails the test that changes the process for those after it, instead of one of those."""
    before = state()
    with as_before():
        yield
    assert not (lines := changed(before, state())), "left changed: " + "; ".join(lines)


WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", "yes", "Yes", "no", "No", "Is", "it", "red"]
WORDS += ["?", ".", "Answer", "with", "or", "a", "circle", "there"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> str:
    """Folder of a small random LLaVA and its processor in their published layout; `WORDS` is all that it knows."""
    out = tmp_path_factory.mktemp("llava")
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
    network.save_pretrained(out)
    processor.save_pretrained(out)
    return str(out)

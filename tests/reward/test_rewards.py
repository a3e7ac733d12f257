"""Rewards on small random networks, against the published formulas written out with the libraries and torch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sana.metric.clip_colours import COLOURS, ClipColours, cut
from sana.metric.clip_features import ClipFeatures
from sana.metric.geneval_rules import Found
from sana.metric.mean_reward import MeanReward
from sana.nn.clip import Clip
from sana.pretrained import MissingWeightsError
from sana.reward.aesthetic import Aesthetic
from sana.reward.blip import Blip, Sizes
from sana.reward.clip_score import ClipScore
from sana.reward.image_reward import AVERAGE, SPREAD, ImageReward
from sana.reward.mlp import PLACES, Head
from sana.reward.pick_score import PickScore

PROMPTS = ["a red car", "two dogs and a cat", "nothing"]


def pictures(n: int = 3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size=(40 + 3 * i, 37, 3), dtype=np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A model of open_clip's kind with 32 px images and 16 numbers."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_clip_score_is_open_clips_cosine(tiny):
    import open_clip

    reward = ClipScore(tiny, "random:3")
    scores = reward(pictures(), PROMPTS)
    net = reward.clip.network
    transform = open_clip.image_transform(32, is_train=False)
    x = torch.stack([transform(Image.fromarray(p)) for p in pictures()])
    tokens = open_clip.get_tokenizer("tiny-clip")(PROMPTS)
    with torch.no_grad():
        a, b = net.encode_image(x), net.encode_text(tokens)
    expected = F.cosine_similarity(a, b) * net.logit_scale.exp()
    assert scores.numpy() == pytest.approx(expected.numpy(), rel=1e-4)
    assert net.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert ClipScore(tiny, "random:3", scale=1.0)(pictures(), PROMPTS).abs().max() <= 1
    assert "random:3" in reward.settings["clip_weights"]
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        reward(pictures(), PROMPTS[:2])


def test_weights_from_a_file(tiny, tmp_path):
    one = Clip(tiny, "random:1")
    torch.save({"state_dict": one.network.state_dict()}, tmp_path / "w.pt")
    other = Clip(tiny, str(tmp_path / "w.pt"))
    assert (other.images(pictures()) == one.images(pictures())).all()
    assert (Clip(tiny, "random:2").images(pictures()) != one.images(pictures())).any()
    assert ClipFeatures(tiny, "random:1")(pictures()).norm(dim=1).numpy() == pytest.approx(np.ones(3), rel=1e-5)
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    for weights, message in (
        (str(tmp_path / "w.pt"), "not the weights of"),
        ("no.pt", "no such file"),
        (None, "needs"),
    ):
        with pytest.raises(MissingWeightsError, match=message):
            Clip(tiny, weights)
    with pytest.raises(ValueError, match="no such architecture"):
        Clip("ViT-Z-99", "random:0")


def test_a_download_that_fails_is_named(monkeypatch):
    import open_clip

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(
        MissingWeightsError, match=r"weights of ViT-L-14-quickgelu could not be downloaded \(no network\)"
    ):
        Clip("ViT-L-14-quickgelu", "openai")


def test_colours_are_the_mean_of_three_templates(tiny):
    colours = ClipColours(tiny, "random:0")
    image = pictures(1)[0]
    mask = np.zeros(image.shape[:2], bool)
    mask[5:20, 3:30] = True
    objects = [Found((3, 5, 30, 20), 0.9, mask), Found((0, 0, 37, 40), 0.8, None)]
    crop = cut(image, objects[0])
    assert crop.shape == (15, 27, 3)
    assert (crop == image[5:20, 3:30]).all()
    part = Found((0, 0, 37, 40), 0.9, mask)
    assert (cut(image, part)[~mask] == 153).all()
    means = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} car", f"a photo of a {colour}-colored car", f"a photo of a {colour} object"]
        mean = F.normalize(colours.clip.network.encode_text(colours.clip.tokenize(texts)), dim=-1).mean(0)
        means.append(mean / mean.norm())
    logits = colours.clip.images([cut(image, o) for o in objects]) @ torch.stack(means).detach().T
    assert colours(image, objects, "car") == [COLOURS[i] for i in logits.argmax(1)]
    assert colours(image, [], "car") == []
    with pytest.raises(ValueError, match="a mask of"):
        cut(image, Found((0, 0, 5, 5), 0.9, mask[1:]))


def affine(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for place in PLACES:
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    return x.flatten()


def test_aesthetic_head(tiny, tmp_path):
    head = Head(16)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = Aesthetic(str(tmp_path / "head.pth"), tiny, "random:0")
    expected = affine(head.state_dict(), reward.clip.images(pictures()))
    assert reward(pictures(), [""] * 3).numpy() == pytest.approx(expected.detach().numpy(), abs=1e-5)
    torch.save(Head(8).state_dict(), tmp_path / "head.pth")
    with pytest.raises(MissingWeightsError, match="five layers"):
        Aesthetic(str(tmp_path / "head.pth"), tiny, "random:0")
    with pytest.raises(MissingWeightsError, match="improved-aesthetic-predictor"):
        Aesthetic(None, tiny, "random:0")


SIZES = Sizes(
    side=32, patch=16, vision_width=24, vision_depth=2, vision_heads=3, width=16, depth=2, heads=2, inner=32, words=40
)


def original(seed: int) -> dict[str, torch.Tensor]:
    """Random weights in ImageReward.pt's layout."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, n: int, m: int) -> None:
        state[f"{name}.weight"] = torch.randn(n, m, generator=g) / m**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(n, generator=g)

    def norm(name: str, n: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(n, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(n, generator=g)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    state[f"{v}.cls_token"] = torch.randn(1, 1, 24, generator=g)
    state[f"{v}.pos_embed"] = torch.randn(1, 5, 24, generator=g)
    state[f"{v}.patch_embed.proj.weight"] = torch.randn(24, 3, 16, 16, generator=g) / 28
    state[f"{v}.patch_embed.proj.bias"] = torch.randn(24, generator=g)
    for i in range(2):
        norm(f"{v}.blocks.{i}.norm1", 24)
        norm(f"{v}.blocks.{i}.norm2", 24)
        linear(f"{v}.blocks.{i}.attn.qkv", 72, 24)
        linear(f"{v}.blocks.{i}.attn.proj", 24, 24)
        linear(f"{v}.blocks.{i}.mlp.fc1", 96, 24)
        linear(f"{v}.blocks.{i}.mlp.fc2", 24, 96)
    norm(f"{v}.norm", 24)
    state[f"{t}.embeddings.word_embeddings.weight"] = torch.randn(40, 16, generator=g)
    state[f"{t}.embeddings.position_embeddings.weight"] = torch.randn(512, 16, generator=g)
    state[f"{t}.embeddings.position_ids"] = torch.arange(512)[None]
    norm(f"{t}.embeddings.LayerNorm", 16)
    for i in range(2):
        for kind, source in (("attention", 16), ("crossattention", 24)):
            linear(f"{t}.encoder.layer.{i}.{kind}.self.query", 16, 16)
            linear(f"{t}.encoder.layer.{i}.{kind}.self.key", 16, source)
            linear(f"{t}.encoder.layer.{i}.{kind}.self.value", 16, source)
            linear(f"{t}.encoder.layer.{i}.{kind}.output.dense", 16, 16)
            norm(f"{t}.encoder.layer.{i}.{kind}.output.LayerNorm", 16)
        linear(f"{t}.encoder.layer.{i}.intermediate.dense", 32, 16)
        linear(f"{t}.encoder.layer.{i}.output.dense", 16, 32)
        norm(f"{t}.encoder.layer.{i}.output.LayerNorm", 16)
    for place, n, m in zip(PLACES, (1024, 128, 64, 16, 1), (16, 1024, 128, 64, 16), strict=True):
        linear(f"mlp.layers.{place}", n, m)
    return state


def reference(
    state: dict[str, torch.Tensor], pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """BLIP's forward pass in the original names, from the paper's description alone."""

    def lin(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def ln(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, heads, allowed=None):
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed.bool()[:, None, None], -1e9)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels, state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], 16)
    x = (
        torch.cat([state[f"{v}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        + state[f"{v}.pos_embed"]
    )
    for i in range(2):
        b = f"{v}.blocks.{i}"
        x = x + lin(f"{b}.attn.proj", attend(*lin(f"{b}.attn.qkv", ln(f"{b}.norm1", x, 1e-6)).chunk(3, -1), 3))
        x = x + lin(f"{b}.mlp.fc2", F.gelu(lin(f"{b}.mlp.fc1", ln(f"{b}.norm2", x, 1e-6))))
    seen = ln(f"{v}.norm", x, 1e-6)
    places = state[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    h = ln(f"{t}.embeddings.LayerNorm", state[f"{t}.embeddings.word_embeddings.weight"][tokens] + places, 1e-12)
    for i in range(2):
        layer = f"{t}.encoder.layer.{i}"
        for kind, source, allowed in (("attention", None, mask), ("crossattention", seen, None)):
            n = f"{layer}.{kind}"
            k = h if source is None else source
            y = attend(lin(f"{n}.self.query", h), lin(f"{n}.self.key", k), lin(f"{n}.self.value", k), 2, allowed)
            h = ln(f"{n}.output.LayerNorm", lin(f"{n}.output.dense", y) + h, 1e-12)
        y = lin(f"{layer}.output.dense", F.gelu(lin(f"{layer}.intermediate.dense", h)))
        h = ln(f"{layer}.output.LayerNorm", y + h, 1e-12)
    return affine({k.removeprefix("mlp."): w for k, w in state.items() if k.startswith("mlp.")}, h[:, 0])


@pytest.mark.parametrize("seed", [0, 1])
def test_image_rewards_network_by_the_papers_formulas(seed):
    state = original(seed)
    net = Blip(SIZES).fill(state, "test")
    g = torch.Generator().manual_seed(seed + 5)
    pixels, tokens = torch.randn(3, 3, 32, 32, generator=g), torch.randint(1, 40, (3, 7), generator=g)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1, 1, 0, 0, 0, 0, 0]])
    expected = reference(state, pixels, tokens, mask)
    with torch.no_grad():
        assert net(pixels, tokens, mask).numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-4)
    del state["blip.visual_encoder.norm.bias"]
    with pytest.raises(MissingWeightsError, match=r"post_layernorm\.bias and 0 more"):
        Blip(SIZES).fill(state, "test")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("words")
    from transformers import BertTokenizer

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "car", "two"]
    (folder / "vocab.txt").write_text("\n".join(known))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_image_reward_is_normalised(tmp_path, words):
    torch.save(original(0), tmp_path / "ImageReward.pt")
    reward = ImageReward(str(tmp_path / "ImageReward.pt"), words, sizes=SIZES, batch_size=2)
    scores = reward(pictures(), PROMPTS)
    tokens = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(mean, std)])
    pixels = torch.stack([transform(Image.fromarray(p)) for p in pictures()])
    raw = reference(original(0), pixels, tokens.input_ids, tokens.attention_mask)
    assert scores.numpy() == pytest.approx(((raw - AVERAGE) / SPREAD).numpy(), rel=1e-4, abs=1e-4)
    assert pytest.approx((0.16717363, 1.03333945)) == (AVERAGE, SPREAD)
    with pytest.raises(MissingWeightsError, match=r"tokenizer=.*nowhere: not to be had"):
        ImageReward("random:0", str(tmp_path / "nowhere"), sizes=SIZES)


def test_pick_score_is_the_scaled_cosine(tmp_path, tiny):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "r": 3, "e": 4, "d</w>": 5}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    network = CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path)
    reward = PickScore(str(tmp_path), batch_size=2)
    scores = reward(pictures(), ["a red", "a", "red a"])
    processor = CLIPProcessor.from_pretrained(tmp_path)
    for i, text in enumerate(["a red", "a", "red a"]):
        inputs = processor(images=Image.fromarray(pictures()[i]), text=text, return_tensors="pt")
        with torch.no_grad():
            expected = network(**inputs).logits_per_image[0, 0]
        assert scores[i].item() == pytest.approx(expected.item(), rel=1e-3)
    with pytest.raises(ValueError, match="needs a folder"):
        PickScore("random:0")


def test_mean_of_a_reward_by_prompts():
    class Length:
        settings = {"reward": "length"}  # noqa: RUF012

        def __call__(self, images, prompts):
            return torch.tensor([float(len(p) + x[0, 0, 0]) for x, p in zip(images, prompts, strict=True)])

    metric = MeanReward(Length(), resamples=200)
    images = [np.full((4, 4, 3), v, np.uint8) for v in (1, 2, 3)]
    figure = metric(images, [{"prompt": "ab"}, {"prompt": "ab"}, {"prompt": "abcd"}], [0, 0, 1])
    assert figure["mean"] == pytest.approx((3 + 4 + 7) / 3)
    assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
    assert figure["settings"] == {"reward": "length"}
    with pytest.raises(ValueError, match="image 1 of these has no prompt"):
        metric(images[:2], [{"prompt": "ab"}, {}])

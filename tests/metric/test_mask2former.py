"""The detector's input and post-processing against loops in numpy, and a tiny network through the whole benchmark."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sana.metric.coco import CLASSES
from sana.metric.geneval import GenEval
from sana.metric.mask2former import Mask2Former, input_size, instances, prepare
from sana.pretrained import MissingWeightsError


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (800, 800)),
        ((512, 768), (800, 1200)),
        ((480, 640), (800, 1067)),  # as detectron2 and mmdet say of COCO's common size
        ((500, 1000), (667, 1333)),  # the longer side rules
        ((1333, 200), (1333, 200)),
    ],
)
def test_input_sizes(size, expected):
    assert input_size(*size) == expected


def test_input_is_normalised_and_padded():
    image = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
    x, size = prepare(image)
    assert size == (800, 1067)
    assert x.shape == (1, 3, 800, 1088)
    assert (x[..., 1067:] == 0).all()
    grey = prepare(np.full((30, 30, 3), 124, np.uint8))[0]
    assert grey[0, 0].numpy() == pytest.approx(np.full((800, 800), (124 / 255 - 0.485) / 0.229), abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_instances_by_a_loop(seed):
    """mmdet's rule, one query and class at a time: score = class probability x mean mask probability inside."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 81, generator=g)
    logits[0, 15] = logits[1, 16] = logits[2, 3] = 9.0
    logits[3, 80] = 12.0  # nothing
    logits[4, 15] = logits[4, 16] = 8.0  # two classes of one query
    masks = 4 * torch.randn(6, 5, 7, generator=g)
    padded, resized, original = (20, 28), (17, 25), (34, 50)
    got = instances(logits, masks, padded, resized, original)
    expected = []
    for q in range(6):
        chances = np.exp(logits[q].double().numpy())
        chances /= chances.sum()
        x = F.interpolate(masks[q][None, None], padded, mode="bilinear", align_corners=False)[:, :, :17, :25]
        x = F.interpolate(x, original, mode="bilinear", align_corners=False)[0, 0].double().numpy()
        inside = x > 0
        sure = (1 / (1 + np.exp(-x[inside]))).mean()
        rows, columns = np.nonzero(inside)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        expected += [(CLASSES[c], chances[c] * sure, box, inside) for c in range(80) if chances[c] * sure > 0.25]
    flat = {(name, round(f.score, 4)): f for name, found in got.items() for f in found if f.score > 0.25}
    assert len(flat) == len(expected) >= 4
    for name, score, box, inside in expected:
        found = flat[name, round(float(score), 4)]
        assert found.box == tuple(map(float, box))
        assert (found.mask == inside).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random network of a few thousand weights in Hugging Face's form."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=80, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=5,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_tiny_network_goes_through_the_benchmark(tiny, monkeypatch):
    monkeypatch.setattr("sana.metric.mask2former.SHORT", 64)
    detector = Mask2Former(tiny)
    image = np.random.default_rng(0).integers(0, 256, size=(48, 40, 3), dtype=np.uint8)
    for found in detector(image).values():
        for f in found:
            assert f.mask.shape == (48, 40)

    class Grey:
        settings = {"colours": "grey"}  # noqa: RUF012

        def __call__(self, image, objects, name):
            return ["white"] * len(objects)

    line = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    metric = GenEval(detector, Grey(), resamples=20)
    with pytest.raises(ValueError, match="none of 1 images is right"):
        metric([image], [line])
    # An untrained network is sure of nothing; made sure of dogs, the same path finds one.
    with torch.no_grad():
        detector.network.class_predictor.bias[CLASSES.index("dog")] += 20
    assert set(detector(image)) == {"dog"}
    assert metric([image], [line])["overall"]["mean"] == 1
    assert metric.settings["detector_weights"].startswith("mask2former")


def test_missing_weights_are_named():
    with pytest.raises(
        MissingWeightsError, match=r"facebook/mask2former-swin-small-coco-instance.*detector.weights=PATH"
    ):
        Mask2Former(None)

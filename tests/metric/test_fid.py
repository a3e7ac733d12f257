"""FID and its relatives against clean-fid's, torch-fidelity's and torchmetrics' own functions, on seeded networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.metric.fid import FID, part_statistics, read_statistics, write_statistics
from sana.metric.frechet import Statistics, frechet_distance, gaussian_distance, matrix_root, merged
from sana.metric.inception import Inception, load_inception
from sana.metric.inception_features import InceptionFeatures
from sana.metric.kernel import CMMD, KID, PrecisionRecall, gaussian_mmd2, polynomial_mmd2, precision_recall
from sana.metric.pictures import Pictures
from sana.metric.resize import RESIZERS, shrink
from sana.pretrained import Located, MissingWeightsError

ROOT = Path(__file__).resolve().parents[2]
RANDOM = Located("random:0", None, 0)


def pictures(n: int, seed: int, low: int = 20, high: int = 60) -> list[np.ndarray]:
    """Images of odd sizes with low-frequency content."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        h, w = rng.integers(low, high, size=2)
        small = rng.integers(0, 256, size=(5, 4, 3), dtype=np.uint8)
        images.append(np.asarray(Image.fromarray(small).resize((int(w), int(h)), Image.Resampling.BICUBIC)))
    return images


def save(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


class Colours:
    """Features without a network: mean and spread of each channel."""

    dim = 6

    def __init__(self) -> None:
        self.settings, self.seen = {"features": "means and spreads"}, 0

    def __call__(self, images) -> torch.Tensor:
        self.seen += len(images)
        rows = [np.concatenate([x.mean((0, 1)), x.std((0, 1))]) for x in images]
        return torch.as_tensor(np.stack(rows).astype(np.float64))


def gaussians(seed: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(2, d, d)) / d**0.5
    x, y = rng.normal(size=(n, d)) @ mix[0] + 0.3, rng.normal(size=(n + 5, d)) @ mix[1]
    return torch.as_tensor(x), torch.as_tensor(y)


@pytest.mark.parametrize("seed", [0, 1])
def test_distances_equal_the_peers_functions(seed):
    from cleanfid.fid import frechet_distance as cleanfid_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    x, y = gaussians(seed, 150, 33)
    a, b = (Statistics(33).update(z) for z in (x, y))
    ours = frechet_distance(a, b)
    stats = [{"mu": z.mean(0).numpy(), "sigma": np.cov(z.numpy(), rowvar=False)} for z in (x, y)]
    theirs = cleanfid_distance(stats[0]["mu"], stats[0]["sigma"], stats[1]["mu"], stats[1]["sigma"])
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    said = fid_statistics_to_metric(stats[0], stats[1], False)
    assert ours == pytest.approx(said["frechet_inception_distance"], rel=1e-6)
    assert ours == pytest.approx(float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance)), rel=1e-6)


def test_both_ways_to_the_root_agree():
    x, _ = gaussians(3, 60, 12)
    full = Statistics(12).update(x).covariance
    flat = full.clone()
    flat[5] = flat[4]
    flat[:, 5] = flat[:, 4]
    for covariance, rank in ((full, 12), (flat, 11)):
        root = matrix_root(covariance)
        assert root.shape == (12, rank)
        assert (root @ root.T - covariance).abs().max() < 1e-12
    assert gaussian_distance(torch.zeros(12), flat, torch.zeros(12), full) == pytest.approx(
        gaussian_distance(torch.zeros(12), full, torch.zeros(12), flat), rel=1e-8
    )


def test_taking_a_part_out_again():
    x, _ = gaussians(4, 90, 7)
    parts = [Statistics(7).update(part) for part in x.split([31, 40, 19])]
    rest = merged(parts).without(parts[1])
    expected = Statistics(7).update(torch.cat([x[:31], x[71:]]))
    assert rest.n == 50
    assert (rest.mean - expected.mean).abs().max() < 1e-13
    assert (rest.covariance - expected.covariance).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 7, 50])
def test_memory_does_not_grow_with_the_number_of_features(n):
    statistics = Statistics(11)
    before = sum(t.numel() for t in (statistics.mean, statistics.scatter))
    for _ in range(n):
        statistics.update(torch.randn(64, 11))
    assert sum(t.numel() for t in (statistics.mean, statistics.scatter)) == before == 11 + 121


@pytest.fixture(scope="module")
def theirs():
    """The published PyTorch port of the network with our random weights, from clean-fid's copy of pytorch-fid."""
    import cleanfid.inception_pytorch as module

    net = load_inception(RANDOM)
    with torch.no_grad():
        for buffer in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(buffer.running_mean, -0.1, 0.1, torch.Generator().manual_seed(buffer.num_features))
    state = net.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    kept, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *a, **k: state
    try:
        yield net, module.InceptionV3(output_blocks=[3], resize_input=False, normalize_input=False).eval(), state
    finally:
        module.load_state_dict_from_url = kept


def test_network_equals_the_published_port(theirs, tmp_path):
    ours, other, state = theirs
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        a, b = ours(x), other(x)[0].flatten(1)
    assert a.shape == (2, 2048)
    assert b.abs().max() > 0.01
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    torch.save(state, tmp_path / "port.pth")
    loaded = load_inception(Located("x", tmp_path / "port.pth", None))
    assert all((loaded.state_dict()[k] == v).all() for k, v in ours.state_dict().items())
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "port.pth")
    with pytest.raises(MissingWeightsError, match="not the Inception of FID"):
        load_inception(Located("x", tmp_path / "port.pth", None))


def test_random_networks_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (load_inception(Located("", None, s)).Conv2d_1a_3x3.conv.weight for s in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()
    assert (torch.get_rng_state() == before).all()
    assert isinstance(load_inception(RANDOM), Inception)


@pytest.mark.parametrize("shape", [(37, 61), (311, 640), (299, 299)])
def test_resizers_equal_the_tools_they_are_named_after(shape):
    from cleanfid.resize import build_resizer
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = np.random.default_rng(0).integers(0, 256, size=(*shape, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = (torch.from_numpy(build_resizer("clean")(image)).permute(2, 0, 1) - 128) / 128
    assert (RESIZERS["clean"](image) - expected).abs().max() == 0
    port = torch.from_numpy(build_resizer("legacy_pytorch")(image.astype(np.float32))).permute(2, 0, 1)
    assert (RESIZERS["pytorch-fid"](image) - (2 * port / 255 - 1)).abs().max() < 1e-5
    tf = (interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False) - 128) / 128
    assert (RESIZERS["tensorflow"](image) - tf[0]).abs().max() < 1e-4
    assert RESIZERS["torchmetrics"](image).shape == (3, 299, 299)
    for size in (32, 37):
        crop = CenterCrop(size)(Resize(size, InterpolationMode.BILINEAR)(Image.fromarray(image)))
        assert (shrink(image, size) == np.asarray(crop)).all()


def test_antialiasing_is_what_tells_the_modes_apart():
    """White noise shrunk from 512 to 299 keeps another spread with and without antialiasing (specification E.2)."""
    noise = np.random.default_rng(0).integers(0, 256, size=(512, 512, 3), dtype=np.uint8)
    spread = {mode: float(resize(noise).std()) / 2 for mode, resize in RESIZERS.items()}
    assert spread["pytorch-fid"] == pytest.approx(0.193, abs=0.005)
    assert spread["torchmetrics"] == pytest.approx(0.112, abs=0.005)


def test_inception_features_and_their_settings(tmp_path):
    images = pictures(3, 0)
    features = InceptionFeatures("random:0", "pytorch-fid", 40)
    values = features(images)
    assert values.shape == (3, 2048)
    assert values.dtype == torch.float64
    assert "random:0" in features.settings["weights"]
    assert "40 px" in features.settings["resize"]
    x = torch.stack([RESIZERS["pytorch-fid"](shrink(i, 40)) for i in images])
    assert (values - features.network(x).double()).abs().max() < 1e-5 * values.abs().max()
    for arguments, message in (
        ((None,), r"pt_inception-2015-12-05-6726825d.pth.*github.com.*features=PATH"),
        (("none.pth",), r"features=none.pth: no such file"),
        (("random",), "random:0"),
        (("random:0", "lanczos"), "not one of clean"),
        (("random:0", "clean", 512), "only pytorch-fid has a size"),
    ):
        with pytest.raises(ValueError, match=message):
            InceptionFeatures(*arguments)
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"broken")
    with pytest.raises(MissingWeightsError, match=r"SHA-256 begins with .*expected 6726825d"):
        InceptionFeatures(str(tmp_path / "pt_inception-2015-12-05-6726825d.pth"))


def test_fid_of_folders_is_cleanfids_number_on_the_same_features(tmp_path):
    from cleanfid.fid import fid_from_feats

    one, other = pictures(40, 1), pictures(50, 2)
    metric = FID(Colours(), save(tmp_path / "real", other), cache=tmp_path / "cache", batch_size=7)
    figure = metric(one)
    expected = fid_from_feats(Colours()(one).numpy(), Colours()(other).numpy())
    assert figure["mean"] == pytest.approx(float(expected), rel=1e-6)
    assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
    assert (figure["n"], figure["reference_n"]) == (40, 50)
    assert figure["settings"]["features"] == "means and spreads"
    assert FID(Colours(), tmp_path / "real", cache=tmp_path / "cache")(other)["mean"] < 1e-6


def test_statistics_are_cached_by_what_they_depend_on(tmp_path):
    real, cache = save(tmp_path / "real", pictures(30, 1)), tmp_path / "cache"
    images = pictures(20, 2)

    def seen() -> int:
        features = Colours()
        FID(features, real, cache=cache)(images)
        return features.seen - 20

    assert [seen(), seen()] == [30, 0]
    Image.fromarray(images[0]).save(real / "0003.png")
    assert [seen(), seen()] == [30, 0]
    changed = Colours()
    changed.settings = {"features": "others"}
    FID(changed, real, cache=cache)(images)
    assert changed.seen == 50


def test_npz_and_shards_as_reference(tmp_path):
    images, real = pictures(20, 1), pictures(33, 2)
    folder = save(tmp_path / "real", real)
    expected = FID(Colours(), folder, cache=tmp_path / "c")(images)["mean"]
    (tmp_path / "shards").mkdir()
    for k in range(2):
        with tarfile.open(tmp_path / "shards" / f"{k}.tar", "w") as shard:
            for path in sorted(folder.iterdir())[k * 20 : k * 20 + 20]:
                shard.add(path, path.name)
    assert len(Pictures(tmp_path / "shards")) == 33
    assert FID(Colours(), tmp_path / "shards", cache=tmp_path / "c")(images)["mean"] == expected
    features = Colours()(real).numpy()
    np.savez(tmp_path / "r.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    by_file = FID(Colours(), tmp_path / "r.npz")(images)
    assert by_file["mean"] == pytest.approx(expected, rel=1e-7)
    assert by_file["reference_n"] is None
    statistics = Statistics(6).update(Colours()(real))
    write_statistics(tmp_path / "own.npz", statistics, {"features": "other"})
    for name, message in (("own.npz", "made with features"), ("none.npz", "is not a file of statistics")):
        with pytest.raises(ValueError, match=message):
            FID(Colours(), tmp_path / name)(images)
    with pytest.raises(ValueError, match="not d = 5"):
        read_statistics(tmp_path / "r.npz", {}, 5)
    with pytest.raises(ValueError, match="does not exist"):
        FID(Colours(), tmp_path / "nothing")(images)
    with pytest.raises(ValueError, match="no real images"):
        FID(Colours())(images)


def test_small_sets_are_refused(tmp_path):
    real = save(tmp_path / "real", pictures(4, 0))
    with pytest.raises(ValueError, match="5 images for 6 features"):
        FID(Colours(), real)(pictures(5, 1))
    with pytest.raises(ValueError, match=r"4 images in .* for 6 features"):
        FID(Colours(), real)(pictures(9, 1))
    assert FID(Colours(), real, allow_small_n=True, cache=tmp_path / "c")(pictures(5, 1))["n"] == 5


RANKS = """
import json, sys, torch
import torch.distributed as dist
sys.path[:0] = [{tests!r}]
from test_fid import Colours, pictures
from sana.metric.fid import FID
from sana.metric.kernel import KID
rank, world, store, real, cache = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size=world)
images, features = pictures(53, 7), Colours()
labels = [i // 2 for i in range(53)]
fid, kid = FID(features, real, cache=cache, batch_size=4), KID(features, real, batch_size=4)
figures = [fid(images, (), labels), kid(images)]
print(json.dumps([[f["mean"].hex(), [v.hex() for v in f["interval"]]] for f in figures] + [features.seen]))
"""


@pytest.mark.slow
def test_one_two_and_three_ranks_give_the_same_bits(tmp_path):
    real = save(tmp_path / "real", pictures(40, 8))
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    answers = {}
    for world in (1, 2, 3):
        command = [sys.executable, str(script)]
        places = [str(tmp_path / f"store{world}"), str(real), str(tmp_path / f"cache{world}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(r), str(world), *places], stdout=subprocess.PIPE, env=environment)
            for r in range(world)
        ]
        said = [json.loads(p.communicate(timeout=240)[0].splitlines()[-1]) for p in processes]
        assert all(s[:2] == said[0][:2] for s in said)
        assert sum(s[2] for s in said) == 2 * (53 + 40), "no image was looked at twice"
        answers[world] = said[0][:2]
    assert answers[1] == answers[2] == answers[3]


def test_kid_equals_the_peers():
    from cleanfid.fid import kernel_distance
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = gaussians(0, 40, 9)
    y = y[:40]
    ours = polynomial_mmd2(x, y)
    assert ours == pytest.approx(kernel_distance(y.numpy(), x.numpy(), num_subsets=1, max_subset_size=40), rel=1e-9)
    fidelity = kernel_mmd(x.numpy(), y.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3,
                          kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)  # fmt: skip
    assert ours == pytest.approx(float(fidelity), rel=1e-9)
    figure = KID(Colours(), lambda: [np.stack(pictures(30, 1, 24, 25))], subset_size=20, subsets=7)(pictures(25, 2))
    assert figure["settings"]["subset_size"] == 20
    assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]


def test_gaussian_kernel_by_a_loop():
    x, y = gaussians(1, 11, 4)

    def mean(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b.numpy()] for p in a.numpy()])

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert gaussian_mmd2(x, y, block=3) == pytest.approx(expected, rel=1e-9)
    figure = CMMD(Colours(), lambda: [np.stack(pictures(30, 1, 24, 25))])(pictures(25, 2))
    assert figure["mean"] > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_precision_and_recall_equal_torch_fidelitys(seed):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = gaussians(seed, 70, 3)
    ours = [float(hits.double().mean()) for hits in precision_recall(x, y, block=16)]
    assert ours == pytest.approx(calculate_precision_recall_full(x, y, neighborhood=3), abs=1e-7)
    assert 0 < ours[0] < 1
    with pytest.raises(ValueError, match="more than k"):
        precision_recall(x[:3], y)
    figures = PrecisionRecall(Colours(), lambda: [np.stack(pictures(30, 1, 24, 25))])(pictures(25, 2))["several"]
    assert set(figures) == {"precision", "recall"}


def test_labels_must_fit():
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        part_statistics(pictures(3, 0), Colours(), ["a", "b"], 2, 4)

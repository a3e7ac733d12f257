"""Drawing into a folder: what is planned, what is skipped, and that going on gives the pixels of one go."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.aspect_ratio import drawn_size, nearest_bin
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma_random import gemma_random
from sana.flow.grid import dpm_grid
from sana.model.draw_progress import DrawProgress
from sana.model.drawing import Job, draw_grid, draw_jobs, plan_jobs
from sana.model.found import find_images
from sana.model.generate import Painter
from sana.model.preview import Preview
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.run.prompts import Request
from sana.run.sidecar import read_image, read_sidecar
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler, Step

FACTS = {"steps": 3, "guidance": 2.0, "sampler": "x", "checkpoint": "00ff", "commit": "a"}
SAMPLER = Sampler(flow_dpm, partial(dpm_grid, shift=3.0), steps=3, guidance=2.0)
PLAN = dict(n=2, seed=0, negative="", height=None, width=None, size=16, multiple=4)


@pytest.fixture(scope="module")
def painter() -> Painter:
    torch.manual_seed(0)
    block = partial(
        Block, mixer=partial(LinearAttention, head_dim=8), cross=partial(CrossAttention, heads=2), ffn=MixFFN
    )
    autoencoder = DCAE(
        channels=4,
        scale=1.0,
        encoder_widths=(8, 8, 16),
        encoder_depths=(1, 1, 1),
        encoder_attention=(False, False, False),
        decoder_widths=(8, 8, 16),
        decoder_depths=(1, 1, 1),
        decoder_attention=(False, False, False),
    ).eval()
    encoder = gemma_random(64, 1, max_tokens=24, dtype="float32", trim=True)
    network = Sana(4, 16, 2, 64, [block], text_norm=1.0).eval()
    return Painter(network, autoencoder, encoder, lambda c: encoder.null(len(c.text), c.text.shape[1]))


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: read_image(p, read_sidecar(p)) for p in sorted(folder.rglob("*.png"))}


def count_draws(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    draw = painter.draw
    monkeypatch.setattr(painter, "draw", lambda *a, **k: counts.append(len(a[0])) or draw(*a, **k))
    return counts


def test_one_prompt_keeps_its_names(tmp_path):
    jobs = plan_jobs([Request('a "red" circle / ring')], tmp_path, **PLAN | {"n": None, "seed": 5})
    assert [j.path.name for j in jobs] == [f"a_red_circle_ring_{s}.png" for s in (5, 6, 7, 8)]
    assert plan_jobs([Request("!")], tmp_path, **PLAN)[0].path.name == "empty_0.png"
    long = plan_jobs([Request("𠀀" * 80)], tmp_path, **PLAN)[0].path.name
    assert len(long.encode()) < 200


def test_a_list_is_numbered_and_lines_have_their_own_settings(tmp_path):
    requests = [
        Request("x"),
        Request("x", seed=9, negative="no", width=24),
        Request("y", seed=[4, 2], height=8, width=12),
    ]
    jobs = plan_jobs(requests, tmp_path, **PLAN | {"height": 20, "width": 16, "negative": "bad"})
    names = ["00000_x_0", "00000_x_1", "00001_x_9", "00001_x_10", "00002_y_4", "00002_y_2"]
    assert [j.path.stem for j in jobs] == names
    assert [j.asked for j in jobs[::2]] == [(20, 16), (20, 24), (8, 12)]
    assert [j.negative for j in jobs[::2]] == ["bad", "no", "bad"]
    alone = plan_jobs([Request("x")], tmp_path, **PLAN | {"width": 24})
    assert alone[0].asked == (24, 24), "one side given is a square"


def test_seeds_may_be_listed(tmp_path):
    jobs = plan_jobs([Request("x")], tmp_path, **PLAN | {"n": None, "seed": [7, 3]})
    assert [j.seed for j in jobs] == [7, 3]
    for seed, n, said in (
        ([1, 1], None, "1 is given twice"),
        ([1, 2], 3, "2 seeds for n=3"),
        ([], None, "no seed"),
        (2**63, 1, "64 bits"),
        (0, 0, "n: 0 images"),
    ):
        with pytest.raises(ValueError, match=said):
            plan_jobs([Request("x")], tmp_path, **PLAN | {"n": n, "seed": seed})


def test_sizes():
    assert drawn_size(1080, 1920, 1024, 32, bins=True) == nearest_bin(1080, 1920, 1024) == (768, 1344)
    assert drawn_size(512, 512, 512, 32, bins=True) == (512, 512)
    assert drawn_size(1088, 1920, 1024, 32, bins=False) == (1088, 1920)
    assert drawn_size(64, 96, 64, 16, bins=True) == (64, 96), "no bins are published for 64 px"
    with pytest.raises(
        ValueError, match="100x64 pixels cannot be drawn: this model draws multiples of 16, such as 96x64"
    ):
        drawn_size(64, 100, 64, 16, bins=True)
    with pytest.raises(ValueError, match="positive"):
        drawn_size(0, 64, 1024, 32, bins=True)


def test_a_bin_is_drawn_then_resized_and_cropped(painter, tmp_path):
    job = Job(tmp_path / "a.png", "x", "", 1, drawn=(16, 28), asked=(20, 30))
    (path,) = draw_jobs(painter, [job], SAMPLER, FACTS, batch=4)
    record = read_sidecar(path)
    assert (record["size"], record["drawn"]) == ([30, 20], [28, 16])
    image = read_image(path, record)
    assert image.shape == (20, 30, 3)
    whole = painter.draw(["x"], [1], SAMPLER, 16, 28)[0].astype(float)
    middle = image[10, 15].astype(float)
    assert np.abs(middle - whole[6:10, 12:17].mean((0, 1))).max() < 40, "the middle stays in the middle"


@pytest.mark.parametrize("interrupted", [1, 2])
def test_going_on_gives_the_pixels_of_one_go(painter, tmp_path, monkeypatch, interrupted):
    requests = [Request("a red circle"), Request("two stars"), Request("a ring", negative="a star")]
    whole = plan_jobs(requests, tmp_path / "whole", **PLAN | {"n": 3})
    paths = list(draw_jobs(painter, whole, SAMPLER, FACTS, batch=4))
    assert paths == [job.path for job in whole]
    jobs = plan_jobs(requests, tmp_path / "parts", **PLAN | {"n": 3})
    counts = count_draws(painter, monkeypatch)
    drawing = draw_jobs(painter, jobs, SAMPLER, FACTS, batch=4)
    for _ in range(2 * interrupted + 1):
        next(drawing)
    drawing.close()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*")}
    assert counts == [4, 2][:interrupted]
    missing = jobs[1].path
    missing.unlink()
    done.pop(missing.name)
    done.pop(missing.with_suffix(".json").name)
    counts.clear()
    painter._rows.clear()
    assert list(draw_jobs(painter, jobs, SAMPLER, {**FACTS, "commit": "b"}, batch=4)) == [job.path for job in jobs]
    assert counts == [4, 2, 3] if interrupted == 1 else [4, 3], "a batch with one missing image is drawn, others not"
    one_go, parts = pictures(tmp_path / "whole"), pictures(tmp_path / "parts")
    assert one_go.keys() == parts.keys()
    assert all((one_go[name] == parts[name]).all() for name in one_go)
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == time for name, time in done.items())
    counts.clear()
    list(draw_jobs(painter, jobs, SAMPLER, FACTS, batch=4))
    assert counts == []


def test_other_settings_are_drawn_again(painter, tmp_path, monkeypatch):
    jobs = plan_jobs([Request("x")], tmp_path, **PLAN)
    list(draw_jobs(painter, jobs, SAMPLER, FACTS, batch=4))
    counts = count_draws(painter, monkeypatch)
    list(draw_jobs(painter, jobs, SAMPLER, {**FACTS, "guidance": 3.0}, batch=4))
    assert counts == [2]
    assert read_sidecar(jobs[0].path)["guidance"] == 3.0
    wide = plan_jobs([Request("x")], tmp_path, **PLAN | {"width": 24, "height": 16})
    list(draw_jobs(painter, wide, SAMPLER, {**FACTS, "guidance": 3.0}, batch=4))
    assert counts == [2, 2]
    wide[1].path.with_suffix(".json").write_text("{")
    list(draw_jobs(painter, wide, SAMPLER, {**FACTS, "guidance": 3.0}, batch=4))
    assert counts == [2, 2, 2]


def test_an_image_does_not_depend_on_what_is_drawn_with_it(painter, tmp_path):
    alone = plan_jobs([Request("two stars", seed=[7])], tmp_path / "a", **PLAN | {"n": None})
    many = plan_jobs([Request("x"), Request("two stars", seed=[7, 1])], tmp_path / "b", **PLAN | {"n": None})
    list(draw_jobs(painter, alone, SAMPLER, FACTS, batch=8))
    list(draw_jobs(painter, many, SAMPLER, FACTS, batch=8))
    a, b = read_image(alone[0].path).astype(int), read_image(many[4].path).astype(int)
    assert many[4].seed == 7
    assert np.abs(a - b).max() <= 1


def test_genevals_layout(painter, tmp_path):
    line = {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two stars"}
    jobs = plan_jobs([Request("two stars", metadata=line), Request("x")], tmp_path, **PLAN, layout="geneval")
    list(draw_jobs(painter, jobs, SAMPLER, FACTS, batch=3))
    assert json.loads((tmp_path / "00000" / "metadata.jsonl").read_text()) == line
    assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == {"prompt": "x"}
    found = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path, _ in found] == [
        f"0000{i}/samples/0000{k}.png" for i in (0, 1) for k in (0, 1)
    ]
    assert found[0][1]["metadata"] == line


def test_the_grid_holds_every_image(painter, tmp_path):
    jobs = plan_jobs([Request("x"), Request("x"), Request("two stars")], tmp_path, **PLAN)
    list(draw_jobs(painter, jobs, SAMPLER, FACTS, batch=8))
    layout = json.loads(draw_grid(tmp_path / "grid.png", jobs).with_suffix(".json").read_text())
    assert [(c["row"], c["column"]) for c in layout["cells"]] == [
        (prompt, seed) for prompt in ("x", "x", "two stars") for seed in ("seed 0", "seed 1")
    ]
    with pytest.raises(ValueError, match="megapixels"):
        draw_grid(tmp_path / "grid.png", [Job(tmp_path / "x.png", "x", "", 0, (1, 1), (16384, 16385))])


def test_bad_requests_write_nothing(painter, tmp_path):
    jobs = plan_jobs([Request("x")], tmp_path / "out", **PLAN)
    with pytest.raises(ValueError, match="batch_size: 0"):
        list(draw_jobs(painter, jobs, SAMPLER, FACTS, batch=0))
    wrong = Sampler(flow_dpm, dpm_grid, 2, pag_scale=1.0, pag_layers=[2])
    with pytest.raises(ValueError, match=r"pag_layers: \[2\], but the network has layers 0 to 1"):
        list(draw_jobs(painter, jobs, wrong, FACTS, batch=2))
    assert not (tmp_path / "out").exists()


def test_previews_follow_a_linear_decoder(tmp_path):
    """Where colours are a linear function of the latent, the preview is the picture."""
    mix = torch.tensor([[0.3, -0.2, 0.1], [0.1, 0.2, 0.3], [0.0, 0.1, -0.3], [0.2, 0.0, 0.1]])

    class Linear:
        def decode(self, latents):
            image = torch.einsum("bchw,cd->bdhw", latents.squeeze(2), mix).add(0.1).clamp(-1, 1)
            pixels = (image * 127.5 + 127.5).round().to(torch.uint8)
            return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3).permute(0, 2, 3, 1).numpy()

    x0 = torch.randn(2, 4, 1, 10, 12, generator=torch.Generator().manual_seed(1)) * 0.5
    preview = Preview(Linear(), tmp_path / "deep" / ".preview.png", 2)
    want = Linear().decode(x0)[:, ::4, ::4].astype(float)
    got = ((preview.colours(x0) * 127.5) + 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(got - want).max() < 3
    seen = []
    for k in range(5):
        preview(Step(k, 5, 0.5, x0))
        seen.append(preview.path.exists())
        preview.close()
    assert seen == [False, True, False, True, True], "every second step, and the last"
    preview(Step(1, 5, 0.5, x0))
    assert Image.open(preview.path).size == (2 * 12 * 21, 10 * 21)
    with pytest.raises(ValueError, match="every 0 steps"):
        Preview(Linear(), tmp_path / "x.png", 0)


def test_previews_do_not_change_the_picture_and_go_with_it(painter, tmp_path):
    plain = plan_jobs([Request("x")], tmp_path / "a", **PLAN)
    watched = plan_jobs([Request("x")], tmp_path / "b", **PLAN)
    list(draw_jobs(painter, plain, SAMPLER, FACTS, batch=4))
    path = tmp_path / "b" / ".preview.png"
    drawing = draw_jobs(painter, watched, SAMPLER, FACTS, batch=1, preview=(path, 1))
    next(drawing)
    assert path.exists()
    list(drawing)
    assert not path.exists()
    a, b = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert all(np.abs(a[name].astype(int) - b[name]).max() <= 1 for name in a)


def test_progress_counts_steps_and_says_when_it_ends(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("sana.model.draw_progress.time.perf_counter", lambda: clock[0])
    stream = io.StringIO()
    progress = DrawProgress(stream, plain_every=10)
    progress.start(12, 2)
    assert progress.line() == "2/12 images"
    for _ in range(5):  # half of the steps of a batch of four, in ten seconds
        clock[0] += 2
        progress.step(4, 10)
    assert progress.line() == "4/12 images, 0.20 images/s, ETA 0:00:40"
    assert stream.getvalue() == "drawing: 4/12 images, 0.20 images/s, ETA 0:00:40\n"
    clock[0] += 90
    assert "50 s/image, ETA 0:06:40" in progress.line()
    progress.close()

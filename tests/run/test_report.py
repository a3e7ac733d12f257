"""The report: one file that fetches nothing, is whole whatever the run lacks, and shows the run's own numbers."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from sana.run.records import to_json
from sana.run.report import duration, make_report
from sana.run.report_charts import Line, chart, common, log_ticks, smooth, thin, ticks
from sana.run.report_pictures import spread
from sana.run.sidecar import save_grid, save_image

EVIL = '<script>alert("x")</script><img src=http://evil.example/x.png>'
VOID = {"meta", "link", "img", "br", "line", "rect", "circle", "path", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        last = self.open.pop()
        assert last == tag, f"</{tag}> closes <{last}>"

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check(path) -> Page:
    """Parse a report and assert that it stands alone."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert value is not None
                assert value.startswith(("data:", "#")), value[:80]
            assert not name.startswith("on"), name
    scripts = re.findall(r"<style>(.*?)</style>|<script>(.*?)</script>", text, re.S)
    for part in ("".join(s) for s in scripts):
        for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
            assert word not in part.replace("url(#clip)", ""), word
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")
    assert all(image.get("alt") for image in page.all("img"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {str(a["href"])[1:] for a in page.all("a")}
    assert anchors <= set(ids)
    return page


def make_run(folder, rows: int = 120, grids: bool = True):
    run = folder / "tiny" / "2026-11-20_16-00-00_0"
    run.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for i in range(rows):
            row = {
                "step": 10 * i,
                "time": 1e9 + i,
                "train/loss": 0.3 + 2 * math.exp(-i / 20) + 0.02 * rng.normal(),
                "train/grad_norm": 1 + rng.random(),
                "train/lr": 1e-3,
                "train/samples_per_s": 390.0 + rng.normal(),
                "time/data": 0.004,
                "time/text": 0.011,
                "time/autoencoder": 0.002,
                "time/model": 0.15,
                "train/perceptual": 1.0 / (1 + i),
            }
            if i % 20 == 0:
                row |= {f"val/loss_t{k}": 0.2 + 0.05 * k for k in range(10)} | {"val/loss": 0.42}
                row |= {"val/overall": i / rows, "val/colors": 0.9}
            file.write(to_json(row) + "\n")
    (run / "config.yaml").write_text("model:\n  width: 192\nurl: https://example.org/x\n")
    (run / "overrides.yaml").write_text('- "model=tiny"\n- "seed=1"\n')
    (run / "status.json").write_text(
        json.dumps({"status": "finished", "reason": None, "started": "2026-11-20T16:00:00+00:00", "seconds": 611.0})
    )
    (run / "environment.json").write_text(
        json.dumps({"git": {"commit": "0123456789abcdef", "dirty": False}, "hardware": {"cpu": "Some CPU"}})
    )
    for step in range(0, 2400, 200) if grids else ():
        images = [[np.full((16, 16, 3), (step + 40 * j) % 256, np.uint8) for j in range(2)] for _ in range(3)]
        prompts = ["a red circle", "two stars", "a <b>cross</b>"]
        save_grid(run / "samples" / f"step_{step:08d}.png", images, prompts, title=f"update {step}")
    return run


def make_results(run) -> dict:
    def figure(mean, n=40, **more):
        return {"mean": mean, "interval": [mean - 0.05, mean + 0.05], "level": 0.95, "n": n, **more}

    names = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    tasks = {t: figure(0.9 - 0.1 * i, reasons={"wrong shapes": 3, EVIL: 1}) for i, t in enumerate(names)}
    images, lines = run / "eval", []
    facts = {"seed": 0, "steps": 20, "guidance": 4.0, "sampler": "dpm", "checkpoint": "00ff", "commit": None}
    for k in range(8):
        path = images / f"{k}.png"
        save_image(path, np.full((16, 16, 3), 20 * k, np.uint8), {"prompt": f"p{k}", **facts})
        line = {"filename": path.name, "tag": "colors", "prompt": f"prompt {k} {EVIL}", "correct": k % 2 == 0}
        lines.append(line | {"reason": "" if k % 2 == 0 else f"wrong colours: {EVIL}", "split": "prompts", "seed": k})
    (images / "verdicts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return {
        "overall": 0.654,
        "steps": 1190,
        "peak_rss_gib": 1.234,
        "figures": {
            "overall": figure(0.654, 240),
            "tasks": tasks,
            "held_out": {"overall": figure(0.321, 60), "tasks": {"colors": figure(0.321, 60, reasons={})}},
            "fid_scenes": figure(0.0471, 240, feature_space="small scenes space", reference_n=512),
        },
        "settings": {"sampler": "flow_dpm", "steps": 20, "guidance": 4.5, "note": EVIL, "ema": True},
        "files": {"images": str(images), "verdicts": str(images / "verdicts.jsonl")},
    }


def test_report_shows_the_run(tmp_path):
    run = make_run(tmp_path)
    path = make_report(run, make_results(run))
    assert path == run / "report.html"
    page = check(path)
    for part in ("65.4", "32.1 %", "0.0471", "1,190", "10 min 11 s", "1.23 GiB", "finished", "commit 0123456789"):
        assert part in page.text, part
    for part in ("Loss", "Validation loss by time t", "Accuracy while training", "Gradient norm", "Learning rate"):
        assert part in page.text, part
    assert len([f for f in page.all("figure") if f.get("class") == "chart"]) == 8
    assert "train/perceptual" in page.text
    assert "Time per update (ms)" in page.text
    for part in ("model=tiny", "flow_dpm", "small scenes space", "width: 192", str(run.resolve())):
        assert part in page.text, part
    alts = [str(image["alt"]) for image in page.all("img")]
    assert sum(alt.startswith("two stars, after") for alt in alts) == 9 * 2, "nine of twelve steps, both columns"
    assert any(alt == "a red circle, after 0 updates" for alt in alts)
    assert any(alt == "a red circle, after 2200 updates" for alt in alts)
    assert sum(alt.startswith("Right: ") for alt in alts) == 4
    assert sum(alt.startswith("Wrong: ") for alt in alts) == 4
    charts = [s for s in page.all("svg") if s.get("role") == "img"]
    assert all(s.get("aria-label") for s in charts)


def test_everything_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path, grids=False)
    (run / "config.yaml").write_text(EVIL)
    (run / "overrides.yaml").write_text(f"- {json.dumps(EVIL)}\n")
    (run / "status.json").write_text(json.dumps({"status": EVIL, "reason": EVIL, "details": EVIL}))
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL, "git": {"commit": EVIL}, "hardware": {"cpu": EVIL}}))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5000, EVIL: 1.0}) + "\n" + json.dumps({"step": 5001, EVIL: 2.0}) + "\n")
    text = make_report(run, make_results(run)).read_text()
    check(run / "report.html")
    assert "<script>alert" not in text
    assert "<img src=http" not in text
    assert text.count("&lt;script&gt;alert") >= 8


def test_results_are_found_in_the_run(tmp_path):
    run = make_run(tmp_path, grids=False)
    (run / "results.json").write_text(json.dumps(make_results(run)))
    assert "65.4" in check(make_report(run)).text


def test_run_without_anything_still_gives_a_page(tmp_path):
    page = check(make_report(tmp_path))
    assert "Where everything lies" in page.text
    assert "How it learned" not in page.text
    with pytest.raises(ValueError, match="not a directory"):
        make_report(tmp_path / "none")


def test_failed_run_says_why(tmp_path):
    run = make_run(tmp_path, rows=1)
    reason = "NonFiniteError: loss is nan at update 7"
    (run / "status.json").write_text(
        json.dumps({"status": "failed", "reason": reason, "details": "Traceback\n  File x.py", "seconds": 3.2})
    )
    page = check(make_report(run))
    assert reason in page.text
    assert "File x.py" in page.text
    assert [p for p in page.all("span") if p.get("class") == "pill bad"]


def test_broken_records_are_survived(tmp_path):
    run = make_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 1210, "train/loss": NaN, "train/grad_norm": "inf"}\n[1]\nnull\n{"train/loss": 3}\n')
        file.write('{"step": "x", "train/loss": 3}\n{"step": 1220, "train/loss": "text", "train/lr": null}\n{"step": 1')
    (run / "environment.json").write_text("[]")
    (run / "status.json").write_text('{"status":')
    (run / "samples" / "step_00000200.png").write_bytes(b"\x89PNG broken")
    (run / "samples" / "step_00000400.json").write_text("{}")
    (run / "samples" / "step_x.png").write_bytes(b"")
    results = make_results(run)
    shutil.rmtree(run / "eval")
    page = check(make_report(run, results))
    assert "Loss" in page.text


def test_grids_without_layout_are_shown_whole(tmp_path):
    run = make_run(tmp_path)
    for layout in (run / "samples").glob("*.json"):
        layout.unlink()
    alts = [str(image["alt"]) for image in check(make_report(run)).all("img")]
    assert alts[0] == "Samples after 0 updates"
    assert alts[-1] == "Samples after 2200 updates"


def test_a_resumed_run_draws_each_step_once(tmp_path):
    rows = [{"step": s, "train/loss": v} for s, v in ((1, 5.0), (2, 4.0), (3, 9.0), (2, 3.0), (3, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = make_report(tmp_path).read_text()
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])  # type: ignore[index]
    assert data["lines"][0]["x"] == [1.0, 2.0, 3.0]


def test_points_of_a_chart_are_where_the_numbers_say():
    html = chart("T", "c", [Line("a", [0.0, 10.0], [0.0, 1.0], "c1")], percent=True)
    xs, ys = zip(*[map(float, p.split()) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", html)], strict=True)
    assert xs == (52, 508)
    assert ys == (230, 10)
    middle = chart("T", "c", [Line("a", [0.0, 1, 2], [0.01, 1.0, 100.0], "c1")], log=True)
    ys = [float(p) for p in re.findall(r"[ML][\d.]+ ([\d.]+)", middle)]
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1)


def test_charts_of_odd_data():
    assert chart("T", "c", []) == ""
    assert chart("T", "c", [Line("a", [1, 2], [math.nan, math.inf], "c1")]) == ""
    assert chart("T", "c", [Line("a", [1, 2], [-1, 0], "c1")], log=True) == ""
    for y in ([3.0], [0.0], [2.0, 2.0, 2.0], [-1.0, 1.0], [1e-9, 1e9], [1.0, math.nan, 2.0]):
        for log in (False, True):
            html = chart("T", "c", [Line("a", list(range(len(y))), y, "c1")], log=log)
            assert "nan" not in re.sub(r"<script.*?</script>", "", html).lower(), (y, log)
            assert not html or Page(html)
    gap = chart("T", "c", [Line("a", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], "c1")])
    assert re.search(r'd="M[\d. ]+M[\d. ]+L[\d. ]+"', gap), "a value that is not finite leaves a gap"
    spike = chart("T", "c", [Line("a", list(range(400)), [100.0] + [1 + 0.1 * (i % 5) for i in range(399)], "c1")])
    assert "goes higher" in spike


def test_smoothing_has_no_lag_and_ends_on_a_mean():
    y = np.linspace(5, 1, 101)
    assert smooth(y.tolist(), 21)[:90] == pytest.approx(y[:90].tolist())
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise.tolist(), 101)[-1] == pytest.approx(noise[-51:].mean())
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([math.nan, 1.0], 1)[0])


def test_thinning_keeps_extremes_and_ends():
    y = np.random.default_rng(1).normal(size=5000)
    y[1234], y[3456] = 50, -50
    x, kept = thin(list(range(5000)), y.tolist(), 200)
    assert len(x) <= 202
    assert (x[0], x[-1]) == (0, 4999)
    assert {50.0, -50.0} <= set(kept)
    assert all(y[int(a)] == b for a, b in zip(x, kept, strict=True))
    assert x == sorted(x)


def test_common_steps_and_ticks():
    x, a, b = common([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [20.0, 30.0, 40.0])])
    assert (x, a, b) == ([2, 3], [2.0, 3.0], [20.0, 30.0])
    x, a = common([(list(range(1000)), [float(i) for i in range(1000)])], points=10)
    assert len(x) == 10
    assert a[0] == pytest.approx(np.mean(range(100)))
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 1999, 4) == [0, 500, 1000, 1500]
    assert log_ticks(0.09, 2.1) == pytest.approx([0.1, 0.2, 0.5, 1, 2])
    assert 2 <= len(log_ticks(1e-9, 1e9)) <= 7


def test_small_things():
    assert [duration(s) for s in (None, 12.34, 200, 3720)] == ["unknown", "12.3 s", "3 min 20 s", "1 h 02 min"]
    assert spread(list(range(12)), 5) == [0, 3, 6, 8, 11]
    assert spread([1, 2], 5) == [1, 2]

"""Reads the runs of chain.py and writes results.json, the plots and page.html beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chain
import numpy as np
import page
from numpy.typing import NDArray
from scipy.stats import sem, t

from sana.metric.best_of_n import expected_best
from sana.model.candidates import read_pool
from sana.run.records import read_metrics

HERE = Path(__file__).resolve().parent
CHECKED = 4  # of chain.POOL
SCORE = "eval/ema/geneval_scenes"

Curve = list[tuple[int, float]]


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % interval of Student's t over the seeds."""
    x = np.asarray(values, np.float64)
    half = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
    mean = float(x.mean())
    return {"mean": mean, "interval": [mean - half, mean + half], "seeds": [float(v) for v in x]}


def scores(folder: Path) -> Curve:
    """Score of the averaged weights by update."""
    return [(int(row["step"]), float(row[SCORE])) for row in read_metrics(folder / "metrics.jsonl") if SCORE in row]


def steps_to(reached: Curve, bar: float) -> float | None:
    """Update at which a curve first reaches the bar, by straight lines between its points; None: it does not."""
    before: tuple[int, float] | None = None
    for step, score in reached:
        if score >= bar:
            if before is None or score == before[1]:
                return float(step)
            return before[0] + (step - before[0]) * (bar - before[1]) / (score - before[1])
        before = (step, score)
    return None


def growth(homes: list[Path], curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Share of the deep network's updates after which the grown one is as good; of a seed that never is, None."""
    bars = [one[-1][1] for one in curves["deep"]]
    reached = [steps_to(one, bar) for one, bar in zip(curves["grown"], bars, strict=True)]
    ratios = [None if step is None else step / chain.S for step in reached]
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(homes):
        return {"mean": None, "interval": None, "seeds": ratios}
    return over_seeds(known)


def best_of(homes: list[Path], name: str, part: str) -> dict[str, dict[str, Any]]:
    """{n: quality over seeds} of a curve."""
    found = [json.loads((home / f"{name}.json").read_text())[part] for home in homes]
    return {
        str(rows[0]["best_of"]): over_seeds([row["mean"] for row in rows]) for rows in zip(*found, strict=True)
    }  # rows: one n, all seeds


def checked(homes: list[Path], judge: str) -> dict[str, Any]:
    """The estimate from the first pool at n = CHECKED against brute force, for each seed and over all of them."""
    pairs = [estimate_and_brute(home, judge) for home in homes]
    everything = tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return {"n": CHECKED, "seeds": [agreement(*pair) for pair in pairs], "all": agreement(*everything)}


def estimate_and_brute(home: Path, judge: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each prompt the estimate from the first pool, and what the second one gives when it is cut into runs of n."""
    pool, fresh = (read_pool(home / name) for name in ("pool", "fresh"))
    estimates = expected_best(pool.scores[judge], pool.scores["oracle"], [CHECKED])[:, 0]
    shape = (len(estimates), -1, CHECKED)
    judged, worth = (fresh.scores[name].reshape(shape) for name in (judge, "oracle"))
    rng = np.random.default_rng(0)  # of equal scores one is as good as another
    best = np.argmax(judged + 1e-9 * rng.random(judged.shape), axis=2)[:, :, None]
    return estimates, np.take_along_axis(worth, best, 2).mean((1, 2))


def agreement(estimates: NDArray[np.float64], brute: NDArray[np.float64]) -> dict[str, Any]:
    """Both means, and the interval of their difference over prompts (Student's t; the prompts are the same)."""
    apart = brute - estimates
    low, high = t.interval(0.95, len(apart) - 1, loc=apart.mean(), scale=sem(apart))
    return {
        "estimate": float(estimates.mean()),
        "brute": float(brute.mean()),
        "difference_interval": [float(low), float(high)],
        "agrees": bool(low <= 0 <= high),
    }


def correlations(homes: list[Path], judge: str, part: str) -> dict[str, Any]:
    """Rank correlation of a judge with the oracle, over the images of all prompts or within prompts."""
    return over_seeds(
        [json.loads((home / f"curve_pool_{judge}.json").read_text())["correlation"][part] for home in homes]
    )


def main() -> None:
    """Everything from the files of the runs alone."""
    homes = [chain.RUNS / f"seed{seed}" for seed in chain.SEEDS]
    curves = {name: [scores(home / name) for home in homes] for name in ("small", "deep", "grown")}
    finals = {name: [one[-1][1] for one in several] for name, several in curves.items()}
    reports = {home.name: json.loads((home / "importance" / "importance.json").read_text())["values"] for home in homes}
    seconds = {
        str(path.relative_to(chain.RUNS).with_suffix("")): float(path.read_text())
        for path in sorted(chain.RUNS.glob("seed*/*.seconds"))
    }
    runs = [path for home in homes for path in sorted(home.glob("*/environment.json"))]
    commits = {str(p.parent.relative_to(chain.RUNS)): json.loads(p.read_text())["git"]["commit"] for p in runs}
    content = {
        "growth_steps_ratio": growth(homes, curves),
        "prune": {arm: over_seeds([scores(home / f"by_{arm}")[-1][1] for home in homes]) for arm in chain.ARMS},
        "best_of_n": best_of(homes, f"curve_pool_{chain.JUDGES[0]}", "ceiling"),
        "best_of_n_judged": {judge: best_of(homes, f"curve_pool_{judge}", "curve") for judge in chain.JUDGES},
        "judge_correlation": {judge: correlations(homes, judge, "overall") for judge in chain.JUDGES},
        "judge_correlation_within": {judge: correlations(homes, judge, "within") for judge in chain.JUDGES},
        "estimate_checked": {judge: checked(homes, judge) for judge in chain.JUDGES},
        "scores": {name: over_seeds(values) for name, values in finals.items()},
        "steps": {"small": chain.S, "deep": chain.S, "grown": round(chain.GROWN * chain.S), "recovery": chain.RECOVERY},
        "importance": reports,
        "curves": curves,
        "seeds": list(chain.SEEDS),
        "seconds": seconds,
        "core_minutes": sum(seconds.values()) / 60,
        "commit": commits[f"{homes[0].name}/by_importance"],
        "commits": commits,
    }
    (HERE / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    page.write(content, homes, HERE)
    print(HERE / "page.html")


if __name__ == "__main__":
    main()

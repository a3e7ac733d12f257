"""Quality against n from one pool: what a judge gains by choosing the best of n images, for every n up to the pool's.

python sample.py ckpt=... prompt=prompts.jsonl best_of=32 keep_all=true judge=colours out=chosen
python scripts/best_of_curve.py chosen --judge colours --value oracle

Writes <output>.json and <output>.png. A judge that has not seen the pool looks at it first, which needs its images; its
settings are those of conf/judge, changed by --set, such as ``--set judge.weights=PATH``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sana.metric.best_of_n import best_of_n_curve, rank_correlation
from sana.model.best_of import judge_pool
from sana.model.candidates import Pool, read_pool
from sana.run.build import build
from sana.run.compose import compose
from sana.run.records import write_atomically

BLUE, GREY, ORANGE = "#4269d0", "#6b7280", "#c26b00"


def with_scores(folder: Path, judge: str, settings: list[str], batch: int) -> Pool:
    """The pool with the scores of a judge, who looks at it if it has not."""
    pool = read_pool(folder)
    if judge not in pool.scores:
        composed = compose("sample", ["ckpt=none", "prompt=none", f"judge={judge}", *settings])
        judge_pool(build(composed.config.judge, "judge"), folder, pool.candidates, batch)
        pool = read_pool(folder)
    return pool


def numbers(folder: Path, pool: Pool, judge: str, value: str, ns: list[int] | None, seed: int) -> dict[str, Any]:
    """All that is to be known of a judge's choice from a pool."""
    scores, values, tasks = pool.scores[judge], pool.scores[value], pool.tasks
    prompts, size = scores.shape
    ns = ns or sorted({*(2**k for k in range(size.bit_length())), size})
    found: dict[str, Any] = {
        "folder": str(folder),
        "judge": judge,
        "value": value,
        "prompts": prompts,
        "pool": size,
        "curve": best_of_n_curve(scores, values, ns, tasks, seed=seed),
        "ceiling": best_of_n_curve(values, values, ns, tasks, seed=seed),
        "correlation": rank_correlation(scores, values),
    }
    if tasks is not None:
        rows = {task: [i for i, own in enumerate(tasks) if own == task] for task in dict.fromkeys(tasks)}
        found["tasks"] = {t: best_of_n_curve(scores[i], values[i], ns, seed=seed) for t, i in rows.items()}
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """The curve of the judge below that of the value itself, with the bands of their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=140, layout="constrained")
    lines = [("curve", BLUE, f"chosen by {found['judge']}")]
    if found["judge"] != found["value"]:
        lines.insert(0, ("ceiling", ORANGE, f"chosen by {found['value']} itself"))
    for key, color, label in lines:
        ns = [row["best_of"] for row in found[key]]
        low, high = zip(*(row["interval"] for row in found[key]), strict=True)
        axes.fill_between(ns, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(ns, [row["mean"] for row in found[key]], color=color, marker="o", markersize=4, label=label)
    axes.axhline(found["ceiling"][0]["mean"], color=GREY, linestyle=":", linewidth=1.2, label="not chosen")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.minorticks_off()
    axes.set_xlabel("best of n")
    axes.set_ylabel(found["value"])
    related, said = found["correlation"], ""
    if len(lines) == 2 and related["within"] is not None:
        said = f"; rank correlation {related['within']:.2f} within the {related['prompts']} where it exists"
    axes.set_title(f"{found['prompts']} prompts, pools of {found['pool']}{said}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Read, judge what is missing, write, and say it in a few lines."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="out= of sample.py")
    parser.add_argument("--judge", required=True, help="who chooses")
    parser.add_argument("--value", help="whose scores the choice is worth; the judge's own where not given")
    parser.add_argument("--ns", type=int, nargs="+", help="powers of two and the size of the pool where not given")
    parser.add_argument("--set", action="append", default=[], help="a setting of a judge that is built here")
    parser.add_argument("--batch", type=int, default=16, help="images that are judged together")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", type=Path, help="files without suffix; FOLDER_curve_JUDGE where not given")
    given = parser.parse_args()
    value = given.value or given.judge
    try:
        for name in dict.fromkeys((given.judge, value)):
            pool = with_scores(given.folder, name, [s for s in given.set if name == given.judge], given.batch)
        found = numbers(given.folder, pool, given.judge, value, given.ns, given.seed)
    except ValueError as error:
        raise SystemExit(f"best_of_curve.py: {error}") from None
    output = given.output or given.folder.with_name(f"{given.folder.name}_curve_{given.judge}")
    write_atomically(output.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    plot(found, output.with_suffix(".png"))
    for row in found["curve"]:
        print(f"best of {row['best_of']:>5}: {row['mean']:.4f} ({row['interval'][0]:.4f} to {row['interval'][1]:.4f})")
    print(f"rank correlation: {json.dumps(found['correlation'])}")
    print(output.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Measure which blocks of a trained network matter: ``python scripts/importance.py ckpt=<run or checkpoint>``;
``--help`` lists the rest.

100 prompts (or prompt=FILE) are drawn by all steps of the sampler, and every block is watched in the same passes.
Writes importance.json, which start=prune of train.py goes by, and importance.png; where a report of the same weights
and settings lies already, that is taken. Under torchrun all processes share the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def importance(composed: Composed) -> None:
    """Measure, or find what was measured, and say which blocks matter least."""
    from sana.model.evaluation import join_ranks, on_first_rank
    from sana.model.importance import importance_of
    from sana.run.error import ConfigError

    with join_ranks():
        try:
            found, path, there = importance_of(composed)
        except ValueError as error:  # what only the weights or the prompts could tell
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        if on_first_rank():
            order = sorted(range(len(found.values)), key=lambda i: found.values[i])
            shown = ", ".join(f"{i} ({found.values[i]:.3g})" for i in order[:10])
            print(f"least important of {len(order)} blocks: {shown}")
            print(f"{path}: {'was there' if there else f'measured in {found.seconds:.1f} s'}", flush=True)


if __name__ == "__main__":
    raise SystemExit(launch("importance", importance))

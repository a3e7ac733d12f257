"""Training: ``python train.py [group=option ...] [section.key=value ...]``; ``--help`` lists the choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def train(composed: Composed) -> None:
    """Build the parts that the configuration names, and fit."""
    from lightning import seed_everything

    from sana.run.begin import begin
    from sana.run.build import build, build_all
    from sana.run.runs import find_checkpoint

    config, record = begin(composed)
    with record:
        seed_everything(config.seed, verbose=False)
        data = build(config.data, "data")
        model = build(config.model, "model")
        trainer = build(
            config.trainer,
            "trainer",
            strategy=config.strategy
            if isinstance(config.strategy, str)
            else build(config.strategy, "strategy"),
            callbacks=list(build_all(config.callback, "callback").values()),
            logger=list(build_all(config.logger, "logger").values()),
            default_root_dir=config.run.dir,
            enable_checkpointing=False,
            enable_progress_bar="progress" in config.callback,
        )
        checkpoint = None if config.resume is None else find_checkpoint(config.resume, "resume")[0]
        trainer.fit(model, data, ckpt_path=checkpoint)


if __name__ == "__main__":
    raise SystemExit(launch("train", train))

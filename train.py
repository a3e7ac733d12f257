"""Training: ``python train.py [group=option ...] [section.key=value ...]``; ``--help`` lists the choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def train(composed: Composed) -> int:
    """Build the parts that the configuration names, and fit. 130 where ctrl-C ended it, 75 where it should be started
    again."""
    import logging

    from lightning import seed_everything

    from sana.model.teacher import start_from
    from sana.run.begin import begin
    from sana.run.build import build, build_all
    from sana.run.inspect import inspect
    from sana.run.stop import Stopped, stopping_at_once

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if composed.config.data.get("inspect"):
        return inspect(build(composed.config.data, "data"), composed.config.run.folder)
    config, record, resume = begin(composed)
    try:
        with record, stopping_at_once():
            seed_everything(config.seed, verbose=False)
            data, model = build(config.data, "data"), build(config.model, "model")
            callbacks = build_all(config.callback, "callback")
            trainer = build(
                config.trainer,
                "trainer",
                strategy=config.strategy if isinstance(config.strategy, str) else build(config.strategy, "strategy"),
                callbacks=list(callbacks.values()),
                logger=list(build_all(config.logger, "logger").values()),
                default_root_dir=config.run.dir,
                enable_checkpointing=False,
                enable_progress_bar="progress" in callbacks,
            )
            if record.writes:
                if hasattr(data, "write"):  # the embedded world makes its shards at first use
                    data.write()
                record.describe(data={"folder": str(config.data.folder), "fingerprint": data.fingerprint()})
            model.resume, model.allow_partial = resume, config.allow_partial
            if config.init is not None:
                start_from(model, config.init)
            trainer.fit(model, data)
            return record.stop(model.stopped, alone=trainer.strategy.launcher is None)
    except Stopped as stopped:
        return record.stop(str(stopped), alone=True)


if __name__ == "__main__":
    raise SystemExit(launch("train", train))

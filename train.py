"""Training: ``python train.py [group=option ...] [section.key=value ...]``; ``--help`` lists the choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def train(composed: Composed) -> int:
    """Build the parts that the configuration names, and fit. 130 or 143 where a signal ended it."""
    import logging

    from lightning import seed_everything

    from sana.run.begin import begin
    from sana.run.build import build, build_all
    from sana.run.inspect import inspect
    from sana.run.runs import find_checkpoint

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if composed.config.data.get("inspect"):
        return inspect(build(composed.config.data, "data"), composed.config.run.folder)
    config, record = begin(composed)
    with record:
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
        resumed = None if config.resume is None else find_checkpoint(config.resume, "resume")[0]
        trainer.fit(model, data, ckpt_path=resumed, weights_only=True)
        signal = next((c.interrupted for c in callbacks.values() if getattr(c, "interrupted", None)), None)
        if signal is not None:
            record.end("interrupted" if signal == "SIGINT" else "preempted", signal)
            return 130 if signal == "SIGINT" else 143
    return 0


if __name__ == "__main__":
    raise SystemExit(launch("train", train))

"""Training: ``python train.py [group=option ...] [section.key=value ...]``; ``--help`` lists the choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def train(composed: Composed) -> int:
    """Build the parts that the configuration names, and fit. 130 where ctrl-C ended it, 75 where it should be started
    again."""
    import logging

    from lightning import seed_everything

    from sana.run.begin import begin
    from sana.run.build import build, build_all
    from sana.run.inspect import inspect
    from sana.run.stop import Stopped, stopping_at_once

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if composed.config.data.get("inspect"):
        return inspect(build(composed.config.data, "data"), composed.config.run.folder)
    begun = begin(composed)
    config, record = begun.config, begun.record
    try:
        with record, stopping_at_once():
            seed_everything(config.seed, verbose=False)
            data, model = build(config.data, "data"), build(config.model, "model")
            callbacks = build_all(config.callback, "callback")
            strategy = config.strategy if isinstance(config.strategy, str) else build(config.strategy, "strategy")
            trainer = build(
                config.trainer,
                "trainer",
                strategy=strategy,
                callbacks=list(callbacks.values()),
                logger=list(build_all(with_id(config.logger, record.id), "logger").values()),
                default_root_dir=config.run.dir,
                enable_checkpointing=False,
                enable_progress_bar="progress" in callbacks,
            )
            if record.writes:
                if hasattr(data, "write"):  # the embedded world makes its shards at first use
                    data.write()
                record.describe(data={"folder": str(config.data.folder), "fingerprint": data.fingerprint()})
            model.resume, model.allow_partial = begun.resume, config.allow_partial
            if config.init is not None:
                start_from(model, config.init)
            trainer.fit(model, data)
            return end(model.stopped, begun.record, trainer)
    except Stopped as stopped:
        return end(str(stopped), begun.record, None)


def start_from(model: Any, name: str) -> None:
    """Put weights into a recipe that starts anew."""
    from sana.model.load import load_weights
    from sana.run.runs import find_weights

    load_weights(model, find_weights(name, key="init").path)


def with_id(loggers: Any, run: str) -> Any:
    """Settings of the loggers; Weights & Biases gets the run's id, so that all parts of a run are one there."""
    from omegaconf import OmegaConf

    loggers = OmegaConf.create(loggers or {}) if loggers is None else loggers.copy()
    for node in loggers.values():
        if node is not None and node._target_.endswith("WandbLogger"):
            OmegaConf.set_struct(node, False)
            node.setdefault("id", run)
            node.setdefault("resume", "allow")
    return loggers


def end(stopped: str | None, record: Any, trainer: Any) -> int:
    """Write how the run ended, have it started again where a scheduler can, and choose the exit code."""
    from sana.run.stop import INTERRUPTED, REQUEUE, requeue

    if stopped is None:
        return 0
    record.end("interrupted" if stopped == "SIGINT" else "preempted", stopped)
    if record.writes and (line := requeue(stopped)):
        print(line, flush=True)
    started_here = trainer is not None and getattr(trainer.strategy.launcher, "procs", None) == []
    if not record.writes and started_here:
        return 0  # the first rank answers for all of them
    return INTERRUPTED if stopped == "SIGINT" else REQUEUE


if __name__ == "__main__":
    raise SystemExit(launch("train", train))

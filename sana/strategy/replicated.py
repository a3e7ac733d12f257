"""DDP under Lightning: a full copy of the network in every process, gradients averaged."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from sana.strategy.launcher import Launcher


class Replicated(DDPStrategy):
    """`DDPStrategy` that also trains recipes of several modules with optimizers of their own.

    Args:
        timeout: minutes that a process waits for the others before it gives up.
    """

    def __init__(self, *, timeout: float = 30.0) -> None:
        super().__init__(gradient_as_bucket_view=True, timeout=timedelta(minutes=timeout))

    def configure_ddp(self) -> None:
        """Wrap the recipe; a loss of one module of several leaves gradients of the others out."""
        modules = self.lightning_module.trainables()  # type: ignore[union-attr, operator]
        self._ddp_kwargs["find_unused_parameters"] = len(modules) > 1
        super().configure_ddp()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher.of(self.cluster_environment, self.num_processes, self.num_nodes)

"""torch.compile for drawing, block by block, and only for the shapes that a measurement says it makes faster.

Compiling costs half a minute, and at some shapes the compiled blocks are slower than plain ones or than a CUDA graph of
plain ones. So "auto" measures both once per shape and machine, and keeps the answer in a file of the user's cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana.model.generate import Painter
from sana.model.graphs import LENGTH, DecoderGraphs, NetworkGraphs, padded
from sana.ops.choice import chosen
from sana.run.environment import cpu_name
from sana.run.records import write_atomically
from sana.types import Edits, Prepared

GAIN = 0.97
"""The compiled call must take less than this share of the plain one's time, or it is not worth its half minute."""
CALLS = 5
WARM_UPS = 2
BROKEN = (OSError, ValueError, KeyError, TypeError)  # what reading a damaged file raises

_logger = logging.getLogger(__name__)


class Regions:
    """The blocks of a module, each of which can stand as it is or compiled; both share their parameters.

    Args:
        containers: lists whose members are the regions. Blocks of one kind share one compiled graph per shape.
    """

    def __init__(self, containers: Sequence[nn.Module]) -> None:
        self.places = [(container, name) for container in containers for name in list(container._modules)]
        self.plain = [container.get_submodule(name) for container, name in self.places]
        self._compiled: list[nn.Module] = []
        self._on = False

    def use(self, on: bool) -> None:
        """Put the compiled blocks in place, or the plain ones."""
        if on == self._on:
            return
        if on and not self._compiled:
            self._compiled = [copy.copy(block) for block in self.plain]  # the same parameters, another call
            for block in self._compiled:
                block.compile(dynamic=False)
        for (container, name), block in zip(self.places, self._compiled if on else self.plain, strict=True):
            setattr(container, name, block)
        self._on = on


class CompileGate:
    """A call that goes through compiled blocks, always or where that is faster.

    Args:
        module: what is called; its structure is part of the key.
        regions: its blocks.
        plain, compiled: the calls to choose from, such as a module and its CUDA graphs; `compiled` is only called with
            the compiled blocks in place, `plain` with the plain ones.
        mode: True: always compiled. "auto": where a measurement says so.
        cache: folder of the answers; None: ``$XDG_CACHE_HOME/sana/compile``.
        clock: seconds, after the device has caught up.
    """

    def __init__(
        self,
        module: nn.Module,
        regions: Regions,
        plain: Callable[..., Tensor],
        compiled: Callable[..., Tensor],
        mode: Literal[True, "auto"],
        cache: str | Path | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.module, self.regions, self.plain, self.compiled, self.mode = module, regions, plain, compiled, mode
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = home / "sana" / "compile" if cache is None else Path(cache)
        self.clock = clock or _clock
        self._digest: str | None = None
        self._known: dict[str, bool] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        """The call; the first one of a shape that nobody has measured takes as long as compiling does."""
        if self.mode is True:
            return self._run(True, *inputs)
        key = json.dumps(self.key(*inputs), sort_keys=True)
        if key not in self._known:
            found = self._read(key)
            self._known[key] = self._measure(key, inputs) if found is None else found
        return self._run(self._known[key], *inputs)

    def key(self, *inputs: Any) -> dict[str, Any]:
        """What the answer depends on: the module, its inputs' shapes and types, precision, device and versions."""
        if self._digest is None:
            self._digest = digest(self.module)
        device = next(x.device for x in inputs if isinstance(x, Tensor))
        cuda = device.type == "cuda"
        return {
            "module": self._digest,
            "inputs": [_form(value) for value in inputs],
            "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
            "kernels": chosen(),
            "graphs": isinstance(self.plain, NetworkGraphs | DecoderGraphs),
            "device": torch.cuda.get_device_name(device)
            if cuda
            else f"{cpu_name()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def _run(self, on: bool, *inputs: Any) -> Tensor:
        self.regions.use(on)
        return (self.compiled if on else self.plain)(*inputs)

    def _measure(self, key: str, inputs: tuple[Any, ...]) -> bool:
        plain, begin = self._time(False, inputs), self.clock()
        try:
            self._run(True, *inputs)
        except Exception as error:  # a compiler that is not installed, or that fails: plain blocks work
            _logger.warning("compile: %s stays plain: %s", type(self.module).__name__, str(error).split("\n")[0])
            return False
        took = self.clock() - begin
        compiled = self._time(True, inputs)
        answer = compiled < GAIN * plain
        facts = {"compiled": answer, "plain_ms": 1e3 * plain, "compiled_ms": 1e3 * compiled, "first_call_s": took}
        _logger.info(
            "compile: %s %.2f ms plain, %.2f ms compiled", type(self.module).__name__, 1e3 * plain, 1e3 * compiled
        )
        self._write(key, facts)
        return answer

    def _time(self, on: bool, inputs: tuple[Any, ...]) -> float:
        """Median seconds of a call."""
        for _ in range(WARM_UPS):
            self._run(on, *inputs)
        times = []
        for _ in range(CALLS):
            begin = self.clock()
            self._run(on, *inputs)
            times.append(self.clock() - begin)
        return statistics.median(times)

    def _read(self, key: str) -> bool | None:
        """The answer of an earlier measurement; None where there is none that can be read."""
        try:
            content = json.loads(self._file(key).read_text(encoding="utf-8"))
            answer = content["compiled"] if content["key"] == json.loads(key) else None
        except BROKEN:
            return None
        return answer if isinstance(answer, bool) else None

    def _write(self, key: str, facts: dict[str, Any]) -> None:
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(key), json.dumps({"key": json.loads(key), **facts}, indent=1) + "\n")
        except OSError as error:  # the answer holds for this process all the same
            _logger.warning("compile: the measurement is not kept: %s", error)

    def _file(self, key: str) -> Path:
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


class Padded:
    """A network that gets its captions padded to a few lengths, as it is compiled for each length anew.

    Args:
        network: as `sana.model.generate.Painter` takes it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._last: tuple[Callable[[], Prepared | None], Prepared] | None = None

    def __call__(self, x: Tensor, t: Tensor, prepared: Prepared, *edits: Edits) -> Tensor:
        """As the network; the padded copy of the last prompt is kept."""
        if self._last is None or self._last[0]() is not prepared:
            self._last = weakref.ref(prepared), padded(prepared)
        return self.network(x, t, self._last[1], *edits)


def use_compiled(painter: Painter, mode: Literal[False, True, "auto"]) -> Painter:
    """Let a painter draw through compiled blocks of the network and the autoencoder: never, always, or where a
    measurement says that they are faster. CUDA graphs that it uses stay, each kind of block with its own.

    Raises:
        ValueError: parts are offloaded; what moves cannot be compiled for its place.
    """
    if mode is False:
        return painter
    if painter.offload is not None:
        raise ValueError(f"compile: {str(mode).lower()} with offload={painter.offload.mode}; compiled blocks have to "
                         "stay in place: choose offload=none or compile=false")  # fmt: skip
    network, autoencoder = painter.network, painter.autoencoder
    graphs = painter.velocity is not None
    painter.velocity = CompileGate(
        network,
        Regions([network.blocks]),
        NetworkGraphs(network) if graphs else network,
        NetworkGraphs(network) if graphs else Padded(network),
        mode,
    )
    stages = getattr(getattr(autoencoder, "decoder", None), "stages", None)
    if stages is not None:
        graphs = painter.pixels is not None
        painter.pixels = CompileGate(
            autoencoder,
            Regions(list(stages)),
            DecoderGraphs(autoencoder) if graphs else autoencoder.decode,
            DecoderGraphs(autoencoder) if graphs else autoencoder.decode,
            mode,
        )
    return painter


def digest(module: nn.Module) -> str:
    """Of a module's structure: its classes, settings and the shapes and types of its tensors, not their numbers."""
    parts = [f"{name} {type(part).__qualname__} {part.extra_repr()}" for name, part in module.named_modules()]
    tensors = (*module.named_parameters(), *module.named_buffers())
    parts += [f"{name} {tuple(x.shape)} {x.dtype}" for name, x in tensors]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _form(value: Any) -> Any:
    """Shapes and types of an input, as JSON has them."""
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype)]
    if isinstance(value, Prepared):
        kv = value.text_kv[0]
        return {
            "caption": [kv.shape[0], -(-kv.shape[1] // LENGTH) * LENGTH, str(kv.dtype)],
            "masked": value.mask is not None,
            "times": None if value.times is None else list(value.times.vectors.shape),
        }
    if isinstance(value, Edits):
        return sorted(value.identity_attention)
    raise TypeError(f"CompileGate: no key for a {type(value).__name__}")


def _clock() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()

"""CUDA graphs for drawing: a step of the network, or decoding, is recorded once and then replayed with one launch.

At batch 1 the time of a step is that of launching its kernels one by one, not of what they compute; a graph launches
them together. What it reads and writes has fixed addresses, so inputs are copied to where it reads, and its output is
copied from where it writes. A graph holds for one set of shapes and types, and for the parts and parameters that it was
recorded with; all are compared before each drawing.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sana.ops.choice import chosen
from sana.types import Condition, Edits, Prepared, Times

LIMIT = 8
"""Graphs that are kept of one module; the one that was used longest ago goes first."""
LENGTH = 64
"""Captions are padded to multiples of so many tokens, so that prompts of all lengths share a few graphs."""
LATENT_PIXELS = 1 << 14
"""Above so many per call (16 images of 1024 x 1024 pixels) the launches hide behind the work, and nothing is gained."""
DECODED_PIXELS = 1 << 20
"""The same for decoding: one image of 1024 x 1024."""
PROMPT_TOKENS = 1 << 11
"""The same for keys and values of captions, with their padding; a graph would hold them twice, for all layers."""
SHARE = 0.25
"""Of the free memory that decoding may take in a graph, where it stays taken."""
WARM_UPS = 1

_logger = logging.getLogger(__name__)
NO_EDITS = Edits()


class Capture(Protocol):
    """Records work: (function of no arguments) -> (what repeats it, the tensor that each repetition fills)."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]: ...


class CudaCapture:
    """`Capture` by CUDA graphs, which share one pool of memory.

    Sharing it lets a graph's output lie where another keeps its intermediates. So an output has to be copied before any
    other graph of the pool is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        with torch.cuda.device(self.device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):  # kernels are compiled, chosen and given their workspaces
                for _ in range(WARM_UPS):
                    run()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = run()
        return graph.replay, output


@dataclass
class Recorded:
    """A graph: where its inputs lie, what replays it, and where its output lies.

    Attributes:
        prompt: the `Prepared` whose numbers lie in `inputs`, while that is alive.
    """

    inputs: Any
    replay: Callable[[], Any]
    output: Tensor
    prompt: Callable[[], Prepared | None] = lambda: None


class Graphs:
    """The graphs of a module by key, at most `limit` of them.

    Args:
        module: whose parameters the graphs read; where they move or a part is replaced, all graphs go.
        capture: None: CUDA's, on the device of the inputs. Tests without a GPU give a stand-in.
        limit: see `LIMIT`.
    """

    def __init__(self, module: nn.Module, capture: Capture | None = None, limit: int = LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"Graphs: limit must be at least 1, got {limit}")
        self.module, self.limit = module, limit
        self.kept: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._capture = capture
        self._any_device = capture is not None
        self._refused: set[Hashable] = set()
        self._watch()

    def possible(self, x: Tensor) -> bool:
        """Whether a call with this input may be replayed at all: on CUDA, where nothing is differentiated or traced."""
        return (
            (self._any_device or x.is_cuda)
            and not torch.is_grad_enabled()
            and forward_ad._current_level < 0
            and not torch.compiler.is_compiling()
        )

    def find(self, key: Hashable) -> Recorded | None:
        """The graph of a key, which counts as used now."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def record(self, key: Hashable, inputs: Any, device: torch.device, run: Callable[[], Tensor]) -> Recorded | None:
        """A new graph of `run`, which reads `inputs`; None, said once, where the device refuses to record it."""
        if key in self._refused:
            return None
        if self._capture is None:
            self._capture = CudaCapture(device)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # casts kept from before would be read after they are freed
        try:
            found = Recorded(inputs, *self._capture(run))
        except RuntimeError as error:  # an operation that waits for the device, or too little memory
            self._refused.add(key)
            _logger.warning("graphs: %s is run without: %s", type(self.module).__name__, str(error).split("\n")[0])
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.kept[key] = found
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        return found

    def check(self) -> None:
        """Drop all graphs where the module has another part, or a parameter other memory, than when they were recorded.

        Parts are replaced by quantising, by adapters, and by whoever assigns one.
        """
        if self._seen() == self._state:
            return
        self.kept.clear()
        self._refused.clear()
        self._watch()
        if not self._any_device:
            self._capture = None  # a pool of memory ends with its last graph

    def _watch(self) -> None:
        self._parts = list(self.module.modules())  # held, so that no later part can be taken for one of them
        self._children: list[dict[str, Any]] = [part._modules for part in self._parts]
        self._tensors: list[dict[str, Any]] = [d for part in self._parts for d in (part._parameters, part._buffers)]
        self._state = self._seen()

    def _seen(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The parts, and identity and memory of each parameter and buffer.

        While all parts have the same children they are the same parts: sooner found so than by walking the module.
        """
        children, tensors = (chain.from_iterable(map(dict.values, held)) for held in (self._children, self._tensors))
        places = [(id(x), x.data_ptr() if type(x) in (Tensor, nn.Parameter) else 0) for x in tensors]
        return list(map(id, children)), places


class NetworkGraphs:
    """``network(x, t, prepared, edits)`` by graphs, one per shapes, types and edits.

    The result equals that of the network on `padded` inputs, bit for bit. The prompt's keys and values are copied when
    another `Prepared` object is given, so they must not be changed in place.

    Args:
        network: as `Painter` takes it.
        capture, limit: see `Graphs`.
    """

    def __init__(self, network: nn.Module, capture: Capture | None = None, limit: int = LIMIT) -> None:
        self.network, self.graphs = network, Graphs(network, capture, limit)

    def __call__(self, x: Tensor, t: Tensor, prepared: Prepared, edits: Edits = NO_EDITS) -> Tensor:
        """As the network; where a graph cannot serve or would not help, by the network."""
        pixels = x.numel() // x.shape[1]
        if not self.graphs.possible(x) or edits.residual or pixels > LATENT_PIXELS:
            return self.network(x, t, prepared, edits)
        key = (_form(x), _form(t), _forms(prepared), edits.identity_attention, self._mode(x))
        found = self.graphs.find(key)
        if found is None or found.prompt() is not prepared:
            self.graphs.check()
            found = self.graphs.find(key)
        if found is None:
            inputs = (torch.empty_like(x), torch.empty_like(t), _room(prepared))
            _fill(inputs, x, t)
            _fill_prompt(inputs[2], prepared)
            found = self.graphs.record(key, inputs, x.device, lambda: self.network(*inputs, edits))
            if found is None:
                return self.network(x, t, prepared, edits)
            found.prompt = weakref.ref(prepared)
        else:
            _fill(found.inputs, x, t)
            if found.prompt() is not prepared:
                _fill_prompt(found.inputs[2], prepared)
                found.prompt = weakref.ref(prepared)
        found.replay()
        return found.output.clone()

    def _mode(self, x: Tensor) -> tuple[Any, ...]:
        """What a forward depends on besides its inputs and parameters."""
        return (chosen(), getattr(self.network, "floor_time", None), *_autocast(x))


class PromptGraphs:
    """Keys and values of captions, ``network.prepare(condition).text_kv``, by graphs: one per number of captions and
    padded length.

    Args:
        network: as `Painter` takes it.
        capture, limit: see `Graphs`.
    """

    def __init__(self, network: Any, capture: Capture | None = None, limit: int = LIMIT) -> None:
        self.network, self.graphs = network, Graphs(network, capture, limit)

    def __call__(self, text: Tensor) -> tuple[Tensor, ...]:
        """Of features (u, l, c): one tensor (u, l, 2 d) per layer."""
        if not self.graphs.possible(text):
            return self.network.prepare(Condition(text)).text_kv
        u, l, c = text.shape
        length = -(-l // LENGTH) * LENGTH
        if u * length > PROMPT_TOKENS:
            return self.network.prepare(Condition(text)).text_kv
        key = (u, length, c, text.dtype, chosen(), *_autocast(text))
        self.graphs.check()
        found = self.graphs.find(key)
        if found is None:
            inputs = text.new_zeros(u, length, c)
            inputs[:, :l] = text
            found = self.graphs.record(key, inputs, text.device, lambda: self._stacked(inputs))
            if found is None:
                return self.network.prepare(Condition(text)).text_kv
        else:
            found.inputs[:, :l] = text  # what lies beyond is of no caption
        found.replay()
        return found.output.clone()[:, :, :l].unbind(0)

    def _stacked(self, text: Tensor) -> Tensor:
        return torch.stack(self.network.prepare(Condition(text)).text_kv)


class DecoderGraphs:
    """``autoencoder.decode(latents)`` by graphs, one per shape and type, where it works on the whole image at once.

    Args:
        autoencoder: with `ratio`, `plan` and `max_memory_gib` as those of `sana.encoder.autoencoder.dc_ae.DCAE`.
        capture, limit: see `Graphs`.
    """

    def __init__(self, autoencoder: Any, capture: Capture | None = None, limit: int = LIMIT) -> None:
        self.autoencoder, self.graphs = autoencoder, Graphs(autoencoder, capture, limit)
        self._large: dict[Hashable, bool] = {}

    def __call__(self, latents: Tensor) -> Tensor:
        """As `decode`; where a graph cannot serve or would not help, by it."""
        key = (_form(latents), chosen(), *_autocast(latents))
        if not self.graphs.possible(latents) or self._too_large(key, latents):
            return self.autoencoder.decode(latents)
        self.graphs.check()
        found = self.graphs.find(key)
        if found is None:
            inputs = latents.clone()
            found = self.graphs.record(key, inputs, latents.device, lambda: self.autoencoder.decode(inputs))
            if found is None:
                return self.autoencoder.decode(latents)
        else:
            found.inputs.copy_(latents)
        found.replay()
        return found.output.clone()

    def _too_large(self, key: Hashable, latents: Tensor) -> bool:
        """Whether decoding is in tiles, takes too much of the memory, or long enough to hide its launches."""
        if key not in self._large:
            pixels = latents.numel() // latents.shape[1] * self.autoencoder.ratio**2
            tiled = getattr(self.autoencoder, "blending", None) is not None
            if not tiled and pixels <= DECODED_PIXELS:
                plan = self.autoencoder.plan("decode", latents)
                free = torch.cuda.mem_get_info(latents.device)[0] if latents.is_cuda else 2**63
                tiled = any(segment.tile for segment in plan.segments) or plan.bytes > SHARE * free
            self._large[key] = tiled or pixels > DECODED_PIXELS
        return self._large[key]


def padded(prepared: Prepared, multiple: int = LENGTH) -> Prepared:
    """The same prompt with its caption padded to a multiple of tokens, which the mask excludes."""
    room = _room(prepared, multiple)
    _fill_prompt(room, prepared)
    return room


def _room(prepared: Prepared, multiple: int = LENGTH) -> Prepared:
    """Memory for prompts like this one and others of the padded length."""
    shape = prepared.text_kv[0].shape
    length = -(-shape[1] // multiple) * multiple
    kv = tuple(layer.new_zeros(shape[0], length, layer.shape[2]) for layer in prepared.text_kv)
    masked = prepared.mask is not None or length != shape[1]
    mask = torch.zeros(shape[0], length, dtype=torch.bool, device=kv[0].device) if masked else None
    guidance = None if prepared.guidance is None else torch.empty_like(prepared.guidance)
    times = prepared.times
    if times is not None:
        times = Times(*(torch.empty_like(part) for part in (times.t, times.embedding, times.vectors)))
    return Prepared(kv, mask, guidance, times)


def _fill(inputs: tuple[Tensor, Tensor, Prepared], x: Tensor, t: Tensor) -> None:
    inputs[0].copy_(x)
    inputs[1].copy_(t)


def _fill_prompt(room: Prepared, prepared: Prepared) -> None:
    """Copy a prompt, and zeros beyond its length.

    The mask excludes what lies there, but NaN times a weight of zero is NaN, and a caption that is masked in full
    attends to everything.
    """
    length = prepared.text_kv[0].shape[1]
    torch._foreach_copy_([layer[:, :length] for layer in room.text_kv], list(prepared.text_kv))
    if length < room.text_kv[0].shape[1]:
        torch._foreach_zero_([layer[:, length:] for layer in room.text_kv])
    if room.mask is not None:
        room.mask.zero_()
        room.mask[:, :length] = True if prepared.mask is None else prepared.mask
    if room.guidance is not None and prepared.guidance is not None:
        room.guidance.copy_(prepared.guidance)
    if room.times is not None and prepared.times is not None:
        for name in ("t", "embedding", "vectors"):
            getattr(room.times, name).copy_(getattr(prepared.times, name))


def _form(x: Tensor | None) -> Hashable:
    return None if x is None else (tuple(x.shape), x.dtype, x.device)


def _forms(prepared: Prepared) -> Hashable:
    """What of a prompt a graph depends on: everything but the numbers and the length within its multiple."""
    (b, length, channels), times = prepared.text_kv[0].shape, prepared.times
    full = -(-length // LENGTH) * LENGTH
    masked = prepared.mask is not None or full != length
    return (
        (len(prepared.text_kv), b, full, channels, prepared.text_kv[0].dtype, masked),
        _form(prepared.guidance),
        None if times is None else (_form(times.t), _form(times.embedding), _form(times.vectors)),
    )


def _autocast(x: Tensor) -> tuple[Any, ...]:
    place = x.device.type
    return torch.is_autocast_enabled(place), torch.get_autocast_dtype(place)

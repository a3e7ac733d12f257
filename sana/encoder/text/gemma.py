"""Gemma-2 as SANA's text encoder: the last hidden state of BOS and of the last 299 tokens of a prompt.

Source: SANA, arXiv 2410.10629, section 2.3, and the published training code. The decoder is causal; features are
taken after its final RMSNorm and are not normalised here (the network does that).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sana.encoder.text.instruction import read_instruction
from sana.encoder.text.weights import DTYPES, load_gemma
from sana.types import Condition

_CHUNK = 8
"""Captions per forward pass when features are cached. A constant, since last bits of a product can depend on its
shape: with it a caption's features are a function of the caption alone, whatever else was in the batch or cache."""


class _Prefix(NamedTuple):
    """The instruction, read once.

    Attributes:
        ids: (start,) its tokens without the last one, which the prompt's first word may swallow.
        cache: their keys and values in every layer, for a batch of one.
        first: (1, 1, c) features of BOS.
    """

    ids: Int[Tensor, " start"]
    cache: Any
    first: Float[Tensor, "1 1 c"]


class GemmaEncoder(nn.Module):
    """Prompts to token features.

    A prompt of k tokens gives BOS and its first k rows; masked rows fill it to `max_tokens`. Before the prompt stands
    the instruction, if there is one: it is seen by the prompt's tokens through causal attention, and its rows are cut.
    As no token of it sees the prompt, its keys and values are computed once and serve every prompt.
    The sequence is cut on the right at n_instruction + max_tokens - 2 tokens, where the 2 are BOS and the trailing
    space of the instruction, which becomes part of the prompt's first word.

    The network must use the mask. What a dropped caption is (its own mask or, as in the published training, the null
    features under the real caption's mask) is the model's choice: `null` gives all `max_tokens` rows for that.

    Args:
        path: folder or hub name of Gemma-2, see `sana.encoder.text.weights.load_gemma`.
        max_tokens: rows per prompt with BOS; 300 in all published models.
        instruction: None, "diffusers" or a file, see `sana.encoder.text.instruction.read_instruction`.
        dtype: "bfloat16" (published) or "float32", of weights and features.
        lowercase: lower-case the prompt first. False in the published training, True in diffusers' pipeline.
        strip: remove white space around the prompt first. False in the published training, True in diffusers' pipeline.
        trim: cut masked rows beyond the longest prompt of a batch (and set those that stay to zero), which changes
            nothing for a network that uses the mask. False is the published form.
        cache: how many captions' features to remember (least recently used go first), 0 for none; needs `trim`.

    Attributes:
        channels: width of the features, 2304 for Gemma-2-2b.
        max_tokens: as given.

    Raises:
        GemmaUnavailableError: the weights are not here; the message has the steps.
        ValueError: an argument out of range, another architecture, or a tokenizer that does not add exactly BOS.
    """

    channels: int
    max_tokens: int
    _null: Tensor | None
    _null_mask: Tensor | None

    def __init__(
        self,
        path: str,
        max_tokens: int = 300,
        instruction: str | None = None,
        dtype: str = "bfloat16",
        lowercase: bool = False,
        strip: bool = False,
        trim: bool = False,
        cache: int = 0,
    ):
        if dtype not in DTYPES:
            raise ValueError(
                f"text encoder: dtype {dtype!r}; expected bfloat16 or float32 (Gemma-2 overflows in float16)"
            )
        text = read_instruction(instruction)
        model, tokenizer = load_gemma(path, DTYPES[dtype])
        self._build(model, tokenizer, max_tokens, text, lowercase, strip, trim, cache)

    @classmethod
    def from_parts(
        cls,
        model: nn.Module,
        tokenizer: Any,
        max_tokens: int = 300,
        instruction: str | None = None,
        lowercase: bool = False,
        strip: bool = False,
        trim: bool = False,
        cache: int = 0,
    ) -> Self:
        """The same encoder around a model and tokenizer that exist already.

        Args:
            model: transformers' Gemma2Model with an attention that applies logit soft-capping (eager does, SDPA does
                not); kept as it is, in its dtype.
            tokenizer: a transformers tokenizer that adds BOS and nothing else.
            instruction: the text itself, or None.
        """
        encoder = cls.__new__(cls)
        encoder._build(model, tokenizer, max_tokens, instruction, lowercase, strip, trim, cache)
        return encoder

    def _build(
        self,
        model: Any,
        tokenizer: Any,
        max_tokens: int,
        instruction: str | None,
        lowercase: bool,
        strip: bool,
        trim: bool,
        cache: int,
    ) -> None:
        if max_tokens < 2:
            raise ValueError(f"text encoder: max_tokens is {max_tokens}, expected at least 2 (BOS and one token)")
        if cache < 0 or (cache and not trim):
            raise ValueError(f"text encoder: cache is {cache}, trim {trim}; expected cache >= 0, and trim=true with it")
        if model.config._attn_implementation == "sdpa":
            raise ValueError("text encoder: attention 'sdpa' leaves out Gemma-2's logit soft-capping; expected 'eager'")
        if tokenizer.pad_token_id is None:
            raise ValueError("text encoder: the tokenizer has no padding token")
        if tokenizer("").input_ids != [tokenizer.bos_token_id]:
            raise ValueError(
                f"text encoder: the tokenizer turns '' into {tokenizer('').input_ids}; expected BOS alone, "
                f"[{tokenizer.bos_token_id}]"
            )
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.channels = model.config.hidden_size
        self.max_tokens = max_tokens
        self.instruction = instruction or ""
        self.lowercase, self.strip, self.trim = lowercase, strip, trim
        self.register_buffer("_null", None, persistent=False)
        self.register_buffer("_null_mask", None, persistent=False)
        self._start = len(tokenizer(self.instruction).input_ids) - 1 if self.instruction else 1
        self._prefix: _Prefix | None = None
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._capacity = cache

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the encoder is frozen, also inside a module that trains."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moved or cast: what is cached lies elsewhere."""
        self._cache.clear()
        self._prefix = None
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], instruct: bool = True) -> Condition:
        """Features and mask of each caption.

        Args:
            captions: b prompts.
            instruct: put the instruction before them; False is the published form of a negative prompt.

        Returns:
            text (b, l, channels) in the model's dtype and mask (b, l), True on BOS and the prompt's tokens; l is
            `max_tokens`, or with `trim` the longest of the batch.
        """
        texts, prefix = self._texts(captions), self.instruction if instruct else ""
        if self._capacity:
            rows = self._cached_rows(texts, prefix)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            return Condition(text=nn.utils.rnn.pad_sequence(rows, batch_first=True), mask=mask.to(self.model.device))
        ids, mask = self._tokenise([prefix + text for text in texts], prefix, longest=self.trim)
        features, mask = self._run(ids, mask, prefix)
        if self.trim:
            features = features * mask.unsqueeze(-1)
        return Condition(text=features, mask=mask)

    @torch.no_grad()
    def rows(
        self,
        captions: Sequence[str],
        instruct: bool = True,
        hidden: Callable[[Tensor, _Prefix | None], Tensor] | None = None,
    ) -> list[Float[Tensor, "k c"]]:
        """Features of each caption's own tokens, which depend on the caption alone, to the last bit.

        Each caption is computed by itself (with a cache: in chunks of a constant shape), so neither padding nor company
        shows in them: what a picture needs that shall be the same in any batch. A caption that occurs twice is computed
        once.

        Args:
            captions, instruct: as in `encode`.
            hidden: computes what `hidden` does, in another way; not used where features come from the cache, nor for
                what is longer than the model's sliding window.

        Returns:
            One (k, channels) per caption, k = its tokens with BOS, at most `max_tokens`.
        """
        texts, prefix = self._texts(captions), self.instruction if instruct else ""
        if self._capacity:
            return self._cached_rows(texts, prefix)
        found = {}
        for text in dict.fromkeys(texts):
            ids, mask = self._tokenise([prefix + text], prefix, longest=True)
            if hidden is None or ids.shape[1] > self._window:
                found[text] = self._run(ids, mask, prefix)[0][0]
            else:
                found[text] = self._alone(ids, prefix, hidden)[0]
        return [found[text] for text in texts]

    @torch.no_grad()
    def hidden(self, ids: Int[Tensor, "1 n"], prefix: _Prefix | None) -> Float[Tensor, "1 n c"]:
        """Last hidden states of a sequence without padding, or of what follows the prefix; within the sliding window.

        Nothing in it waits for the device or depends on numbers there, so it can be recorded in a CUDA graph: the masks
        are made here, where transformers would look whether it needs them.
        """
        n, before = ids.shape[1], 0
        more: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            before, more = len(prefix.ids), {"past_key_values": self._keys_values(prefix, 1), "use_cache": True}
        place = torch.arange(before + n, device=ids.device)
        unseen = place > place[before:, None]
        bias = torch.zeros_like(unseen, dtype=self.model.dtype).masked_fill_(unseen, torch.finfo(self.model.dtype).min)
        masks = dict.fromkeys(("full_attention", "sliding_attention"), bias[None, None])
        with torch.autocast(ids.device.type, enabled=False):
            out = self.model(input_ids=ids, attention_mask=masks, position_ids=place[None, before:], **more)
        return out.last_hidden_state

    @torch.no_grad()
    def padded(self, caption: str, instruct: bool = False) -> Condition:
        """All `max_tokens` rows of one caption; those of padding tokens have the features that the model gives them.

        The published pipelines let the unconditional branch look at such rows: under the positive prompt's mask.

        Args:
            caption: such as a negative prompt, or "".
            instruct: put the instruction before it.

        Returns:
            text (1, max_tokens, channels) and mask (1, max_tokens), True on BOS and the caption's tokens.
        """
        (text,), prefix = self._texts([caption]), self.instruction if instruct else ""
        ids, mask = self._tokenise([prefix + text], prefix, longest=False)
        features, mask = self._run(ids, mask, prefix)
        return Condition(text=features, mask=mask)

    @torch.no_grad()
    def null(self, b: int, length: int | None = None) -> Condition:
        """The unconditional input: "" without instruction, b times.

        Args:
            b: how many.
            length: rows to keep, `max_tokens` by default; the l of a trimmed batch, to mix with it.

        Returns:
            text (b, length, channels), with the features of the padding tokens beyond BOS, and mask, True on BOS.
        """
        if self._null is None:
            null = self.padded("")
            self._null, self._null_mask = null.text, null.mask
        assert self._null is not None
        assert self._null_mask is not None
        length = self.max_tokens if length is None else length
        if not 1 <= length <= self.max_tokens:
            raise ValueError(f"text encoder: null of length {length}, expected 1 to {self.max_tokens}")
        return Condition(text=self._null[:, :length].expand(b, -1, -1), mask=self._null_mask[:, :length].expand(b, -1))

    def _texts(self, captions: Sequence[str]) -> list[str]:
        if isinstance(captions, str) or not len(captions):
            raise ValueError(f"text encoder: expected a non-empty list of captions, got {captions!r}")
        return [self._normalise(caption) for caption in captions]

    def _normalise(self, caption: str) -> str:
        if self.lowercase:
            caption = caption.lower()
        return caption.strip() if self.strip else caption

    def _tokenise(self, texts: list[str], prefix: str, longest: bool) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Token ids and mask, padded on the right to the longest text or to the whole length."""
        start = self._start if prefix else 1
        tokens = self.tokenizer(
            texts,
            padding="longest" if longest else "max_length",
            max_length=start + self.max_tokens - 1,
            truncation=True,
            padding_side="right",
            return_tensors="pt",
        )
        device = self.model.device
        return tokens.input_ids.to(device), tokens.attention_mask.to(device, torch.bool)

    def _run(
        self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], prefix: str
    ) -> tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]]:
        """Last hidden state and mask of BOS and of what follows the prefix."""
        start = self._start if prefix else 1
        rows = [0, *range(start, ids.shape[1])]
        # Under a surrounding autocast the features would depend on who calls.
        with torch.autocast(ids.device.type, enabled=False):
            if not prefix or ids.shape[1] <= start:
                return self._hidden(ids, mask)[:, rows], mask[:, rows]
            known = self._read_prefix()
            # A prompt may merge with more of the instruction than its trailing space: such a row is computed whole.
            usual = (ids[:, :start] == known.ids).all(1)
            if bool(usual.all()):
                return self._after(known, ids, mask), mask[:, rows]
            features = self._hidden(ids, mask)[:, rows]
            if bool(usual.any()):
                features[usual] = self._after(known, ids[usual], mask[usual])
            return features, mask[:, rows]

    @property
    def _window(self) -> int:
        """Tokens that a layer of the model may look back at, all layers being alike up to this length."""
        return getattr(self.model.config, "sliding_window", None) or 2**31

    def _alone(
        self, ids: Int[Tensor, "1 n"], prefix: str, hidden: Callable[[Tensor, _Prefix | None], Tensor]
    ) -> Float[Tensor, "1 l c"]:
        """Features of BOS and of what follows the prefix, of one caption without padding."""
        start = self._start if prefix else 1
        if prefix and ids.shape[1] > start:
            known = self._read_prefix()
            if bool((ids[0, :start] == known.ids).all()):
                return torch.cat([known.first, hidden(ids[:, start:], known)], dim=1)
        return hidden(ids, None)[:, [0, *range(start, ids.shape[1])]]

    def _hidden(self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        return self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state

    def _read_prefix(self) -> _Prefix:
        if self._prefix is None:
            ids = torch.tensor(self.tokenizer(self.instruction).input_ids[: self._start], device=self.model.device)
            out = self.model(input_ids=ids[None], use_cache=True)
            self._prefix = _Prefix(ids, out.past_key_values, out.last_hidden_state[:, :1])
        return self._prefix

    def _after(self, prefix: _Prefix, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b l c"]:
        """Features of BOS and of the tokens after the prefix, whose keys and values are not computed again."""
        b, cache = len(ids), self._keys_values(prefix, len(ids))
        rest = self.model(
            input_ids=ids[:, len(prefix.ids) :], attention_mask=mask.long(), past_key_values=cache, use_cache=True
        ).last_hidden_state
        return torch.cat([prefix.first.expand(b, -1, -1), rest], dim=1)

    @staticmethod
    def _keys_values(prefix: _Prefix, b: int) -> Any:
        """Those of the prefix for b rows, which all rows and calls share: an update makes new tensors and leaves these
        as they are."""
        cache = copy.copy(prefix.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = (x.expand(b, -1, -1, -1) for x in (layer.keys, layer.values))
        return cache

    def _cached_rows(self, texts: list[str], prefix: str) -> list[Float[Tensor, "k c"]]:
        """Each caption's rows from the cache, or computed in chunks of constant shape."""
        missing = [text for text in dict.fromkeys(texts) if prefix + text not in self._cache]
        found: dict[str, Tensor] = {}
        for text in texts:
            if prefix + text in self._cache:
                self._cache.move_to_end(prefix + text)
                found[text] = self._cache[prefix + text]
        for first in range(0, len(missing), _CHUNK):
            chunk = missing[first : first + _CHUNK]
            padded = [prefix + text for text in chunk] + [prefix] * (_CHUNK - len(chunk))
            ids, mask = self._tokenise(padded, prefix, longest=False)
            features, mask = self._run(ids, mask, prefix)
            for text, rows, count in zip(chunk, features, mask.sum(1).tolist(), strict=False):
                found[text] = self._cache[prefix + text] = rows[:count].clone()
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return [found[text] for text in texts]

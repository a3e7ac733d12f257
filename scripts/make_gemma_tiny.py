"""Make the tiny Gemma-2 of the scenes: a word-level tokenizer, a small causal language model, and their probe.

    python scripts/make_gemma_tiny.py --out experiments/gemma_tiny

The architecture is Gemma-2's, the size is not. It is trained on captions of training scenes (its text never states a
held-out combination) to predict the next word and, through linear heads that are thrown away afterwards, what has
been said so far: the `SLOTS`, from each token and from the mean over tokens. The heads are there because so small a
language model keeps only what the next word depends on (`--heads 0` shows it), while SANA conditions on a model that
keeps nearly everything. The probe is made of fresh ridge regressions on other scenes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana import scenes
from sana.data import synthetic
from sana.encoder.text.gemma import GemmaEncoder

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
MAX_TOKENS = 24

COLORS = {c: 1 + i for i, c in enumerate(scenes.COLORS)}
SHAPES = {s: 1 + i for i, s in enumerate(scenes.SHAPES)}
PLURALS = {scenes.plural(s): i for s, i in SHAPES.items()}
NOUNS = SHAPES | PLURALS | {"shape": 1 + len(SHAPES), "shapes": 1 + len(SHAPES), "something": 2 + len(SHAPES)}
COUNTS = {"a": 1, "an": 1, "one": 1, "something": 1, "two": 2, "three": 3, "four": 4, "several": 5, "some": 5}
LINKS = {"and": 1, "with": 1, "left": 2, "right": 3, "above": 4, "below": 5}
ADJECTIVES = {"large": 1, "small": 2}
GREYS = {"light": 1, "plain": 2, "dark": 3}
MEANINGFUL = {*COLORS, *NOUNS, *LINKS, *ADJECTIVES}

SLOTS = {
    "color1": 1 + len(COLORS),
    "shape1": 3 + len(SHAPES),
    "relation": 6,
    "color2": 1 + len(COLORS),
    "shape2": 3 + len(SHAPES),
    "count": 6,
    "size1": 3,
    "size2": 3,
    "background": 4,
}
"""What a caption can say -> number of values, 0 being "not said (yet)". 1 and 2 are the order of mention."""


def said(words: Sequence[str]) -> list[dict[str, int]]:
    """The slots after BOS and after each word, 1 + len(words) of them."""
    slots = dict.fromkeys(SLOTS, 0)
    rows = [dict(slots)]
    objects, color, size, count, previous = 0, 0, 0, 0, ""
    for word in words:
        if word in COUNTS:
            color, size, count = 0, 0, COUNTS[word]
        if word in COLORS and previous == "something":
            slots[f"color{min(objects, 2)}"] = COLORS[word]
        elif word in COLORS:
            color = COLORS[word]
        elif word in ADJECTIVES:
            size = ADJECTIVES[word]
        elif word in GREYS:
            slots["background"] = GREYS[word]
        elif word in LINKS and objects == 1:
            slots["relation"] = LINKS[word]
        elif word in NOUNS:
            objects += 1
            if objects <= 2:
                slots |= {f"color{objects}": color, f"shape{objects}": NOUNS[word], f"size{objects}": size}
            if objects == 1:
                slots["count"] = count
            color = size = 0
        rows.append(dict(slots))
        previous = word
    return rows


def held_out(words: Sequence[str]) -> bool:
    """Whether the words state a combination of `scenes.HELD_OUT`."""
    slots = said(words)[-1]
    if slots["count"] != 1:
        return False
    color, shape = ({v: k for k, v in names.items()} for names in (COLORS, SHAPES))
    role = {0: "alone", 1: "and", 2: "left of", 3: "right of", 4: "above", 5: "below"}[slots["relation"]]
    for i, own in ((1, role), (2, scenes.OPPOSITE.get(role, role))):
        pair = (color.get(slots[f"color{i}"], ""), shape.get(slots[f"shape{i}"], ""))
        if any((*pair, r) in scenes.HELD_OUT for r in {own, "alone" if role == "alone" else "and"}):
            return True
    return False


def captions(seed: int, count: int, held: bool = False) -> list[list[str]]:
    """The words of the four captions of each of `count` scenes."""
    made = (synthetic.captions(synthetic.make_scene(seed, i, held_out=held)) for i in range(count))
    return [caption["text"].split() for four in made for caption in four]


def reword(words: list[str], rng: random.Random) -> list[str]:
    """The sentence with other colours and shapes half of the time, unless it then states something held out; and half
    of the time with each word that fills a slot unknown by a chance of 1 in 4, so that no slot's code can lean on
    another's."""
    for _ in range(4 if rng.random() < 0.5 else 0):
        new = list(words)
        for i, word in enumerate(words):
            for names in (COLORS, SHAPES, PLURALS):
                if word in names:
                    new[i] = rng.choice(list(names))
        if not held_out(new):
            words = new
            break
    chance = 0.25 if rng.random() < 0.5 else 0.0
    return ["<unk>" if word in MEANINGFUL and rng.random() < chance else word for word in words]


def tensors(texts: Sequence[Sequence[str]], ids: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Token ids (b, n), padded with PAD, and slots (b, n, slots), padded with -100."""
    n = 1 + max(len(words) for words in texts)
    tokens = torch.full((len(texts), n), PAD)
    slots = torch.full((len(texts), n, len(SLOTS)), -100)
    for i, words in enumerate(texts):
        tokens[i, : len(words) + 1] = torch.tensor([BOS, *(ids[w] for w in words)])
        slots[i, : len(words) + 1] = torch.tensor([list(row.values()) for row in said(words)])
    return tokens, slots


def build_tokenizer() -> Any:
    """One token per word of the scenes, lower case, without punctuation, BOS before, padding on the right."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *synthetic.vocabulary()))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="right", model_max_length=MAX_TOKENS, **names)


def build_model(vocabulary: int, width: int, layers: int) -> Any:
    """A Gemma-2 language model with random weights and all of Gemma-2's habits (soft caps, four norms a layer)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    heads = 4
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        query_pre_attn_scalar=width // heads,
        max_position_embeddings=4 * MAX_TOKENS,
        sliding_window=4 * MAX_TOKENS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.05,
    )
    return Gemma2ForCausalLM(config)


def losses(
    model: Any, heads: nn.ModuleList, tokens: Tensor, slots: Tensor, noise: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies in nats: of the next word, of the slots from each token, of all slots from the mean token.

    The heads read features with Gaussian noise (of `noise` times their root mean square; half of it on the mean), so
    that values of a slot must lie apart, along directions that serve every context.
    """
    mask = tokens != PAD
    row, last = torch.arange(len(tokens)), mask.sum(1) - 1
    hidden = model.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
    cap = model.config.final_logit_softcapping
    logits = cap * torch.tanh(model.lm_head(hidden) / cap)
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], PAD)], 1)
    following[row, last] = EOS
    word = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=PAD)
    sizes = list(SLOTS.values())
    scale = noise * hidden[mask].square().mean().sqrt().detach()
    mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    each = heads[0](hidden + scale * torch.randn_like(hidden)).flatten(0, 1).split(sizes, -1)
    pooled = heads[1](mean + 0.5 * scale * torch.randn_like(mean)).split(sizes, -1)
    a = [F.cross_entropy(x, slots[..., k].flatten(), ignore_index=-100) for k, x in enumerate(each)]
    b = [F.cross_entropy(x, slots[row, last, k]) for k, x in enumerate(pooled)]
    return word, torch.stack(a).mean(), torch.stack(b).mean()


def batches(texts: list[list[str]], size: int, rng: random.Random) -> Iterator[list[list[str]]]:
    """Batches of similar length without end."""
    while True:
        pool = sorted((reword(words, rng) for words in rng.choices(texts, k=16 * size)), key=len)
        firsts = list(range(0, len(pool), size))
        rng.shuffle(firsts)
        for first in firsts:
            yield pool[first : first + size]


def train(model: Any, texts: list[list[str]], ids: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    """AdamW with warm-up and a cosine; returns the mean losses of the last 100 steps."""
    heads = nn.ModuleList(nn.Linear(args.width, sum(SLOTS.values())) for _ in range(2))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.decay)
    start, history = time.perf_counter(), []
    for step, batch in zip(range(args.steps), batches(texts, args.batch, random.Random(args.seed)), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        word, each, pooled = losses(model, heads, *tensors(batch, ids), args.noise)
        optimizer.zero_grad()
        (args.words * word + args.heads * (each + pooled)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append((word.item(), each.item(), pooled.item()))
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            word, each, pooled = torch.tensor(history[-100:]).mean(0).tolist()
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: word {word:.3f}, each {each:.5f}, mean {pooled:.5f}, {seconds:.0f} s", flush=True)
    return dict(zip(("word", "each", "mean"), torch.tensor(history[-100:]).mean(0).tolist(), strict=True))


@torch.no_grad()
def unit_rms(model: Any, texts: list[list[str]], ids: dict[str, int]) -> None:
    """Scale the final norm so that the features of a typical caption have root mean square 1."""
    tokens, _ = tensors(texts, ids)
    mask = tokens != PAD
    hidden = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]
    model.norm.weight.copy_((1 + model.norm.weight) / hidden.square().mean().sqrt() - 1)


# --- the probe --------------------------------------------------------------------------------------------------------


def features(encoder: GemmaEncoder, texts: list[list[str]]) -> dict[str, tuple[Tensor, Tensor]]:
    """What a probe reads -> (float64 features (b, c), slots (b, slots)): "last" and "mean" are the last and the mean
    token of each caption, with all that it says; "each" is every token, with what has been said up to it."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"last": [], "mean": [], "each": []}
    ids = encoder.tokenizer.get_vocab()
    for first in range(0, len(texts), 256):
        some = texts[first : first + 256]
        condition = encoder.encode([" ".join(words) for words in some])
        assert condition.mask is not None
        text, mask, slots = condition.text.double(), condition.mask, tensors(some, ids)[1]
        row, last = torch.arange(len(text)), mask.sum(1) - 1
        found["last"].append((text[row, last], slots[row, last]))
        found["mean"].append(((text * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True), slots[row, last]))
        found["each"].append((text[mask], slots[mask]))
    return {k: (torch.cat([x for x, _ in v]), torch.cat([y for _, y in v])) for k, v in found.items()}


def ridge(x: Tensor, slots: Tensor, penalty: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Least-squares fit of all slots, one-hot side by side, on features x (b, c): weight (c, sum) and bias (sum,)."""
    target = torch.cat([F.one_hot(slots[:, k], n) for k, n in enumerate(SLOTS.values())], 1).double()
    centre, middle = x.mean(0), target.mean(0)
    x = x - centre
    gram = x.T @ x
    gram = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ (target - middle))
    return weight, middle - centre @ weight


def probe(encoder: GemmaEncoder, fitted: int = 1500, tested: int = 500) -> dict[str, Any]:
    """Read every slot by a linear map from one vector; fitted on captions of training scenes, tested on new ones.

    Args:
        fitted, tested: scenes, four captions each.

    Returns:
        {"last" or "mean" or "each": {"seen" or "held_out": {slot: accuracy, ..., "all": share without any error}}},
        see `features`; held_out are captions that state a combination that neither encoder nor probe has met.
    """
    known = features(encoder, captions(101, fitted))
    splits = {
        "seen": features(encoder, captions(102, tested)),
        "held_out": features(encoder, [words for words in captions(103, tested, held=True) if held_out(words)]),
    }
    result: dict[str, Any] = {}
    for kind, (x, y) in known.items():
        weight, bias = ridge(x, y)
        result[kind] = {}
        for split, new in splits.items():
            z, truth = new[kind]
            read = (z @ weight + bias).split(list(SLOTS.values()), 1)
            right = (torch.stack([scores.argmax(1) for scores in read], 1) == truth).double()
            result[kind][split] = dict(zip(SLOTS, right.mean(0).tolist(), strict=True))
            result[kind][split]["all"] = right.prod(1).mean().item()
    return result


def separation(encoder: GemmaEncoder, colors: Sequence[str] = tuple(COLORS)) -> dict[str, float]:
    """Distances of last-token features over all position prompts of two different things in some colours, in units of
    the features' typical norm.

    Returns:
        prompts: how many; nearest: least distance of any two of them; order: least distance of two that have the same
        words in another order; median: of random pairs.
    """
    things = [(c, s) for c in colors for s in SHAPES]
    keys = [(a, r, b) for a in things for r in scenes.RELATIONS for b in things if a != b]
    texts = [f"{scenes.article(f'{c} {s}')} {r} {scenes.article(f'{d} {u}')}".split() for (c, s), r, (d, u) in keys]
    x = features(encoder, texts)["last"][0]
    x = x / x.square().sum(1).mean().sqrt()
    squares = x.square().sum(1)
    nearest = math.inf
    for first in range(0, len(x), 512):
        block = slice(first, first + 512)
        distance = squares[block, None] + squares - 2 * x[block] @ x.T
        distance[torch.arange(len(distance)), first + torch.arange(len(distance))] = math.inf
        nearest = min(nearest, distance.min().item())
    index = {key: i for i, key in enumerate(keys)}
    # The same words: the two objects change places, or only their colours or only their shapes do.
    others = [
        torch.tensor([index.get(key, -1) for key in keys_moved])
        for keys_moved in (
            [(b, r, a) for a, r, b in keys],
            [((d, s), r, (c, u)) for (c, s), r, (d, u) in keys],
        )
    ]
    moved = [(x - x[o])[(o >= 0) & (o != torch.arange(len(x)))].norm(dim=1).min().item() for o in others]
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return {
        "prompts": len(x),
        "nearest": math.sqrt(nearest),
        "order": min(moved),
        "median": (x - x[shuffled]).norm(dim=1).median().item(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer and results.json")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--words", type=float, default=0.3, help="weight of the language model's loss")
    parser.add_argument("--noise", type=float, default=1.0, help="before the heads, in units of the features' RMS")
    parser.add_argument("--heads", type=float, default=1.0, help="weight of the slot losses; 0: language model only")
    parser.add_argument("--scenes", type=int, default=30000, help="training scenes, four captions each")
    parser.add_argument(
        "--probe", type=int, default=500, help="scenes to test the probe on; it is fitted on thrice as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one core, and the same sums everywhere
    start = time.perf_counter()
    tokenizer = build_tokenizer()
    texts = captions(args.seed, args.scenes)
    if any(held_out(words) for words in texts):
        raise RuntimeError("a caption of a training scene states a held-out combination")
    print(f"{len(texts)} captions, {len({' '.join(t) for t in texts})} different, longest {max(map(len, texts))} words")
    model = build_model(len(tokenizer), args.width, args.layers)
    final = train(model, texts, tokenizer.get_vocab(), args)
    decoder = model.model.eval()
    unit_rms(decoder, texts[:4000], tokenizer.get_vocab())
    seconds = time.perf_counter() - start

    args.out.mkdir(parents=True, exist_ok=True)
    decoder.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    encoder = GemmaEncoder(str(args.out), max_tokens=MAX_TOKENS, dtype="float32", trim=True)
    results = {
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "vocabulary": len(tokenizer),
        "longest_caption": max(map(len, texts)),
        "final_loss": final,
        "seconds": round(seconds, 1),
        "probe": probe(encoder, 3 * args.probe, args.probe),
        "separation": separation(encoder),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

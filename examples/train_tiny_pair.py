"""Train a tiny target model and a far cheaper draft of it, for speculative decoding.

Nothing is downloaded: the text is the source code of Python's own standard library. Both
models share one byte-level BPE tokenizer and load as any other folder does:

    .venv/bin/python examples/train_tiny_pair.py --out pairs
    minserve serve --model pairs/llama/target

The models are real but weak: what they are good for is that the draft's greedy token is
often, but not always, the target's. The last line is JSON, one entry per family.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils.logging import disable_progress_bar

from minserve.progress_bar import progress_bar

FAMILIES = ("llama", "opt")
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
PAD_ID = 0  # "<unk>": byte-level BPE never produces it
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages"}
SKIPPED_FOLDERS |= {"encodings", "html"}  # mostly tables of characters
HELD_OUT_SHARE = 0.1
CONTINUATION = 64  # tokens of the target's own greedy text, on which agreement is measured
WRITTEN_AT_ONCE = 64  # continuations: a decode step costs hardly more for many than for one


@dataclass(frozen=True)
class ModelSize:
    """Widths of one model; the MLP has four times `hidden` (OPT) or as many weights (Llama)."""

    layers: int
    hidden: int
    heads: int
    learning_rate: float  # at its peak


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, besides the Python release and thread count.

    `vocab_size` counts the special tokens; `megabytes` of text include the held-out files;
    `context` and `max_positions`, the models' limit, are in tokens; `batch` is in windows of
    `context` tokens (at most 64), `steps` in batches; the draft learns from `own_texts`
    continuations by the target; `prompts` is the number of held-out windows measured on.
    """

    target: ModelSize
    draft: ModelSize
    vocab_size: int
    megabytes: float
    context: int
    batch: int
    steps: int
    own_texts: int
    max_positions: int
    prompts: int
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """Two model folders and how they do on text that neither was trained on.

    The losses are in nats per token. `agreement` is the share (0 to 1) of positions of the
    target's greedy continuations at which the draft's most likely token is the target's.
    """

    target: Path
    draft: Path
    target_loss: float
    draft_loss: float
    agreement: float


FULL = Recipe(
    target=ModelSize(layers=6, hidden=256, heads=4, learning_rate=1e-3),
    draft=ModelSize(layers=1, hidden=128, heads=4, learning_rate=3e-3),
    vocab_size=2048,
    megabytes=4.0,
    context=256,
    batch=2,
    steps=800,
    own_texts=640,
    max_positions=1024,
    prompts=64,
)
SMALL = Recipe(
    target=ModelSize(layers=2, hidden=64, heads=4, learning_rate=4e-3),
    draft=ModelSize(layers=1, hidden=64, heads=4, learning_rate=6e-3),
    vocab_size=1024,
    megabytes=0.5,
    context=128,
    batch=4,
    steps=300,
    own_texts=384,
    max_positions=512,
    prompts=16,
)
RECIPES = {"full": FULL, "small": SMALL}


def train_pair(
    folder: Path, family: str, recipe: Recipe, *, progress: bool = True, force: bool = False
) -> Pair:
    """Train `folder`/target and `folder`/draft, or reuse them if this recipe made them.

    `family` is "llama" or "opt". The same recipe on the same machine with the same number of
    threads gives the same weights. Raises ValueError for an unknown family or a recipe whose
    text or positions do not suffice.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
    if recipe.context + CONTINUATION > recipe.max_positions:
        raise ValueError(f"max_positions must be at least context + {CONTINUATION}")
    record = folder / "recipe.json"
    made_by = {"family": family, "recipe": asdict(recipe)}
    if record.exists() and not force:
        known = json.loads(record.read_text())
        if known["made_by"] == made_by:
            return Pair(folder / "target", folder / "draft", **known["measured"])
    record.unlink(missing_ok=True)  # if this run is cut short, what it leaves is not reused

    train_texts, held_out_texts = read_texts(recipe)
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size)
    tokens = encode(tokenizer, train_texts)
    held_out = encode(tokenizer, held_out_texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        target = build_model(family, recipe.target, recipe, tokenizer)
        draft = build_model(family, recipe.draft, recipe, tokenizer)
    fit(target, draft, tokens, recipe, progress)
    measured = measure(target, draft, held_out, recipe)

    disable_progress_bar()
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    record.write_text(json.dumps({"made_by": made_by, "measured": measured}, indent=2) + "\n")
    return Pair(folder / "target", folder / "draft", **measured)


def read_texts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Whole source files of the standard library: those to train on and those held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [f for f in subfolders if f not in SKIPPED_FOLDERS]
        paths += [Path(folder, f) for f in files if f.endswith(".py")]
    paths.sort()
    random.Random(recipe.seed).shuffle(paths)  # else a small share would be packages in "a"
    train, held_out = [], []
    held_out_bytes = total_bytes = 0
    for path in paths:
        if total_bytes >= recipe.megabytes * 1e6:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        size = len(text.encode())
        total_bytes += size
        if held_out_bytes < HELD_OUT_SHARE * total_bytes:
            held_out.append(text)
            held_out_bytes += size
        else:
            train.append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> FastTokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens.

    Raises ValueError if the texts are too short for that many.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gives {bpe.get_vocab_size()} tokens, not {vocab_size}")
    unk, bos, eos = SPECIAL_TOKENS
    return FastTokenizer(
        tokenizer_object=bpe, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk
    )


def encode(tokenizer: FastTokenizer, texts: list[str]) -> torch.Tensor:
    """All texts in one row of token ids (int64), each between `<s>` and `</s>`."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(family: str, size: ModelSize, recipe: Recipe, tokenizer: FastTokenizer) -> Model:
    """A model of that size with random weights, in float32."""
    common = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": recipe.max_positions,
        "tie_word_embeddings": True,  # a head of its own would be most of a draft's weights
        "pad_token_id": PAD_ID,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "opt":
        widths = {"word_embed_proj_dim": size.hidden, "ffn_dim": 4 * size.hidden}
        return OPTForCausalLM(OPTConfig(**common, **widths, dropout=0.0))
    widths = {"num_key_value_heads": size.heads, "intermediate_size": 8 * size.hidden // 3}
    return LlamaForCausalLM(LlamaConfig(**common, **widths))


def windows(
    tokens: torch.Tensor, recipe: Recipe, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of random windows and their positions, both [batch, context].

    Training at `max_positions` would be slow, and positions (OPT) or distances (Llama) that
    never occur in training would stay untrained. So in every other window all tokens from a
    random place on are moved up by a random number of positions: over the steps, all occur.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    batch, context = recipe.batch, recipe.context

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (batch, 1), generator=generator)

    row = torch.arange(context).expand(batch, context)
    for _ in range(count):
        jump = draw(recipe.max_positions - context + 1)
        jump[::2] = 0
        cut = draw(context)
        yield tokens[draw(len(tokens) - context + 1) + row], row + jump * (row >= cut)


class Learner:
    """A model with its optimizer and the course of its learning rate over `steps` steps."""

    def __init__(self, model: Model, size: ModelSize, steps: int) -> None:
        self.model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), size.learning_rate)
        self._schedule = OneCycleLR(self._optimizer, size.learning_rate, steps, pct_start=0.1)

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()


def fit(target: Model, draft: Model, tokens: torch.Tensor, recipe: Recipe, progress: bool) -> None:
    """Train both in place: the target on the text, the draft on the target's logits.

    First both learn side by side, so that the draft's lessons cost no pass of their own. Then
    the target stands still and the draft learns on what the target writes: greedy text of a
    weak model soon repeats itself, which is unlike any text the draft has seen until then.
    """
    own_steps = recipe.own_texts // recipe.batch
    teacher = Learner(target, recipe.target, recipe.steps)
    pupil = Learner(draft, recipe.draft, recipe.steps + own_steps)
    lessons = chain(windows(tokens, recipe, recipe.steps), own_texts(target, tokens, recipe))
    bar = progress_bar(lessons, total=recipe.steps + own_steps, unit="step", disable=not progress)
    shown = {}
    for step, (ids, positions) in enumerate(bar):
        with torch.set_grad_enabled(step < recipe.steps):
            target_logits = logits_at(target, ids, positions)
        if step < recipe.steps:
            loss = next_token_loss(target_logits, ids)
            teacher.step(loss)
            shown["loss"] = f"{loss.item():.2f}"
        kl = divergence(logits_at(draft, ids, positions), target_logits.detach())
        pupil.step(kl)
        bar.set_postfix(shown, draft_kl=f"{kl.item():.2f}", refresh=False)


def own_texts(
    target: Model, tokens: torch.Tensor, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of prompts that the target has continued, and their positions, as `windows`."""
    at_once = WRITTEN_AT_ONCE // recipe.batch
    for left in range(recipe.own_texts // recipe.batch, 0, -at_once):
        other = replace(recipe, seed=recipe.seed + left)
        prompts = torch.cat([ids for ids, _ in windows(tokens, other, min(left, at_once))])
        texts = continue_greedily(target, prompts[:, : recipe.context // 2])
        for ids in texts.split(recipe.batch):
            yield ids, torch.arange(ids.shape[1]).expand_as(ids)


def continue_greedily(target: Model, prompts: torch.Tensor) -> torch.Tensor:
    """The prompts [n, length] with the target's greedy text behind them.

    An end of text would leave padding behind it, so it is ruled out.
    """
    return target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=CONTINUATION,
        min_new_tokens=CONTINUATION,
    )


def logits_at(model: Model, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [batch, context, vocabulary] of tokens at the given positions."""
    # Without a mask, transformers takes a jump in the positions for the start of another text.
    mask = torch.ones_like(ids)
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence of the tokens' distributions from the wanted ones, in nats."""
    logs = [x.log_softmax(-1).flatten(0, 1) for x in (logits, wanted)]
    return functional.kl_div(*logs, reduction="batchmean", log_target=True)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token but the first, in nats."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def measure(
    target: Model, draft: Model, held_out: torch.Tensor, recipe: Recipe
) -> dict[str, float]:
    """The numbers of a `Pair`: losses on held-out windows, agreement on their continuations."""
    target.eval()
    draft.eval()
    starts = torch.linspace(0, len(held_out) - recipe.context, recipe.prompts).long()
    ids = held_out[starts[:, None] + torch.arange(recipe.context)]
    losses = [next_token_loss(m(ids).logits, ids).item() for m in (target, draft)]

    prompts = ids[:, : recipe.context // 2]
    texts = continue_greedily(target, prompts)
    chosen = [m(texts).logits[:, prompts.shape[1] - 1 : -1].argmax(-1) for m in (target, draft)]
    agreement = (chosen[0] == chosen[1]).float().mean().item()
    return {"target_loss": losses[0], "draft_loss": losses[1], "agreement": agreement}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="for FAMILY/target, FAMILY/draft")
    parser.add_argument("--family", choices=[*FAMILIES, "both"], default="both")
    parser.add_argument("--recipe", choices=RECIPES, default="full", help="minutes or seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="train again what is there already")
    args = parser.parse_args()
    recipe = replace(RECIPES[args.recipe], seed=args.seed)
    families = FAMILIES if args.family == "both" else (args.family,)
    pairs = {f: train_pair(args.out / f, f, recipe, force=args.force) for f in families}
    print(json.dumps({f: asdict(pair) for f, pair in pairs.items()}, default=str))


if __name__ == "__main__":
    main()

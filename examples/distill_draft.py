"""Distil a small draft model for the embedded SmolLM2 from its own answers.

Three steps, each of which can be stopped and taken up again:

    .venv/bin/python examples/distill_draft.py generate --data DIR --tokens 140000
    .venv/bin/python examples/distill_draft.py train --data DIR --out models/smollm2_draft
    .venv/bin/python examples/distill_draft.py evaluate --draft models/smollm2_draft

`generate` lets the target write both sides of chats, from nothing but the beginning of a
user's turn (Xu et al., "Magpie: alignment data synthesis from scratch", 2024), and keeps its
most likely tokens at every step of its answers. `train` starts from two of the target's own
layers and its embeddings, which stay as they are and are not stored again, and fits the
target's probabilities. `evaluate` takes prompts that were never seen in training.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from minserve import Engine, SamplingParams
from minserve.models.finding.source import find_model, load_config
from minserve.models.weights.loader import open_checkpoint
from minserve.progress_bar import progress_bar

TARGET = "smollm2"
PROMPTS = Path(__file__).parent.parent / "bench" / "data"
NUM_TOP = 16
MOST_QUESTION_TOKENS = 96
MOST_ANSWER_TOKENS = 224
ROUND = 64
# Half of the user's turns begin like this, the others are free: left to itself the model
# seldom asks for code or summaries.
OPENERS = (
    "Write a Python function",
    "Write a function that",
    "Complete the following code:\n",
    "Fix the bug in this code:\n",
    "Summarize the following text in one sentence.\n",
    "Summarize the following abstract in one sentence.\n\n",
    "Rewrite the following",
    "Translate",
    "Explain",
    "What is",
    "How do I",
    "Solve this problem:",
    "Write a short",
    "Give me a list of",
    "Make a table",
    "Write an email",
)


# Of a config.json, what minserve reads.
_KEPT = (
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class DistillationRecipe:
    """How a draft model is trained.

    Attributes:
        layers: which of the target's layers the draft begins as.
        head_size: tokens that it can propose.
    """

    layers: tuple[int, ...] = (0, 1)
    head_size: int = 8192
    epochs: int = 8
    batch_size: int = 4
    peak_lr: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """One chat, and what the target thought at each step of its answer.

    Attributes:
        token_ids: int64 ``[n]``, the chat's prompt and then the answer.
        num_prompt_tokens: where the answer begins.
        top_ids: int64 ``[answer tokens, NUM_TOP]``, most likely first.
        top_logprobs: float32, the same shape.
    """

    token_ids: np.ndarray
    num_prompt_tokens: int
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def generate(folder: Path, num_tokens: int, seed: int, threads: int | None) -> None:
    """Write shards of answers until the folder holds so many answer tokens of this seed."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(TARGET, threads=threads, seed=seed, max_num_seqs=ROUND)
    rng = random.Random(seed)
    with progress_bar(total=num_tokens, unit="token", desc="Answers") as bar:
        for number in itertools.count():
            if bar.n >= num_tokens:
                return
            shard = folder / f"{seed:03}-{number:05}.npz"
            questions = _questions(engine, rng)
            if not shard.exists():
                _save(shard, _answers(engine, questions, rng))
            bar.update(sum(len(answer.top_ids) for answer in _load(shard)))


def _questions(engine: Engine, rng: random.Random) -> list[str]:
    """User's turns as the target imagines them."""
    begin = engine.tokenizer.render_chat([{"role": "user", "content": "\0"}]).split("\0")[0]
    openers = [rng.choice(OPENERS) if rng.random() < 0.5 else "" for _ in range(ROUND)]
    params = [
        SamplingParams(
            max_tokens=MOST_QUESTION_TOKENS, temperature=1.0, top_p=0.95, seed=rng.getrandbits(63)
        )
        for _ in openers
    ]
    outputs = engine.generate([begin + opener for opener in openers], params)
    return [
        (opener + output.outputs[0].text).strip() or "Hello"
        for opener, output in zip(openers, outputs, strict=True)
    ]


def _answers(engine: Engine, questions: list[str], rng: random.Random) -> list[TrainingExample]:
    """The target's answers, half of them greedy."""
    params = [
        SamplingParams(
            max_tokens=MOST_ANSWER_TOKENS,
            temperature=rng.choice((0.0, 0.8)),
            seed=rng.getrandbits(63),
            logprobs=NUM_TOP,
        )
        for _ in questions
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = []
    for output in engine.generate(chats, params):
        one = output.outputs[0]
        top = np.array([step.top for step in one.logprobs], dtype=np.float32)
        answers.append(
            TrainingExample(
                np.array([*output.prompt_token_ids, *one.token_ids]),
                len(output.prompt_token_ids),
                top[:, :, 0].astype(np.int64),
                top[:, :, 1],
            )
        )
    return answers


def _save(shard: Path, answers: list[TrainingExample]) -> None:
    """All answers end to end; half precision is plenty for the probabilities."""
    partial = shard.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        token_ids=np.concatenate([a.token_ids for a in answers]).astype(np.uint16),
        lengths=np.array([len(a.token_ids) for a in answers]),
        num_prompt_tokens=np.array([a.num_prompt_tokens for a in answers]),
        top_ids=np.concatenate([a.top_ids for a in answers]).astype(np.uint16),
        top_logprobs=np.concatenate([a.top_logprobs for a in answers]).astype(np.float16),
    )
    partial.replace(shard)


def _load(shard: Path) -> Iterator[TrainingExample]:
    with np.load(shard) as data:
        arrays = {name: data[name] for name in data.files}
    token = top = 0
    for length, prompt in zip(arrays["lengths"], arrays["num_prompt_tokens"], strict=True):
        num = int(length - prompt)
        yield TrainingExample(
            arrays["token_ids"][token : token + length].astype(np.int64),
            int(prompt),
            arrays["top_ids"][top : top + num].astype(np.int64),
            arrays["top_logprobs"][top : top + num].astype(np.float32),
        )
        token, top = token + length, top + num


def train(folder: Path, out: Path, recipe: DistillationRecipe) -> None:
    """Fit a draft model to all answers in a folder and save it in the form that minserve loads."""
    answers = [answer for shard in sorted(folder.glob("*-*.npz")) for answer in _load(shard)]
    if not answers:
        raise SystemExit(f"{folder} holds no answers; run the step 'generate' first")
    torch.manual_seed(recipe.seed)
    head = _head_tokens(answers, recipe.head_size)
    place = torch.full((load_config(find_model(TARGET)).vocab_size,), -1)
    place[head] = torch.arange(len(head))
    model = _student(recipe)
    rows = model.embed_tokens.weight[head]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    batches = _batches(answers, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_lr, total_steps=len(batches), pct_start=0.05
    )
    losses: list[float] = []
    with progress_bar(batches, desc="Training", unit="batch") as bar:
        for batch in bar:
            loss = _loss(model, rows, place, [answers[i] for i in batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    _save_draft(out, model, head)
    print(json.dumps({"loss": sum(losses[-50:]) / len(losses[-50:]), "answers": len(answers)}))


def _head_tokens(answers: list[TrainingExample], size: int) -> torch.Tensor:
    """The tokens that the target finds likely most often, int64 ``[size]``, ascending.

    Those that never came up are filled in from the lowest ids on: byte-pair encoding numbers
    tokens in the order in which it found them worth merging.
    """
    mass: Counter[int] = Counter()
    for answer in answers:
        ids, shares = answer.top_ids.ravel(), np.exp(answer.top_logprobs.ravel())
        found, inverse = np.unique(ids, return_inverse=True)
        mass.update(dict(zip(found.tolist(), np.bincount(inverse, shares).tolist(), strict=True)))
    likely = [token for token, _ in mass.most_common(size)]
    others = (token for token in itertools.count() if token not in mass)
    return torch.tensor(sorted([*likely, *itertools.islice(others, size - len(likely))]))


def _student(recipe: DistillationRecipe) -> LlamaModel:
    """A Llama with some of the target's layers, its last norm, and its embeddings, frozen."""
    source = find_model(TARGET)
    config = _draft_config(recipe)
    model = LlamaModel(LlamaConfig(**config))
    with open_checkpoint(source, progress=False) as checkpoint:
        state = {
            name: checkpoint.get(f"model.{_origin(name, recipe.layers)}")
            for name in model.state_dict()
        }
    model.load_state_dict(state)
    model.embed_tokens.weight.requires_grad_(False)
    return model


def _origin(name: str, layers: tuple[int, ...]) -> str:
    """The target's name of a parameter of the draft."""
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    return f"layers.{layers[int(index)]}.{rest}"


def _draft_config(recipe: DistillationRecipe) -> dict[str, object]:
    """The target's config.json, as a draft's."""
    config = asdict(load_config(find_model(TARGET)))
    return {
        **{k: v for k, v in config.items() if not k.startswith("_")},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": len(recipe.layers),
        "tie_word_embeddings": False,
        "draft_vocab_size": recipe.head_size,
    }


def _batches(answers: list[TrainingExample], recipe: DistillationRecipe) -> list[list[int]]:
    """Indices of answers of similar length, for all epochs, in random order."""
    rng = random.Random(recipe.seed)
    batches: list[list[int]] = []
    for _ in range(recipe.epochs):
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].token_ids) + rng.random())
        epoch = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def _loss(
    model: LlamaModel, rows: torch.Tensor, place: torch.Tensor, answers: list[TrainingExample]
) -> torch.Tensor:
    """Mean cross entropy to the target's probabilities, of its likely tokens in the head.

    Args:
        rows: ``[head, hidden]``, the embeddings of the head's tokens.
        place: int64 ``[vocab]``, each token's row, -1 for those outside the head.
    """
    longest = max(len(answer.token_ids) for answer in answers)
    # Padded at the end: causal attention lets no token of an answer see it.
    ids = torch.zeros(len(answers), longest, dtype=torch.int64)
    for i, answer in enumerate(answers):
        ids[i, : len(answer.token_ids)] = torch.from_numpy(answer.token_ids)
    hidden = model(ids, use_cache=False).last_hidden_state
    # The row of a token predicts the next one.
    picked = [
        hidden[i, answer.num_prompt_tokens - 1 : len(answer.token_ids) - 1]
        for i, answer in enumerate(answers)
    ]
    logits = torch.cat(picked) @ rows.T
    top = place[torch.from_numpy(np.concatenate([a.top_ids for a in answers]))]
    shares = torch.from_numpy(np.concatenate([a.top_logprobs for a in answers])).exp()
    shares = shares * (top >= 0)
    logprobs = F.log_softmax(logits, dim=-1).gather(1, top.clamp(min=0))
    return -(shares * logprobs).sum() / shares.sum()


def _save_draft(out: Path, model: LlamaModel, head: torch.Tensor) -> None:
    """Everything but the embeddings, which minserve borrows from the target."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("embed_tokens")
    }
    save_file({**tensors, "lm_head.token_ids": head.int()}, out / "model.safetensors")
    config = {**model.config.to_dict(), "draft_vocab_size": len(head)}
    kept = (*_KEPT, "draft_vocab_size")
    text = json.dumps({key: config[key] for key in kept}, indent=2)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")


def evaluate(draft: Path, num_prompts: int, max_tokens: int) -> None:
    """Acceptance of greedy drafts on prompts that were never seen, by file and position."""
    results = {}
    for file in sorted(PROMPTS.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            prompts = [json.loads(line)["prompt"] for line in itertools.islice(lines, num_prompts)]
        # Fixed lengths, so that every place of a draft is tried equally often.
        engine = Engine(TARGET, draft_model=str(draft), policy="sarathi", max_speculation=4)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        engine.generate(chats, SamplingParams(max_tokens=max_tokens, temperature=0.0))
        stats = engine.speculation_stats
        places = [round(n / stats.num_drafts, 3) for n in stats.num_accepted_per_pos]
        results[file.name.split(".")[0]] = {"accepted_by_place": places}
        print(f"{file.name}: accepted by place {places}")
    print(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("generate", help="let the target write answers")
    step.add_argument("--data", type=Path, required=True, help="folder of the answers")
    step.add_argument("--tokens", type=int, default=300_000, help="answer tokens to write")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--threads", type=int, default=None, help="CPU threads")
    step = commands.add_parser("train", help="fit the draft model to the answers")
    step.add_argument("--data", type=Path, required=True, help="folder of the answers")
    step.add_argument("--out", type=Path, required=True, help="folder of the draft model")
    step.add_argument("--epochs", type=int, default=DistillationRecipe.epochs)
    step.add_argument("--layers", type=int, nargs="+", default=DistillationRecipe.layers)
    step.add_argument("--threads", type=int, default=None, help="CPU threads")
    step = commands.add_parser("evaluate", help="acceptance on prompts never seen")
    step.add_argument("--draft", type=Path, required=True, help="folder of the draft model")
    step.add_argument("--prompts", type=int, default=32, help="of each file")
    step.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
    args = parser.parse_args()
    if args.command == "generate":
        generate(args.data, args.tokens, args.seed, args.threads)
    elif args.command == "train":
        if args.threads:
            torch.set_num_threads(args.threads)
        train(
            args.data, args.out, DistillationRecipe(epochs=args.epochs, layers=tuple(args.layers))
        )
    else:
        evaluate(args.draft, args.prompts, args.tokens)


if __name__ == "__main__":
    main()

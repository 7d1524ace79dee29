"""Compares speculation with none: the same engine with and without drafts, on the same prompts.

Both engines live in this process. A round runs every group of prompts with one engine and with the
other, in turns (A B, then B A), greedy and with a fixed number of output tokens, prefix caching
off. The decode phase is timed: all prompts of a group are prefilled in one batch, untimed and
without drafts, so that both sides enter the phase with one token per sequence; it ends with the
last token. The draft model's own prefill is part of it. The speed ratio is that of tokens per
second in a round; its median and extremes are shown.

It also checks that outputs are the same as without speculation: in float32, greedy and sampled
under a seed, every decode with drafts. After a mismatch the exit code is 1.

    .venv/bin/python bench/speculative.py              # 10 to 15 minutes on two cores, the first time
                                             # some more to train the tiny pairs
    .venv/bin/python bench/speculative.py --quick      # within a minute
    .venv/bin/python bench/speculative.py --synthetic-acceptance 0.7 --target-shape opt-6.7b \\
        --draft-shape opt-125m               # random weights, acceptance by chance

--quick uses the small recipe of the tiny Llama pair and none of the OPT pair, fewer and shorter
rounds, SmolLM2 at batch 1 only, leaves out batch 16 and `ngram-summarization-free`, and profiles
for only a few seconds. In `ngram-summarization` the model is asked to repeat key sentences of an
abstract word by word, in `ngram-summarization-free` for a summary of one sentence. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from minserve import Engine
from minserve.errors import MinserveError
from minserve.models.finding.source import EMBEDDED_DRAFT, find_model, load_config
from minserve.progress_bar import progress_bar
from minserve.workload import data_files
from parts.speculative.report import SYNTHETIC, CaseResult, plot, summary, table
from parts.speculative.runs import (
    Group,
    SpeculationCase,
    SpeculationEffort,
    check_lossless,
    measure,
)
from parts.speculative.synthetic import synthetic_loader
from shared.machine import machine
from shared.synthetic_models import SHAPES, write_shape

ROOT = Path(__file__).parent.parent
# So many prompts of a set are used, from its beginning.
MOST_PROMPTS = 300
# The longest prompt in tokens, and the largest batch of such prompts for which there are blocks.
MOST_PROMPT, MOST_BATCH = 224, 24
CODE_PROMPT, SYNTHETIC_PROMPT = 96, 128
EXTRACT = "Repeat the key sentences of the following abstract word by word.\n\n{text}"
EDIT = (
    "Rename the first argument of this Python function to `data`, and change nothing else. "
    "Give back the whole code.\n\n```python\n{text}```"
)


CASES = (
    SpeculationCase("tiny-llama", "tiny-llama", "draft"),
    SpeculationCase("tiny-llama-ngram", "tiny-llama", "ngram"),
    SpeculationCase("tiny-opt", "tiny-opt", "draft", in_quick=False),
    SpeculationCase("tiny-opt-ngram", "tiny-opt", "ngram", in_quick=False),
    SpeculationCase("smollm2-draft", "smollm2", "draft", "self_instruct_user"),
    SpeculationCase("ngram-summarization", "smollm2", "ngram", "scitldr_abstracts_test", EXTRACT),
    SpeculationCase(
        "ngram-summarization-free", "smollm2", "ngram", "scitldr_abstracts_test", in_quick=False
    ),
    SpeculationCase("ngram-code-edit", "smollm2", "ngram", "humaneval", EDIT),
)


EFFORTS = {
    ("tiny", False): SpeculationEffort({1: 4, 4: 5, 16: 4}, 3, 96, 10.0, 4, 64),
    ("tiny", True): SpeculationEffort({1: 3, 4: 3}, 2, 64, 1.0, 2, 32),
    ("smollm2", False): SpeculationEffort({1: 4, 4: 3, 16: 2}, 3, 64, 20.0, 3, 48),
    ("smollm2", True): SpeculationEffort({1: 2}, 1, 28, 3.0, 1, 16),
    ("synthetic", False): SpeculationEffort({1: 5, 4: 4, 16: 3}, 2, 96, 20.0, 0, 0),
    ("synthetic", True): SpeculationEffort({1: 2, 4: 2}, 1, 24, 2.0, 0, 0),
}


def read_prompts(case: SpeculationCase, engine: Engine, code: Sequence[str]) -> list[Any]:
    """Return a case's prompts in a fixed random order: chats, or token ids of code.

    Args:
        code: held-out files, for the cases without a file of prompts.
    """
    rng = random.Random(0)
    if not case.prompts:
        prompts = []
        for text in code:
            ids = engine.tokenizer.encode(text)
            starts = range(0, len(ids) - CODE_PROMPT, 4 * CODE_PROMPT)
            prompts += [ids[start : start + CODE_PROMPT] for start in starts]
        rng.shuffle(prompts)
        return prompts
    texts = list(data_files.read_prompts(case.prompts)[:MOST_PROMPTS])
    if case.instruction == EXTRACT:
        texts = [text.split("\n\n", 1)[1] for text in texts]
    rng.shuffle(texts)
    chats = [[{"role": "user", "content": case.instruction.format(text=t)}] for t in texts]
    return [chat for chat in chats if _length(engine, chat) <= MOST_PROMPT]


def _length(engine: Engine, chat: list[dict[str, str]]) -> int:
    """Return the number of prompt tokens of a chat."""
    text = engine.tokenizer.render_chat(chat)
    return len(engine.tokenizer.encode(text, add_special_tokens=False))


def grouped(prompts: Sequence[Any], batch: int, lone: int) -> list[list[Any]]:
    """Return the prompts of a batch size: one group, or at batch size 1 several groups of one."""
    if batch == 1:
        return [[prompt] for prompt in prompts[:lone]]
    return [list(prompts[:batch])]


def tiny_pair(name: str, *, quick: bool) -> tuple[Path, list[str]]:
    """Return the folder of a tiny target and draft, trained on first use, and held-out files."""
    script = _load_script(ROOT / "examples" / "train_tiny_pair.py")
    recipe = script.RECIPES["small" if quick else "full"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    family = name.removeprefix("tiny-")
    folder = cache / "minserve" / "bench" / "tiny_pairs" / ("small" if quick else "full") / family
    script.train_pair(folder, family, recipe)
    return folder, script.read_texts(recipe)[1]


def _load_script(path: Path) -> ModuleType:
    """Load a script that is in no package as a module."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def run_group(
    group: Group, cases: Sequence[SpeculationCase], prompts: dict[str, list[Any]], effort: SpeculationEffort,
    results: dict[str, CaseResult], args: argparse.Namespace, bar: tqdm,
) -> None:  # fmt: skip
    """Measure the cases of one target model at every batch size."""
    for case in cases:
        for batch in batch_sizes(args, effort):
            groups = grouped(prompts[case.name], batch, effort.lone_prompts)
            for fixed in (None, args.fixed) if args.fixed else (None,):
                lengths = "adaptive" if fixed is None else f"fixed {fixed}"
                bar.set_description(f"{bar.desc.split(':')[0]}: {case.name}, {lengths}, {batch}")
                cell = measure(
                    group.engine(case.speculator, fixed, **engine_settings(args)),
                    group.engine("off", fixed, **engine_settings(args)),
                    groups,
                    effort.rounds.get(batch, 2),
                    effort.tokens,
                    bar.update,
                    lengths,
                )
                if results[case.name].synthetic:
                    cell = replace(cell, identical=None)
                results[case.name].cells.append(cell)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the engines that are measured."""
    return {"dtype": args.dtype, "device": args.device}


def batch_sizes(args: argparse.Namespace, effort: SpeculationEffort) -> list[int]:
    """Return the batch sizes of the flags, else those of the effort."""
    return args.batch_sizes or list(effort.rounds)


def num_runs(
    cases: Sequence[SpeculationCase], effort: SpeculationEffort, args: argparse.Namespace
) -> int:
    """Return the number of runs, for the progress bar."""
    per_case = sum(
        2 * effort.rounds.get(batch, 2) * (effort.lone_prompts if batch == 1 else 1)
        for batch in batch_sizes(args, effort)
    )
    return len(cases) * per_case * (2 if args.fixed else 1)


def bench_real(
    args: argparse.Namespace, results: dict[str, CaseResult], devices: list[str]
) -> None:
    """Measure all cases with trained models, group by group."""
    cases = [case for case in CASES if _is_chosen(case, args)]
    for case in cases:
        results[case.name] = CaseResult(name=case.name, missing=_missing(case))
    cases = [case for case in cases if results[case.name].missing is None]
    efforts = {case.group: EFFORTS[case.group.split("-")[0], args.quick] for case in cases}
    total = sum(num_runs([case], efforts[case.group], args) for case in cases)
    with progress_bar(total=total, desc="Measuring", unit="run") as bar:
        for name, effort in efforts.items():
            own = [case for case in cases if case.group == name]
            target, draft, code = name, None, []
            if name.startswith("tiny"):
                bar.set_description(f"Measuring: {name}, training where not done before")
                folder, code = tiny_pair(name, quick=args.quick)
                target, draft = str(folder / "target"), str(folder / "draft")
            group = Group(target, draft, effort.profile_s)
            bar.set_description(f"Measuring: {name}, profile")
            plain = group.engine("off", None, **engine_settings(args))
            devices.append(group.profile.key.device)
            prompts = {case.name: read_prompts(case, plain, code) for case in own}
            bar.set_description(f"Measuring: {name}, lossless check")
            check_lossless(group, prompts, own, effort, results, device=args.device)
            run_group(group, own, prompts, effort, results, args, bar)


def _is_chosen(case: SpeculationCase, args: argparse.Namespace) -> bool:
    if args.only:
        return case.name in args.only
    return case.in_quick or not args.quick


def _missing(case: SpeculationCase) -> str | None:
    """Return why a case cannot run here; ``None`` if it can."""
    try:
        if case.group == "smollm2":
            find_model(case.group)
            if case.speculator == "draft":
                load_config(find_model(EMBEDDED_DRAFT))
    except MinserveError as error:
        return str(error)
    return None


def bench_synthetic(
    args: argparse.Namespace, results: dict[str, CaseResult], devices: list[str]
) -> None:
    """Measure two shapes with random weights, where chance decides acceptance."""
    name = f"{args.target_shape}+{args.draft_shape}@{args.synthetic_acceptance:g}"
    effort, case = EFFORTS["synthetic", args.quick], SpeculationCase(name, "synthetic", "draft")
    vocab = SHAPES[args.target_shape]["vocab_size"]
    rng = random.Random(0)
    most = max([effort.lone_prompts, *batch_sizes(args, effort)])
    prompts = [[rng.randrange(4, vocab) for _ in range(SYNTHETIC_PROMPT)] for _ in range(most)]
    results[name] = CaseResult(name=name, synthetic=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target, draft = (
            write_shape(folder / f"synthetic-{role}-{shape}", shape, tokenizer=role == "target")
            for role, shape in (("target", args.target_shape), ("draft", args.draft_shape))
        )
        bar = stack.enter_context(
            progress_bar(
                total=num_runs([case], effort, args), desc=f"{SYNTHETIC}measuring", unit="run"
            )
        )
        load = synthetic_loader(args.synthetic_acceptance, args.device)
        group = Group(str(target), str(draft), effort.profile_s, load)
        # Without speculation chance decides nothing, so this is the real speed.
        group.engine("off", None, **engine_settings(args))
        devices.append(group.profile.key.device)
        run_group(group, [case], {name: prompts}, effort, results, args, bar)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, see above")
    parser.add_argument("--only", metavar="CASE[,CASE]", type=lambda text: text.split(","),
                        help=", ".join(case.name for case in CASES))  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: 1 4 16")
    parser.add_argument("--fixed", type=int, metavar="K",
                        help="also always draft K tokens (policy sarathi)")  # fmt: skip
    parser.add_argument("--dtype", default="auto", help="dtype of the engines that are measured")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--synthetic-acceptance", type=float, metavar="RATE",
                        help="random weights; drafts are accepted with this probability")  # fmt: skip
    parser.add_argument("--target-shape", choices=SHAPES, default="opt-6.7b", help="if synthetic")
    parser.add_argument("--draft-shape", choices=SHAPES, default="opt-125m", help="if synthetic")
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - {case.name for case in CASES}
    if unknown:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    if args.fixed is not None and args.fixed < 1:
        parser.error("--fixed must be at least 1")
    if any(not 1 <= batch <= MOST_BATCH for batch in args.batch_sizes or ()):
        parser.error(f"batch sizes must be from 1 to {MOST_BATCH}")
    if args.synthetic_acceptance is not None:
        if not 0 <= args.synthetic_acceptance <= 1:
            parser.error("--synthetic-acceptance must be from 0 to 1")
        if len({SHAPES[s]["vocab_size"] for s in (args.target_shape, args.draft_shape)}) > 1:
            parser.error("target and draft shape must have the same vocabulary")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: .venv/bin/pip install -e '.[plot]'")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, 1 if outputs changed, 130 if it was interrupted."""
    args = parse(argv)
    is_synthetic = args.synthetic_acceptance is not None
    print((SYNTHETIC if is_synthetic else "") + json.dumps(machine()), flush=True)
    results: dict[str, CaseResult] = {}
    devices: list[str] = []
    interrupted = False
    try:
        (bench_synthetic if is_synthetic else bench_real)(args, results, devices)
    except KeyboardInterrupt:
        interrupted = True
    print("\n".join(table(results.values())))
    line = summary(results.values(), devices[0] if devices else "unknown", quick=args.quick)
    if interrupted:
        line["interrupted"] = True
    if args.plot:
        plot(list(results.values()), args.plot)
    print(json.dumps(line))
    if any(one.lossless is False for one in results.values()):
        return 1
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())

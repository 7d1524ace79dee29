"""lm-eval over HTTP beside lm-eval with transformers, on one task and the same weights.

Both run in this process's environment; transformers' runs first take no server. Compared are each
log likelihood, whether the continuation is the greedy one, and greedy continuations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from client_checks import check

TASKS = Path(__file__).parent / "lm_eval_tasks"
FOLDER, MODEL = os.environ["MINSERVE_FOLDER"], os.environ["MINSERVE_MODEL"]
# Both compute in float32, in another order.
TOLERANCE = 1e-3


def evaluate(name: str, model: str, arguments: str) -> dict[str, list]:
    """Return the answers to all requests of each task, in their order."""
    out = Path.cwd() / name
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments,
         "--tasks", "tiny_likelihoods,tiny_greedy", "--include_path", str(TASKS), "--batch_size", "1",
         "--device", "cpu", "--log_samples", "--output_path", str(out)],
        cwd=TASKS, capture_output=True, text=True,
    )  # fmt: skip
    check(
        f"lm_eval --model {model}",
        done.returncode == 0,
        done.stderr[-1500:] if done.returncode else "",
    )
    answers = {}
    for task in ("tiny_likelihoods", "tiny_greedy"):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"])
        answers[task] = [response[0] for one in samples for response in one["resps"]]
    return answers


url = f"{os.environ['OPENAI_BASE_URL']}/completions"
ours = evaluate("served", "local-completions",
                f"model={MODEL},base_url={url},tokenizer={FOLDER},tokenizer_backend=huggingface,"
                "num_concurrent=2,max_retries=1,max_length=2048")  # fmt: skip
theirs = evaluate("transformers", "hf", f"pretrained={FOLDER},dtype=float32")

pairs = list(zip(ours["tiny_likelihoods"], theirs["tiny_likelihoods"], strict=True))
errors = [abs(float(one[0]) - float(other[0])) for one, other in pairs]
check(f"{len(pairs)} log likelihoods within {TOLERANCE:g}", max(errors) <= TOLERANCE,
      f"the largest difference is {max(errors):.2g}")  # fmt: skip
check("the same greedy flags", all(str(one[1]) == str(other[1]) for one, other in pairs),
      f"{sum(str(one[1]) == 'True' for one, _ in pairs)} are greedy")  # fmt: skip
check(f"{len(ours['tiny_greedy'])} equal greedy continuations",
      ours["tiny_greedy"] == theirs["tiny_greedy"], ours["tiny_greedy"][0])  # fmt: skip

"""Simon Willison's command-line program `llm`, whose files lie in a folder of this run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from client_checks import check

home = Path.cwd() / "llm"
home.mkdir()
name = os.environ["MINSERVE_MODEL"]
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: {name}\n  api_base: {os.environ['OPENAI_BASE_URL']}\n"
    "  api_key_name: here\n"
)
env = os.environ | {"LLM_USER_PATH": str(home)}


def llm(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llm", *words], env=env, capture_output=True, text=True
    )
    check(f"llm {' '.join(words).replace(os.environ['OPENAI_API_KEY'], 'KEY')}",
          done.returncode == 0, (done.stdout or done.stderr).strip()[:300])  # fmt: skip
    return done.stdout.strip()


llm("keys", "set", "here", "--value", os.environ["OPENAI_API_KEY"])
check("the model is known", "here" in llm("models", "list"))
options = ("-m", "here", "-o", "max_tokens", "16", "-o", "temperature", "0")
streamed = llm(*options, "Name three colours.")
check("the same without a stream", llm(*options, "--no-stream", "Name three colours.") == streamed)
check("a conversation that goes on", llm("-c", "And three more."))

"""What a server process has behind it when it says that it is ready."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from waiting import PATIENCE_S

SCRIPT = """
import gc, os, signal, sys
from minserve.cli import main
from minserve.server import lifecycle

def told(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    rendered = "transformers.utils.chat_template_utils" in sys.modules
    return f"{rendered} {len(gc.get_objects())} {gc.get_freeze_count()}"

lifecycle.ready_message = told
sys.exit(main(sys.argv[1:]))
"""


def test_ready_means_that_nothing_is_left_to_load_and_little_to_collect(
    tiny_llama_dir: Path,
) -> None:
    arguments = ["serve", "--port", "0", "--model", str(tiny_llama_dir), "--num-blocks", "64",
                 "--threads", "1", "--device", "cpu", "--profile-seconds", "0.1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    rendered, num_collected, num_frozen = done.stdout.split()
    assert rendered == "True"
    assert int(num_frozen) > 20 * int(num_collected)

"""`make test` fails with the check of types, and leaves nothing running."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from waiting import is_alive, wait_until

ROOT = Path(__file__).parents[1]
# The compiling of the tests, which would go on for long, and the tests themselves.
PYTHON = """#!/bin/sh
case "$*" in
    *--collect-only*) echo $$ > collecting.part; mv collecting.part collecting; exec sleep 300;;
    *) touch tested;;
esac
"""
# It ends when the other has begun.
TYPECHECK = """#!/bin/sh
while ! test -e collecting; do sleep 0.01; done
test $FAILS = no || exit 1
kill $(cat collecting)
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", [False, True], ids=["sound", "a wrong type"])
def test_a_check_that_fails_ends_all(tmp_path: Path, fails: bool) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    programs = {
        ".venv/bin/ruff": "#!/bin/sh\n",
        ".venv/bin/python": PYTHON,
        "scripts/typecheck.sh": TYPECHECK,
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    # What `make` would install from is not newer than what is installed.
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "scripts/install.sh"):
        (tmp_path / name).touch()
    for name in (".venv/.installed", ".venv/.installed-test"):
        (tmp_path / name).touch()
    command = ["make", "test", f"FAILS={'yes' if fails else 'no'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) != fails, done.stdout + done.stderr
    assert (tmp_path / "tested").exists() != fails
    pid = int((tmp_path / "collecting").read_text())
    wait_until(lambda: not is_alive(pid), "the tests are still being compiled")

"""A test that loses the device costs no other test: the next one runs in a new process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from lost_device import LostDevicePlugin
lost = []

def pytest_configure(config):
    config.pluginmanager.register(LostDevicePlugin(lambda: bool(lost)))
"""
TESTS = """
import os
from conftest import lost

def test_before():
    pass

def test_that_fails_and_loses_nothing():
    raise RuntimeError("an ordinary failure")

def test_that_loses_the_device():
    lost.append(True)
    raise RuntimeError("an illegal memory access")

def test_behind():
    assert not lost

def test_further_behind():
    assert not lost
"""


def run(folder: Path, *flags: str) -> str:
    """What pytest says of these tests."""
    (folder / "conftest.py").write_text(CONFTEST.format(tests=str(Path(__file__).parent)))
    (folder / "test_some.py").write_text(TESTS)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfp", *flags, "."]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    return done.stdout


def test_a_worker_that_has_lost_the_device_is_replaced(tmp_path: Path) -> None:
    said = run(tmp_path, "-n", "1", "--max-worker-restart", "1")
    passed = {*re.findall(r"^PASSED \S+::(\w+)", said, re.MULTILINE)}
    assert passed == {"test_before", "test_behind", "test_further_behind"}, said
    # The report of the test itself came before its process ended.
    assert "an illegal memory access" in said
    assert said.count("replacing crashed worker") == 1, said


def test_without_workers_the_session_stops(tmp_path: Path) -> None:
    said = run(tmp_path, "-p", "no:xdist")
    passed = {*re.findall(r"^PASSED \S+::(\w+)", said, re.MULTILINE)}
    assert passed == {"test_before"}, said
    assert "the device is lost" in said

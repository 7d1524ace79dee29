"""A pytest plugin for machines with a GPU: a process that has lost the device runs no further test.

After a wrong memory access every later call of CUDA fails in that process, and so would every later
test of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest


class LostDevicePlugin:
    """Ends the process of a test that has failed, where the device is lost since.

    A worker of pytest-xdist just ends: another one takes its place and its further tests. Without
    workers the session stops, for all that is left would fail.

    Args:
        is_lost: whether this process can use the device no more; asked after failures alone.
    """

    def __init__(self, is_lost: Callable[[], bool]) -> None:
        self._is_lost = is_lost
        self._has_failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._has_failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._has_failed = False
        told = yield  # the test's reports are with the controller after this
        if self._has_failed and self._is_lost():
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            item.session.shouldstop = "the device is lost: no further test can run here"
        return told

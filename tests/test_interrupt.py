"""Ctrl-C between two steps."""

from __future__ import annotations

import signal

import pytest

from minserve.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures("ctrl_c")


def test_the_first_waits_for_the_check_and_the_second_does_not() -> None:
    with Interrupt() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_ctrl_c_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before

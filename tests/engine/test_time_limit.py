"""Work that takes too long is interrupted in its own thread, and nothing else is."""

from __future__ import annotations

import threading
import time

import pytest
from waiting import PATIENCE_S, wait_until

from minserve.engine.time_limit import TimeLimit, TimeLimitError


def test_work_within_its_time_is_left_alone() -> None:
    limit = TimeLimit()
    assert not limit.enforce(0.0)
    with limit:
        assert not limit.enforce(3600.0)
    assert not limit.enforce(0.0)


def test_work_that_never_ends_is_interrupted() -> None:
    limit, began = TimeLimit(), threading.Event()
    ended: list[BaseException] = []

    def work() -> None:
        try:
            with limit:
                began.set()
                while True:
                    pass
        except TimeLimitError as error:
            ended.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    began.wait(PATIENCE_S)
    wait_until(lambda: limit.enforce(0.0), "there is no work")
    thread.join(PATIENCE_S)
    assert len(ended) == 1


def test_what_is_on_its_way_when_the_work_ends_arrives_within_it() -> None:
    """Many tries, since it depends on the moment in which the interruption comes."""
    limit, stop = TimeLimit(), threading.Event()
    num_tries = num_interrupted = 0

    def enforce() -> None:
        while not stop.is_set():
            limit.enforce(0.0)

    thread = threading.Thread(target=enforce, daemon=True)
    thread.start()
    try:
        # On a busy machine the other thread may begin late.
        while num_tries < 200 or not num_interrupted:
            num_tries += 1
            try:
                with limit:
                    time.sleep(0)
            except TimeLimitError:
                num_interrupted += 1
            # Nothing may come here, or the test fails with it.
            sum(range(200))
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="its own"), TimeLimit():
        raise ValueError("its own")

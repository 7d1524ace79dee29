"""How many threads a pass has beside other programs, by made-up readings and on this machine."""

from __future__ import annotations

import pytest
import torch

from minserve import Engine, SamplingParams
from minserve.config import EngineConfig
from minserve.engine.device import thread_count
from minserve.engine.device.device_choice import set_num_threads
from minserve.engine.device.thread_count import ThreadCount, Usage, num_fitting


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "cores", "busy", "own", "fitting"),
    [
        (2, 2, 0.0, 0.0, 2),
        (2, 2, 2.0, 2.0, 2),  # all of it is ours
        (2, 2, 2.0, 1.0, 1),  # a program keeps a core busy
        (2, 2, 2.0, 1.7, 2),  # a client that does a little
        (2, 2, 4.0, 0.5, 1),  # at least one thread, however busy the others are
        (16, 16, 9.0, 2.0, 9),
        (2, 16, 9.0, 2.0, 2),  # there are cores enough for all
        (2, 16, 17.0, 2.0, 1),
        (1, 1, 1.0, 0.5, 1),
        (4, 2, 2.0, 2.0, 4),  # as asked for
        (4, 2, 3.0, 2.0, 3),
    ],
)
def test_cores_that_others_keep_busy_are_left_to_them(
    most: int, cores: int, busy: float, own: float, fitting: int
) -> None:
    before = Usage(at=10.0, busy=100.0, own=50.0)
    for seconds in (0.25, 1.0, 60.0):
        after = Usage(10.0 + seconds, 100.0 + busy * seconds, 50.0 + own * seconds)
        assert num_fitting(most, cores, before, after) == fitting


def test_the_threads_of_all_ranks_count_as_too_many(caplog: pytest.LogCaptureFixture) -> None:
    set_num_threads(EngineConfig(threads=1), torch.device("cpu"))
    assert not caplog.messages
    set_num_threads(EngineConfig(threads=1, tensor_parallel=4096), torch.device("cpu"))
    (told,) = caplog.messages
    assert told.startswith("--threads 1 --tensor-parallel 4096: 4096 threads, but")


def test_passes_give_way_to_a_neighbour_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    others = [0.0]
    usage = [Usage(0.0, 0.0, 0.0)]

    def look() -> Usage:
        seconds = now[0] - usage[0].at
        usage[0] = Usage(
            now[0], usage[0].busy + (1.0 + others[0]) * seconds, usage[0].own + seconds
        )
        return usage[0]

    monkeypatch.setattr(thread_count.time, "monotonic", lambda: now[0])
    threads = ThreadCount(2, cores=2, look=look)
    seen = []
    for step, busy in enumerate((0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)):
        now[0], others[0] = float(step + 1), busy
        threads.before_pass()
        seen.append(torch.get_num_threads())
    assert seen == [2, 1, 1, 1, 1, 1, 2]  # back when two looks in a row agree


def test_the_machine_is_looked_at_now_and_then_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], []

    def look() -> Usage:
        looks.append(now[0])
        return Usage(now[0], 0.0, 0.0)

    monkeypatch.setattr(thread_count.time, "monotonic", lambda: now[0])
    threads = ThreadCount(2, cores=2, look=look)
    for step in range(100):
        now[0] = step / 100
        threads.before_pass()
    assert looks == [0.0, 0.25, 0.5, 0.75]
    looks.clear()
    one = ThreadCount(1, cores=2, look=look)
    now[0] = 100.0
    one.before_pass()
    assert looks == [0.99]  # with one thread there is nothing to choose


def test_a_look_tells_what_this_process_uses() -> None:
    before = Usage.look()
    while (after := Usage.look()).own - before.own < 0.1:
        sum(range(100_000))
    assert after.at > before.at
    # The system counts in ticks of 10 ms.
    assert after.busy - before.busy > after.own - before.own - 0.05


def test_an_engine_keeps_its_output_whatever_the_threads(tiny_llama_dir, monkeypatch) -> None:
    engine = Engine(str(tiny_llama_dir), dtype="float32", threads=2)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    want = engine.generate([3, 4, 5, 6], params)[0].outputs[0].token_ids
    counts = []
    runner = engine._core.runner
    monkeypatch.setattr(thread_count, "LOOK_S", 0.0)
    monkeypatch.setattr(
        thread_count, "num_fitting", lambda *_: counts.append(1) or 1 + len(counts) // 3 % 2
    )
    assert engine.generate([3, 4, 5, 6], params)[0].outputs[0].token_ids == want
    assert len(counts) >= 12
    assert runner.threads.most == 2


def test_where_processor_times_cannot_be_read_all_threads_stay(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> Usage:
        raise PermissionError("/proc/stat")

    threads = ThreadCount(2, cores=2, look=look)
    monkeypatch.setattr(thread_count.time, "monotonic", lambda: 1e9)
    for _ in range(3):
        threads.before_pass()
        assert torch.get_num_threads() == 2
    assert len(caplog.records) == 1

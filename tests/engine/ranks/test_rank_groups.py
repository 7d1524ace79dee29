"""A group of ranks says what one process says, and ends as one."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from speculating import essence, make_engine, outputs_of
from waiting import is_alive, wait_until

from minserve import Engine, SamplingParams
from minserve.config import EngineConfig
from minserve.engine.ranks import group as group_module
from minserve.engine.ranks import keeper, shared_memory
from minserve.engine.ranks.starting import SHARED_SETTINGS
from minserve.errors import ConfigError, DeviceLostError
from minserve.outputs import RequestOutput
from minserve.structure import Structure

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
SHARED = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n" * 2
PROMPTS = [
    "import os\nimport sys\n\n",
    SHARED,
    SHARED + "def write(self",
    "for name in names:\n        self.assertEqual(name, self.name)\n" * 3,
    "x",
]
# Chunks of few tokens, and blocks for a part of the sequences only: they have to be preempted.
TIGHT = {"token_budget": 24, "max_num_seqs": 8, "num_blocks": 30, "block_size": 8}


def everything(engine: Engine) -> dict[str, Any]:
    """What an engine says to requests of many kinds, and what of its pool was put to use."""
    found = {
        "greedy": essence(outputs_of(engine, PROMPTS, GREEDY)),
        "again": essence(outputs_of(engine, PROMPTS[:3], GREEDY)),
        "several": essence(outputs_of(engine, PROMPTS[:2], replace(GREEDY, n=2, max_tokens=16))),
        "seeded": essence(
            outputs_of(engine, PROMPTS, replace(GREEDY, temperature=0.8, seed=3, max_tokens=24))
        ),
        "structured": essence(
            outputs_of(
                engine,
                PROMPTS[:2],
                SamplingParams(
                    temperature=0.0,
                    max_tokens=64,
                    structure=Structure("regex", "[a-z]{2,6}( [a-z]{2,6}){1,2}!"),
                ),
            )
        ),
    }
    (output,) = engine.generate("import os", replace(GREEDY, max_tokens=1, prompt_logprobs=2))
    found["prompt"] = [one and one.token_id for one in output.prompt_logprobs or []]
    stats = engine._core.snapshot()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    return found


def ranks_of(engine: Engine) -> list[int]:
    return engine._loaded.keeper.pids


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(one.token_ids) for output in outputs for one in output.outputs]


@pytest.fixture(scope="module")
def alone(tiny_llama_pair: Any) -> dict[str, Any]:
    """What one process says."""
    return everything(make_engine(tiny_llama_pair, **TIGHT))


@pytest.fixture
def group(
    tiny_llama_pair: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """Two ranks that speculate in some way, with sums in shared memory or by gloo."""
    how, shares = request.param
    if not shares:
        monkeypatch.setattr(shared_memory, "is_supported", lambda: False)
    engine = make_engine(tiny_llama_pair, how, tensor_parallel=2, **TIGHT)
    yield engine
    engine._loaded.keeper.close()


@pytest.mark.parametrize("group", [("draft", True)], indirect=True)
def test_two_ranks_with_a_draft_model_say_what_one_process_says_until_one_is_killed(
    group: Engine, alone: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert everything(group) == alone
    assert group.speculation_stats.num_accepted_tokens > 0
    (pid,) = ranks_of(group)
    stream = group.stream(PROMPTS[0], replace(GREEDY, max_tokens=200))
    next(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceLostError, match="rank 1 has ended \\(SIGKILL\\)"):
        list(stream)
    assert not group._loaded.keeper.lost.by_fault
    with pytest.raises(DeviceLostError, match="rank 1"):
        group.generate(PROMPTS[:2], GREEDY)
    assert "runs in parts" not in caplog.text


@pytest.mark.parametrize("group", [("ngram", False)], indirect=True)
def test_a_rank_that_stays_stopped_is_killed_and_its_group_is_lost(
    group: Engine, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert everything(group) == alone
    (pid,) = ranks_of(group)
    stream = group.stream(PROMPTS[0], replace(GREEDY, max_tokens=200))
    next(stream)
    monkeypatch.setattr(keeper, "STOPPED_S", 0.3)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeviceLostError, match="rank 1 has ended"):
        list(stream)
    wait_until(lambda: not is_alive(pid))


def test_a_setting_is_every_ranks_or_known_as_rank_0s_alone() -> None:
    alone = {
        "tokenizer", "chat_template", "tool_format", "reasoning_format", "generation_config",
        "deterministic", "executor", "profile", "prefix_caching", "max_queue", "slo_classes",
        "default_slo", "thinking_marker", "length_estimator", "best_effort_share", "seed",
    }  # fmt: skip
    assert {one.name for one in fields(EngineConfig)} - alone == set(SHARED_SETTINGS)


def test_four_ranks_say_what_one_process_says_and_end_with_their_engine(
    tiny_llama_dir: Path,
) -> None:
    settings = {"dtype": "float32", "threads": 1, "num_blocks": 100, "block_size": 8}
    prompts = ["The quick brown fox", "A server answers requests; a planner decides", "def add(a"]
    expected = tokens(Engine(str(tiny_llama_dir), **settings).generate(prompts, GREEDY))
    engine = Engine(str(tiny_llama_dir), tensor_parallel=4, **settings)
    pids = ranks_of(engine)
    assert len(pids) == 3
    assert tokens(engine.generate(prompts, GREEDY)) == expected
    del engine
    gc.collect()
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("where", ["choose_device", "follow"])
def test_what_fails_on_one_rank_alone_is_told_by_the_error(
    where: str, tiny_llama_dir: Path, planted: Callable[[str, str], None]
) -> None:
    planted(where, "raise RuntimeError('no room')")
    with pytest.raises(DeviceLostError, match=r"rank 1 has ended .*RuntimeError: no room"):
        Engine(str(tiny_llama_dir), tensor_parallel=2, threads=1, num_blocks=20).generate("The")


def test_ranks_wait_for_who_still_loads_and_are_not_those_of_a_fork(
    tiny_llama_dir: Path, planted: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "PATIENCE_S", 0.5)
    planted(
        "load_share",
        "from minserve.engine import build; read = build.build_model\n"
        "    build.build_model = lambda *args: time.sleep(2) or read(*args)\n"
        "    return build.load_share(*_)",
    )
    engine = Engine(str(tiny_llama_dir), tensor_parallel=2, threads=1, num_blocks=20)
    monkeypatch.undo()
    expected = tokens(engine.generate("The", GREEDY))
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            engine.generate("The", GREEDY)  # whose KV the other rank would keep
            code = 2
        engine._loaded.keeper.close()  # as a fork that ends does
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert tokens(engine.generate("The", GREEDY)) == expected


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Has the ranks other than 0 do something in place of a function that they call."""

    def plant(function: str, what: str) -> None:
        (tmp_path / "planted_rank.py").write_text(
            "import os, sys, time\n"
            "from minserve.engine.ranks import follower, follower_process\n"
            f"def planted(*_):\n    {what}\n"
            f"follower.{function} = planted\n"
            "code = follower_process.main(*sys.argv[1:])\n"
            "os._exit(code)\n"
        )
        monkeypatch.setattr(keeper, "MODULE", "planted_rank")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    return plant


def test_settings_that_no_group_can_have_are_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel must be at least 1"):
        Engine(str(tiny_llama_dir), tensor_parallel=0)
    with pytest.raises(ConfigError, match="deterministic is not available with tensor_parallel 2"):
        Engine(str(tiny_llama_dir), tensor_parallel=2, deterministic=True)
    with pytest.raises(ConfigError, match="4 attention heads"):
        Engine(str(tiny_llama_dir), tensor_parallel=3)

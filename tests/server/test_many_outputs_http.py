"""A request of many outputs that asks to be refused: served or refused as a whole, never half."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import RunningServer, post
from waiting import wait_until

from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.server_config import ServerConfig

PROMPT = "The quick brown fox"
STREAM = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": True, "seed": 3}
STRICT = {"ttft_ms": 1000, "tpot_ms": 120, "on_unattainable": "reject"}


@pytest.fixture
def server(
    tiny_llama_dir: Path, tmp_path: Path, start_server: Callable[..., RunningServer]
) -> RunningServer:
    """With a device that keeps 120 ms per token for some 40 outputs at once, not for 64."""
    model = PerfModel([Piece(tokens=0.0025, base=0.01)])
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"key": {"model": "x"}, "model": model.to_dict()}))
    return start_server(
        tiny_llama_dir,
        ServerConfig(served_model_name="tiny"),
        executor="simulated",
        profile=str(path),
        num_blocks=2000,
        max_num_seqs=128,
        max_queue=256,
    )


def text_of(raw: bytes) -> str:
    *events, done = raw.decode().split("\n\n")[:-1]
    assert done == "data: [DONE]"
    return "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("n", "expected"), [(64, 429), (16, 200)])
def test_it_is_refused_or_served_and_its_neighbours_go_on(
    server: RunningServer, stream: bool, n: int, expected: int
) -> None:
    alone = text_of(post(server, "/v1/completions", STREAM)[2])
    texts: list[str] = []

    def neighbour() -> None:
        texts.append(text_of(post(server, "/v1/completions", STREAM)[2]))

    neighbours = [threading.Thread(target=neighbour) for _ in range(3)]
    for thread in neighbours:
        thread.start()
    wait_until(lambda: server.engine.num_unfinished or len(texts) == len(neighbours))
    body = {"prompt": PROMPT, "n": n, "max_tokens": 16, "slo": STRICT, "stream": stream}
    status, headers, raw = post(server, "/v1/completions", {**body, "ignore_eos": True})
    assert status == expected, raw
    if expected == 429:
        error = json.loads(raw)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "slo_unattainable")
        # More outputs than the engine ever runs at once.
        assert headers["x-should-retry"] == "false"
    elif not stream:
        answer = json.loads(raw)
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * n
        assert answer["usage"]["completion_tokens"] == 16 * n
    for thread in neighbours:
        thread.join()
    assert texts == [alone] * 3
    server.wait_until_free()
    health = json.loads(post(server, "/health", None, method="GET")[2])
    assert health == {"status": "ok", "unfinished": 0}
    engine = server.engine
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)
    engine._core.check_integrity()

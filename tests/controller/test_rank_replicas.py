"""A replica that is a group of ranks: it answers over HTTP, and is replaced whichever rank is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
from cluster import announced, launch
from held import Hold, planted_in
from waiting import PATIENCE_S, is_alive, wait_until

BODY = {
    "prompt": "The quick brown fox",
    "max_tokens": 100,
    "ignore_eos": True,
    "temperature": 0,
    "logprobs": 0,
}


def test_a_group_answers_over_http_goes_on_without_a_lost_token_and_leaves_no_rank(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    process = launch(
        log, tiny_llama_dir, "--tensor-parallel", "2", "--threads", "1",
        module="planted_serve", environment=planted_in(tmp_path),
    )  # fmt: skip
    seen: set[int] = set()
    try:
        server = announced(process, log)
        (replica,) = server.wait_until_up()

        def ranks() -> list[int]:
            """The replica's other ranks."""
            found = [one.pid for one in psutil.Process(server.replicas()[0]["pid"]).children()]
            seen.update(found)
            return found

        expected = server.stream(BODY)
        assert len(expected[0][1]) == BODY["max_tokens"]

        (rank,) = ranks()
        hold = Hold(tmp_path).at(60)

        def kill() -> None:
            os.kill(rank, signal.SIGKILL)
            # Its rank 0 finds that out where it goes on.
            hold.release()
            server.wait_until_lost(replica)

        assert server.stream(BODY, after=20, then=kill) == expected
        (again,) = server.wait_until_up()
        assert again["pid"] != replica["pid"]
        assert again["lost"] == 1
        assert not is_alive(replica["pid"])

        (rank,) = ranks()
        server.lose(0)  # its own rank 0
        wait_until(lambda: not is_alive(rank))
        # Until a group is back, new requests are refused.
        server.wait_until_up()
        assert server.stream({**BODY, "n": 2})[0] == expected[0]
        ranks()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, log.read_text()
        wait_until(lambda: not any(map(is_alive, seen)))
    finally:
        process.kill()
        process.wait()

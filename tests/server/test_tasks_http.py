"""Tasks over HTTP: three calls of an agent, budgets that differ, tasks that are too late."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import RunningServer, hanging, post
from waiting import wait_until

from minserve.server_config import ServerConfig

BODY = {"model": "tiny", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
LONG = 600_000


def ask(server: RunningServer, prompt: str, slo: Any, **more: Any) -> tuple[int, dict, dict]:
    """Status, headers and answer of a completion."""
    headers = more.pop("headers", {})
    body = {**BODY, "prompt": prompt, "slo": slo, **more}
    status, told, answer = post(server, "/v1/completions", body, headers)
    return status, told, json.loads(answer)


def task(name: str, **more: Any) -> dict[str, Any]:
    return {"task": {"id": name, "finish_ms": LONG, "calls": 3, **more}}


def outcomes(server: RunningServer) -> dict[str, float]:
    _, _, text = post(server, "/metrics", None, method="GET")
    lines = [line for line in text.decode().splitlines() if line.startswith("minserve:tasks_total")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def test_three_calls_of_a_task(server: RunningServer) -> None:
    before, said, told = outcomes(server), "An agent looks for a fox in the wood. " * 4, []
    pool = server.engine._core.pool
    for number in range(3):
        status, _, answer = ask(server, said, task("three"))
        assert status == 200, answer
        usage = answer["usage"]
        told.append(usage["slo"]["task"])
        # The call's own part of the time is a deadline like any other.
        assert (
            0
            < usage["slo"]["targets"]["finish_ms"]
            <= (told[-2]["remaining_ms"] if number else LONG)
        )
        assert usage["slo"]["attained"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 0) == (number > 0)
        server.wait_until_free()
        # While a tool runs, its prefix is held; behind the last call nothing is.
        wait_until(lambda number=number: (pool.num_held_blocks > 0) == (number < 2))
        said += answer["choices"][0]["text"] + f" Tool {number} says: nothing. "
    assert [(one["id"], one["call"], one["calls"]) for one in told] == [
        ("three", number, 3) for number in (1, 2, 3)
    ]
    left = [one["remaining_ms"] for one in told]
    assert LONG > left[0] > left[1] > left[2] > 0
    assert not any(one["given_up"] for one in told)
    assert outcomes(server)["attained"] == before["attained"] + 1


def test_a_stream_tells_of_its_task_in_the_usage(server: RunningServer) -> None:
    body = {**BODY, "prompt": "Hi", "slo": task("stream", calls=None), "stream": True}
    body["stream_options"] = {"include_usage": True}
    status, _, text = post(server, "/v1/chat/completions", {
        **{k: v for k, v in body.items() if k != "prompt"},
        "messages": [{"role": "user", "content": "Hi"}],
    })  # fmt: skip
    assert status == 200
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith(b"data: {")]
    (usage,) = [one["usage"] for one in events if one.get("usage")]
    assert (usage["slo"]["task"]["call"], usage["slo"]["task"]["calls"]) == (1, None)


def test_several_prompts_of_one_request_are_one_call(server: RunningServer) -> None:
    for number in (1, 2):
        status, _, answer = ask(server, ["one", "two"], task("pair"), n=2)
        assert status == 200
        assert answer["usage"]["slo"]["task"]["call"] == number


def test_another_budget_gets_one_clear_400(server: RunningServer) -> None:
    assert ask(server, "first", task("budget"))[0] == 200
    for other, param in (
        ({"finish_ms": LONG + 1}, "slo.task.finish_ms"),
        ({"calls": 4}, "slo.task.calls"),
        ({"calls": None}, "slo.task.calls"),
    ):
        status, _, answer = ask(server, "again", task("budget", **other))
        assert (status, answer["error"]["param"]) == (400, param)
        assert "another id" in answer["error"]["message"]
    status, _, answer = ask(server, "again", task("budget"))
    assert answer["usage"]["slo"]["task"]["call"] == 2
    # With another salt nothing is shared, not even the names of tasks.
    assert ask(server, "again", task("budget", calls=4), cache_salt="other")[0] == 200


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"task": 3}, "slo.task"),
        ({"task": []}, "slo.task"),
        ({"task": {}}, "slo.task.id"),
        ({"task": {"id": "a"}}, "slo.task.finish_ms"),
        ({"task": {"finish_ms": 5}}, "slo.task.id"),
        (task("a", deadline_ms=5), "slo.task.deadline_ms"),
        (task("a", finish_slowdown=5), "slo.task.finish_slowdown"),
        (task(""), "slo.task.id"),
        (task("a" * 129), "slo.task.id"),
        (task("a\nb"), "slo.task.id"),
        (task(7), "slo.task.id"),
        (task("a", finish_ms=0), "slo.task.finish_ms"),
        (task("a", finish_ms=-5), "slo.task.finish_ms"),
        (task("a", finish_ms="5"), "slo.task.finish_ms"),
        (task("a", finish_ms=True), "slo.task.finish_ms"),
        (task("a", finish_ms=1e30), "slo.task.finish_ms"),
        (task("a", calls=0), "slo.task.calls"),
        (task("a", calls=-1), "slo.task.calls"),
        (task("a", calls=2.5), "slo.task.calls"),
        (task("a", calls=True), "slo.task.calls"),
    ],
)
def test_a_wrong_task_is_named(server: RunningServer, wrong: Any, param: str) -> None:
    status, _, answer = ask(server, "Hi", wrong)
    assert (status, answer["error"]["param"]) == (400, param)


def test_a_task_that_cannot_be_in_time_is_given_up_as_a_whole(server: RunningServer) -> None:
    before = outcomes(server)
    late = task("late", finish_ms=0.001)
    status, _, answer = ask(server, "first", late)
    assert status == 200
    told = answer["usage"]["slo"]
    assert (told["admitted"], told["attained"], told["task"]["given_up"]) == (False, False, True)
    assert told["task"]["remaining_ms"] < 0
    status, _, answer = ask(server, "second", late)
    assert (status, answer["usage"]["slo"]["task"]["call"]) == (200, 2)
    assert answer["usage"]["slo"]["task"]["given_up"]
    # Where a call would rather be refused, it is, and told that no wait helps.
    status, headers, answer = ask(server, "third", {**late, "on_unattainable": "reject"})
    assert (status, answer["error"]["code"]) == (429, "slo_unattainable")
    assert headers["x-request-dropped-reason"] == "task"
    assert headers["x-should-retry"] == "false"
    assert "Retry-After" not in headers
    now = outcomes(server)
    assert sum(now[one] - before[one] for one in ("late", "given_up")) == 1


def test_the_stricter_of_two_deadlines_counts(server: RunningServer) -> None:
    for finish_ms, stricter in ((1000, True), (LONG, False)):
        slo = {**task(f"strict {finish_ms}"), "finish_ms": finish_ms}
        _, _, answer = ask(server, "Hi", slo)
        promised = answer["usage"]["slo"]["targets"]["finish_ms"]
        assert (promised == finish_ms) is stricter
        assert promised <= finish_ms


def test_a_call_that_the_client_leaves_does_not_count(server: RunningServer) -> None:
    body = {**BODY, "prompt": "a", "slo": task("left"), "max_tokens": 150, "stream": True}
    with hanging(server), server.connect() as sock:
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        server.wait_until_busy()
        sock.close()
        server.wait_until_left()
    server.wait_until_free()
    _, _, answer = ask(server, "a", task("left"))
    assert answer["usage"]["slo"]["task"]["call"] == 1


def test_equal_ids_of_two_keys_are_two_tasks(tiny_llama_dir: Path, start_server: Callable) -> None:
    config = ServerConfig(served_model_name="tiny", api_key=["first-key-1234", "other-key-1234"])
    server = start_server(tiny_llama_dir, config)
    for key, calls in (("first-key-1234", 3), ("other-key-1234", 5)):
        headers = {"Authorization": f"Bearer {key}"}
        status, _, answer = ask(server, "Hi", task("same", calls=calls), headers=headers)
        assert (status, answer["usage"]["slo"]["task"]["call"]) == (200, 1)

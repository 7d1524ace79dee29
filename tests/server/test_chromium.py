"""Pages of other origins in headless Chromium: what they can make the server do."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import RunningServer
from served import served
from web_pages import site, visit

from minserve.config import EngineConfig
from minserve.controller.controller import Controller
from minserve.controller.rendezvous import Rendezvous
from minserve.controller.replicas import ReplicaState
from minserve.process_config import ControllerConfig
from minserve.server.app import Server
from minserve.server_config import ServerConfig
from parts.page_picture.chromium import CHROMIUM, NO_CHROMIUM

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
CHAT = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}


@pytest.fixture
def replicated(tiny_llama_dir: Path) -> Iterator[str]:
    """The URL of a server with two replicas, of which the second is up."""
    controller = Controller(
        EngineConfig(model=str(tiny_llama_dir)),
        ControllerConfig(replicas=2),
        Rendezvous("127.0.0.1", 0, 2),
    )
    controller.table.replicas[1].enter(ReplicaState.UP)
    with served(Server(ServerConfig(), controller).create_runner()) as url:
        yield url


def state_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/replicas") as answer:
        return json.load(answer)["replicas"][1]["state"]


def test_no_page_of_another_origin_drains_a_replica(replicated: str, tmp_path: Path) -> None:
    order = f"{replicated}/replicas/1/drain"
    script = f"""
        return [await attempt("{order}", {{method: "POST", mode: "no-cors"}}),
                await attempt("{order}", {{method: "POST", mode: "no-cors", body: "a"}}),
                await attempt("{order}", {{method: "POST"}}),
                await attempt("/replicas/1/drain", {{method: "POST"}}),
                await attempt("{replicated}/replicas")];
    """
    with site(replicated) as page:
        found = visit(page, script, "evil.test", tmp_path)
    blind, blind_too, asking, rebound, reading = found
    # In this mode the browser sends the order, and keeps the answer from the page.
    assert [blind["type"], blind_too["type"]] == ["opaque", "opaque"]
    assert [asking["type"], reading["type"]] == ["failed", "failed"]
    assert rebound["status"] == 403
    assert json.loads(rebound["text"])["error"]["code"] == "unknown_host"
    assert state_of(replicated) == "up"
    # The order is a good one, if it comes from elsewhere.
    urllib.request.urlopen(urllib.request.Request(order, data=b"", method="POST")).close()
    assert state_of(replicated) != "up"


def test_no_page_of_another_origin_makes_the_server_compute(
    server: RunningServer, tmp_path: Path
) -> None:
    url = f"{server.url}/v1/chat/completions"
    script = f"""
        const body = JSON.stringify({json.dumps(CHAT)}), method = "POST";
        const headers = {{"Content-Type": "application/json"}};
        return [await attempt("{url}", {{method, body, mode: "no-cors"}}),
                await attempt("{url}", {{method, body: new Blob([body]), mode: "no-cors"}}),
                await attempt("{url}", {{method, body}}),
                await attempt("{url}", {{method, body, headers}})];
    """
    before = server.engine.stats().num_generation_tokens
    with site(server.url) as page:
        found = visit(page, script, "localhost", tmp_path)  # of another port alone
    assert [one["type"] for one in found] == ["opaque", "opaque", "failed", "failed"]
    assert server.engine.stats().num_generation_tokens == before


def test_a_page_of_an_allowed_origin_streams_a_chat(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    body: dict[str, Any] = {**CHAT, "stream": True}
    script = f"""
        const ask = (key) => fetch("URL/v1/chat/completions", {{
            method: "POST", body: JSON.stringify({json.dumps(body)}),
            headers: {{"Content-Type": "application/json", "Authorization": "Bearer " + key,
                       "x-request-id": "from-a-page"}}}});
        const refused = await ask("wrong");
        const answer = await ask("secret"), reader = answer.body.getReader();
        let text = "", decoder = new TextDecoder();
        for (let part; !(part = await reader.read()).done;) {{ text += decoder.decode(part.value); }}
        return {{text, id: answer.headers.get("x-request-id"), refused: await refused.json()}};
    """
    with site("http://localhost:1") as page:
        origin = f"http://friend.test:{page.server_port}"
        config = ServerConfig(allowed_origins=(origin,), api_key=("secret",))
        server = start_server(tiny_llama_dir, config)
        found = visit(page, script.replace("URL", server.url), "friend.test", tmp_path)
    *chunks, done = found["text"].strip().split("\n\n")
    assert done == "data: [DONE]"
    deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
    with server.client(api_key="secret") as client:
        whole = client.chat.completions.create(
            model=server.engine.model_name, messages=MESSAGES, max_tokens=8, temperature=0
        )
    assert "".join(delta.get("content", "") for delta in deltas) == whole.choices[0].message.content
    assert found["id"] == "from-a-page"
    assert found["refused"]["error"]["code"] == "invalid_api_key"

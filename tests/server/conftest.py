"""Servers to test against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import ENGINE_SETTINGS, RunningServer, run_server

from minserve import AsyncEngine
from minserve.server_config import ServerConfig


@pytest.fixture(scope="session")
def server(tiny_llama_dir: Path) -> Iterator[RunningServer]:
    engine = AsyncEngine(str(tiny_llama_dir), **ENGINE_SETTINGS)
    yield from run_server(engine, ServerConfig(served_model_name="tiny", max_body_mib=1.0))


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Start further servers with settings of their own."""
    running = []

    def start(model: Path, config: ServerConfig, **settings: Any) -> RunningServer:
        engine = AsyncEngine(str(model), **{**ENGINE_SETTINGS, **settings})
        running.append(run_server(engine, config))
        return next(running[-1])

    yield start
    for one in running:
        one.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
    server.wait_until_free()

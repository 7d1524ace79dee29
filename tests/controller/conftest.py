"""A controller whose replicas are played by the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from played import Test, join
from waiting import PATIENCE_S

from minserve.config import EngineConfig
from minserve.controller.controller import Controller
from minserve.controller.rendezvous import Rendezvous
from minserve.process_config import ControllerConfig


@pytest.fixture
def run(tiny_llama_dir: Path) -> Callable[..., None]:
    """Runs a test with a controller of three idle replicas."""

    def run(test: Test, **settings: Any) -> None:
        async def main() -> None:
            controller = Controller(
                EngineConfig(model=str(tiny_llama_dir)),
                ControllerConfig(**{"replicas": 3, **settings}),
                Rendezvous("127.0.0.1", 0, 3),
            )
            controller._accepting = True
            await test(controller, [join(controller, number) for number in range(3)])

        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))

    return run

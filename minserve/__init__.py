"""minserve: an LLM inference server in pure PyTorch that keeps latency promises.

The public face, imported lazily so that ``import minserve`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minserve.engine.async_engine import AsyncEngine
    from minserve.engine.engine import Engine
    from minserve.outputs import CompletionOutput, OutputDelta, RequestOutput
    from minserve.sampling_params import SamplingParams
    from minserve.slo.attainment import SLOReport
    from minserve.slo.objectives import SLO, DecodeStage, Task
    from minserve.structure import Structure

__version__ = "0.1.0"

_HOMES = {
    "Engine": "minserve.engine.engine",
    "AsyncEngine": "minserve.engine.async_engine",
    "SamplingParams": "minserve.sampling_params",
    "RequestOutput": "minserve.outputs",
    "CompletionOutput": "minserve.outputs",
    "OutputDelta": "minserve.outputs",
    "SLO": "minserve.slo.objectives",
    "DecodeStage": "minserve.slo.objectives",
    "Task": "minserve.slo.objectives",
    "SLOReport": "minserve.slo.attainment",
    "Structure": "minserve.structure",
}
__all__ = [
    "SLO",
    "AsyncEngine",
    "CompletionOutput",
    "DecodeStage",
    "Engine",
    "OutputDelta",
    "RequestOutput",
    "SLOReport",
    "SamplingParams",
    "Structure",
    "Task",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minserve' has no attribute {name!r}")

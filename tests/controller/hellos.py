"""What replicas of a small model say first."""

from __future__ import annotations

from typing import Any

from minserve.controller import messages as m
from minserve.planner.predict.perf_model import Piece
from minserve.planner.replica_load import ReplicaLoad


def hello(**changes: Any) -> m.Hello:
    """A replica's first words, but for some fields."""
    fields = {
        "identity": m.Identity(protocol=m.PROTOCOL, version="0", traits={"dtype": "float32"}),
        "pid": 1000,
        "host": "here",
        "model_name": "tiny",
        "max_model_len": 512,
        "vocab_size": 512,
        "load": ReplicaLoad(free_tokens=10**5),
        "pieces": (Piece(tokens=1e-4, base=0.01),),
        "margin": 1.0,
    }
    return m.Hello(**(fields | changes))

"""What the controller and its replicas tell each other: typed messages as MessagePack bytes.

Times cross as ages (seconds before the message was written), since machines share no clock.
Whatever does not decode to exactly one of the types below is a `ProtocolError`: nothing that
comes over the wire is code, and nothing is guessed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from minserve.engine.stats import EngineStats, Histogram
from minserve.errors import GenerationError, MinserveError, ProtocolError, SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.planner.replica_load import ReplicaLoad
from minserve.planner.perf_model import Piece
from minserve.request import Request

# Goes up whenever a message changes its meaning.
PROTOCOL = 1


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What all replicas of one controller must have in common.

    Attributes:
        protocol: of these messages.
        version: of minserve.
        traits: of the engine and its model, by name.
    """

    protocol: int
    version: str
    traits: dict[str, str]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica's first words.

    Attributes:
        load: with nothing to do.
        pieces, margin: its performance model.
    """

    identity: Identity
    pid: int
    host: str
    model_name: str
    max_model_len: int
    vocab_size: int
    load: ReplicaLoad
    pieces: tuple[Piece, ...]
    margin: float


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The controller takes a replica in."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The controller does not; the replica has to end, and to say why."""

    why: str


class Resumed(msgspec.Struct, frozen=True, kw_only=True):
    """What a client already has of an output that goes on elsewhere.

    Attributes:
        ages_s: of its tokens.
        told_prompt: the log probabilities of the prompt were told, where asked for.
    """

    token_ids: tuple[int, ...] = ()
    ages_s: tuple[float, ...] = ()
    told_prompt: bool = False


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run a request.

    Attributes:
        request: its ``arrival_s`` means nothing here.
        age_s: of its arrival.
        outputs: by index, those that are to be run, with what there is of them.
    """

    request: Request
    age_s: float
    outputs: dict[int, Resumed]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The client has left."""

    request_id: str


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """Give a request back, if none of its outputs has begun."""

    request_id: str


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    """The replica has given a request back, and says nothing more of it."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process; whatever still runs is not wanted any more.

    Attributes:
        again: another process shall take its place.
    """

    again: bool = False


class News(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What came of an iteration, and how the replica stands after it.

    Attributes:
        declined: ids of requests that are promised nothing for now, have not begun, and so
            may be better off elsewhere.
        num_taken: submissions so far that ``load`` counts in; later ones are still under way.
    """

    deltas: tuple[OutputDelta, ...] = ()
    declined: tuple[str, ...] = ()
    load: ReplicaLoad | None = None
    num_taken: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a replica has counted, and how it stands; sent now and then, also as a sign of life.

    Attributes:
        num_taken: as in `News`.
    """

    stats: EngineStats
    load: ReplicaLoad
    num_taken: int


Message = (
    Hello | Welcome | Refused | Submit | Abort | Withdraw | Withdrawn | Stop | News | Heartbeat
)  # fmt: skip


def encode(message: Message) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """The message that bytes stand for.

    Raises:
        ProtocolError: where they stand for none.
    """
    try:
        return _decoder.decode(data)
    # ValueError: text that is not UTF-8, which the decoder does not catch everywhere.
    except (msgspec.MsgspecError, MinserveError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol {PROTOCOL}: {error}") from None


def _to_wire(value: Any) -> Any:
    if isinstance(value, SLOUnattainableError):
        return {"message": str(value), "reason": value.reason, "after_s": value.retry_after_s}
    if isinstance(value, Exception):
        return {"message": str(value)}
    if isinstance(value, Histogram):
        return [list(value.bounds), value.counts, value.total]
    raise TypeError(f"{type(value).__name__} has no form on the wire")


def _from_wire(kind: type, value: Any) -> Any:
    if kind is Exception:
        return _error(msgspec.convert(value, dict[str, str | float]))
    if kind is Histogram:
        bounds, counts, total = msgspec.convert(value, tuple[tuple[float, ...], list[int], float])
        histogram = Histogram(bounds)
        histogram.counts, histogram.total = counts, total
        return histogram
    raise TypeError(f"{kind} has no form on the wire")


def _error(told: dict[str, str | float]) -> MinserveError:
    """An error as the client's own process would have raised it."""
    message = str(told.get("message", ""))
    if "reason" in told:
        return SLOUnattainableError(
            message, reason=str(told["reason"]), retry_after_s=float(told.get("after_s", 0.0))
        )
    return GenerationError(message)


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=_from_wire)

"""The messages between the controller and its replicas: typed, as MessagePack bytes.

Times are sent as ages (seconds before the message was written), because machines share no clock.
Bytes that do not decode to exactly one of the types below raise `ProtocolError`: nothing that
comes over the wire is run as code, and nothing is guessed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from minserve.activity import Activity, Cursor
from minserve.engine.stats import EngineStats, Histogram
from minserve.errors import (
    GenerationError,
    InvalidRequestError,
    MinserveError,
    ProtocolError,
    SLOUnattainableError,
)
from minserve.outputs import OutputDelta
from minserve.planner.predict.eager import NO_MIXED, MixedLimit
from minserve.planner.predict.perf_model import Piece
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import Request

# Raised by 1 whenever the meaning of a message changes.
PROTOCOL = 3


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The properties that all replicas of one controller must have in common.

    Attributes:
        protocol: version of these messages.
        version: version of minserve.
        traits: properties of the engine and its model, by name.
    """

    protocol: int
    version: str
    traits: dict[str, str]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a replica.

    Attributes:
        load: the replica's load while it has no requests.
        pieces, margin, mixed: of its performance model.
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
    mixed: MixedLimit = NO_MIXED


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The controller accepts a replica."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The controller does not accept a replica; the replica must log the reason and end."""

    why: str


class Resumed(msgspec.Struct, frozen=True, kw_only=True):
    """The part of an output that the client already has, when another replica continues it.

    Attributes:
        ages_s: seconds since each of these tokens was delivered.
        told_prompt: the client has the prompt's log probabilities, where it asked for them.
    """

    token_ids: tuple[int, ...] = ()
    ages_s: tuple[float, ...] = ()
    told_prompt: bool = False


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tells a replica to run a request.

    Attributes:
        request: the request; its ``arrival_s`` means nothing here.
        age_s: seconds since the request arrived.
        outputs: the outputs to run, by index, each with the part that the client has.
    """

    request: Request
    age_s: float
    outputs: dict[int, Resumed]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Tells a replica to end a request, because its client has left.

    Attributes:
        has_all: its client is still there, and wants nothing more: it is to be told the end.
    """

    request_id: str
    has_all: bool = False


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """Asks a replica to give a request back, if none of its outputs has begun."""

    request_id: str


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    """The replica has given a request back, and will send nothing more about it."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Tells a replica to end its process; requests that still run are not wanted any more.

    Attributes:
        again: true if another process shall take its place.
    """

    again: bool = False


class News(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The outcome of an iteration, and the replica's load after it.

    Attributes:
        declined: ids of requests that have no promise for now and have not begun, so that
            another replica may serve them better.
        num_taken: number of submissions so far that ``load`` includes; later ones are on their way.
    """

    deltas: tuple[OutputDelta, ...] = ()
    declined: tuple[str, ...] = ()
    load: ReplicaLoad | None = None
    num_taken: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica's statistics and load; sent regularly, also as a sign of life.

    Attributes:
        num_taken: as in `News`.
    """

    stats: EngineStats
    load: ReplicaLoad
    num_taken: int


class Look(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks a replica what it did lately. It answers at once with `Seen`, also while it computes.

    Attributes:
        number: chosen by the controller, to tell the answers apart.
        since: what was seen before; ``None`` asks for all that is kept.
    """

    number: int
    since: Cursor | None = None


class Seen(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica's answer to the `Look` of the same number."""

    number: int
    activity: Activity


class Hung(msgspec.Struct, frozen=True, tag=True):
    """The last message of a replica whose iteration takes longer than the watchdog allows.

    Attributes:
        iteration_s: how many seconds it has taken so far.
    """

    iteration_s: float


Message = (
    Hello | Welcome | Refused | Submit | Abort | Withdraw | Withdrawn | Stop | News | Heartbeat | Hung
    | Look | Seen
)  # fmt: skip


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Return the message that bytes stand for.

    Raises:
        ProtocolError: if they stand for no message.
    """
    try:
        return _decoder.decode(data)
    # ValueError: text that is not UTF-8, which the decoder does not catch everywhere.
    except (msgspec.MsgspecError, MinserveError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol {PROTOCOL}: {error}") from None


def _to_wire(value: Any) -> Any:
    if isinstance(value, SLOUnattainableError):
        return {"message": str(value), "reason": value.reason, "after_s": value.retry_after_s}
    if isinstance(value, InvalidRequestError):
        return {"message": str(value), "param": value.param or ""}
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
    """Return the error that the client's own process would have raised."""
    message = str(told.get("message", ""))
    if "reason" in told:
        return SLOUnattainableError(
            message, reason=str(told["reason"]), retry_after_s=float(told.get("after_s", 0.0))
        )
    if "param" in told:
        return InvalidRequestError(message, str(told["param"]) or None)
    return GenerationError(message)


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=_from_wire)

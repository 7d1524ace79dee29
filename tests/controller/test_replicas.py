"""Who is taken in beside the others, and who is told why not."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hellos import hello
from waiting import PATIENCE_S

from minserve import __version__
from minserve.config import EngineConfig
from minserve.controller import messages as m
from minserve.controller.channel import FRAME, MAX_MESSAGE, REPLICA, Channel, pair_store
from minserve.controller.rendezvous import Arrival, Rendezvous, announce
from minserve.controller.replica_loop import identity_of
from minserve.controller.replicas import ReplicaTable
from minserve.engine.relay import RelayEngine
from minserve.errors import ReplicaLostError, ReplicaRefusedError
from minserve.planner.replica_load import ReplicaLoad

TRAITS = {"model": "tiny (0123456789ab)", "dtype": "float32", "policy": "dp"}
OWN = m.Identity(protocol=m.PROTOCOL, version=__version__, traits=TRAITS)


@pytest.fixture
def table() -> Iterator[ReplicaTable]:
    """Of two replicas, of which the first has joined."""
    nothing = {name: lambda *_: None for name in ("joined", "told", "seen", "lost")}
    found = ReplicaTable(Rendezvous("127.0.0.1", 0, 2), 2, 5.0, **nothing)
    found._identity = OWN
    found.replicas[0].epoch = 3
    return found


def check(table: ReplicaTable, identity: m.Identity, number: int = 1, epoch: int = 1) -> None:
    table._check(table.replicas[number], Arrival(number, epoch), hello(identity=identity))


def test_one_like_the_others_is_taken_in(table: ReplicaTable) -> None:
    check(table, OWN)
    check(table, OWN, number=0, epoch=4)


@pytest.mark.parametrize(
    ("setting", "value"), [("kv_cache_dtype", "int8"), ("tokenizer", "other"), ("policy", "edf")]
)
def test_a_setting_that_changes_tokens_or_promises_is_a_trait(setting: str, value: str) -> None:
    def traits(config: EngineConfig) -> dict[str, str]:
        engine = SimpleNamespace(
            config=config, model_name="tiny", fingerprint="", dtype="", max_model_len=1
        )
        return identity_of(cast(RelayEngine, engine)).traits

    usual = EngineConfig()
    differs = {
        k for k, v in traits(replace(usual, **{setting: value})).items() if v != traits(usual)[k]
    }
    assert differs == {setting}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"traits": {**TRAITS, "dtype": "bfloat16"}},
         "its dtype is bfloat16, that of the others float32"),
        ({"traits": {**TRAITS, "model": "tiny (ba9876543210)"}}, r"its model is tiny \(ba98"),
        ({"traits": {"model": TRAITS["model"], "dtype": "float32"}}, "its policy is None"),
        ({"version": "0.0.0"}, "it is minserve 0.0.0"),
        ({"protocol": m.PROTOCOL + 1}, f"with protocol {m.PROTOCOL + 1}"),
    ],
    ids=["dtype", "weights", "a trait that is missing", "version", "protocol"],
)  # fmt: skip
def test_one_that_differs_is_refused_in_one_line(
    table: ReplicaTable, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ReplicaRefusedError, match=says) as error:
        check(table, msgspec.structs.replace(OWN, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("epoch", [1, 3])
def test_one_of_the_past_is_refused(table: ReplicaTable, epoch: int) -> None:
    with pytest.raises(ReplicaRefusedError, match="a later process has taken this replica's place"):
        check(table, OWN, number=0, epoch=epoch)


def test_the_version_counts_for_the_first_one_too(table: ReplicaTable) -> None:
    table._identity = None
    check(table, OWN)
    with pytest.raises(ReplicaRefusedError, match="it is minserve"):
        check(table, msgspec.structs.replace(OWN, version="0.0.0"))


FRAMES = {
    "no message": (9).to_bytes(8, "little") + bytes([0xC1] * 9),
    "empty": bytes(8),
    "too long": (MAX_MESSAGE + 1).to_bytes(8, "little"),
    "longer than memory": b"\xff" * 8,
}
MESSAGES = {
    "of the controller": m.encode(m.Welcome()),
    "a second hello": m.encode(hello(identity=OWN)),
    "a load that is none": m.encode(m.News(load=ReplicaLoad())).replace(
        b"free_tokens\x00", b"free_tokens\xc0"
    ),
}


@pytest.mark.parametrize("what", [*FRAMES, *MESSAGES])
def test_whatever_a_replica_sends_ends_its_own_connection_alone(what: str) -> None:
    """Real channels, whose other ends are threads here."""
    told, lost = [], []

    def play(rendezvous: Rendezvous, number: int, go: threading.Event) -> None:
        meeting = announce(rendezvous.host, rendezvous.port, number)
        channel = Channel(
            pair_store(meeting.store, number, meeting.epoch),
            REPLICA,
            address="127.0.0.1",
            patience_s=PATIENCE_S,
            join_s=PATIENCE_S,
        )
        channel.send(m.encode(hello(identity=OWN)))
        assert isinstance(m.decode(channel.receive()), m.Welcome)
        go.wait(PATIENCE_S)
        if number == 1:
            channel.send(m.encode(m.Withdrawn("a")))
            assert m.decode(channel.receive()) == m.Stop()
            return
        if what in FRAMES:
            channel._send(bytearray(FRAMES[what].ljust(FRAME, b"\0")))
        else:
            channel.send(MESSAGES[what])
        with pytest.raises(ReplicaLostError):
            _send_on(channel)

    async def main() -> None:
        joined, go = asyncio.Event(), threading.Event()
        rendezvous = Rendezvous("127.0.0.1", 0, 2)
        table = ReplicaTable(
            rendezvous,
            2,
            PATIENCE_S,
            joined=lambda *_: joined.set() if all(r.is_up for r in table.replicas) else None,
            told=lambda replica, message: told.append((replica.number, message)),
            seen=lambda _: None,
            lost=lambda replica, error: lost.append((replica.number, error)),
        )
        table.start()
        ends = [asyncio.to_thread(play, rendezvous, number, go) for number in range(2)]
        ending = asyncio.gather(*ends)
        await joined.wait()
        go.set()
        while not (lost and told):
            await asyncio.sleep(0.01)
        assert [number for number, _ in lost] == [0]
        assert told == [(1, m.Withdrawn("a"))]
        assert table.replicas[1].is_up
        closing = asyncio.create_task(table.close())
        await asyncio.gather(closing, ending)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize("raises", [KeyError("x"), OverflowError(math.inf)])
def test_what_a_message_breaks_it_breaks_for_its_replica(
    table: ReplicaTable, raises: Exception
) -> None:
    lost = []

    def told(*_: object) -> None:
        raise raises

    table._told, table._lost = told, lambda replica, _: lost.append(replica.number)
    mailbox = table.replicas[1].mailbox = Mute()
    table._hear(table.replicas[1], m.Withdrawn("a"))
    assert (lost, mailbox.closed) == ([1], True)


def _send_on(channel: Channel) -> None:
    while True:
        channel.send(m.encode(m.Withdrawn("a")))


class Mute:
    """A mailbox that only closes."""

    closed = False

    def close(self) -> None:
        self.closed = True

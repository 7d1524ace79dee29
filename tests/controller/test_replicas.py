"""Who is taken in beside the others, and who is told why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hellos import hello

from minserve import __version__
from minserve.controller import messages as m
from minserve.controller.rendezvous import Arrival, Rendezvous
from minserve.controller.replicas import ReplicaTable
from minserve.errors import ReplicaRefusedError

TRAITS = {"model": "tiny (0123456789ab)", "dtype": "float32", "policy": "dp"}
OWN = m.Identity(protocol=m.PROTOCOL, version=__version__, traits=TRAITS)


@pytest.fixture
def table() -> Iterator[ReplicaTable]:
    """Of two replicas, of which the first has joined."""
    nothing = {name: lambda *_: None for name in ("joined", "told", "lost")}
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

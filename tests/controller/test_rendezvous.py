"""Where replicas and their controller find each other: a real store on a real port."""

from __future__ import annotations

import socket

import psutil
import pytest
from torch.distributed import TCPStore
from unused_ports import unused_port

from minserve.controller import rendezvous
from minserve.controller.rendezvous import Arrival, Rendezvous, announce, is_open, local_address
from minserve.errors import ConfigError, ReplicaLostError, ReplicaRefusedError

HOST = "127.0.0.1"


@pytest.fixture
def meeting() -> Rendezvous:
    return Rendezvous(HOST, 0, 3)


def stranger(meeting: Rendezvous) -> TCPStore:
    """Somebody who reaches the control port."""
    return TCPStore(meeting.host, meeting.port, is_master=False, wait_for_workers=False)


def test_a_taken_port_is_one_error_that_names_it() -> None:
    with socket.create_server((HOST, 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError) as error:
            Rendezvous(HOST, port, 3)
    assert f"{HOST}:{port}" in str(error.value)
    assert "in use" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_port_of_another_controller_is_taken_too(meeting: Rendezvous) -> None:
    with pytest.raises(ConfigError, match=f"{HOST}:{meeting.port}"):
        Rendezvous(HOST, meeting.port, 3)


@pytest.mark.parametrize("host", ["host.invalid", "192.0.2.1", "a" * 70], ids=lambda h: h[:12])
def test_an_unknown_host_is_one_error_that_names_it(host: str) -> None:
    with pytest.raises(ConfigError, match=host) as error:
        Rendezvous(host, 0, 3)
    assert "\n" not in str(error.value)


def test_it_listens_on_the_asked_address_and_on_no_other(meeting: Rendezvous) -> None:
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == meeting.port
    ]
    assert listening == [HOST]
    assert stranger(meeting).add("anything", 1) == 1


def test_a_port_that_was_asked_for_is_the_one_it_has() -> None:
    port = unused_port()
    assert Rendezvous(HOST, port, 3).port == port


def test_who_announces_is_found_once_with_rising_epochs(meeting: Rendezvous) -> None:
    assert meeting.arrivals() == []
    epochs = [announce(HOST, meeting.port, replica).epoch for replica in (1, 0)]
    assert epochs == [1, 1]
    assert meeting.arrivals() == [Arrival(0, 1), Arrival(1, 1)]
    assert meeting.arrivals() == []
    assert announce(HOST, meeting.port, 1).epoch == 2
    assert meeting.arrivals() == [Arrival(1, 2)]


def test_of_two_with_one_number_the_later_one_is_meant(meeting: Rendezvous) -> None:
    for epoch in (1, 2):
        assert announce(HOST, meeting.port, 2).epoch == epoch
    assert meeting.arrivals() == [Arrival(2, 2)]


def test_a_number_beyond_the_controllers_is_refused(meeting: Rendezvous) -> None:
    with pytest.raises(ReplicaRefusedError, match="no replica 3: the controller has 3"):
        announce(HOST, meeting.port, 3)
    assert meeting.arrivals() == []


def test_a_replica_and_its_controller_have_the_same_store(meeting: Rendezvous) -> None:
    store = announce(HOST, meeting.port, 0).store
    store.set("said", "hello")
    assert meeting.store.get("said") == b"hello"


@pytest.mark.parametrize("told", ["", "x", "-1", "1/1", "1.0", "\u0661", "1" * 10_000, b"\xff"])
def test_what_is_no_epoch_is_passed_over(meeting: Rendezvous, told: str | bytes) -> None:
    stranger(meeting).set("minserve/epoch/0", told)
    announce(HOST, meeting.port, 2)
    assert meeting.arrivals() == [Arrival(2, 1)]


def test_it_is_open_to_others_once_that_is_said(meeting: Rendezvous) -> None:
    assert not is_open(HOST, meeting.port)
    meeting.open()
    assert is_open(HOST, meeting.port)


def test_without_a_controller_nothing_is_open_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "PROBE_S", 0.1)
    assert not is_open(HOST, unused_port())
    # Whoever waits asks again and again.
    assert capfd.readouterr() == ("", "")


def test_a_controller_that_hangs_is_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PROBE_S", 0.1)
    # The kernel takes the connection, and nobody ever answers.
    with socket.create_server((HOST, 0)) as sock:
        assert not is_open(HOST, sock.getsockname()[1])


def test_a_replica_without_a_controller_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.2)
    port = unused_port()
    for call in (lambda: announce(HOST, port, 0), lambda: local_address(HOST, port)):
        with pytest.raises(ReplicaLostError, match=f"no controller answers on {HOST}:{port}") as e:
            call()
        assert "\n" not in str(e.value)


def test_a_replica_knows_the_address_that_its_controller_sees(meeting: Rendezvous) -> None:
    assert local_address(HOST, meeting.port) == HOST

"""What exceptions become, and what of them is logged."""

from __future__ import annotations

import logging

import pytest
from aiohttp import ClientConnectionResetError

from minserve.server.errors import HttpError, error_body, to_http_error


def test_a_client_that_leaves_is_no_mistake_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        to_http_error(ClientConnectionResetError("Cannot write to closing transport"))
        assert caplog.records == []
        to_http_error(ConnectionResetError("of the server's own"))
        assert len(caplog.records) == 1


def test_what_a_client_has_chosen_does_not_make_an_error_long() -> None:
    error = error_body(HttpError(404, "x" * 10**6, param="y" * 10**6))["error"]
    assert len(error["message"]) <= 1000
    assert len(error["param"]) <= 200

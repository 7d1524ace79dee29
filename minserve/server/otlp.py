"""The exporter of spans over OTLP/HTTP: the SDK's, with one warning where it cannot send.

Imports OpenTelemetry, which is an extra: only `minserve.server.tracing` imports this module.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

# The path of traces where an endpoint has none.
TRACES_PATH = "/v1/traces"
# They have a line for each try and each lost span.
_SDK_LOGS = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")


class OneWarning(SpanExporter):
    """An exporter that warns once when spans are lost, and says when they are sent again.

    Args:
        inner: the exporter that sends them.
    """

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._num_lost = 0
        self._why = _LastWords()
        for name in _SDK_LOGS:
            sdk = logging.getLogger(name)
            sdk.propagate = False
            sdk.addHandler(self._why)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; called by the SDK's thread."""
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._num_lost:
                logger.warning(
                    "traces cannot be sent, and are lost until that works again: %s",
                    self._why.text or "no reason is known",
                )
            self._num_lost += len(spans)
        elif self._num_lost:
            logger.warning("traces are sent again; %d spans or more were lost", self._num_lost)
            self._num_lost = 0
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._inner.shutdown()
        for name in _SDK_LOGS:
            logging.getLogger(name).removeHandler(self._why)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return whether nothing is held back."""
        return self._inner.force_flush(timeout_millis)


class _LastWords(logging.Handler):
    """Keeps the newest message of the SDK's, which says why something failed."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def make_exporter(endpoint: str | None) -> OneWarning:
    """Return the exporter to a collector.

    Args:
        endpoint: its URL; without a path, that of traces is added. ``None`` takes the SDK's variables.
    """
    if endpoint is not None and urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + TRACES_PATH
    return OneWarning(OTLPSpanExporter(endpoint))

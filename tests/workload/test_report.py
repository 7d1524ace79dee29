"""The arithmetic of reports: shares, percentiles, goodput, JSON and the table."""

from __future__ import annotations

import json
import math

import pytest

from minserve.workload.report import Report, percentile, share
from minserve.workload.verdict import Cause, Verdict


def verdict(cause: Cause | None = None, name: str = "chatbot", **fields: object) -> Verdict:
    known = {"arrival_s": 0.0, "attained_mean": cause is None, "output_tokens": 10,
             "ttft_s": 0.1, "tpot_s": 0.05}  # fmt: skip
    return Verdict(name=name, cause=cause, **{**known, **fields})


RUN = [
    *[verdict() for _ in range(5)],
    verdict(Cause.LATE_TPOT, attained_mean=True, tpot_s=0.2),
    verdict(Cause.LATE_TTFT, ttft_s=3.0, best_effort=True),
    verdict(Cause.REJECTED, "coding", ttft_s=None, tpot_s=None, output_tokens=0),
    verdict(Cause.NOT_SENT, "coding", ttft_s=None, tpot_s=None, output_tokens=0),
    verdict(None, "coding", output_tokens=1, tpot_s=None),
]


def test_the_denominator_is_every_request_offered() -> None:
    report = Report.of(RUN, 20.0)
    assert report.attainment == 0.6
    assert report.attainment_mean == 0.7
    assert report.classes["chatbot"].attainment == 5 / 7
    assert report.classes["coding"].attainment == 1 / 3
    assert sum(part.offered for part in report.classes.values()) == report.total.offered == 10


def test_goodput_counts_attained_requests_and_their_tokens_alone() -> None:
    report = Report.of(RUN, 20.0)
    assert (report.rate, report.goodput, report.goodput_tokens) == (0.5, 0.3, 51 / 20)


def test_misses_are_counted_by_cause_and_best_effort_beside_them() -> None:
    total = Report.of(RUN, 20.0).total
    assert sum(total.misses.values()) == total.offered - total.attained == 4
    assert total.misses[Cause.NOT_SENT] == 1
    assert Cause.FAILED not in total.misses
    assert total.best_effort == 1


def test_requests_without_a_token_waited_for_ever_and_have_no_pace() -> None:
    report = Report.of(RUN, 20.0)
    assert report.total.ttft_s.p50 == 0.1
    assert report.total.ttft_s.p90 == report.total.ttft_s.p99 == math.inf
    assert (report.total.tpot_s.p50, report.total.tpot_s.p99) == (0.05, 0.2)


def test_json_is_in_milliseconds_and_has_no_infinity() -> None:
    found = json.loads(json.dumps(Report.of(RUN, 20.0).to_dict(), allow_nan=False))
    assert found["attainment"] == 0.6
    assert found["ttft_ms"] == {"p50": 100.0, "p90": None, "p99": None}
    assert found["tpot_ms"]["p99"] == 200.0
    assert found["misses"] == {"late_ttft": 1, "late_tpot": 1, "late_finish": 0, "rejected": 1,
                               "failed": 0, "unanswered": 0, "not_sent": 1}  # fmt: skip
    assert found["classes"]["coding"]["attained"] == 1
    assert found["send_lag_ms"]["p99"] == 0.0


def test_a_run_without_requests_has_no_shares() -> None:
    report = Report.of([], 0.0)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["attainment"] is found["goodput"] is found["ttft_ms"]["p50"] is None
    assert math.isnan(report.attainment)
    assert "misses: none" in report.table()


def test_the_table_has_a_row_per_class_and_one_for_all() -> None:
    header, chatbot, coding, everything, misses, rates = Report.of(RUN, 20.0).table().splitlines()
    assert chatbot.split()[:4] == ["chatbot", "7", "71.4%", "85.7%"]
    assert coding.split()[:3] == ["coding", "3", "33.3%"]
    assert everything.split()[:5] == ["all", "10", "60.0%", "70.0%", "100.0"]
    assert "never" in everything
    assert len(header) == len(chatbot) == len(coding) == len(everything)
    assert "1 late first token, 1 late token, 1 rejected, 1 not sent; best effort: 1" in misses
    assert "0.5 requests/s for 20.0 s" in rates
    assert "goodput 0.3 requests/s, 2.55 output tokens/s" in rates


def test_a_single_class_is_not_said_twice() -> None:
    assert len(Report.of(RUN[:5], 20.0).table().splitlines()) == 4


def test_percentiles_are_values_that_occurred() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.99) == 5.0
    assert percentile([*values, math.inf], 0.99) == math.inf
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize(("flags", "expected"), [([True, False], 0.5), ([True], 1.0)])
def test_a_share_is_of_all_flags(flags: list[bool], expected: float) -> None:
    assert share(flags) == expected
    assert math.isnan(share([]))

"""A user's trace: read as it is, or refused with the line and the value at fault."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from minserve.errors import WorkloadError
from minserve.slo.objectives import preset_classes
from minserve.workload.traces import TraceRequest, read_trace, to_workload

HEADER = "arrival_s,prompt_tokens,output_tokens"


def write(folder: Path, *lines: str, name: str = "trace.csv") -> Path:
    file = folder / name
    text = "\n".join(lines) + "\n"
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_trace_is_read(tmp_path: Path, name: str) -> None:
    file = write(
        tmp_path,
        "class, output_tokens, extra, arrival_s, prompt_tokens",
        "coding,7,x,0.5,100",
        "",
        ",8.0,y,0.5,200",
        name=name,
    )
    assert read_trace(file) == [
        TraceRequest(0.5, 100, 7, "coding", 2),
        TraceRequest(0.5, 200, 8, "", 4),
    ]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    file = tmp_path / "excel.csv"
    file.write_text(f"{HEADER}\r\n0,1,1\r\n", encoding="utf-8-sig")
    assert len(read_trace(file)) == 1


def test_shipped_traces_go_by_their_names() -> None:
    assert len(read_trace("azure2023_conv")) == 19_366
    assert len(read_trace("azure2023_code")) == 8_819


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "no column arrival_s, prompt_tokens, output_tokens, found nothing"),
        ((HEADER,), "has no rows"),
        (
            ("time,prompt_tokens,class",),
            "line 1: no column arrival_s, output_tokens, found time, prompt_tokens, class; "
            "the columns are arrival_s, prompt_tokens, output_tokens and, where wanted, class",
        ),
        ((HEADER, "0,1,1", "soon,1,1"), "line 3: arrival_s must be .* not 'soon'"),
        ((HEADER, "nan,1,1"), "line 2: arrival_s must be .* not 'nan'"),
        ((HEADER, "inf,1,1"), "line 2: arrival_s must be .* not 'inf'"),
        ((HEADER, "-1,1,1"), "line 2: arrival_s must be .* not '-1'"),
        ((HEADER, "2,1,1", "1,1,1"), "line 3: arrival_s 1 is before the row above it .*sort"),
        ((HEADER, "0,0,1"), "line 2: prompt_tokens must be a whole number from 1 .* not '0'"),
        ((HEADER, "0,1,-3"), "line 2: output_tokens must be .* not '-3'"),
        ((HEADER, "0,1,1.5"), "line 2: output_tokens must be .* not '1.5'"),
        ((HEADER, "0,many,1"), "line 2: prompt_tokens must be .* not 'many'"),
        ((HEADER, "0,nan,1"), "line 2: prompt_tokens must be .* not 'nan'"),
        ((HEADER, "0,1e99,1"), "line 2: prompt_tokens must be .* not '1e99'"),
        ((HEADER, "0,,1"), "line 2: prompt_tokens must be .* not ''"),
        ((HEADER, "0,1"), "line 2: 2 values for 3 columns"),
        ((HEADER, "0,1,1,1"), "line 2: 4 values for 3 columns"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(
    tmp_path: Path, lines: tuple[str, ...], said: str
) -> None:
    file = write(tmp_path, *lines) if lines else tmp_path / "trace.csv"
    file.touch()
    with pytest.raises(WorkloadError, match=said) as caught:
        read_trace(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"no trace .*none.csv: .*azure2023_code"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(tmp_path)
    plain = write(tmp_path, HEADER, "0,1,1").rename(tmp_path / "plain.csv.gz")
    damaged = write(tmp_path, HEADER, *["0,1,1"] * 500, name="damaged.csv.gz")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:20] + b"\xff" * 8 + whole[28:])
    short = tmp_path / "short.csv.gz"
    short.write_bytes(whole[: len(whole) // 2])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    for file in (plain, damaged, short, binary):
        with pytest.raises(WorkloadError, match=file.name):
            read_trace(file)


ROWS = [
    TraceRequest(10.0, 5, 6, "", 2),
    TraceRequest(12.0, 50, 60, "coding", 3),
    TraceRequest(20.0, 500, 600, "", 4),
]


def test_rows_become_requests_of_their_classes() -> None:
    workload = to_workload(ROWS, preset_classes(), "chatbot")
    assert [one.arrival_s for one in workload] == [0.0, 2.0, 10.0]
    turns = [one.turns[0] for one in workload]
    assert [turn.slo.name for turn in turns] == ["chatbot", "coding", "chatbot"]
    assert [(turn.prompt_tokens, turn.output_tokens) for turn in turns] == [
        (5, 6),
        (50, 60),
        (500, 600),
    ]


def test_a_trace_is_rescaled_to_a_rate() -> None:
    workload = to_workload(ROWS, preset_classes(), "chatbot", rate=3.0)
    # Three requests in one second, with the gap that follows the last.
    assert [one.arrival_s for one in workload] == pytest.approx([0.0, 2 / 15, 2 / 3])
    one = to_workload(ROWS[:1], preset_classes(), "chatbot", rate=3.0)
    assert one[0].arrival_s == 0.0


def test_a_workload_that_cannot_be_made_is_refused() -> None:
    presets = preset_classes()
    with pytest.raises(WorkloadError, match=r"line 3: no class 'coding'; there are chatbot$"):
        to_workload(ROWS, {"chatbot": presets["chatbot"]}, "chatbot")
    with pytest.raises(
        WorkloadError, match=r"line 3: 50 prompt and 60 output .*100; .*2 of 3 rows"
    ):
        to_workload(ROWS, presets, "chatbot", max_model_len=100)
    assert to_workload(ROWS, presets, "chatbot", max_model_len=1100)
    for rate in (0.0, float("nan"), float("inf")):
        with pytest.raises(WorkloadError, match="rate"):
            to_workload(ROWS, presets, "chatbot", rate=rate)
    with pytest.raises(WorkloadError, match="at once"):
        to_workload([ROWS[0], ROWS[0]], presets, "chatbot", rate=1.0)

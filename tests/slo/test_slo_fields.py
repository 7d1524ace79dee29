"""SLOs as people write them: every field arrives, every bad one is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.errors import ConfigError, InvalidSLOError
from minserve.slo.objectives import SLO, DecodeStage, OnUnattainable, preset_classes
from minserve.slo.slo_fields import find_class, load_classes, parse_slo, seconds

CLASSES = {
    **preset_classes(),
    "three": SLO(
        stages=[DecodeStage(tpot=1.0, tokens=5), DecodeStage(until="x"), DecodeStage()],
        name="three",
    ),
}
MARKER = "</think>"


def parse(values: dict[str, Any], marker: str | None = MARKER, **options: Any) -> SLO:
    return parse_slo(values, where="slo", classes=CLASSES, thinking_marker=marker, **options)


def refused(values: dict[str, Any], **options: Any) -> str | None:
    """The field that is blamed."""
    with pytest.raises(InvalidSLOError) as caught:
        parse(values, **options)
    assert len(str(caught.value)) < 300
    return caught.value.param


# --- what is taken ---


@pytest.mark.parametrize(
    ("values", "slo"),
    [
        ({"ttft_ms": 250}, SLO(ttft=0.25)),
        ({"ttft_slowdown": 3, "tpot_ms": 62.5}, SLO(ttft_slowdown=3, tpot=0.0625)),
        ({"tpot_slowdown": 1}, SLO(tpot_slowdown=1)),
        (
            {"tpot_ms": 100, "thinking_tpot_ms": 50},
            SLO(stages=[DecodeStage(tpot=0.05, until=MARKER), DecodeStage(tpot=0.1)]),
        ),
        (
            {"thinking_tpot_slowdown": 2},
            SLO(stages=[DecodeStage(tpot_slowdown=2, until=MARKER), DecodeStage()]),
        ),
        (
            {
                "ttft_ms": 1000,
                "expected_output_tokens": 40,
                "on_unattainable": "reject",
                "value": 2.5,
                "tpot_ms": None,
                "class": None,
            },
            SLO(
                ttft=1.0,
                expected_output_tokens=40,
                on_unattainable=OnUnattainable.REJECT,
                value=2.5,
            ),
        ),
        ({"class": "coding"}, CLASSES["coding"]),
        ({"class": "reasoning"}, CLASSES["reasoning"]),
    ],
)
def test_fields_become_an_slo(values: dict[str, Any], slo: SLO) -> None:
    assert parse(values) == slo


def test_a_class_keeps_what_the_fields_do_not_replace() -> None:
    strict = parse({"class": "coding", "on_unattainable": "reject", "value": 3})
    assert strict.on_unattainable is OnUnattainable.REJECT
    assert (strict.ttft_slowdown, strict.tpot, strict.value) == (5, 0.05, 3)
    assert strict.name == "coding"
    quick = parse({"class": "coding", "ttft_ms": 100})
    assert quick == SLO(ttft=0.1, tpot=0.05)  # and the name says that it is not the class's


def test_paces_replace_those_of_a_classs_stages() -> None:
    thinking, answer = CLASSES["reasoning"].stages
    assert parse({"class": "reasoning", "tpot_ms": 200}).stages == (
        thinking,
        DecodeStage(tpot=0.2),
    )
    # The class brings its own marker, whatever the model's is.
    slower = parse({"class": "reasoning", "thinking_tpot_slowdown": 4}, marker=None)
    assert slower.stages == (DecodeStage(tpot_slowdown=4, until="</think>"), answer)
    assert parse({"class": "coding", "thinking_tpot_ms": 20}).stages == (
        DecodeStage(tpot=0.02, until=MARKER),
        DecodeStage(tpot=0.05),
    )
    assert parse({"class": "three", "tpot_ms": 5}).stages == (
        *CLASSES["three"].stages[:2],
        DecodeStage(tpot=0.005),
    )


def test_a_base_is_refined_unless_a_class_is_named() -> None:
    base = SLO(ttft=9.0, tpot=9.0, name="house")
    assert parse({"tpot_ms": 50}, base=base) == SLO(ttft=9.0, tpot=0.05)
    assert parse({"value": 2}, base=base) == SLO(ttft=9.0, tpot=9.0, value=2, name="house")
    assert parse({"class": "coding"}, base=base) == CLASSES["coding"]


# --- what is refused ---

NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "100", "", [100], {"ms": 100}]
NO_MS = [*NO_NUMBERS, 0, -1, -0.0, 5e-324, 1e308, 10**400, 10**5000, 1e9 + 1]
NO_SLOWDOWN = [*NO_NUMBERS, 0, -1, 0.5, 1e308, 10**400, 10**5000]
NO_COUNT = [*NO_NUMBERS, 0, -1, 1.0, 1e308, 2**31, 10**400, 10**5000]
NO_VALUE = [*NO_NUMBERS, 0, -1, 1e308, 10**400, 10**5000]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ttft_ms", NO_MS),
        ("tpot_ms", NO_MS),
        ("thinking_tpot_ms", NO_MS),
        ("ttft_slowdown", NO_SLOWDOWN),
        ("tpot_slowdown", NO_SLOWDOWN),
        ("thinking_tpot_slowdown", NO_SLOWDOWN),
        ("expected_output_tokens", NO_COUNT),
        ("value", NO_VALUE),
        ("on_unattainable", [1, True, "", "REJECT", "drop", [], {}, ["reject"]]),
        ("class", [1, True, "", "Coding", [], {}, "x" * 10]),
        ("stages", [[{"tpot_ms": 50}], 1, "reasoning"]),
        ("ttft", [1.0]),
        ("weight", [1.0]),
        ("name", ["coding"]),
    ],
)
def test_a_bad_value_or_an_unknown_field_is_named(field: str, values: list[Any]) -> None:
    for beside in ({}, {"class": "coding"}, {"ttft_ms": 5}):
        for value in values:
            assert refused({**beside, field: value}) == f"slo.{field}", value


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({}, "slo"),
        ({"value": 2}, "slo"),
        ({"on_unattainable": "reject"}, "slo"),
        ({"ttft_ms": None}, "slo"),
        ({"ttft_ms": 5, "ttft_slowdown": 5}, "slo.ttft_slowdown"),
        ({"tpot_ms": 5, "tpot_slowdown": 5}, "slo.tpot_slowdown"),
        (
            {"thinking_tpot_ms": 5, "thinking_tpot_slowdown": 5},
            "slo.thinking_tpot_slowdown",
        ),
        ({"class": "three", "thinking_tpot_slowdown": 5}, "slo.thinking_tpot_slowdown"),
    ],
)
def test_what_contradicts_itself_or_promises_nothing_is_refused(
    values: dict[str, Any], param: str
) -> None:
    assert refused(values) == param


@pytest.mark.parametrize("field", ["thinking_tpot_ms", "thinking_tpot_slowdown"])
def test_thinking_needs_a_marker(field: str) -> None:
    assert refused({field: 50}, marker=None) == f"slo.{field}"
    assert refused({field: 50, "class": "coding"}, marker=None) == f"slo.{field}"


def test_the_errors_speak_in_milliseconds() -> None:
    with pytest.raises(InvalidSLOError, match=r"slo\.ttft_ms: .*milliseconds"):
        parse({"ttft_ms": 0})
    with pytest.raises(InvalidSLOError, match=r"x-slo-tpot-ms: .*milliseconds"):
        seconds(-1.0, "x-slo-tpot-ms")


def test_an_unknown_class_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidSLOError, match=r"known: batch, chatbot, coding, .*tool_loop"):
        find_class("talk", CLASSES, "slo")
    with pytest.raises(InvalidSLOError, match="known: none"):
        find_class("talk", {}, "slo")


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["coding", "reasoning", "three", "reject", "best_effort", "x"])
    | st.lists(st.integers(), max_size=2)
)
NAMES = st.sampled_from(
    [
        "class",
        "ttft_ms",
        "ttft_slowdown",
        "tpot_ms",
        "tpot_slowdown",
        "thinking_tpot_ms",
        "thinking_tpot_slowdown",
        "expected_output_tokens",
        "on_unattainable",
        "value",
        "other",
    ]
)


@settings(max_examples=300, derandomize=True)
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.none() | st.just(MARKER))
def test_any_fields_are_parsed_or_refused_but_never_crash(
    values: dict[str, Any], marker: str | None
) -> None:
    try:
        slo, blamed = parse(values, marker=marker), "slo"
    except InvalidSLOError as error:
        slo, blamed = None, error.param or ""
    assert slo is None or slo.promises_anything
    assert blamed == "slo" or blamed.removeprefix("slo.") in values


# --- classes files ---


def write(folder: Path, text: str) -> Path:
    path = folder / "classes.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_adds_to_the_presets_and_replaces_them(tmp_path: Path) -> None:
    classes = load_classes(
        write(
            tmp_path,
            """
            [support]
            ttft_ms = 800
            stages = [{tpot_ms = 50, until = "</think>"}, {tpot_slowdown = 4, tokens = 9}, {}]

            [support_strict]
            class = "support"
            on_unattainable = "reject"

            [coding]
            class = "coding"
            tpot_ms = 40

            ["naïve 東京"]
            tpot_slowdown = 2
            value = 0.5
            expected_output_tokens = 12
            """,
        )
    )
    presets = preset_classes()
    assert set(classes) == {*presets, "support", "support_strict", "naïve 東京"}
    assert all(slo.name == name for name, slo in classes.items())
    stages = (
        DecodeStage(tpot=0.05, until="</think>"),
        DecodeStage(tpot_slowdown=4, tokens=9),
        DecodeStage(),
    )
    assert classes["support"] == SLO(ttft=0.8, stages=stages, name="support")
    assert classes["support_strict"] == SLO(
        ttft=0.8, stages=stages, name="support_strict", on_unattainable=OnUnattainable.REJECT
    )
    assert classes["coding"] == SLO(ttft_slowdown=5, tpot=0.04, name="coding")
    assert classes["naïve 東京"] == SLO(
        tpot_slowdown=2, value=0.5, expected_output_tokens=12, name="naïve 東京"
    )
    assert classes["chatbot"] == presets["chatbot"]
    assert "support" not in preset_classes()


def test_an_empty_file_leaves_the_presets(tmp_path: Path) -> None:
    assert load_classes(write(tmp_path, "")) == preset_classes()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[talk]\nttft_ms = 0", r"talk\.ttft_ms"),
        ("[talk]\nttft_ms = nan", r"talk\.ttft_ms"),
        ("[talk]\ntpot_ms = inf", r"talk\.tpot_ms"),
        ("[talk]\ntpot_ms = true", r"talk\.tpot_ms"),
        ("[talk]\ntpot_ms = 2020-01-01", r"talk\.tpot_ms"),
        ("[talk]\ntpot_ms = 5\ntpto_ms = 5", r"talk\.tpto_ms"),
        ("[talk]\nclass = 'later'\n[later]\ntpot_ms = 5", r"talk\.class"),
        ("[talk]\nvalue = 5", "talk: an SLO needs an objective"),
        ("[talk]", "talk: an SLO needs an objective"),
        ("[talk]\nthinking_tpot_ms = 5", r"talk\.thinking_tpot_ms.*stages"),
        ("[talk]\nstages = []", r"talk\.stages"),
        ("[talk]\nstages = 5", r"talk\.stages"),
        ("[talk]\nstages = [5]", r"talk\.stages"),
        ("[talk]\nstages = [{}]", "talk: an SLO needs an objective"),
        ("[talk]\nstages = [{tpot_ms = 5, tokens = 1}]", "talk: the last stage"),
        ("[talk]\nstages = [{tpot_ms = 5}, {tpot_ms = 5}]", r"talk: stages\[0\] has no end"),
        ("[talk]\nstages = [{tpot_ms = -5}]", r"talk\.stages\[0\]\.tpot_ms"),
        ("[talk]\nstages = [{tpot = 5}]", r"talk\.stages\[0\]\.tpot:"),
        ("[talk]\nstages = [{tokens = 5, until = 'x'}, {}]", r"talk\.stages\[0\]: give until"),
        ("[talk]\nstages = [{tokens = 0, tpot_ms = 5}, {}]", r"talk\.stages\[0\]: tokens"),
        ("[talk]\nstages = [{until = 5, tpot_ms = 5}, {}]", r"talk\.stages\[0\]: until"),
        ("[talk]\ntpot_ms = 5\nstages = [{tpot_ms = 5}]", r"talk\.stages: contradicts tpot_ms"),
        ("ttft_ms = 5", "ttft_ms must be a table"),
        ("[custom]\ntpot_ms = 5", "cannot be called 'custom'"),
        ("['']\ntpot_ms = 5", "cannot be called ''"),
        ("[talk", "not TOML"),
        ("[talk]\nttft_ms = 1\nttft_ms = 2", "not TOML"),
        ("[talk]\nttft_ms = " + "9" * 5000, "not TOML"),
    ],
)
def test_a_bad_file_is_refused_by_file_class_and_field(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_classes(write(tmp_path, text))
    assert "classes.toml" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_classes(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_classes(tmp_path)
    (tmp_path / "latin.toml").write_bytes("[é]\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.toml is not TOML"):
        load_classes(tmp_path / "latin.toml")
